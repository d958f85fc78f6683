"""What each kernel is told, read back as the keys that every query row looks at.

The kernels get their plans in three forms: `triton_work.Work`, `pallas_work.PallasWork` and `jax_blindsight`'s
`AttentionWork`. Each reader here walks one of them in NumPy by the rules of its kernel and counts looks, so that a key
seen twice shows as much as a key missed. Unmasked stretches must need no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import torch

from blindsight_kernels import triton_prefill
from blindsight_kernels.pallas_prefill import rows_of
from blindsight_kernels.pallas_work import BLOCK_Q, FIELDS, NO_TILE, PallasWork, build_pallas_work
from blindsight_kernels.plans import build_plans
from blindsight_kernels.triton_work import BOTH_WAYS, GATHERED, NO_WINDOW, Work, build_work
from jax_blindsight.work import AttentionWork, attention_work
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.plan import Plan, build_plan

Read = Callable[["Prompts", Category], np.ndarray]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prompts:
    """A batch whose plans are compared.

    Attributes:
        layouts: one a batch row, of `q_stop` tokens each.
        template: sinks and local blocks.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.
        max_keys: longest range of one tile of text rows, None for no limit.
        block_k: keys of a tile.
    """

    layouts: tuple[Layout, ...]
    template: SinkTemplate
    window: int | None = None
    q_start: int = 0
    max_keys: int | None = None
    block_k: int = 16

    @property
    def q_stop(self) -> int:
        """Position after the last query; no key is there yet."""
        return self.layouts[0].n_tokens

    def plans(self) -> tuple[Plan, ...]:
        """One a batch row, in tiles of 8 rows, so that short prompts have many."""
        where = dict(window=self.window, q_start=self.q_start, max_keys=self.max_keys)
        return tuple(build_plan(layout, self.template, tile_rows=8, **where) for layout in self.layouts)


def keys_by_definition(prompts: Prompts, category: Category) -> np.ndarray:
    """`[B, T, S]` as `shared_profiles.masks` has it."""
    where = dict(window=prompts.window, q_start=prompts.q_start)
    return np.stack([category_mask(x, category, prompts.template, **where) for x in prompts.layouts]).astype(int)


def keys_of_triton(prompts: Prompts, category: Category) -> np.ndarray:
    """How often the Triton kernel's tiles show each key to each row: `[B, T, S]`."""
    return read_triton(build_work(prompts.plans(), prompts.block_k, _CPU), prompts, category)


def read_triton(work: Work, prompts: Prompts, category: Category) -> np.ndarray:
    """Walks the Triton kernel's work list: `[B, T, S]`. Every row is stored once: by a whole tile, or by a merge."""
    rows, packed = work.gathered_rows.numpy(), work.packed_positions.numpy()
    seen = np.zeros((len(prompts.layouts), prompts.q_stop - prompts.q_start, prompts.q_stop), int)
    stored, parts, merged = np.zeros(seen.shape[:2], int), [], []
    for batch, row_start, n_rows, slot, n_parts in work.merges.tolist():
        merged += [(slot + i, batch, row_start, n_rows) for i in range(n_parts)]
        stored[batch, rows[row_start : row_start + n_rows] - prompts.q_start] += 1
    for tile in work.tiles[category].tolist():
        batch, flags, row_start, n_rows, slot, *spans = tile
        index = np.arange(row_start, row_start + n_rows)
        position = (rows[index] if flags & GATHERED else index)[:, None]
        if slot >= 0:
            parts.append((slot, batch, row_start, n_rows))
        else:
            stored[batch, position[:, 0] - prompts.q_start] += 1
        for source, (start, full, n_full, stop) in enumerate((spans[:4], spans[4:])):
            index = np.arange(start, stop)
            keys = index if source else packed[start:stop]
            late = (keys > position) & (not (flags & BOTH_WAYS and source))
            hidden = late | (keys <= position - (prompts.window or NO_WINDOW))
            in_full = (index >= full) & (index < full + n_full * prompts.block_k)
            assert not hidden[:, in_full].any(), "an unmasked tile holds a key that a row must not see"
            np.add.at(seen[batch], (position - prompts.q_start, keys[None]), ~hidden)
    assert sorted(parts) == sorted(merged), "a merge joins other slots than its parts are put aside in"
    assert sorted(slot for slot, *_ in parts) == list(range(work.n_slots)), "two parts share a slot"
    assert (stored == seen.any(axis=2)).all(), "a row is not stored once"
    return seen


