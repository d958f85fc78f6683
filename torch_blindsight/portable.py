"""Sparse prefill attention in plain torch, on any device: the same rule as the kernels, one block of rows at a time.

A block is some rows of one image (or local block). It reads `[packed keys | keys of its range]`, joined
once per image, in one call of the fused attention with a small additive bias: the causal triangle at the end, the
sliding window at the front. Text rows are gathered into blocks of their own. A whole causal sequence of dense heads
is one fused call. Nothing is merged, and memory grows with the prompt, never with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blindsight_kernels.checks import check_arrays, check_categories, check_keys, check_layouts
from shared_profiles import Category, Layout, SinkTemplate, Tiles, image_tiles, packed_positions
from shared_profiles.layout import concatenated_ranges
from torch_blindsight.heads import as_index, pick, put
from torch_blindsight.merging import merge

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
# Scores held at once by the unfused attention of devices other than the CPU.
_SCORES_AT_ONCE = 1 << 26


def portable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layouts: Sequence[Layout],
    categories: Sequence[int] | np.ndarray,
    template: SinkTemplate,
    *,
    scale: float,
    window: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Prefill attention of a batch, every head by its category.

    Args:
        q: queries `[B, H, T, D]`, row t standing at position `q_start + t`. float32, float64, bfloat16 or float16.
        k, v: keys and values `[B, K, S, D]`, H a multiple of K, S at least `q_start + T`; keys beyond are ignored.
        layouts: B layouts of `q_start + T` tokens.
        categories: `[H]` indices into `Category`.
        template: sinks and local blocks.
        scale: factor on the scores, usually `D ** -0.5`.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.

    Returns:
        `[B, T, H, D]` outputs in q's dtype, contiguous, and `[B, H, T]` log-sum-exps of the scaled scores, float32
        (float64 for float64). Rows of padding are zero and `-inf`.

    Raises:
        ValueError: shapes, devices or layouts do not fit together.
    """
    check_arrays(q, k, v)
    check_layouts(layouts, q.shape[0], q_start, q.shape[2])
    check_keys(k.shape[2], q_start + q.shape[2])
    check_categories(categories, q.shape[1])
    n_batch, n_heads, n_queries, dim = q.shape
    out = q.new_empty(n_batch, n_queries, n_heads, dim)
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((n_batch, n_heads, n_queries), -torch.inf, dtype=precise, device=q.device)
    for b, layout in enumerate(layouts):
        out[b, : max(layout.start - q_start, 0)] = 0
        out[b, max(layout.stop - q_start, 0) :] = 0
    categories = np.asarray(categories)
    group = n_heads // k.shape[1]
    for value in np.unique(categories):
        heads = np.flatnonzero(categories == value)
        # [B, heads, T, D]; a view when the heads are neighbours
        q_heads = pick(q, heads)
        k_heads, v_heads = (pick(x, heads // group) for x in (k, v))
        where = as_index(heads, q.device)
        for b, layout in enumerate(layouts):
            rows = _Rows(q_heads[b : b + 1], k_heads[b : b + 1], v_heads[b : b + 1], layout, scale, window, q_start)
            for queries, o, m in rows.blocks(Category(int(value)), template):
                put(out[b], queries, where, o[0].transpose(0, 1))
                put(lse[b].T, queries, where, m[0].T)
    return out, lse


class _Rows:
    """The rows of one sequence for the heads of one category; `blocks` yields their attention piece by piece."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None, q_start: int
    ) -> None:
        self.q, self.k, self.v = q, k, v  # [1, heads, T or S, D]
        self.layout, self.scale, self.window = layout, scale, window
        self.q_start, self.q_stop = q_start, q_start + q.shape[2]
        self.recorded = _recorded(q, k, v)
        self.triangles: dict[int, Tensor] = {}

    def blocks(self, category: Category, template: SinkTemplate) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
        """Yields `(queries [n], out [1, heads, n, D], lse [1, heads, n])`, queries counted from the first."""
        layout = self.layout
        first, last = max(self.q_start, layout.start), min(self.q_stop, layout.stop)
        whole = category is Category.DENSE and self.window is None and not layout.bidirectional
        if whole and first == layout.start:
            if first < last:
                q, k, v = self.q[:, :, first - self.q_start :], self.k[:, :, first:last], self.v[:, :, first:last]
                yield (
                    slice(first - self.q_start, last - self.q_start),
                    *_attend(q[:, :, : last - first], k, v, self.scale, causal=True),
                )
            return
        yield from self._text(layout.textual_rows)
        packed = packed_positions(layout, category, template)
        tiles = image_tiles(
            layout, category, template, packed, window=self.window, q_start=self.q_start, q_stop=self.q_stop
        )
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
                _join(extra[:, :, p_start:p_stop], own[:, :, lo:hi], None if self.recorded else buffer)
                for extra, own, buffer in zip(packed_kv, (self.k, self.v), buffers, strict=True)
            )
            if len(group.lo) > 1:
                yield self._several(group, p_start, positions, k, v)
            else:
                yield from self._image(start, stop, positions, k, v)

    def _image(
        self, start: int, stop: int, positions: np.ndarray, k: Tensor, v: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The rows `[start, stop)` of one image; the last of its keys, at `positions`, is its last row if causal."""
        both_ways = self.layout.bidirectional
        first = start
        while first < stop:
            last = first + (stop - first - 1) % _CHUNK_ROWS + 1
            common = len(positions) - (stop - first)
            ahead = None
            if self.window is None and not both_ways and last - first == _CHUNK_ROWS and common >= _CHUNK_KEYS:
                rows = slice(first - self.q_start, last - self.q_start)
                ahead = _attend(self.q[:, :, rows], k[:, :, :common], v[:, :, :common], self.scale)
            begin = 0 if ahead is None else common
            for s in range(first, last, _BLOCK_ROWS):
                e = min(s + _BLOCK_ROWS, last)
                end = len(positions) - (0 if both_ways else stop - e)
                bias = self._bias(np.arange(s, e), positions[begin:end], both_ways=both_ways)
                rows = slice(s - self.q_start, e - self.q_start)
                o, m = _attend(self.q[:, :, rows], k[:, :, begin:end], v[:, :, begin:end], self.scale, bias=bias)
                if ahead is not None:
                    part = slice(s - first, e - first)
                    o, m = merge(ahead[0][:, :, part], ahead[1][:, :, part], o, m)
                yield rows, o, m
            first = last

    def _several(
        self, group: Tiles, p_start: int, positions: np.ndarray, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Several small tiles in one call: every row is shown its own tile's keys among those of all."""
        rows = concatenated_ranges(group.row_start, group.row_stop)
        lo, hi, p_stop = (
            np.repeat(x, group.row_stop - group.row_start)[:, None] for x in (group.lo, group.hi, group.packed_stop)
        )
        index = np.arange(len(positions)) + p_start
        own = (positions >= lo) & (positions < hi)
        if not self.layout.bidirectional:
            own &= positions <= rows[:, None]
        shown = np.where(index < group.packed_stop[-1], index < p_stop, own)
        if self.window is not None:
            shown &= positions > rows[:, None] - self.window
        queries = torch.from_numpy(rows - self.q_start).to(self.q.device)
        hidden = torch.from_numpy(~shown).to(self.q.device)
        return queries, *_attend(self.q[:, :, queries], k, v, self.scale, bias=self._hide(hidden))

    def _text(self, rows: np.ndarray) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
        """Text and delimiter rows: everything before them, inside the window."""
        for block in _text_blocks(rows[(rows >= self.q_start) & (rows < self.q_stop)]):
            lo = self.layout.start if self.window is None else max(self.layout.start, int(block[0]) - self.window + 1)
            hi = int(block[-1]) + 1
            queries = torch.from_numpy(block - self.q_start).to(self.q.device)
            bias = self._bias(block, np.arange(lo, hi), both_ways=False)
            yield (
                queries,
                *_attend(self.q[:, :, queries], self.k[:, :, lo:hi], self.v[:, :, lo:hi], self.scale, bias=bias),
            )

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
    short = [run for run in runs if len(run) < _LONG_TEXT]
    gathered = np.concatenate(short) if short else rows[:0]
    for run in [gathered, *(run for run in runs if len(run) >= _LONG_TEXT)]:
        step = _TEXT_ROWS
        if len(run) and run is not gathered:
            step = max(_TEXT_ROWS, min(_BLOCK_ROWS, _BIAS_ENTRIES // int(run[-1] + 1)))
        yield from np.split(run, range(step, len(run), step)) if len(run) else ()


def _recorded(*inputs: Tensor) -> bool:
    """Whether what is computed from these will be differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _join(extra: Tensor, own: Tensor, buffer: Tensor | None) -> Tensor:
    """`[extra | own]` along the tokens, written into `buffer` if there is one and anything to join."""
    n = extra.shape[2]
    if n == 0:
        return own
    if buffer is None:
        return torch.cat([extra, own], dim=2)
    joined = buffer[:, :, : n + own.shape[2]]
    joined[:, :, :n] = extra
    joined[:, :, n:] = own
    return joined


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp: `[1, H, T, D]`, `[1, H, S, D]` -> `[1, H, T, D]`, `[1, H, T]`.

    `causal` aligns the triangle at the upper left; `bias` `[T, S]` is added to the scores.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    if _recorded(q, k, v):  # the scores of one block only are ever kept for the backward
        return checkpoint(_attend_unfused, q, k, v, scale, causal=causal, bias=bias, use_reentrant=False)
    return _attend_unfused(q, k, v, scale, causal=causal, bias=bias)


def _attend_unfused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`_attend` by matrix products, a bounded number of scores at a time."""
    precise = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(precise).transpose(2, 3), v.to(precise)
    outs, lses = [], []
    step = max(1, _SCORES_AT_ONCE // (q.shape[1] * k.shape[2]))
    for s in range(0, q.shape[2], step):
        scores = (q[:, :, s : s + step].to(precise) @ keys) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(s + 1), -torch.inf)
        if bias is not None:
            scores = scores + bias[s : s + step]
        lses.append(scores.logsumexp(-1))
        outs.append((torch.exp(scores - lses[-1][..., None]) @ values).to(q.dtype))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
