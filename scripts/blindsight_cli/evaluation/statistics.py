"""Statistics of two answers to the same questions: right or wrong, in pairs.

                sparse right   sparse wrong
dense right     both           only_dense
dense wrong     only_sparse    neither
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""

INTERVAL = "Newcombe 1998, method 10 (square-and-add of Wilson scores with a corrected phi)"
"""What `PairedCounts.interval` is, for result files."""


@dataclass(frozen=True)
class PairedCounts:
    """How many questions two arms got right, together and alone.

    Attributes:
        both: both right.
        only_dense: dense right, sparse wrong.
        only_sparse: dense wrong, sparse right.
        neither: both wrong.

    Raises:
        ValueError: a count is negative, or all are zero.
    """

    both: int
    only_dense: int
    only_sparse: int
    neither: int

    def __post_init__(self) -> None:
        counts = (self.both, self.only_dense, self.only_sparse, self.neither)
        if min(counts) < 0 or sum(counts) == 0:
            raise ValueError(f"counts of questions must be at least 0, and one of them positive. Got {counts}.")

    @property
    def n(self) -> int:
        """All questions."""
        return self.both + self.only_dense + self.only_sparse + self.neither

    @property
    def dense_right(self) -> int:
        """Questions that dense got right."""
        return self.both + self.only_dense

    @property
    def sparse_right(self) -> int:
        """Questions that sparse got right."""
        return self.both + self.only_sparse

    @property
    def difference(self) -> float:
        """Accuracy of sparse minus that of dense."""
        return (self.only_sparse - self.only_dense) / self.n

    def interval(self, z: float = Z_95) -> tuple[float, float]:
        """A confidence interval for the difference.

        With `p` each arm's accuracy, `(l, u)` its Wilson interval and `phi` the correlation of the pairs:

            lower = d - sqrt((ps - ls)^2 - 2 phi (ps - ls)(ud - pd) + (ud - pd)^2)
            upper = d + sqrt((us - ps)^2 - 2 phi (us - ps)(pd - ld) + (pd - ld)^2)

        Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10. Unlike Wald's it is not empty where no answer
        differs, and never leaves [-1, 1].
        """
        pd, ps = self.dense_right / self.n, self.sparse_right / self.n
        (ld, ud), (ls, us) = wilson(self.dense_right, self.n, z), wilson(self.sparse_right, self.n, z)
        phi = self._phi()

        def add(a: float, b: float) -> float:
            return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

        return self.difference - add(ps - ls, ud - pd), self.difference + add(us - ps, pd - ld)

    def _phi(self) -> float:
        """Correlation of the pairs; a positive one is corrected for continuity by n/2, but not below 0."""
        margins = self.dense_right * (self.n - self.dense_right) * self.sparse_right * (self.n - self.sparse_right)
        if margins == 0:
            return 0.0
        product = self.both * self.neither - self.only_dense * self.only_sparse
        if product > 0:
            return max(product - self.n / 2, 0.0) / math.sqrt(margins)
        return product / math.sqrt(margins)

    def p_value(self) -> float:
        """Exact two-sided McNemar test of "neither arm is better": doubled binomial tail of the unequal pairs."""
        unequal, fewer = self.only_dense + self.only_sparse, min(self.only_dense, self.only_sparse)
        tail, term = 0, 1  # whole numbers: exact, and never too large to divide
        for k in range(fewer + 1):
            tail += term
            term = term * (unequal - k) // (k + 1)
        return min(1.0, 2 * tail / 2**unequal)


def wilson(right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion `right / n`.

    Raises:
        ValueError: not `0 <= right <= n` with a positive n.
    """
    if not (0 <= right <= n and n > 0):
        raise ValueError(f"a proportion must be of 0 <= right <= n, n > 0. Got {right} of {n}.")
    p, z2 = right / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the ends the formula gives 0 and 1 but for rounding.
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def least_agreement(agreement: float, n_prompts: int) -> float:
    """The lower end of the 95% interval of the share of prompts whose next token stays the same."""
    return wilson(round(agreement * n_prompts), n_prompts)[0]
