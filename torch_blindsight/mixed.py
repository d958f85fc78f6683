"""Prefill attention on a GPU: sparse heads by the Triton kernel, dense ones by whichever kernel is faster for them.

The same code runs on CPU tensors where Triton is interpreted (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from blindsight_kernels.triton_prefill import triton_attention
from shared_profiles import Category, Layout, SinkTemplate
from torch_blindsight.vendor import vendor_attention, vendor_serves

# Dense heads go to the vendor's kernel where a prefill has so many rows. An estimate, not measured yet: cuDNN is said
# to take 55 to 440 ms for the plan of a new length, and at 36K rows its better rate would gain a few tens of ms in all
# layers together. From here on one head fills the GPU, 512 tiles of rows for 132 processors.
VENDOR_ROWS = 1 << 16


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
    # `triton_attention` checks the arguments.
    dense = np.flatnonzero(np.asarray(categories) == Category.DENSE).tolist()
    by_vendor = len(dense) > 0 and _vendor_is_faster(q, k, v, layouts, window, q_start)
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
        vendor_attention(out, lse, q, k, v, layouts, dense, scale=scale, q_start=q_start)
    return out, lse


def _vendor_is_faster(
    q: Tensor, k: Tensor, v: Tensor, layouts: Sequence[Layout], window: int | None, q_start: int
) -> bool:
    """Which kernel computes dense heads: the vendor's, unless it cannot or the rows are few."""
    if window is not None and window < max(layout.stop - layout.start for layout in layouts):
        return False
    n_rows = max(layout.stop - max(layout.start, q_start) for layout in layouts)
    return n_rows >= VENDOR_ROWS and vendor_serves(q, k, v)
