"""The path from all-Dense to all-cheapest: which head gives up what, and in which order.

    harm, pairs ──► per head: lower convex hull of (pairs, harm) ──► its edges, the gentlest first
                ──► per layer: lower convex hull of (pairs of the busiest process, harm) ──► all edges, likewise

For any price `lambda` of a query-key pair the cheapest choice of a head is the category with the least `harm + lambda *
pairs`, whatever the other heads do. As the price rises, a head walks down its convex hull; so all choices that are best
at some price form one sequence, and a budget needs to search only that.

Where a layer's heads are split over processes, it takes as long as the busiest of them. A head that is made cheaper in
one process saves nothing until the others keep up, and what the busiest computes costs the others nothing: a layer's
choices are, for every number of pairs, what each process would choose that computes no more. Of a process only those
choices count that are best at some price for it alone, which falls a little short of the best of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shared_profiles.categories import Category
from shared_profiles.summary import Summary


@dataclass(frozen=True)
class Move:
    """One step of one layer: at least one head gets a cheaper category.

    Attributes:
        slope: harm per pair that the busiest process saves.
        layer: which.
        categories: `[H]` int8, those of all its heads from then on.
    """

    slope: float
    layer: int
    categories: np.ndarray


class Path:
    """The choices that are best at some price, from all-Dense (step 0) to all-cheapest (the last step).

    With several processes they are nearly the best, see above.

    Args:
        harm: `[L, H, 4]`, the estimated harm of each category, at least 0, 0 for `DENSE`.
        pairs: `[4, L]`, query-key pairs that one head of each category computes.
        processes: over how many the heads are split, each having `H // processes` neighbours.

    Raises:
        ValueError: shapes do not fit, a value is not finite or below 0, or the heads cannot be split so.
    """

    def __init__(self, harm: np.ndarray, pairs: np.ndarray, processes: int = 1) -> None:
        harm, pairs = np.asarray(harm, dtype=np.float64), np.asarray(pairs, dtype=np.float64)
        n = len(Category)
        if harm.ndim != 3 or harm.shape[2] != n or pairs.shape != (n, harm.shape[0]):
            raise ValueError(f"harm must have shape (L, H, 4) and pairs (4, L). Got {harm.shape} and {pairs.shape}.")
        if not all((np.isfinite(x) & (x >= 0)).all() for x in (harm, pairs)) or harm[..., Category.DENSE].any():
            raise ValueError("harm and pairs must be finite and at least 0, and the harm of DENSE 0. Got others.")
        check_split(harm.shape[1], processes)
        self.pairs, self.processes, self.shape = pairs, processes, harm.shape[:2]
        moves = [
            Move(slope, layer, categories)
            for layer, heads in enumerate(harm)
            for slope, categories in _layer_edges(pairs[:, layer], heads, processes)
        ]
        # Slopes rise along a hull, and the sort is stable: no layer's second move comes before its first.
        self.moves = tuple(sorted(moves, key=lambda move: move.slope))

    def __len__(self) -> int:
        """How many moves there are; steps go from 0 to this."""
        return len(self.moves)

    def categories(self, step: int) -> np.ndarray:
        """The choice after the first `step` moves: `[L, H]` int8."""
        chosen = np.full(self.shape, Category.DENSE, dtype=np.int8)
        for move in self.moves[:step]:
            chosen[move.layer] = move.categories
        return chosen

    def kept(self, categories: np.ndarray) -> float:
        """The fraction of its dense pairs that the busiest process computes of a choice `[L, H]`."""
        return kept_pairs(categories, self.pairs, self.processes)


def check_split(n_heads: int, processes: int) -> None:
    """Refuses to split heads over processes where they do not come out even.

    Raises:
        ValueError: they do not.
    """
    if n_heads % processes:
        raise ValueError(
            f"the number of processes must divide the query heads of a layer. Got {processes} for {n_heads} heads."
        )


def kept_pairs(categories: np.ndarray, pairs: np.ndarray, processes: int = 1) -> float:
    """The fraction of its dense pairs that the busiest of some processes computes, layer by layer.

    Args:
        categories: `[L, H]`.
        pairs: `[4, L]`, those of one head.
        processes: over how many the heads are split; 1 gives the fraction of all pairs.
    """
    n_layers, n_heads = categories.shape
    kept = pairs[categories, np.arange(n_layers)[:, None]].reshape(n_layers, processes, -1).sum(-1)
    return float(kept.max(-1).sum() / (pairs[Category.DENSE].sum() * (n_heads // processes)))


def path_of(summary: Summary, ranking: str, processes: int = 1) -> Path:
    """The path of a calibration's statistics.

    Raises:
        ValueError: the ranking was not measured, or the heads cannot be split over so many processes.
    """
    return Path(summary.harm_of(ranking), pairs_of(summary), processes)


def pairs_of(summary: Summary) -> np.ndarray:
    """`[4, L]`: `Summary.pairs` as one array."""
    return np.stack([summary.pairs[category] for category in Category])


@dataclass(frozen=True)
class _Choice:
    """What some heads of a layer may do: the pairs that the busiest process computes then, harm, and categories."""

    pairs: float
    harm: float
    categories: np.ndarray


def _layer_edges(pairs: np.ndarray, harm: np.ndarray, processes: int) -> Iterator[tuple[float, np.ndarray]]:
    """The edges of a layer's lower convex hull, from all-Dense on: slope and categories `[H]` that each leads to.

    Corners that lie on a straight line are all kept, so that a budget finds the nearest.

    Args:
        pairs: `[4]`, of one head.
        harm: `[H, 4]`.
        processes: over how many the heads are split.
    """
    walks = [_walk(pairs, part) for part in np.split(harm, processes)]
    choices = list(_abreast(walks))
    kept = np.array([choice.pairs for choice in choices])
    total = np.array([choice.harm for choice in choices])
    at, slope = 0, 0.0
    while at < len(choices) - 1:
        slopes = (total[at + 1 :] - total[at]) / (kept[at] - kept[at + 1 :])
        at += 1 + int((slopes <= slopes.min() * (1 + 1e-9)).argmax())
        slope = max(float(slopes.min()), slope)
        yield slope, choices[at].categories


def _abreast(walks: list[list[_Choice]]) -> Iterator[_Choice]:
    """For every number of pairs at which a process stands, falling: the first choice of each with no more."""
    at = [0] * len(walks)
    for level in sorted({choice.pairs for walk in walks for choice in walk}, reverse=True):
        for i, walk in enumerate(walks):
            while walk[at[i]].pairs > level:
                at[i] += 1
        chosen = [walk[step] for walk, step in zip(walks, at, strict=True)]
        harm = math.fsum(choice.harm for choice in chosen)
        yield _Choice(level, harm, np.concatenate([choice.categories for choice in chosen]))


def _walk(pairs: np.ndarray, harm: np.ndarray) -> list[_Choice]:
    """The choices of one process's heads `[n, 4]` that are best at some price, from all-Dense on."""
    n = np.arange(len(harm))
    edges = [(slope, head, category) for head in n for slope, category in _hull(pairs, harm[head])]
    categories = np.full(len(harm), Category.DENSE, dtype=np.int8)
    choices = [_Choice(math.fsum(pairs[categories]), 0.0, categories.copy())]
    for _, head, category in sorted(edges, key=lambda edge: edge[0]):
        categories[head] = category
        # Exact sums: equal choices of two processes are equally many pairs, in whatever order they were made.
        choices.append(_Choice(math.fsum(pairs[categories]), math.fsum(harm[n, categories]), categories.copy()))
    return choices


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
