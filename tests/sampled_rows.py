"""Attention of a few rows of a long prompt: the float64 reference, and plain attention in low precision beside it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blindsight_kernels.reference import masked_attention
from shared_profiles import Category, Layout, SinkTemplate, category_mask

TEMPLATE = SinkTemplate()


def images_in(n: int, n_images: int) -> Layout:
    """A prompt of `n` tokens, mostly images of equal size, with a few words of text around each."""
    step = (n - 20) // n_images
    begin = 7 + step * np.arange(n_images)
    return Layout(n, 0, n, np.stack([begin, begin + 1, begin + step - 5, begin + step - 4], axis=1))


def check_rows(out: Any, lse: Any, q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout, categories) -> None:
    """Demands, in rows of every kind, at most twice the error of plain attention in the same precision.

    Args:
        out: `[1, T, H, D]`, what is tested, and `lse` `[1, H, T]`; with `TEMPLATE` and a scale of `D ** -0.5`.
        q, k, v: `[1, H, T, D]` and twice `[1, K, S, D]`, T and S at least the layout's N tokens.
        layout: from position 0 on, without a window.
        categories: `[H]`.
    """
    n, scale = layout.n_tokens, q.shape[3] ** -0.5
    some = np.random.default_rng(1).choice(n, 64, replace=False)
    rows = np.unique([*layout.images[:, :3].flat, *(layout.images[:, 2:] - 1).flat, 0, n - 1, *some])  # R of them
    masks = {c: category_mask(layout, Category(c), TEMPLATE)[rows] for c in set(categories)}  # [R, N] each
    wrong: list[float] = []
    allowed: list[float] = []
    for head, category in enumerate(categories):
        kv = head // (q.shape[1] // k.shape[1])
        given = q[0, head, rows], k[0, kv, :n], v[0, kv, :n]
        exact, exact_lse = masked_attention(*(np.asarray(x, np.float64) for x in given), masks[category], scale)
        plain = _plain(*given, masks[category], scale)
        wrong.append(np.abs(np.asarray(out[0, rows, head], np.float64) - exact).max())
        allowed.append(2 * np.abs(np.asarray(plain, np.float64) - exact).max())
        if lse is not None:
            np.testing.assert_allclose(lse[0, head, rows], exact_lse, rtol=0, atol=5e-5)
    assert max(wrong) <= max(allowed), f"errors of the heads {wrong}, of plain attention twice {allowed}"


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray, scale: float) -> jax.Array:
    """Attention with everything in q's dtype: `[R, D]`."""
    scores = jnp.where(mask, q @ k.T * jnp.asarray(scale, q.dtype), -jnp.inf)  # [R, N]
    return jax.nn.softmax(scores, axis=-1) @ v
