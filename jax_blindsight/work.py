"""The work of one attention over a prompt: its plan as a few int32 arrays whose shapes depend on buckets alone.

    tiles [B, 4, n, 7]    tiles of neighbouring query rows under each category; the first `n_tiles` [B, 4] are real
    gathered [B, m, 7]    tiles of scattered text and delimiter rows, taken together from `gathered_rows` [B, T]
    packed [B, 4, P]      positions of the packed keys of each category

A row reads the packed keys `[packed_start, packed_stop)` of its tile and the ordinary keys `[lo, hi)`, of these only
the ones before `max(row + 1, open_to)`: `open_to` is 0 where rows are causal and `hi` in a bidirectional image. Under
a sliding window it reads keys after `row - window` only. Tiles with the most keys come first, so that neighbours in
the list are alike. The loops over tiles run as often as `n_tiles` says: another prompt of the same buckets runs the
same program, and pays for its own tiles only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from blindsight_kernels.checks import check_window
from jax_blindsight.buckets import pad_first, power_of_two
from shared_profiles import Category, Layout, SinkTemplate, image_tiles, packed_positions
from shared_profiles.layout import concatenated_ranges

# Query rows of a tile at most. 256 took 3 to 9% less processor time with images of 1,024 tokens; short ones waste them.
TILE_ROWS = 128
# Rows of a gathered tile; runs of text twice as long get tiles of their own.
GATHERED_ROWS = 32
_LONG_TEXT = 2 * GATHERED_ROWS
# Least capacities for images and for packed keys; above them, powers of two.
_IMAGES, _PACKED = 64, 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class AttentionWork:
    """What the attention is told about a batch. All arrays are int32; axes of 4 are indexed by `Category`.

    Every array leads with B, so a batch is dealt out over devices by one partition spec.

    Attributes:
        q_start: `[B]` position of the first query, the same in all rows.
        span: `[B, 2]` the real tokens `[start, stop)`.
        tiles: `[B, 4, n, 7]` columns row_start, row_stop, lo, hi, open_to, packed_start, packed_stop; longest first.
        n_tiles: `[B, 4]` how many tiles are real.
        gathered: `[B, m, 7]` the same columns; the rows are those from row_start to row_stop in `gathered_rows`.
        n_gathered: `[B, 4]` how many gathered tiles are real: none where tiles hold the text rows as well.
        gathered_rows: `[B, T]` positions, ascending; then 0.
        packed: `[B, 4, P]` positions, ascending; then 0.
        n_keys: S of the keys that it is for.
    """

    q_start: np.ndarray
    span: np.ndarray
    tiles: np.ndarray
    n_tiles: np.ndarray
    gathered: np.ndarray
    n_gathered: np.ndarray
    gathered_rows: np.ndarray
    packed: np.ndarray
    n_keys: int = field(metadata=dict(static=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


def attention_work(
    layouts: Sequence[Layout],
    template: SinkTemplate,
    *,
    window: int | None = None,
    q_start: int = 0,
    n_queries: int,
    n_keys: int,
    dense: Sequence[bool] | None = None,
) -> AttentionWork:
    """Builds the work of a batch; all layers with the same window share it.

    Shapes depend on the number of layouts, `n_queries`, the template's local block, and the powers of two that hold
    the most images (at least 64) and the most packed keys (at least 1024) of a sequence.

    Args:
        layouts: one a batch row, of `q_start` + (real number of queries) tokens each, padding included.
        template: sinks and local blocks.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.
        n_queries: T, the bucketed number of queries.
        n_keys: S, the bucketed number of keys, or the capacity of the cache.
        dense: the batch rows in which every head attends densely, whatever its category. Default: none.

    Raises:
        ValueError: layouts of different lengths or both directions, more tokens than the buckets hold, or `dense` of
            another length than `layouts`.
    """
    dense = [False] * len(layouts) if dense is None else dense
    check_layouts(layouts, dense, window=window, q_start=q_start, n_queries=n_queries, n_keys=n_keys)
    sequences = [
        _Sequence(layout, template, window, q_start, all_dense)
        for layout, all_dense in zip(layouts, dense, strict=True)
    ]
    n_images = power_of_two(max(layout.n_images for layout in layouts), _IMAGES)
    # Every image and every run of text may end in a short tile.
    n_tiles = -(-n_queries // _tile_rows(Category.SINK, template)) + 2 * n_images + 1
    n_packed = power_of_two(max(len(p) for s in sequences for p in s.packed), _PACKED)

    def stack(rows: list[list[np.ndarray]], n: int) -> np.ndarray:
        return np.stack([np.stack([pad_first(x.astype(np.int32), n) for x in row]) for row in rows])

    return AttentionWork(
        q_start=np.full(len(layouts), q_start, dtype=np.int32),
        span=np.array([(layout.start, layout.stop) for layout in layouts], dtype=np.int32),
        tiles=stack([s.tiles for s in sequences], n_tiles),
        n_tiles=np.array([[len(x) for x in s.tiles] for s in sequences], dtype=np.int32),
        gathered=stack([[s.gathered] for s in sequences], -(-n_queries // GATHERED_ROWS))[:, 0],
        n_gathered=np.array([s.n_gathered for s in sequences], dtype=np.int32),
        gathered_rows=stack([[s.gathered_rows] for s in sequences], n_queries)[:, 0],
        packed=stack([s.packed for s in sequences], n_packed),
        n_keys=n_keys,
    )


class _Sequence:
    """The unpadded arrays of one batch row; `tiles`, `packed` and `n_gathered` are lists with one entry a category."""

    def __init__(
        self, layout: Layout, template: SinkTemplate, window: int | None, q_start: int, all_dense: bool
    ) -> None:
        self.layout, self.template, self.window, self.q_start = layout, template, window, q_start
        rows = layout.textual_rows
        runs = _runs(rows[rows >= q_start])
        long = [run for run in runs if run[1] - run[0] >= _LONG_TEXT]
        self.gathered_rows = np.concatenate(
            [rows[:0], *(np.arange(*run) for run in runs if run[1] - run[0] < _LONG_TEXT)]
        )
        self.gathered = self._gathered()
        whole = (max(layout.start, q_start), layout.stop)
        whole_tiles = self._causal([whole] if whole[0] < whole[1] else [])
        text_tiles = self._causal(long)
        self.tiles, self.packed, self.n_gathered = [], [], []
        for category in [Category.DENSE] * len(Category) if all_dense else Category:
            if category is Category.DENSE and not layout.bidirectional:  # images are rows like any other
                self.tiles.append(_longest_first(whole_tiles))
                self.packed.append(rows[:0])
                self.n_gathered.append(0)
            else:
                tiles, packed = self._images(category)
                self.tiles.append(_longest_first(np.concatenate([tiles, text_tiles])))
                self.packed.append(packed)
                self.n_gathered.append(len(self.gathered))

    def _images(self, category: Category) -> tuple[np.ndarray, np.ndarray]:
        """Tiles of image rows, `[n, 7]`, and the packed keys that any of them reads."""
        packed = packed_positions(self.layout, category, self.template)
        t = image_tiles(
            self.layout,
            category,
            self.template,
            packed,
            tile_rows=_tile_rows(category, self.template),
            window=self.window,
            q_start=self.q_start,
        )
        open_to = t.hi if self.layout.bidirectional else np.zeros_like(t.hi)
        columns = [t.row_start, t.row_stop, t.lo, t.hi, open_to, t.packed_start, t.packed_stop]
        return np.stack(columns, axis=1), packed[: t.packed_stop.max(initial=0)]

    def _causal(self, runs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Tiles of runs of causal rows that see everything before them: `[n, 7]`."""
        first, stop = np.array(runs, dtype=np.int64).reshape(-1, 2).T
        n = -(-(stop - first) // TILE_ROWS)
        row_start = concatenated_ranges(np.zeros_like(n), n) * TILE_ROWS + np.repeat(first, n)
        row_stop = np.minimum(row_start + TILE_ROWS, np.repeat(stop, n))
        nothing = np.zeros_like(row_start)
        columns = [row_start, row_stop, self._oldest(row_start), row_stop, nothing, nothing, nothing]
        return np.stack(columns, axis=1)

    def _gathered(self) -> np.ndarray:
        """Tiles of scattered rows, which are causal and read no packed keys: `[n, 7]`."""
        rows = self.gathered_rows
        first = np.arange(0, len(rows), GATHERED_ROWS)
        stop = np.minimum(first + GATHERED_ROWS, len(rows))
        nothing = np.zeros_like(first)
        columns = [first, stop, self._oldest(rows[first]), rows[stop - 1] + 1, nothing, nothing, nothing]
        return _longest_first(np.stack(columns, axis=1))

    def _oldest(self, rows: np.ndarray) -> np.ndarray:
        """The first key that causal rows see."""
        start = np.full_like(rows, self.layout.start)
        return start if self.window is None else np.maximum(start, rows - self.window + 1)


def keys_of(tiles: np.ndarray) -> np.ndarray:
    """How many keys tiles `[..., 7]` read: `[...]`."""
    _, _, lo, hi, _, packed_start, packed_stop = np.moveaxis(tiles, -1, 0)
    return hi - lo + packed_stop - packed_start


def _longest_first(tiles: np.ndarray) -> np.ndarray:
    """Tiles `[n, 7]` by falling numbers of keys."""
    return tiles[np.argsort(-keys_of(tiles), kind="stable")]


def _tile_rows(category: Category, template: SinkTemplate) -> int:
    """Rows of a tile of image rows; under `SINK` a divisor of the local block, so that no tile straddles two."""
    if category is not Category.SINK:
        return TILE_ROWS
    return next(n for n in range(min(TILE_ROWS, template.local_block), 0, -1) if template.local_block % n == 0)


def _runs(positions: np.ndarray) -> list[tuple[int, int]]:
    """Ascending positions as `[first, stop)` of neighbours."""
    pieces = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    return [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces if len(piece)]


def check_layouts(
    layouts: Sequence[Layout],
    dense: Sequence[bool],
    *,
    window: int | None,
    q_start: int,
    n_queries: int,
    n_keys: int,
) -> None:
    """Refuses layouts that do not fit together or into the buckets.

    Raises:
        ValueError: see `attention_work`.
    """
    if len(dense) != len(layouts):
        raise ValueError(f"dense must hold one bool per layout, {len(layouts)}. Got {len(dense)}.")
    lengths = {layout.n_tokens for layout in layouts}
    if len(lengths) != 1 or len({layout.bidirectional for layout in layouts}) != 1:
        raise ValueError(
            "the layouts of a batch must share n_tokens and bidirectional. Got "
            f"{[(layout.n_tokens, layout.bidirectional) for layout in layouts]}. Build them from padded rows of one "
            "length."
        )
    n_tokens = lengths.pop()
    if not 0 <= q_start <= n_tokens <= min(q_start + n_queries, n_keys):
        raise ValueError(
            "0 <= q_start <= n_tokens <= min(q_start + n_queries, n_keys) must hold. Got "
            f"{q_start}, {n_tokens}, {q_start} + {n_queries}, {n_keys}. Take larger buckets."
        )
    check_window(window)
