"""Dense heads by the fastest kernels that come with PyTorch: cuDNN first, else FlashAttention.

They know causal squares and rectangles, and nothing else. What a prefill needs is put together from those, the parts
merged by their log-sum-exps; no mask is ever built::

    keys       past      own tokens           image, looking both ways       its upper triangle, read backwards
    queries    1 1 1  |  1                    1 1 1 1        1                     1
               1 1 1  |  1 1              =>  1 1 1 1   =    1 1        +          1 1
               1 1 1  |  1 1 1                1 1 1 1        1 1 1                 1 1 1
              rectangle  causal                              causal            causal, of one row less

cuDNN builds an execution plan for every shape it has not seen. So heads come one at a time, as views: one plan a prompt
length serves all layers, however many of their heads are dense. The triangles, small and of many lengths, go to
FlashAttention, which builds none.

Sliding windows are not served: a window has no such decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from shared_profiles.layout import Layout
from torch_blindsight.merging import merge

# Beyond, those who bring cuDNN to PyTorch report trouble since cuDNN 9.11 (pytorch/pytorch#161210), and FlashAttention
# should be no faster than our kernel (an estimate).
MOST_DIM = 128
# Earlier versions are wrong where the length is not a multiple of 128 (pytorch/pytorch#169849).
_MINIMUM_CUDNN = 91501
# Tokens of bidirectional images computed at once: bounds the memory of what is gathered for them.
_IMAGE_TOKENS = 1 << 16


def vendor_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a vendor's kernel takes such queries, keys and values; not on old GPUs, and not float32 on any.

    Nor heads of more than `MOST_DIM` dimensions.
    """
    if q.shape[-1] > MOST_DIM:
        return False
    if q.device.type == "cpu":
        return True
    n = min(q.shape[2], k.shape[2])
    q, k, v = (x[:1, :1, :n] for x in (q, k, v))
    params = SDPAParams(q, k, v, None, 0.0, True, False)
    return can_use_flash_attention(params)  # what cuDNN takes besides, the part that it does not take may need


def vendor_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layouts: Sequence[Layout],
    heads: Sequence[int],
    *,
    scale: float,
    q_start: int = 0,
) -> None:
    """Dense attention of some heads of a prefill, without a sliding window, written into outputs of all heads.

    Args:
        out: `[B, T, H, D]`; rows of padding and other heads are left as they are.
        lse: `[B, H, T]`, likewise: log-sum-exps of the scaled scores.
        q: `[B, H, T, D]`, row t standing at position `q_start + t`; a dtype and device that `vendor_serves`.
        k, v: `[B, K, S, D]`, H a multiple of K, S at least `q_start + T`; keys beyond are ignored.
        layouts: B layouts of `q_start + T` tokens.
        heads: which.
        scale: factor on the scores.
        q_start: position of the first query.
    """
    group = q.shape[1] // k.shape[1]
    for b, layout in enumerate(layouts):
        rows = slice(max(layout.start - q_start, 0), layout.stop - q_start)
        if rows.start >= rows.stop:
            continue
        for head in heads:
            one, kv = slice(head, head + 1), slice(head // group, head // group + 1)
            o, m = _head(
                q[b : b + 1, one, rows], k[b : b + 1, kv], v[b : b + 1, kv], layout, scale, q_start + rows.start
            )
            out[b, rows, head], lse[b, head, rows] = o[0, 0], m[0, 0]


def _head(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, first: int) -> tuple[Tensor, Tensor]:
    """One head's rows at `[first, first + T)`: `[1, 1, T, D]`, `[1, 1, S, D]` -> `[1, 1, T, D]`, `[1, 1, T]`."""
    stop = first + q.shape[2]
    own_k, own_v = k[:, :, first:stop], v[:, :, first:stop]
    out, lse = _planned(q, own_k, own_v, scale, causal=True)
    if first > layout.start:
        past = slice(layout.start, first)
        merged, lse = merge(out, lse, *_planned(q, k[:, :, past], v[:, :, past], scale, causal=False))
        out = merged.to(q.dtype)
    if layout.bidirectional:
        _add_upper_triangles(out[0, 0], lse[0, 0], q[0, 0], own_k[0, 0], own_v[0, 0], layout, scale, first)
    return out, lse


def _add_upper_triangles(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, first: int
) -> None:
    """Adds to causal rows what those of an image see of its later tokens: in place, `[T, D]` and `[T]`.

    Row i of n sees keys i + 1 .. n - 1. With rows and keys read backwards that is a causal square of n - 1.
    """
    for index in _images(layout, first, q.device):
        later, earlier = index[:, :-1], index[:, 1:]
        o, m = _flash(q[earlier][:, None], k[later][:, None], v[later][:, None], scale, causal=True)  # [m, 1, n - 1, D]
        where = earlier.reshape(-1)
        merged = merge(out[where], lse[where], o.flatten(0, 2), m.flatten())
        out[where], lse[where] = merged[0].to(q.dtype), merged[1]


@lru_cache(maxsize=16)
def _images(layout: Layout, first: int, device: torch.device) -> tuple[Tensor, ...]:
    """Tokens of the images among rows from `first` on, counted from `first`, last first: `[m, n]` each."""
    begin, end = np.maximum(layout.images[:, 1], first) - first, layout.images[:, 2] - first
    lengths, found = end - begin, []
    for n in np.unique(lengths[lengths > 1]).tolist():
        rows = torch.from_numpy(end[lengths == n][:, None] - 1 - np.arange(n)).to(device)
        found += rows.split(max(1, _IMAGE_TOKENS // n))
    return tuple(found)


def _planned(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """`_flash`, but by cuDNN where it can."""
    if q.device.type != "cpu":
        can = can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, causal, False))
        if can and (torch.backends.cudnn.version() or 0) >= _MINIMUM_CUDNN:
            call = torch.ops.aten._scaled_dot_product_cudnn_attention
            out, lse = call(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
            return out, lse.reshape(q.shape[:3])  # comes as [B, H, T, 1]
    return _flash(q, k, v, scale, causal=causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """One call of FlashAttention: `[B, H, T, D]`, `[B, H, S, D]` -> `[B, H, T, D]`, `[B, H, T]`; causal: T = S."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
