"""The path from all-Dense to all-cheapest: which head gives up what, and in which order.

    harm, pairs ──► per head: lower convex hull of (pairs, harm) ──► all hull edges, the gentlest first ──► Path

For any price `lambda` of a query-key pair the cheapest choice of a head is the category with the least `harm + lambda *
pairs`, whatever the other heads do. As the price rises, a head walks down its convex hull; so all choices that are best
at some price form one sequence, and a budget needs to search only that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared_profiles.categories import Category
from shared_profiles.summary import Summary


@dataclass(frozen=True)
class Move:
    """One edge of one head's hull: from the category it has to a cheaper one, for `slope` of harm per pair saved."""

    slope: float
    layer: int
    head: int
    category: Category


class Path:
    """The choices that are best at some price, from all-Dense (step 0) to all-cheapest (the last step).

    Args:
        harm: `[L, H, 4]`, the estimated harm of each category, at least 0, 0 for `DENSE`.
        pairs: `[4, L]`, query-key pairs that one head of each category computes.

    Raises:
        ValueError: shapes do not fit, or a value is not finite or below 0.
    """

    def __init__(self, harm: np.ndarray, pairs: np.ndarray) -> None:
        harm, pairs = np.asarray(harm, dtype=np.float64), np.asarray(pairs, dtype=np.float64)
        n = len(Category)
        if harm.ndim != 3 or harm.shape[2] != n or pairs.shape != (n, harm.shape[0]):
            raise ValueError(f"harm must have shape (L, H, 4) and pairs (4, L). Got {harm.shape} and {pairs.shape}.")
        if not all((np.isfinite(x) & (x >= 0)).all() for x in (harm, pairs)) or harm[..., Category.DENSE].any():
            raise ValueError("harm and pairs must be finite and at least 0, and the harm of DENSE 0. Got others.")
        self.pairs, self.shape = pairs, harm.shape[:2]
        moves = [
            Move(slope, layer, head, category)
            for layer, heads in enumerate(harm)
            for head, values in enumerate(heads)
            for slope, category in _hull(pairs[:, layer], values)
        ]
        # Slopes rise along a hull, and the sort is stable: no head's second move comes before its first.
        self.moves = tuple(sorted(moves, key=lambda move: move.slope))

    def __len__(self) -> int:
        """How many moves there are; steps go from 0 to this."""
        return len(self.moves)

    def categories(self, step: int) -> np.ndarray:
        """The choice after the first `step` moves: `[L, H]` int8."""
        chosen = np.full(self.shape, Category.DENSE, dtype=np.int8)
        for move in self.moves[:step]:
            chosen[move.layer, move.head] = move.category
        return chosen

    def kept(self, categories: np.ndarray) -> float:
        """The fraction of all dense pairs that a choice `[L, H]` computes."""
        return kept_pairs(categories, self.pairs)


def kept_pairs(categories: np.ndarray, pairs: np.ndarray) -> float:
    """The fraction of all dense pairs that categories `[L, H]` compute, `pairs` `[4, L]` being those of one head."""
    kept = pairs[categories, np.arange(len(categories))[:, None]].sum()
    return float(kept / (pairs[Category.DENSE].sum() * categories.shape[1]))


def path_of(summary: Summary, ranking: str) -> Path:
    """The path of a calibration's statistics.

    Raises:
        ValueError: the ranking was not measured.
    """
    return Path(summary.harm_of(ranking), pairs_of(summary))


def pairs_of(summary: Summary) -> np.ndarray:
    """`[4, L]`: `Summary.pairs` as one array."""
    return np.stack([summary.pairs[category] for category in Category])


def _hull(pairs: np.ndarray, harm: np.ndarray) -> list[tuple[float, Category]]:
    """The edges of one head's lower convex hull, from `DENSE` on: slope and category that each leads to.

    Of categories equal in slope, pairs and harm the latest wins, which sees more.
    """
    edges: list[tuple[float, Category]] = []
    at = Category.DENSE
    while True:
        cheaper = [c for c in Category if pairs[c] < pairs[at]]
        if not cheaper:
            return edges
        slopes = {c: float((harm[c] - harm[at]) / (pairs[at] - pairs[c])) for c in cheaper}
        # The gentlest edge; of several in one direction the longest, so that every corner is a real one.
        best = min(cheaper, key=lambda c: (slopes[c], pairs[c], -c))
        edges.append((max(slopes[best], edges[-1][0]) if edges else slopes[best], best))
        at = best
