"""The reference attention: NumPy, float64, one boolean mask a head; what kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared_profiles.categories import Category
from shared_profiles.layout import Layout
from shared_profiles.masks import category_mask
from shared_profiles.template import SinkTemplate


def masked_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention of one head under a boolean mask.

    Args:
        q: queries `[T, D]`.
        k, v: keys and values `[S, D]`.
        mask: `[T, S]` bool, True where the query may look.
        scale: factor on the scores, usually `D ** -0.5`.

    Returns:
        The output `[T, D]` and the log-sum-exp of the scaled scores `[T]`, float64. A row that sees nothing gives
        zeros and `-inf`.
    """
    scores = np.where(mask, (q.astype(np.float64) @ k.astype(np.float64).T) * scale, -np.inf)  # [T, S]
    peak = scores.max(axis=1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + peak
    return weights @ v.astype(np.float64) / np.where(total > 0, total, 1.0), lse[:, 0]


def reference_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    layouts: Sequence[Layout],
    categories: Sequence[int] | np.ndarray,
    template: SinkTemplate,
    *,
    scale: float,
    window: int | None = None,
    q_start: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Prefill attention of a batch by the definition of each head's category.

    Args:
        q: queries `[B, H, T, D]`, row t standing at position `q_start + t`.
        k, v: keys and values `[B, K, S, D]`, H a multiple of K, S at least `q_start + T`.
        layouts: B layouts of `q_start + T` tokens.
        categories: `[H]` indices into `Category`.
        template: sinks and local blocks.
        scale: factor on the scores.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.

    Returns:
        `[B, H, T, D]` outputs and `[B, H, T]` log-sum-exps, float64. Rows of padding are zero and `-inf`.
    """
    group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:3], -np.inf)
    for b, layout in enumerate(layouts):
        masks = {
            c: category_mask(layout, Category(c), template, window=window, q_start=q_start)
            for c in set(map(int, categories))
        }
        for h, category in enumerate(map(int, categories)):
            keys, values = k[b, h // group, : layout.n_tokens], v[b, h // group, : layout.n_tokens]
            out[b, h], lse[b, h] = masked_attention(q[b, h], keys, values, masks[category], scale)
    return out, lse
