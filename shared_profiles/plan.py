"""The plan: all that a kernel is ever told about a prompt, as small integer arrays.

Every query tile reads exactly two things::

    packed keys   [t t t s s t s s t ...]     text (and sink) tokens gathered once per layer, in position order
                   ^packed_start  ^packed_stop
    ordinary keys [ . . . . . . . . . . . . ]
                              ^lo       ^hi   one contiguous range

A tile's rows all belong to one image, or are *gathered*: text and delimiter rows, few and long, packed into full
tiles wherever they stand. Row by row a kernel still applies the causal limit (or, in a bidirectional image, the
end of the range) and the sliding window; the tile's numbers bound them. Nothing here has S * S entries: 300K
tokens make about 2,500 tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared_profiles.categories import Category
from shared_profiles.layout import Layout
from shared_profiles.template import SinkTemplate


@dataclass(frozen=True, eq=False)
class Tiles:
    """Query tiles of image rows under one category, in prompt order. All arrays are `[n_tiles]` int64.

    Attributes:
        row_start, row_stop: the tile's query positions.
        lo, hi: its range of ordinary keys. Causal tiles see keys up to their own row; tiles of a bidirectional
            image all of `[lo, hi)`.
        packed_start, packed_stop: its slice of the packed keys of the category.
    """

    row_start: np.ndarray
    row_stop: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    packed_start: np.ndarray
    packed_stop: np.ndarray


def packed_positions(layout: Layout, category: Category, template: SinkTemplate) -> np.ndarray:
    """Positions of the packed keys of a category, ascending: text, text and sinks, or nothing for `DENSE`.

    Returns:
        `[P]` int64.

    Raises:
        ValueError: what is given is no category.
    """
    match Category(category):
        case Category.DENSE:
            return np.zeros(0, dtype=np.int64)
        case Category.INTRA_IMAGE:
            return layout.text
        case _:
            return np.union1d(layout.text, layout.sinks(template))


def image_tiles(
    layout: Layout,
    category: Category,
    template: SinkTemplate,
    packed: np.ndarray,
    *,
    tile_rows: int | None = None,
    window: int | None = None,
    q_start: int = 0,
) -> Tiles:
    """Cuts the image rows of a prompt into tiles; no tile straddles an image or, under `SINK`, a local block.

    Args:
        layout, category, template: what is asked for.
        packed: `packed_positions(layout, category, template)`.
        tile_rows: rows of a tile at most, counted from each image's first token. Default: as many as the category
            allows, i.e. one tile an image or local block.
        window: sliding window in tokens.
        q_start: position of the first query; the queries are all tokens from there on.
    """
    category = Category(category)
    begin, first, last, _ = (column[:, None] for column in layout.images.T)
    rows = tile_rows or int(max((last - first).max(initial=1), 1))
    if category is Category.SINK:
        rows = min(rows, template.local_block)
    low = np.maximum(first, q_start)
    k_low = (low - first) // rows
    n = np.where(last > low, -(-(last - first) // rows) - k_low, 0)[:, 0]  # tiles per image
    image = np.repeat(np.arange(len(n)), n)
    begin, first, last, low, k_low = (x[image, 0] for x in (begin, first, last, low, k_low))
    k = k_low + np.arange(len(image)) - np.repeat(np.cumsum(n) - n, n)
    row_start = np.maximum(first + k * rows, low)
    row_stop = np.minimum(first + (k + 1) * rows, last)

    match category:
        case Category.DENSE:
            lo, end = np.full_like(row_start, layout.start), last
        case Category.SINK:
            lo = first + (row_start - first) // template.local_block * template.local_block
            end = np.minimum(lo + template.local_block, last)
        case _:
            lo, end = begin, last
    hi = end if layout.bidirectional else row_stop
    packed_stop = np.searchsorted(packed, lo)
    packed_start = np.zeros_like(packed_stop)
    if window is not None:
        oldest = row_start - window + 1
        packed_start = np.minimum(np.searchsorted(packed, oldest), packed_stop)
        lo = np.maximum(lo, oldest)
    return Tiles(row_start, row_stop, lo, hi, packed_start, packed_stop)


@dataclass(frozen=True, eq=False)
class Plan:
    """The work list of one prompt for every category. Arrays are int32 and read-only.

    Tiles `[0, n_image_tiles)` are image tiles: rows `row_start .. row_start + n_rows`. The others are gathered: rows
    `gathered_rows[row_start .. row_start + n_rows]`. A gathered tile with a long range is there `n_parts` times, once
    per piece of its range; the pieces' outputs are merged by their log-sum-exp.

    Attributes:
        layout, template, tile_rows, window, q_start: what the plan was built from.
        row_start, n_rows: `[n_tiles]`.
        part, n_parts: `[n_tiles]`.
        lo, hi, packed_start, packed_stop: `[4, n_tiles]`, the first axis indexed by `Category`.
        gathered_rows: `[n_gathered]` positions of the text and delimiter rows.
        packed_text, packed_sinks: `[P]` positions of the packed keys of `INTRA_IMAGE`, and of the two sink categories.
    """

    layout: Layout
    template: SinkTemplate
    tile_rows: int
    window: int | None
    q_start: int
    n_image_tiles: int
    row_start: np.ndarray
    n_rows: np.ndarray
    part: np.ndarray
    n_parts: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    packed_start: np.ndarray
    packed_stop: np.ndarray
    gathered_rows: np.ndarray
    packed_text: np.ndarray
    packed_sinks: np.ndarray

    def packed(self, category: Category) -> np.ndarray:
        """Positions of the packed keys that a head of this category reads."""
        if (category := Category(category)) is Category.DENSE:
            return self.packed_text[:0]
        return self.packed_text if category is Category.INTRA_IMAGE else self.packed_sinks

    @property
    def gathered(self) -> np.ndarray:
        """Which tiles are gathered: `[n_tiles]` bool."""
        return np.arange(len(self.row_start)) >= self.n_image_tiles

    def row_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of every tile's first and last row: `[n_tiles]` int64 each."""
        first, last = self.row_start.astype(np.int64), self.row_start + self.n_rows - 1
        gathered = self.gathered
        if gathered.any():
            first[gathered] = self.gathered_rows[first[gathered]]
            last[gathered] = self.gathered_rows[last[gathered]]
        return first, last

    @property
    def n_keys(self) -> np.ndarray:
        """Keys that each tile visits under each category: `[4, n_tiles]` int32."""
        return self.hi - self.lo + self.packed_stop - self.packed_start

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))


