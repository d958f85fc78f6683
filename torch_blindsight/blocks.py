"""The calls of a fused attention that together are a prefill: rows in blocks, each with the keys that they see.

A block is some rows of one image (or local block). It reads `[packed keys | keys of its range]`, joined
once per image, in one call with a small additive bias: the causal triangle at the end, the
sliding window at the front. Text rows are gathered into blocks of their own. A whole causal sequence of dense heads
is one call. Memory grows with the prompt, never with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared_profiles import Category, Layout, SinkTemplate, Tiles, image_tiles, packed_positions
from shared_profiles.layout import concatenated_ranges

# Rows of a block. The fused CPU attention computes whole rectangles, so fewer rows waste less of the causal triangle;
# but only from 192 rows on does it multiply 64 rows at a time instead of 32. 192 and 256 measured alike.
_BLOCK_ROWS = 256
# From 768 rows on it multiplies 256 at a time: keys that this many rows all see, if they are many, are a call of their
# own, merged by log-sum-exp.
_CHUNK_ROWS, _CHUNK_KEYS = 1024, 768
# Neighbouring tiles whose ranges together span at most this many keys share one call.
_GROUP_SPAN = 192
# Text rows reach far back. A long run of them is cut into blocks of its own; short runs are gathered, a few rows at a
# time, because the block reaches as far as its last row.
_LONG_TEXT, _TEXT_ROWS = 64, 32
# Entries of a text block's bias at most, unless `_TEXT_ROWS` rows have more.
_BIAS_ENTRIES = 1 << 24


@dataclass(frozen=True)
class Call:
    """One call of a fused attention: some rows, and keys that they see.

    Attributes:
        rows: the queries `[n]`, counted from the first.
        positions: where the keys `[m]` stand.
        n_packed: how many of them come from the packed keys; those behind are neighbours.
        q, k, v: `[1, heads, n or m, D]`. What k and v hold is gone when the next call is asked for.
        bias: added to the scores, `[n, m]`; None for nothing.
        causal: whether row i sees the keys up to the i-th only, of as many.
        more: whether an earlier call gave these rows other keys; the two are to be merged.
    """

    rows: slice | Tensor
    positions: np.ndarray
    n_packed: int
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    more: bool = False


class Rows:
    """The rows of one sequence for the heads of one category; `calls` yields what computes them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, q_start: int) -> None:
        self.q, self.k, self.v = q, k, v  # [1, heads, T or S, D]
        self.layout, self.window = layout, window
        self.q_start = q_start
        self.triangles: dict[int, Tensor] = {}

    def calls(self, category: Category, template: SinkTemplate) -> Iterator[Call]:
        """Yields calls that give every row of the chunk each key that its category lets it see, once."""
        layout = self.layout
        first, last = max(self.q_start, layout.start), layout.stop
        whole = category is Category.DENSE and self.window is None and not layout.bidirectional
        if whole and first == layout.start:
            if first < last:
                k, v = self.k[:, :, first:last], self.v[:, :, first:last]
                rows = slice(first - self.q_start, last - self.q_start)
                yield Call(rows, np.arange(first, last), 0, self.q[:, :, rows], k, v, causal=True)
            return
        yield from self._text(layout.textual_rows)
        packed = packed_positions(layout, category, template)
        tiles = image_tiles(layout, category, template, packed, window=self.window, q_start=self.q_start)
        index = torch.from_numpy(packed).to(self.q.device)
        packed_kv = [x[:, :, index] for x in (self.k, self.v)]  # [1, heads, P, D]
        groups = list(_groups(tiles))
        longest = max((int(g.packed_stop[-1] - g.packed_start[0] + g.hi[-1] - g.lo[0]) for g in groups), default=0)
        buffers = [x.new_empty(1, x.shape[1], longest, x.shape[3]) for x in (self.k, self.v)]
        for group in groups:
            start, stop, lo, hi = (int(x) for x in (group.row_start[0], group.row_stop[-1], group.lo[0], group.hi[-1]))
            p_start, p_stop = int(group.packed_start[0]), int(group.packed_stop[-1])
            positions = np.r_[packed[p_start:p_stop], lo:hi]
            k, v = (
                _join(extra[:, :, p_start:p_stop], own[:, :, lo:hi], buffer)
                for extra, own, buffer in zip(packed_kv, (self.k, self.v), buffers, strict=True)
            )
            if len(group.lo) > 1:
                yield self._several(group, positions, k, v)
            else:
                yield from self._image(start, stop, positions, p_stop - p_start, k, v)

    def _image(
        self, start: int, stop: int, positions: np.ndarray, n_packed: int, k: Tensor, v: Tensor
    ) -> Iterator[Call]:
        """The rows `[start, stop)` of one image; the last of its keys, at `positions`, is its last row if causal."""
        both_ways = self.layout.bidirectional
        first = start
        while first < stop:
            last = first + (stop - first - 1) % _CHUNK_ROWS + 1
            common = len(positions) - (stop - first)
            # What all rows of the chunk see, if worth a call of its own.
            ahead = self.window is None and not both_ways and last - first == _CHUNK_ROWS and common >= _CHUNK_KEYS
            begin = common if ahead else 0
            if ahead:
                rows = slice(first - self.q_start, last - self.q_start)
                keys = slice(common)
                yield Call(rows, positions[keys], n_packed, self.q[:, :, rows], k[:, :, keys], v[:, :, keys])
            for s in range(first, last, _BLOCK_ROWS):
                e = min(s + _BLOCK_ROWS, last)
                end = len(positions) - (0 if both_ways else stop - e)
                rows, keys = slice(s - self.q_start, e - self.q_start), slice(begin, end)
                bias = self._bias(np.arange(s, e), positions[keys], both_ways=both_ways)
                yield Call(
                    rows, positions[keys], 0 if ahead else n_packed, self.q[:, :, rows], k[:, :, keys], v[:, :, keys],
                    bias, more=ahead,
                )  # fmt: skip
            first = last

    def _several(self, group: Tiles, positions: np.ndarray, k: Tensor, v: Tensor) -> Call:
        """Several small tiles in one call: every row is shown its own tile's keys among those of all."""
        rows = concatenated_ranges(group.row_start, group.row_stop)
        lo, hi, p_stop = (
            np.repeat(x, group.row_stop - group.row_start)[:, None] for x in (group.lo, group.hi, group.packed_stop)
        )
        index = np.arange(len(positions)) + group.packed_start[0]
        own = (positions >= lo) & (positions < hi)
        if not self.layout.bidirectional:
            own &= positions <= rows[:, None]
        shown = np.where(index < group.packed_stop[-1], index < p_stop, own)
        if self.window is not None:
            shown &= positions > rows[:, None] - self.window
        queries = torch.from_numpy(rows - self.q_start).to(self.q.device)
        hidden = torch.from_numpy(~shown).to(self.q.device)
        n_packed = int(group.packed_stop[-1] - group.packed_start[0])
        return Call(queries, positions, n_packed, self.q[:, :, queries], k, v, self._hide(hidden))

    def _text(self, rows: np.ndarray) -> Iterator[Call]:
        """Text and delimiter rows: everything before them, inside the window."""
        for block in _text_blocks(rows[rows >= self.q_start]):
            lo = self.layout.start if self.window is None else max(self.layout.start, int(block[0]) - self.window + 1)
            hi = int(block[-1]) + 1
            queries = torch.from_numpy(block - self.q_start).to(self.q.device)
            positions = np.arange(lo, hi)
            bias = self._bias(block, positions, both_ways=False)
            k, v = self.k[:, :, lo:hi], self.v[:, :, lo:hi]
            yield Call(queries, positions, 0, self.q[:, :, queries], k, v, bias)

    def _bias(self, rows: np.ndarray, keys: np.ndarray, *, both_ways: bool) -> Tensor | None:
        """Zero where a row may look and -inf where it may not: `[rows, keys]`; None if it may look everywhere."""
        cut = self.window is not None and int(keys.min()) <= int(rows[-1]) - self.window
        if both_ways and not cut:
            return None
        n = len(rows)
        if not cut and keys[-n] == rows[0] and keys[-1] - keys[-n] == rows[-1] - rows[0] == n - 1:
            return self._triangle(n, len(keys))
        r, c = (torch.from_numpy(x).to(self.q.device) for x in (rows[:, None], keys))
        hidden = torch.zeros(n, len(keys), dtype=torch.bool, device=self.q.device)
        if not both_ways:
            hidden |= c > r
        if cut:
            assert self.window is not None
            hidden |= c <= r - self.window
        return self._hide(hidden)

    def _hide(self, hidden: Tensor) -> Tensor:
        """The bias that hides keys: -inf where `hidden`, else zero."""
        return torch.zeros(hidden.shape, dtype=self.q.dtype, device=self.q.device).masked_fill_(hidden, -torch.inf)

    def _triangle(self, n_rows: int, n_keys: int) -> Tensor:
        """The bias of rows that are their own last keys: a view into the widest one of that height so far."""
        wide = self.triangles.get(n_rows)
        if wide is None or wide.shape[1] < n_keys:
            wide = self.q.new_zeros(n_rows, 2 * n_keys)
            wide[:, -n_rows:] = torch.full_like(wide[:, -n_rows:], -torch.inf).triu_(1)
            self.triangles[n_rows] = wide
        return wide[:, wide.shape[1] - n_keys :]


