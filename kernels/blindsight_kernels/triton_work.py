"""The work list of the Triton kernel: plans of a batch as small int32 tensors on the device.

    tiles [4, n_tiles, 13]   one table a category, longest tiles first; shared by all layers of a prompt
    heads [H, 3]             head, kv head, category: all that a layer adds

Program p of the launch computes tile `tiles[category, p % n_tiles]` of head `heads[p // n_tiles]`: head-major, the
heads of one KV group adjacent so that their keys stay in cache, the most expensive group first.

A tile reads two spans of keys, each cut in three so that the long middle part needs no mask::

    start ..... full ........................ full + n_full * BLOCK_K ..... stop
      masked           no row is denied a key                   masked
    (window)                                              (causal limit, last tile)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from shared_profiles.categories import Category
from shared_profiles.layout import Layout
from shared_profiles.plan import Plan

# Columns of a tile: batch, flags, row_start, n_rows, slot; then start, full, n_full, stop of its slice of the packed
# keys, and of its range of ordinary keys. `row_start` is a position, or an index into `gathered_rows`; `slot` is where
# a part's result is put aside for the merge, -1 for a whole tile.
N_FIELDS = 13
GATHERED, BOTH_WAYS = 1, 2  # flags
NO_WINDOW = 1 << 30  # wider than any prompt


@dataclass(frozen=True, eq=False)
class Work:
    """What the kernel is told about a batch, for every category. Tensors are int32 on the device unless said.

    Attributes:
        tiles: `[4, n_tiles, 13]`, its columns are named above `N_FIELDS`.
        cost: `[4]` keys visited under each category, on the host.
        gathered_rows: `[n]` positions of the text and delimiter rows, batch rows one after another.
        packed_positions: `[P]` positions of the packed keys: for each batch row text, then text and sinks. P >= 1.
        packed_batch: `[P]` int64, the batch row of each; `packed_index` the same positions in int64, for the gather.
        merges: `[n_merges, 5]` tiles computed in parts: batch, row_start, n_rows, first slot, n_parts.
        n_slots: parts a head.
    """

    tiles: Tensor
    cost: np.ndarray
    gathered_rows: Tensor
    packed_positions: Tensor
    packed_batch: Tensor
    packed_index: Tensor
    merges: Tensor
    n_slots: int

    @property
    def n_tiles(self) -> int:
        """Tiles a head."""
        return self.tiles.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all device tensors."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))


@lru_cache(maxsize=16)
def build_work(plans: tuple[Plan, ...], block_k: int, device: torch.device) -> Work:
    """Builds the work list of a batch, or returns the one built before for these very plans.

    Args:
        plans: one plan a batch row, all of the same queries, window and `tile_rows`.
        block_k: keys of a tile.
        device: where the tensors go.

    Raises:
        ValueError: no plans, or plans that differ in what must be the same for a launch.
    """
    if len({(p.q_start, p.window, p.layout.n_tokens) for p in plans}) != 1:
        given = [(p.q_start, p.window, p.layout.n_tokens) for p in plans]
        raise ValueError(
            f"the plans of a batch must share q_start, window and n_tokens. Got {given}. Build them with the "
            "same arguments, one a batch row, padding included in each layout."
        )
    tables, merges, costs = [], [], []
    row_base = packed_base = n_slots = 0
    for b, plan in enumerate(plans):
        table, merge = _tiles_of(plan, b, block_k, row_base, packed_base, n_slots)
        tables.append(table)
        merges.append(merge)
        costs.append(plan.n_keys)
        row_base += len(plan.gathered_rows)
        packed_base += len(plan.packed_text) + len(plan.packed_sinks)
        n_slots += int(merge[:, 4].sum())
    cost = np.concatenate(costs, axis=1)
    order = np.argsort(-cost, axis=1, kind="stable")
    tiles = np.take_along_axis(np.concatenate(tables, axis=1), order[:, :, None], axis=1)
    packed = [np.concatenate([p.packed_text, p.packed_sinks]) for p in plans]
    batch = np.repeat(np.arange(len(plans)), [len(x) for x in packed])
    positions = np.concatenate(packed)
    if not len(positions):  # a tensor descriptor must not be empty
        batch = positions = np.zeros(1, dtype=np.int64)

    def put(array: np.ndarray, dtype: type = np.int32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(device)

    return Work(
        put(tiles),
        cost.sum(axis=1),
        put(np.concatenate([p.gathered_rows for p in plans])),
        put(positions),
        put(batch, np.int64),
        put(positions, np.int64),
        put(np.concatenate(merges)),
        n_slots,
    )


@lru_cache(maxsize=256)
def order_heads(categories: tuple[int, ...], n_kv_heads: int, work: Work, skip_dense: bool = False) -> Tensor:
    """The heads of a layer in the order they are launched: `[H, 3]` int32 on the work's device.

    Args:
        categories: of each query head, values of `Category`.
        n_kv_heads: K; head h reads kv head `h // (H // K)`.
        work: the batch's work list.
        skip_dense: leave `DENSE` heads out.

    Raises:
        ValueError: not a category, or H is not a multiple of K.
    """
    if any(c not in Category.__members__.values() for c in categories) or len(categories) % n_kv_heads:
        raise ValueError(
            f"categories must be one of {list(map(int, Category))} a query head, a multiple of K={n_kv_heads} heads. "
            f"Got {list(categories)}."
        )
    category = np.array(categories)
    kv = np.arange(len(category)) // (len(category) // n_kv_heads)
    cost = work.cost[category]
    of_group = np.bincount(kv, weights=cost, minlength=n_kv_heads)
    order = np.lexsort((np.arange(len(category)), -cost, kv, -of_group[kv]))
    if skip_dense:
        order = order[category[order] != Category.DENSE]
    heads = np.stack([order, kv[order], category[order]], axis=1)
    return _upload(tuple(map(tuple, heads.tolist())), work.tiles.device)


@lru_cache(maxsize=1024)
def _upload(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """`[H, 3]` int32. An upload waits for the GPU; layers and prompts mostly have the same few orders."""
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 3)


def pack(x: Tensor, work: Work) -> Tensor:
    """Gathers the packed keys or values of a layer: `[B, K, S, D]` -> `[1, K, P, D]`, heads of a token adjacent."""
    return x.transpose(1, 2)[work.packed_batch, work.packed_index].transpose(0, 1)[None]


def _tiles_of(
    plan: Plan, batch: int, block_k: int, row_base: int, packed_base: int, slot_base: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of one batch row, `[4, n_tiles, 13]`, and those to merge, `[n_merges, 5]`."""
    n = len(plan.row_start)
    gathered = plan.gathered
    first, last = plan.row_bounds()
    both_ways = ~gathered & plan.layout.bidirectional
    oldest = last - (NO_WINDOW if plan.window is None else plan.window) + 1  # that every row of a tile may see
    in_parts = plan.n_parts > 1
    slots = np.where(in_parts, slot_base + np.cumsum(in_parts) - 1, -1)
    row_start = plan.row_start + np.where(gathered, row_base, 0)
    flags = GATHERED * gathered + BOTH_WAYS * both_ways
    common = [np.full(n, batch), flags, row_start, plan.n_rows, slots]

    table = np.empty((len(Category), n, N_FIELDS), dtype=np.int64)
    for category in Category:
        packed = plan.packed(category)
        base = packed_base + (0 if category is Category.INTRA_IMAGE else len(plan.packed_text))
        start, stop = plan.packed_start[category], plan.packed_stop[category]
        lo, hi = plan.lo[category], plan.hi[category]
        if category in (Category.SINK, Category.INTRA_IMAGE_SINK):
            n_moved = np.where(gathered, 0, _own_delimiters(plan.layout, lo))
            lo, stop = lo + n_moved, stop + n_moved
        table[category, :, 5:9] = _span(start, np.searchsorted(packed, oldest), stop, stop, block_k)
        table[category][:, [5, 6, 8]] += base
        table[category, :, 9:13] = _span(lo, oldest, np.where(both_ways, hi, np.minimum(first + 1, hi)), hi, block_k)
        table[category, :, :5] = np.stack(common, axis=1)

    heads = np.flatnonzero(in_parts & (plan.part == 0))
    merges = [np.full(len(heads), batch), row_start[heads], plan.n_rows[heads], slots[heads], plan.n_parts[heads]]
    return table, np.stack(merges, axis=1)


def _own_delimiters(layout: Layout, lo: np.ndarray) -> np.ndarray:
    """Keys at the beginning of ranges from `lo` that are an image's start delimiter: `[n]`, mostly 0 or 1.

    They are sinks, so the packed keys hold them next. Read there, they leave a range that begins with the image's
    first token like its tiles, and ends with a whole number of K tiles instead of one key more.
    """
    begin, first = layout.images[:, 0], layout.images[:, 1]
    image = np.searchsorted(begin, lo, side="right") - 1
    return np.where((image >= 0) & (begin[image] == lo), first[image] - begin[image], 0) if len(begin) else 0 * lo


def _span(start: np.ndarray, full: np.ndarray, full_stop: np.ndarray, stop: np.ndarray, block: int) -> np.ndarray:
    """Columns start, full, n_full, stop of spans whose keys `[full, full_stop)` need no mask: `[n, 4]`."""
    full = np.clip(full, start, stop)
    n_full = np.maximum(full_stop - full, 0) // block
    return np.stack([start, np.where(n_full > 0, full, start), n_full, stop], axis=1)