@lru_cache(maxsize=64)
def build_plan(
    layout: Layout,
    template: SinkTemplate,
    *,
    tile_rows: int = 128,
    window: int | None = None,
    q_start: int = 0,
    max_keys: int | None = None,
) -> Plan:
    """Builds the plan of a prompt, or returns the one built before for an equal layout.

    Args:
        layout: the sequence.
        template: sinks and local blocks.
        tile_rows: query rows of a tile (BLOCK_Q); must divide `template.local_block`.
        window: sliding window in tokens.
        q_start: position of the first query; the queries are all tokens from there on.
        max_keys: longest key range of one gathered tile; longer ones are split. Default: never.

    Raises:
        ValueError: `tile_rows` does not divide the local block, or a number is out of range.
    """
    if tile_rows < 1 or template.local_block % tile_rows:
        raise ValueError(
            f"tile_rows must divide the template's local block of {template.local_block}, or a tile would straddle two "
            f"blocks. Got {tile_rows}."
        )
    if not 0 <= q_start <= layout.n_tokens:
        raise ValueError(f"0 <= q_start <= {layout.n_tokens} must hold. Got {q_start}.")
    for name, value in (("window", window), ("max_keys", max_keys)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None. Got {value}.")
    packed = [packed_positions(layout, category, template) for category in Category]
    tiles = [
        image_tiles(layout, c, template, packed[c], tile_rows=tile_rows, window=window, q_start=q_start)
        for c in Category
    ]
    rows = layout.textual_rows
    rows = rows[np.searchsorted(rows, q_start) :]
    gathered = _gathered_tiles(rows, layout.start, tile_rows, window, max_keys or layout.n_tokens)
    n_image_tiles = len(tiles[0].row_start)

    def stack(name: str) -> np.ndarray:  # [4, n_tiles]
        return np.stack([np.concatenate([getattr(t, name), gathered[name]]) for t in tiles])

    arrays = dict(
        row_start=np.concatenate([tiles[0].row_start, gathered["row_start"]]),
        n_rows=np.concatenate([tiles[0].row_stop - tiles[0].row_start, gathered["n_rows"]]),
        part=np.concatenate([np.zeros(n_image_tiles), gathered["part"]]),
        n_parts=np.concatenate([np.ones(n_image_tiles), gathered["n_parts"]]),
        **{name: stack(name) for name in ("lo", "hi", "packed_start", "packed_stop")},
        gathered_rows=rows,
        packed_text=packed[Category.INTRA_IMAGE],
        packed_sinks=packed[Category.SINK],
    )
    for name, array in arrays.items():
        arrays[name] = array.astype(np.int32)
        arrays[name].setflags(write=False)
    return Plan(layout, template, tile_rows, window, q_start, n_image_tiles, **arrays)


def _gathered_tiles(
    rows: np.ndarray, start: int, tile_rows: int, window: int | None, max_keys: int
) -> dict[str, np.ndarray]:
    """Tiles of the text and delimiter rows: full, in position order, long ranges cut into pieces."""
    row_start = np.arange(0, len(rows), tile_rows)
    n_rows = np.minimum(tile_rows, len(rows) - row_start)
    hi = rows[row_start + n_rows - 1] + 1
    lo = np.full_like(hi, start)
    if window is not None:
        lo = np.maximum(lo, rows[row_start] - window + 1)
    n_parts = -(-(hi - lo) // max_keys)
    tile = np.repeat(np.arange(len(hi)), n_parts)
    part = np.arange(len(tile)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    lo = lo[tile] + part * max_keys
    nothing = np.zeros_like(tile)
    return dict(
        row_start=row_start[tile],
        n_rows=n_rows[tile],
        part=part,
        n_parts=n_parts[tile],
        lo=lo,
        hi=np.minimum(lo + max_keys, hi[tile]),
        packed_start=nothing,
        packed_stop=nothing,
    )
