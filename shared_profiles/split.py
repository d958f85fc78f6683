"""Two disjoint halves of a data set: prompts to calibrate on, and prompts held out to measure the budget on.

Which half a prompt falls in follows from its own content hash alone: not from its place, not from the others, not from
the machine. So a data set can grow, be dealt out or be resumed, and no prompt ever changes sides.
"""

from __future__ import annotations

import hashlib

from shared_profiles._values import is_number

HELD_OUT = 0.25
"""Share of the prompts that is held out unless said otherwise."""


class Split[P]:
    """Takes the held-out prompts of a data set aside.

    Args:
        share: the share of prompts to hold out, in (0, 1).

    Attributes:
        prompts: the held-out prompts by their digest, each once, in the order in which they came.

    Raises:
        ValueError: the share is out of its range.
    """

    def __init__(self, share: float = HELD_OUT) -> None:
        if not is_number(share) or not 0 < share < 1:
            raise ValueError(f"held_out must be a share of the prompts in (0, 1), or prompts. Got {share!r}.")
        self.share = float(share)
        self.prompts: dict[str, P] = {}

    @property
    def rule(self) -> str:
        """What decides which prompts are held out."""
        return f"a share of {self.share}"

    def claims(self, prompt_id: str) -> bool:
        """Whether a prompt is on the held-out side, wherever it may come from."""
        return is_held_out(prompt_id, self.share)

    def holds_out(self, prompt_id: str, prompt: P) -> bool:
        """Whether a prompt is held out; it is then kept in `prompts`."""
        if not self.claims(prompt_id):
            return False
        self.prompts.setdefault(prompt_id, prompt)
        return True


class Given[P](Split[P]):
    """Held-out prompts that the caller chose.

    Args:
        prompts: the held-out prompts by their digest.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, prompts: dict[str, P]) -> None:
        require_held_out(len(prompts), 0)
        self.prompts = prompts

    @property
    def rule(self) -> str:
        """See `Split`."""
        return " ".join(sorted(self.prompts))

    def claims(self, prompt_id: str) -> bool:
        """Whether a prompt is one of them."""
        return prompt_id in self.prompts

    def holds_out(self, prompt_id: str, prompt: P) -> bool:
        """Never: such a prompt must not come among those to calibrate on.

        Raises:
            ValueError: it does.
        """
        if self.claims(prompt_id):
            raise ValueError(
                f"held-out prompts must not be calibrated on. Got prompt {prompt_id} in both. Leave it out of one."
            )
        return False


def is_held_out(prompt_id: str, share: float) -> bool:
    """Whether the split of this share holds a prompt out."""
    number = int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big")
    return number < share * 2**64


def require_held_out(n_measured: int, n_all: int) -> None:
    """Refuses an empty held-out split.

    Raises:
        ValueError: no held-out prompt has two images.
    """
    if not n_measured:
        raise ValueError(
            f"the held-out split must have a prompt with at least two images. Got none ({n_all} prompts held out). "
            "Pass more prompts, a larger share, or held-out prompts of your own."
        )