def _groups(tiles: Tiles) -> Iterator[Tiles]:
    """Joins neighbouring tiles that are so small that a call for each would cost more than the keys they share."""
    first = 0
    n = len(tiles.lo)
    for i in range(1, n + 1):
        fits = i < n and tiles.hi[i] - tiles.lo[first] <= _GROUP_SPAN
        if not fits:
            yield Tiles(*(column[first:i] for column in vars(tiles).values()))
            first = i


def _text_blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts ascending positions into blocks; see `_LONG_TEXT`."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    gathered = np.concatenate([rows[:0], *(run for run in runs if len(run) < _LONG_TEXT)])
    yield from _cut(gathered, _TEXT_ROWS)
    for run in runs:
        if len(run) >= _LONG_TEXT:
            yield from _cut(run, max(_TEXT_ROWS, min(_BLOCK_ROWS, _BIAS_ENTRIES // int(run[-1] + 1))))


def _cut(rows: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Pieces of n rows, the last as long as is left."""
    return (rows[i : i + n] for i in range(0, len(rows), n))


def _join(extra: Tensor, own: Tensor, buffer: Tensor) -> Tensor:
    """`[extra | own]` along the tokens, written into `buffer` if there is anything to join."""
    n = extra.shape[2]
    if n == 0:
        return own
    joined = buffer[:, :, : n + own.shape[2]]
    joined[:, :, :n] = extra
    joined[:, :, n:] = own
    return joined
