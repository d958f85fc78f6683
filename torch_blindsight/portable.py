"""Sparse prefill attention in plain torch, on any device: the same rule as the kernels, one block of rows at a time.

A block is one image (or local block) of one sequence. Its rows read `[packed keys before it | keys of its range]`:

* causal blocks go to the fused causal attention with the packed keys in front. The rows just before the image stand
  in as queries for the packed keys, so the causal triangle falls exactly where it must; their outputs are dropped.
  No mask is built and nothing is merged.
* blocks of a bidirectional image read both parts whole.
* blocks cut by a sliding window carry a small mask.

Where the packed keys outnumber the rows, stand-in queries would cost more than they save: then the two parts are
computed apart and merged by their log-sum-exp. Memory grows with the prompt, never with its square.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared_profiles import Category, Layout, SinkTemplate, image_tiles, packed_positions

# Rows of a masked block at most: bounds its mask to this many rows times the keys in reach.
_MASKED_ROWS = 512
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
    _check(q, k, v, layouts, categories, q_start)
    n_batch, n_heads, n_queries, dim = q.shape
    out = q.new_zeros(n_batch, n_queries, n_heads, dim)
    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((n_batch, n_heads, n_queries), -torch.inf, dtype=precise, device=q.device)
    categories = np.asarray(categories)
    group = n_heads // k.shape[1]
    for value in np.unique(categories):
        heads = np.flatnonzero(categories == value)
        # [B, heads, T, D]; a view when the heads are neighbours
        q_heads = _pick(q, heads)
        k_heads, v_heads = (_pick(x, heads // group) for x in (k, v))
        where = _as_index(heads, q.device)
        for b, layout in enumerate(layouts):
            rows = _Rows(q_heads[b : b + 1], k_heads[b : b + 1], v_heads[b : b + 1], layout, scale, window, q_start)
            for start, stop, o, m in rows.blocks(Category(int(value)), template):
                out[b, start:stop, where] = o[0].transpose(0, 1)
                lse[b, where, start:stop] = m[0].to(precise)
    return out, lse


class _Rows:
    """The rows of one sequence for the heads of one category; `blocks` yields their attention piece by piece."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None, q_start: int
    ) -> None:
        self.q, self.k, self.v = q, k, v  # [1, heads, T or S, D]
        self.layout, self.scale, self.window = layout, scale, window
        self.q_start, self.q_stop = q_start, q_start + q.shape[2]

    def blocks(self, category: Category, template: SinkTemplate):
        """Yields `(start, stop, out [1, heads, n, D], lse [1, heads, n])`, start and stop counted in queries."""
        first, last = max(self.q_start, self.layout.start), min(self.q_stop, self.layout.stop)
        if category is Category.DENSE and not self.layout.bidirectional and self.window is None:
            if first < last:
                yield self._at(first, last, *self._causal(first, last, self.layout.start))
            return
        for start, stop in self._text_runs(first, last):
            yield from self._text(start, stop)
        packed = packed_positions(self.layout, category, template)
        tiles = image_tiles(
            self.layout, category, template, packed, window=self.window, q_start=self.q_start, q_stop=self.q_stop
        )
        index = torch.from_numpy(packed).to(self.q.device)
        self.packed_k, self.packed_v = self.k[:, :, index], self.v[:, :, index]  # [1, heads, P, D]
        columns = (tiles.row_start, tiles.row_stop, tiles.lo, tiles.hi, tiles.packed_start, tiles.packed_stop)
        for start, stop, lo, hi, packed_start, packed_stop in zip(*(c.tolist() for c in columns), strict=True):
            if self._window_cuts(stop, lo, packed[packed_start:packed_stop]):
                for s in range(start, stop, _MASKED_ROWS):
                    e = min(s + _MASKED_ROWS, stop)
                    part = packed[packed_start:packed_stop]
                    yield self._at(s, e, *self._masked(s, e, lo, hi if self.layout.bidirectional else e, part))
            elif self.layout.bidirectional:
                keys, values = self._joined(packed_start, packed_stop, lo, hi)
                yield self._at(start, stop, *_attend(self._queries(start, stop), keys, values, self.scale))
            else:
                yield self._at(start, stop, *self._causal(start, stop, lo, packed_start, packed_stop))

    def _at(self, start: int, stop: int, out: Tensor, lse: Tensor) -> tuple[int, int, Tensor, Tensor]:
        return start - self.q_start, stop - self.q_start, out, lse

    def _queries(self, start: int, stop: int) -> Tensor:
        return self.q[:, :, start - self.q_start : stop - self.q_start]

    def _text_runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Contiguous runs of text and delimiter rows inside `[first, last)`."""
        images = self.layout.images
        starts, stops = np.r_[self.layout.start, images[:, 2]], np.r_[images[:, 1], self.layout.stop]
        runs = zip(np.maximum(starts, first).tolist(), np.minimum(stops, last).tolist(), strict=True)
        return [(a, b) for a, b in runs if a < b]

    def _text(self, start: int, stop: int):
        """Text rows: everything before them, inside the window."""
        if self.window is None:
            yield self._at(start, stop, *self._causal(start, stop, self.layout.start))
            return
        none = np.zeros(0, dtype=np.int64)
        for s in range(start, stop, _MASKED_ROWS):
            e = min(s + _MASKED_ROWS, stop)
            lo = max(self.layout.start, s - self.window + 1)
            yield self._at(s, e, *self._masked(s, e, lo, e, none))

    def _window_cuts(self, stop: int, lo: int, packed: np.ndarray) -> bool:
        """Whether the window hides, from the block's last row, any key that its first row sees."""
        oldest = min(lo, int(packed[0])) if len(packed) else lo
        return self.window is not None and oldest <= stop - 1 - self.window

    def _joined(self, packed_start: int, packed_stop: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Packed keys and values followed by those of `[lo, hi)`: `[1, heads, P + hi - lo, D]` each."""
        pairs = ((self.packed_k, self.k), (self.packed_v, self.v)) if packed_stop > packed_start else ()
        if not pairs:
            return self.k[:, :, lo:hi], self.v[:, :, lo:hi]
        keys, values = (torch.cat([p[:, :, packed_start:packed_stop], x[:, :, lo:hi]], dim=2) for p, x in pairs)
        return keys, values

    def _causal(
        self, start: int, stop: int, lo: int, packed_start: int = 0, packed_stop: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Rows `[start, stop)` on some packed keys and, causally, on `[lo, stop)`."""
        n_before = packed_stop - packed_start + start - lo
        n_rows = stop - start
        if n_before <= min(n_rows // 2, start - self.q_start):
            keys, values = self._joined(packed_start, packed_stop, lo, stop)
            out, lse = _attend(self._queries(start - n_before, stop), keys, values, self.scale, causal=True)
            return out[:, :, n_before:], lse[:, :, n_before:]
        own = _attend(
            self._queries(start, stop), self.k[:, :, start:stop], self.v[:, :, start:stop], self.scale, causal=True
        )
        keys, values = self._joined(packed_start, packed_stop, lo, start)
        return _merge(own, _attend(self._queries(start, stop), keys, values, self.scale))

    def _masked(self, start: int, stop: int, lo: int, hi: int, packed: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows `[start, stop)` on the given packed positions and on `[lo, hi)`, every row inside its own window."""
        assert self.window is not None
        device = self.q.device
        packed = packed[packed > start - self.window]
        index = torch.from_numpy(np.concatenate([packed, np.arange(lo, hi)])).to(device)
        rows = torch.arange(start, stop, device=device)[:, None]
        allowed = index > rows - self.window
        if not (self.layout.bidirectional and self._is_image(start)):
            allowed &= index <= rows
        bias = torch.zeros(allowed.shape, dtype=self.q.dtype, device=device).masked_fill_(~allowed, -torch.inf)
        return _attend(self._queries(start, stop), self.k[:, :, index], self.v[:, :, index], self.scale, bias=bias)

    def _is_image(self, position: int) -> bool:
        _, first, last, _ = self.layout.images.T
        return bool(((first <= position) & (position < last)).any())


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
    return _attend_unfused(q, k, v, scale, causal=causal, bias=bias)


def _attend_unfused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`_attend` by matrix products, a bounded number of scores at a time."""
    precise = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    step = max(1, _SCORES_AT_ONCE // (q.shape[1] * k.shape[2]))
    for s in range(0, q.shape[2], step):
        scores = (q[:, :, s : s + step].to(precise) @ k.to(precise).transpose(2, 3)) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(s + 1), -torch.inf)
        if bias is not None:
            scores = scores + bias[s : s + step]
        lses.append(scores.logsumexp(-1))
        outs.append((torch.exp(scores - lses[-1][..., None]) @ v.to(precise)).to(q.dtype))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint sets of keys into attention over their union."""
    (o1, m1), (o2, m2) = one, other
    weight = torch.sigmoid(m2 - m1)[..., None].to(o1.dtype)
    return torch.lerp(o1, o2, weight), torch.logaddexp(m1, m2)


def _pick(x: Tensor, heads: np.ndarray) -> Tensor:
    """Heads of `[B, H, N, D]`, without a copy where they are neighbours."""
    return x[:, _as_index(heads, x.device)]


def _as_index(heads: np.ndarray, device: torch.device) -> slice | Tensor:
    if (np.diff(heads) == 1).all():
        return slice(int(heads[0]), int(heads[-1]) + 1)
    return torch.from_numpy(heads).to(device)


def _check(
    q: Tensor, k: Tensor, v: Tensor, layouts: Sequence[Layout], categories: Sequence[int] | np.ndarray, q_start: int
) -> None:
    """Refuses inputs that do not fit together."""
    stop = q_start + q.shape[2]
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q, k and v must be [B, H, T, D], [B, K, S, D], [B, K, S, D] with H a multiple of K. Got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if not q.device == k.device == v.device or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must share one device and one dtype. Got {q.device}, {k.device}, {v.device}; "
            f"{q.dtype}, {k.dtype}, {v.dtype}."
        )
    if len(layouts) != q.shape[0] or any(layout.n_tokens != stop for layout in layouts) or k.shape[2] < stop:
        raise ValueError(
            f"there must be {q.shape[0]} layouts of q_start + T = {stop} tokens, and at least as many keys. Got layouts of "
            f"{[layout.n_tokens for layout in layouts]} tokens and {k.shape[2]} keys."
        )
    if len(categories) != q.shape[1]:
        raise ValueError(f"categories must hold one category per query head, H={q.shape[1]}. Got {len(categories)}.")
