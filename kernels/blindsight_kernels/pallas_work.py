"""The work list of the Pallas kernel: plans of a batch as small int32 arrays of few different shapes.

    tiles   [4, n_tiles, 15]   one table a category, longest tiles first: what one block of the kernel reads
    q_tiles [n_q_tiles, 4]     the query rows of a tile; the parts of a long text range share them

Everything about a prompt is data. Shapes depend on T, on the tiles' rows, and on the powers of two that hold the
images, the text rows, the packed keys and the parts, so that prompts of one bucket run the same compiled program; what
is not used is a tile without keys.

A tile reads two spans of keys, in tiles of `block_k` from a multiple of 8 on::

    first  start .... low ......................... high ...... stop
    |        masked   |    no row is denied a key   |    masked   |      (each a whole number of tiles from `first`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from blindsight_kernels.pallas_requirements import jax
from shared_profiles.categories import Category
from shared_profiles.plan import Plan

BLOCK_Q = 128  # query rows of a tile: two compute warpgroups of 64
ALIGNMENT = 8  # rows; where TMA may start under the layout that wgmma reads
NO_WINDOW = 1 << 30  # wider than any prompt
NO_TILE = np.iinfo(np.int32).max  # in `merges`
_IMAGES = 8  # least capacity for images
_MOST_TILES = 65535  # of one launch: the second dimension of a CUDA grid, heads being the first
GATHERED, BOTH_WAYS = 1, 2  # kinds of a q_tile
# Columns of a tile. `slot` is where a part's result is put aside for the merge, -1 for a whole tile.
_SPAN = ("first", "n_tiles", "low", "high", "start", "stop")
FIELDS = ("batch", "q_tile", "slot", *(f"{source}_{name}" for source in ("packed", "range") for name in _SPAN))
_STATIC = dict(static=True)  # for jax: a number that programs are compiled for


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PallasWork:
    """What the kernel is told about a batch, for every category. A pytree of int32 arrays, NumPy until they are moved.

    Attributes:
        tiles: `[4, n_tiles, 15]`, its columns are `FIELDS`.
        cost: `[4]` float32, keys visited under each category.
        q_tiles: `[n_q_tiles, 4]`: batch row, row_start, n_rows (0: not used), kind. `row_start` is a position, or an
            index into `gathered_rows`.
        gathered_rows: `[n]` positions of the text and delimiter rows, batch rows one after another.
        packed: `[P]` positions of the packed keys: for each batch row text, then text and sinks, each from a multiple
            of 8 on.
        packed_batch: `[P]` the batch row of each. Of its own: XLA would put a slice of `packed` and the kernel into
            one fusion.
        merges: `[n_merges, 1 + n_parts]` tiles computed in parts: q_tile (`NO_TILE`: not used), then slots, -1 for
            none.
        span: `[B, 2]` the real keys `[start, stop)` of each batch row.
        limits: `[2]` q_start and window.
        block_k: keys of a tile.
        n_batch, n_queries, n_keys: B, T and S of the arrays it is for, rounded up.
        n_slots: parts a head.
    """

    tiles: np.ndarray
    cost: np.ndarray
    q_tiles: np.ndarray
    gathered_rows: np.ndarray
    packed: np.ndarray
    packed_batch: np.ndarray
    merges: np.ndarray
    span: np.ndarray
    limits: np.ndarray
    block_k: int = field(metadata=_STATIC)
    n_batch: int = field(metadata=_STATIC)
    n_queries: int = field(metadata=_STATIC)
    n_keys: int = field(metadata=_STATIC)
    n_slots: int = field(metadata=_STATIC)

    @property
    def steps(self) -> np.ndarray:
        """Tiles of keys that each tile reads, by category: `[4, n_tiles]`; of stacked works `[n, 4, n_tiles]`."""
        return self.tiles[..., FIELDS.index("packed_n_tiles")] + self.tiles[..., FIELDS.index("range_n_tiles")]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


@lru_cache(maxsize=16)
def build_pallas_work(
    plans: tuple[Plan, ...],
    block_k: int,
    *,
    n_queries: int | None = None,
    n_keys: int | None = None,
    dense: tuple[bool, ...] | None = None,
) -> PallasWork:
    """Builds the work list of a batch, or returns the one built before for these very plans.

    Args:
        plans: one plan a batch row, all of the same queries and window, `tile_rows` up to 128.
        block_k: keys of a tile.
        n_queries, n_keys: T and S of the queries and keys that it will be used with; default the plans'.
        dense: the batch rows in which every head attends densely, whatever its category. Default: none.

    Raises:
        ValueError: no plans, plans that differ in what must be the same for a launch, too few queries or keys, or
            `dense` of another length than `plans`.
        NotImplementedError: more tiles than a launch can have: a long batch of tiles of few rows.
    """
    dense = (False,) * len(plans) if dense is None else dense
    if len(dense) != len(plans):
        raise ValueError(f"dense must hold one bool per plan, {len(plans)}. Got {len(dense)}.")
    shared = {(p.q_start, p.window, p.layout.n_tokens) for p in plans}
    if len(shared) != 1:
        raise ValueError(
            "the plans of a batch must share q_start, window and n_tokens. Got "
            f"{sorted(shared, key=str)}. Build them with the same arguments, one a batch row, padding included."
        )
    ((q_start, window, n_tokens),) = shared
    n_queries = n_tokens - q_start if n_queries is None else n_queries
    n_keys = n_tokens if n_keys is None else n_keys
    rows = max(p.tile_rows for p in plans)
    needed = max(n_tokens - q_start, 1)
    if n_queries < needed or n_keys < n_tokens or rows > BLOCK_Q:
        raise ValueError(
            f"the plans need n_queries >= {needed}, n_keys >= {n_tokens} and tiles of at most {BLOCK_Q} "
            f"rows. Got n_queries={n_queries}, n_keys={n_keys}, tile_rows={rows}. Give the lengths of q and k."
        )
    tables, q_tiles, merges, packed, costs = [], [], [], [], []
    bases = dict(q_tile=0, row=0, packed=0, slot=0)
    for b, plan in enumerate(plans):
        runs_as = np.zeros(len(Category), int) if dense[b] else np.arange(len(Category))
        table, q_tile, merge, rows_of, n_parts = _tiles_of(plan, b, block_k, bases)
        table = table[runs_as]
        tables.append(table)
        q_tiles.append(q_tile)
        merges.append(merge)
        packed.append(rows_of)
        costs.append(plan.n_keys[runs_as])  # [4, n_tiles]
        bases["q_tile"] += len(q_tile)
        bases["row"] += len(plan.gathered_rows)
        bases["packed"] += rows_of.shape[1]
        bases["slot"] += n_parts
    cost = np.concatenate(costs, axis=1)
    order = np.argsort(-cost, axis=1, kind="stable")
    tiles = np.take_along_axis(np.concatenate(tables, axis=1), order[:, :, None], axis=1)
    n_images = _power_of_two(max(p.layout.n_images for p in plans), _IMAGES)
    # every image may end in a short tile, and a chunk may begin and the text end in one
    n_q_tiles = len(plans) * (n_queries // min(p.tile_rows for p in plans) + n_images + 3)
    n_slots = _power_of_two(bases["slot"])
    if n_q_tiles + n_slots > _MOST_TILES:
        raise NotImplementedError(
            f"the Pallas kernel takes at most {_MOST_TILES} tiles of queries and parts a launch. Got "
            f"{n_q_tiles + n_slots}, for {len(plans)} x {n_queries} queries in tiles of {rows} rows. Make local_block "
            f"a multiple of {BLOCK_Q}, so that tiles have as many rows; or take a smaller batch, or the portable "
            "implementation."
        )
    n_merges = _power_of_two(sum(map(len, merges)))
    n_parts = _power_of_two(max(m.shape[1] - 1 for m in merges))
    packed_keys = np.concatenate(packed, axis=1)
    n_packed = _power_of_two(bases["packed"] + block_k, 2 * block_k)  # a tile of positions is read from any of them on
    merge_table = np.full((n_merges, 1 + n_parts), -1)
    merge_table[:, 0] = NO_TILE
    at = 0
    for merge in merges:
        merge_table[at : at + len(merge), : merge.shape[1]] = merge
        at += len(merge)
    return PallasWork(
        _padded(tiles, (len(Category), n_q_tiles + n_slots, len(FIELDS))),
        cost.sum(axis=1).astype(np.float32),
        _padded(np.concatenate(q_tiles), (n_q_tiles, 4)),
        _padded(np.concatenate([p.gathered_rows for p in plans]), (_power_of_two(bases["row"], BLOCK_Q),)),
        _padded(packed_keys[1], (n_packed,)),
        _padded(packed_keys[0], (n_packed,)),
        merge_table.astype(np.int32),
        np.array([(p.layout.start, p.layout.stop) for p in plans], np.int32),
        np.array([q_start, NO_WINDOW if window is None else window], np.int32),
        block_k,
        len(plans),
        n_queries,
        n_keys,
        n_slots,
    )


def stack_pallas_works(works: Sequence[PallasWork]) -> PallasWork:
    """One work list a device, in one value: every array gets a leading axis over the devices.

    Args:
        works: of equally many rows each, and of the same T, S and block_k; what is smaller is filled up to the largest.

    Returns:
        `n_batch`, `n_queries` and `n_keys` are those of one device. Inside `shard_map`, take `[0]` of every array.
    """
    n_slots = max(work.n_slots for work in works)

    def stack(name: str) -> np.ndarray:
        arrays = [getattr(work, name) for work in works]
        shape = tuple(np.max([x.shape for x in arrays], axis=0))
        out = np.zeros((len(arrays), *shape), arrays[0].dtype)
        if name == "merges":
            out[:] = -1
            out[:, :, 0] = NO_TILE
        for i, array in enumerate(arrays):
            out[i][tuple(map(slice, array.shape))] = array
        return out

    arrays: dict[str, Any] = {f.name: stack(f.name) for f in fields(PallasWork) if not f.metadata}
    return replace(works[0], n_slots=n_slots, **arrays)


def _tiles_of(
    plan: Plan, batch: int, block_k: int, bases: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """The tiles of one batch row, `[4, n, 15]`, its q_tiles, those to merge, its packed keys, and its parts."""
    n = len(plan.row_start)
    gathered = plan.gathered
    first, last = plan.row_bounds()
    both_ways = ~gathered & plan.layout.bidirectional
    oldest = last - (NO_WINDOW if plan.window is None else plan.window) + 1  # that every row of a tile may see
    in_parts = plan.n_parts > 1
    slots = np.where(in_parts, bases["slot"] + np.cumsum(in_parts) - 1, -1)
    is_first = plan.part == 0
    q_tile = bases["q_tile"] + np.cumsum(is_first) - 1
    kind = GATHERED * gathered + BOTH_WAYS * both_ways
    row_start = plan.row_start + np.where(gathered, bases["row"], 0)
    q_tiles = np.stack([np.full(n, batch), row_start, plan.n_rows, kind], axis=1)[is_first]

    table = np.zeros((len(Category), n, len(FIELDS)), dtype=np.int64)
    table[:, :, :3] = np.stack([np.full(n, batch), q_tile, slots], axis=1)
    sinks_at = -(-len(plan.packed_text) // ALIGNMENT) * ALIGNMENT
    for category in Category:
        base = bases["packed"] + (0 if category is Category.INTRA_IMAGE else sinks_at)
        start, stop = plan.packed_start[category], plan.packed_stop[category]
        full = np.searchsorted(plan.packed(category), oldest)
        table[category, :, 3:9] = _span(start + base, full + base, stop + base, stop + base, block_k)
        lo, hi = plan.lo[category], plan.hi[category]
        table[category, :, 9:] = _span(lo, oldest, np.where(both_ways, hi, np.minimum(first + 1, hi)), hi, block_k)

    packed = np.zeros((2, sinks_at + -(-len(plan.packed_sinks) // ALIGNMENT) * ALIGNMENT), np.int64)
    packed[0] = batch
    packed[1, : len(plan.packed_text)] = plan.packed_text
    packed[1, sinks_at : sinks_at + len(plan.packed_sinks)] = plan.packed_sinks
    heads = np.flatnonzero(in_parts & is_first)
    widest = int(plan.n_parts[heads].max(initial=0))
    merges = np.full((len(heads), 1 + widest), -1)
    merges[:, 0] = q_tile[heads]
    for row, head in enumerate(heads):
        parts = plan.n_parts[head]
        merges[row, 1 : 1 + parts] = slots[head] + np.arange(parts)
    return table, q_tiles, merges, packed, int(in_parts.sum())


def _span(start: np.ndarray, full: np.ndarray, full_stop: np.ndarray, stop: np.ndarray, block_k: int) -> np.ndarray:
    """Columns of spans `[start, stop)` whose keys `[full, full_stop)` need no mask: `[n, 6]`."""
    first = start // ALIGNMENT * ALIGNMENT
    n_tiles = np.where(stop > start, -(-(stop - first) // block_k), 0)
    low = -(-(np.clip(full, start, stop) - first) // block_k)
    high = (full_stop - first) // block_k
    some = (high > low) & (n_tiles > 0)
    return np.stack([first, n_tiles, np.where(some, low, 0), np.where(some, high, 0), start, stop], axis=1)


def _power_of_two(n: int, minimum: int = 1) -> int:
    return max(minimum, 1 << max(n - 1, 0).bit_length())


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array as int32, with zeros at the ends of its axes."""
    out = np.zeros(shape, np.int32)
    out[tuple(map(slice, array.shape))] = array
    return out
