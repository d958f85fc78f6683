"""The processes that share one calibration: how many, which one this is, and how they tell each other what they have.

    rank 0:  prompts 0, 2, 4, ...  ──┐
    rank 1:  prompts 1, 3, 5, ...  ──┴─► gather ──► the same on all of them

Every process runs the same program and is given the same prompts; what differs is whose turn a prompt is.
"""

from __future__ import annotations


class Processes:
    """One process alone; `torch_blindsight.processes` has those of a torch process group.

    Attributes:
        rank: number of this process, from 0.
        n: how many there are.
    """

    rank = 0
    n = 1

    def is_mine(self, turn: int) -> bool:
        """Whether this process takes the piece of work of that number."""
        return turn % self.n == self.rank

    def gather[T](self, value: T) -> list[T]:
        """The values of all processes by rank, the same list on each; all of them must call it."""
        return [value]


ALONE = Processes()