def keys_of_pallas(prompts: Prompts, category: Category) -> np.ndarray:
    """How often the Pallas kernel's tiles show each key to each row: `[B, T, S]`."""
    n = prompts.q_stop - prompts.q_start
    sizes = dict(n_queries=-(-max(n, 1) // 8) * 8, n_keys=-(-prompts.q_stop // 8) * 8)
    seen = read_pallas(build_pallas_work(prompts.plans(), prompts.block_k, **sizes), category)
    assert not seen[:, n:].any() and not seen[:, :, prompts.q_stop :].any()
    return seen[:, :n, : prompts.q_stop]


def read_pallas(work: PallasWork, category: Category) -> np.ndarray:
    """Walks the Pallas kernel's work list: `[B, T, S]`, T and S its own, rounded up. Every q_tile is stored once."""
    index, oldest, newest, row_of = (np.asarray(x) for x in rows_of(work))
    seen = np.zeros((work.n_batch * work.n_queries, work.n_keys), int)
    merges = [row for row in work.merges.tolist() if row[0] != NO_TILE]
    merged, stored, parts = (
        [(slot, q) for q, *slots in merges for slot in slots if slot >= 0],
        [q for q, *_ in merges],
        [],
    )
    for tile in work.tiles[category]:
        field = dict(zip(FIELDS, tile.tolist(), strict=True))
        if field["packed_n_tiles"] + field["range_n_tiles"]:  # or the kernel leaves it out
            if field["slot"] >= 0:
                parts.append((field["slot"], field["q_tile"]))
            else:
                stored.append(field["q_tile"])
        rows = np.arange(BLOCK_Q) + field["q_tile"] * BLOCK_Q
        rows = rows[row_of[index[rows]] == rows]
        for source in ("packed", "range"):
            first, n_tiles, low, high, start, stop = (
                field[f"{source}_{name}"] for name in ("first", "n_tiles", "low", "high", "start", "stop")
            )
            assert first % 8 == 0 and 0 <= low <= high <= n_tiles
            key = first + np.arange(n_tiles * work.block_k)
            position = key
            allowed = np.broadcast_to((key >= start) & (key < stop), (len(rows), len(key)))
            if source == "packed":
                assert key[-1:].max(initial=0) < len(work.packed), "a tile reads beyond the packed keys"
                batch, position = work.packed_batch[key], work.packed[key]
                assert (batch[(key >= start) & (key < stop)] == field["batch"]).all()
            else:
                allowed = allowed & (key <= newest[rows, None])
            allowed = allowed & (position >= oldest[rows, None])
            unmasked = allowed[:, low * work.block_k : high * work.block_k]
            assert unmasked.all(), "an unmasked tile holds a key that a row must not see"
            at, keys = np.nonzero(allowed)
            np.add.at(seen, (index[rows[at]], position[keys]), 1)
    assert sorted(parts) == sorted(merged), "a merge joins other slots than its parts are put aside in"
    assert len({slot for slot, _ in parts} & set(range(work.n_slots))) == len(parts), "two parts share a slot"
    assert sorted(stored) == np.flatnonzero(work.q_tiles[:, 2]).tolist(), "a tile of rows is not stored once"
    return seen.reshape(work.n_batch, work.n_queries, work.n_keys)


def keys_of_xla(prompts: Prompts, category: Category) -> np.ndarray:
    """How often the XLA loops' tiles show each key to each row: `[B, T, S]`."""
    n = prompts.q_stop - prompts.q_start
    sizes = dict(n_queries=n + 5, n_keys=prompts.q_stop + 9)
    work = attention_work(prompts.layouts, prompts.template, window=prompts.window, q_start=prompts.q_start, **sizes)
    return read_xla(work, category, (n, prompts.q_stop), prompts.window)


def read_xla(work: AttentionWork, category: Category, shape: tuple[int, int], window: int | None) -> np.ndarray:
    """Walks the work of the XLA loops: `[B, T, S]` of a shape `(T, S)`."""
    seen, keys = np.zeros((len(work.span), *shape), int), np.arange(shape[1])
    for b, q_start in enumerate(work.q_start):
        tiles = [
            (np.arange(*t[:2]), *t[2:]) for t in work.tiles[b, category, : work.n_tiles[b, category]].astype(np.int64)
        ]
        for first, stop, *limits in work.gathered[b, : work.n_gathered[b, category]].astype(np.int64):
            tiles.append((work.gathered_rows[b, first:stop], *limits))
        for rows, lo, hi, open_to, p_start, p_stop in tiles:
            at, row = rows - q_start, rows[:, None]
            recent = keys > row - (window or NO_WINDOW)
            np.add.at(seen[b], at, (keys >= lo) & (keys < hi) & (keys < np.maximum(row + 1, open_to)) & recent)
            packed = work.packed[b, category, p_start:p_stop]
            np.add.at(seen[b], (at[:, None], packed[None]), recent[:, packed])
    return seen


READERS: dict[str, Read] = {"triton": keys_of_triton, "pallas": keys_of_pallas, "xla": keys_of_xla}


def first_difference(got: np.ndarray, want: np.ndarray, prompts: Prompts) -> str | None:
    """Names the first row whose keys differ, and how; None where all are the same. Counts `[B, T, S]`."""
    wrong = np.argwhere((got != want).any(axis=2))
    if not len(wrong):
        return None
    b, t = wrong[0].tolist()
    missed, extra = (np.flatnonzero(x).tolist() for x in (got[b, t] < want[b, t], got[b, t] > want[b, t]))
    return (
        f"batch row {b}, query at {t + prompts.q_start}: misses keys {missed}, sees {extra} too often "
        f"({len(wrong)} rows differ)"
    )


def plans_of_torch(prompts: Prompts, monkeypatch: Any, head_dim: int = 128) -> tuple[Plan, ...]:
    """The plans that `triton_attention` builds its work list from, on a Hopper GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(triton_prefill, "INTERPRETED", True)  # so that CPU tensors get as far as the launch
        patch.setattr(triton_prefill, "build_work", build := Mock(wraps=build_work))
        for kernel in ("prefill_kernel", "merge_kernel"):
            patch.setattr(triton_prefill, kernel, MagicMock())
        rows = len(prompts.layouts)
        q, k = (torch.zeros(rows, 1, n, head_dim).half() for n in (prompts.q_stop - prompts.q_start, prompts.q_stop))
        where = dict(scale=1.0, window=prompts.window, q_start=prompts.q_start)
        triton_prefill.triton_attention(q, k, k, list(prompts.layouts), [0], prompts.template, **where)
    plans: tuple[Plan, ...] = build.call_args.args[0]
    return plans


def plans_of_jax(prompts: Prompts) -> tuple[Plan, ...]:
    """The plans that the Pallas kernel's work list is built from."""
    return build_plans(prompts.layouts, prompts.template, window=prompts.window, q_start=prompts.q_start)


def plan_arrays(plan: Plan) -> dict[str, np.ndarray]:
    """The arrays of a plan by name."""
    return {name: x for name, x in vars(plan).items() if isinstance(x, np.ndarray)}


def alone(layout: Layout) -> Layout:
    """The same prompt with all images but the first turned into text: a second row for a ragged batch."""
    return Layout(layout.n_tokens, layout.start, layout.stop, layout.images[:1], layout.bidirectional)
