"""Prefill attention on a GPU: sparse heads by the Triton kernel, dense ones by whichever kernel is faster for them.

The same code runs on CPU tensors where Triton is interpreted (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from blindsight_kernels.checks import check_categories, check_keys, check_layouts
from blindsight_kernels.triton_prefill import check_inputs, triton_attention
from shared_profiles import Category, Layout, SinkTemplate
from torch_blindsight.heads import as_index, pick
from torch_blindsight.vendor import vendor_attention, vendor_serves

# Dense heads go to the vendor's kernel from this many keys on; below, one launch of ours for all heads saves more than
# the vendor's better rate gives. Bidirectional images cost the vendor's kernel a second pass over their tokens and a
# merge, which more keys outweigh. Both numbers are estimates: neither has been measured yet.
VENDOR_KEYS, VENDOR_KEYS_BIDIRECTIONAL = 2048, 8192


def mixed_attention(
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
    """Prefill attention of a batch, every head by its category; called as `triton_attention`, which see.

    Returns:
        `[B, T, H, D]` outputs in q's dtype, contiguous, and `[B, H, T]` log-sum-exps of the scaled scores, float32.
        Rows of padding are zero and `-inf`.

    Raises:
        ValueError, NotImplementedError: as `triton_attention`.
    """
    check_inputs(q, k, v, scale)
    check_layouts(layouts, q.shape[0], q_start, q.shape[2])
    check_keys(k.shape[2], q_start + q.shape[2])
    check_categories(categories, q.shape[1])
    dense = np.flatnonzero(np.asarray(categories) == Category.DENSE)
    by_vendor = len(dense) > 0 and _vendor_is_faster(q, k, v, layouts, window)
    if by_vendor and len(dense) == q.shape[1]:
        return vendor_attention(q, k, v, layouts, scale=scale, q_start=q_start)
    out, lse = triton_attention(
        q,
        k,
        v,
        layouts,
        categories,
        template,
        scale=scale,
        window=window,
        q_start=q_start,
        skip_dense=by_vendor,
    )
    if by_vendor:
        keys = _keys_of(k, v, dense, q.shape[1])
        where = as_index(dense, q.device)
        out[:, :, where], lse[:, where] = vendor_attention(pick(q, dense), *keys, layouts, scale=scale, q_start=q_start)
    return out, lse


def _vendor_is_faster(q: Tensor, k: Tensor, v: Tensor, layouts: Sequence[Layout], window: int | None) -> bool:
    """Which kernel computes dense heads: the vendor's, unless it cannot or the prompt is short."""
    n_keys = max(layout.stop - layout.start for layout in layouts)
    if window is not None and window < n_keys:
        return False
    both_ways = any(layout.bidirectional for layout in layouts)
    return n_keys >= (VENDOR_KEYS_BIDIRECTIONAL if both_ways else VENDOR_KEYS) and vendor_serves(q, k, v)


def _keys_of(k: Tensor, v: Tensor, heads: np.ndarray, n_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values for some of the heads, grouped as before if all groups lost equally many, else one a head."""
    kv = heads // (n_heads // k.shape[1])
    groups, sizes = np.unique(kv, return_counts=True)
    chosen = groups if (sizes == sizes[0]).all() else kv
    return pick(k, chosen), pick(v, chosen)
