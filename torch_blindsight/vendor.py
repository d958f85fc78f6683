"""Dense attention by the fastest kernels that come with PyTorch: cuDNN first, else FlashAttention.

They know causal squares and rectangles, and nothing else. What a prefill needs is put together from those, the parts
merged by their log-sum-exps; no mask is ever built::

    keys       past      own tokens           image, looking both ways       its upper triangle, read backwards
    queries    1 1 1  |  1                    1 1 1 1        1                     1
               1 1 1  |  1 1              =>  1 1 1 1   =    1 1        +          1 1
               1 1 1  |  1 1 1                1 1 1 1        1 1 1                 1 1 1
              rectangle  causal                              causal            causal, of one row less

Sliding windows are not served: a window has no such decomposition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from shared_profiles.layout import Layout
from torch_blindsight.merging import merge

# Earlier versions are wrong where the length is not a multiple of 128 (pytorch/pytorch#169849).
_MINIMUM_CUDNN = 91501
# Tokens of bidirectional images computed at once: bounds the memory of what is gathered for them.
_IMAGE_TOKENS = 1 << 14


def vendor_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a vendor's kernel takes such queries, keys and values; not on old GPUs, and not float32 on any."""
    if q.device.type == "cpu":
        return True
    n = min(q.shape[2], k.shape[2])
    params = SDPAParams(q[:, :, :n], k[:, :, :n], v[:, :, :n], None, 0.0, True, True)
    return can_use_flash_attention(params)  # what cuDNN takes besides, the part that it does not take may need


def vendor_attention(
    q: Tensor, k: Tensor, v: Tensor, layouts: Sequence[Layout], *, scale: float, q_start: int = 0
) -> tuple[Tensor, Tensor]:
    """Dense attention of a prefill, without a sliding window.

    Args:
        q: `[B, H, T, D]`, row t standing at position `q_start + t`; a dtype and device that `vendor_serves`.
        k, v: `[B, K, S, D]`, H a multiple of K, S at least `q_start + T`; keys beyond are ignored.
        layouts: B layouts of `q_start + T` tokens.
        scale: factor on the scores.
        q_start: position of the first query.

    Returns:
        `[B, T, H, D]` outputs in q's dtype, contiguous, and `[B, H, T]` log-sum-exps, float32 (float64 for float64).
        Rows of padding are zero and `-inf`.
    """
    n_batch, n_heads, n_queries, dim = q.shape
    stop = q_start + n_queries
    spans = {(layout.start, layout.stop) for layout in layouts}
    if n_queries and spans == {(0, stop)}:
        out, lse = _rows(q, k, v, layouts, scale, q_start)
        return out.transpose(1, 2).contiguous(), lse
    out = q.new_zeros(n_batch, n_queries, n_heads, dim)
    precise = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((n_batch, n_heads, n_queries), -torch.inf, dtype=precise, device=q.device)
    for b, layout in enumerate(layouts):
        rows = slice(max(layout.start - q_start, 0), max(layout.stop - q_start, 0))
        if rows.start < rows.stop:
            o, m = _rows(q[b : b + 1, :, rows], k[b : b + 1], v[b : b + 1], [layout], scale, q_start + rows.start)
            out[b, rows], lse[b, :, rows] = o[0].transpose(0, 1), m[0]
    return out, lse


def _rows(
    q: Tensor, k: Tensor, v: Tensor, layouts: Sequence[Layout], scale: float, first: int
) -> tuple[Tensor, Tensor]:
    """Rows at `[first, first + T)` of sequences that all begin at `layouts[0].start`: `[B, H, T, D]`, `[B, H, T]`."""
    start, stop = layouts[0].start, first + q.shape[2]
    own_k, own_v = k[:, :, first:stop], v[:, :, first:stop]
    out, lse = _fused(q, own_k, own_v, scale, causal=True)
    if first > start:
        past, past_lse = _fused(q, k[:, :, start:first], v[:, :, start:first], scale, causal=False)
        merged, lse = merge(out, lse, past, past_lse)
        out = merged.to(q.dtype)
    for b, layout in enumerate(layouts):
        if layout.bidirectional:
            _add_upper_triangles(out[b], lse[b], q[b], own_k[b], own_v[b], layout, scale, first)
    return out, lse


def _add_upper_triangles(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, first: int
) -> None:
    """Adds to causal rows what those of an image see of its later tokens: in place, `[H, T, D]` and `[H, T]`.

    Row i of n sees keys i + 1 .. n - 1. With rows and keys read backwards that is a causal square of n - 1.
    """
    for rows in _images(layout, first, first + q.shape[1]):
        index = torch.from_numpy(rows).to(q.device)  # [m, n], the last token of each image first
        later, earlier = index[:, :-1], index[:, 1:]
        o, m = _fused(_gather(q, earlier), _gather(k, later), _gather(v, later), scale, causal=True)
        where = earlier.reshape(-1)
        merged = merge(out[:, where], lse[:, where], o.transpose(0, 1).flatten(1, 2), m.transpose(0, 1).flatten(1, 2))
        out[:, where], lse[:, where] = merged[0].to(q.dtype), merged[1]


def _images(layout: Layout, first: int, stop: int) -> Iterator[np.ndarray]:
    """Tokens of the images among rows `[first, stop)`, counted from `first`, last first: `[m, n]` of one length."""
    begin, end = np.maximum(layout.images[:, 1], first) - first, np.minimum(layout.images[:, 2], stop) - first
    lengths = end - begin
    for n in np.unique(lengths[lengths > 1]).tolist():
        rows = end[lengths == n][:, None] - 1 - np.arange(n)
        step = max(1, _IMAGE_TOKENS // n)
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """`[H, N, D]` at `[m, n]` -> `[m, H, n, D]`, heads of a token adjacent."""
    return x.transpose(0, 1)[index].transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """One call of a vendor's kernel: `[B, H, T, D]`, `[B, K, S, D]` -> `[B, H, T, D]`, `[B, H, T]`; causal: T = S."""
    if q.device.type == "cpu":
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    params = SDPAParams(q, k, v, None, 0.0, causal, True)
    if can_use_cudnn_attention(params) and (torch.backends.cudnn.version() or 0) >= _MINIMUM_CUDNN:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        return out, lse.reshape(q.shape[:3])  # comes as [B, H, T, 1]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
