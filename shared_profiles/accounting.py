"""FLOP accounting: how many query-key pairs a head of each category computes, and of what kind.

A pair costs `4 * head_dim` FLOPs (two for the score, two for the output), so pairs are the unit everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared_profiles.categories import Category
from shared_profiles.layout import Layout, concatenated_ranges
from shared_profiles.plan import packed_positions
from shared_profiles.template import SinkTemplate


@dataclass(frozen=True)
class PairCounts:
    """Query-key pairs of one or more heads, split by what looks at what.

    Attributes:
        text_rows: queries that are text or delimiters, with any key.
        image_text: image tokens looking at text.
        intra: image tokens looking at their own image, its start delimiter included.
        inter: image tokens looking at other images, delimiters included.
    """

    text_rows: int
    image_text: int
    intra: int
    inter: int

    @property
    def total(self) -> int:
        """All pairs."""
        return self.text_rows + self.image_text + self.intra + self.inter

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@lru_cache(maxsize=256)
def count_pairs(layout: Layout, category: Category, template: SinkTemplate, *, window: int | None = None) -> PairCounts:
    """The pairs that one head of a category keeps on a prompt; `DENSE` gives the model's own count.

    Counted row by row from the definition's intervals, in O(N) memory.

    Raises:
        ValueError: what is given is no category.
    """
    category = Category(category)  # equal numbers share what the cache keeps
    first_seen = (lambda rows, lo: lo) if window is None else (lambda rows, lo: np.maximum(lo, rows - window + 1))
    textual = layout.textual_rows
    text_rows = int((textual + 1 - first_seen(textual, layout.start)).sum())

    begin, first, last, _ = np.repeat(layout.images, layout.images[:, 2] - layout.images[:, 1], axis=0).T
    rows = concatenated_ranges(layout.images[:, 1], layout.images[:, 2])
    match category:
        case Category.SINK:
            lo = first + (rows - first) // template.local_block * template.local_block
            end = np.minimum(lo + template.local_block, last)
        case _:
            lo, end = begin, last
    hi = end if layout.bidirectional else rows + 1

    def seen(lo: np.ndarray | int, hi: np.ndarray) -> np.ndarray:
        """Keys of `[lo, hi)` inside each row's window."""
        return np.maximum(hi - first_seen(rows, lo), 0)

    def seen_of(positions: np.ndarray, lo: np.ndarray | int, hi: np.ndarray) -> np.ndarray:
        """How many of the given ascending positions lie in `[lo, hi)` and inside each row's window."""
        return np.maximum(np.searchsorted(positions, hi) - np.searchsorted(positions, first_seen(rows, lo)), 0)

    intra = seen(lo, hi)
    image_text = seen_of(layout.text, 0, begin)
    if category is Category.DENSE:
        inter = seen(layout.start, begin) - image_text
    elif category is Category.INTRA_IMAGE:
        inter = np.zeros(1, dtype=np.int64)
    else:
        sinks = np.setdiff1d(packed_positions(layout, category, template), layout.text, assume_unique=True)
        inter = seen_of(sinks, 0, begin)
        intra = intra + seen_of(sinks, begin, lo)  # under SINK, its own sinks before the local block
    return PairCounts(text_rows, int(image_text.sum()), int(intra.sum()), int(inter.sum()))


def count_layer_pairs(layout: Layout, template: SinkTemplate, windows: Sequence[int | None]) -> np.ndarray:
    """The pairs that one head of each category keeps in each layer: `[4, L]` int64, axis 0 is `Category`."""
    counts = [[count_pairs(layout, c, template, window=window).total for window in windows] for c in Category]
    return np.array(counts, dtype=np.int64)


def count_model_pairs(
    layout: Layout, categories: np.ndarray, template: SinkTemplate, *, windows: Sequence[int | None] | None = None
) -> PairCounts:
    """The pairs of a whole model: the sum over layers and query heads.

    Args:
        layout: the prompt.
        categories: `[L, H]` integers, indices into `Category`.
        template: sinks and local blocks.
        windows: the sliding window of each layer, None where a layer has none. Default: none anywhere.
    """
    total = PairCounts(0, 0, 0, 0)
    for layer, window in zip(categories, windows or [None] * len(categories), strict=True):
        for value, n_heads in zip(*np.unique(layer, return_counts=True), strict=True):
            one = count_pairs(layout, Category(value), template, window=window)
            total += PairCounts(*(getattr(one, name) * int(n_heads) for name in PairCounts.__dataclass_fields__))
    return total
