"""What every prefill attention demands of its arguments, whichever library the arrays come from.

Only shapes, dtypes and devices are looked at, so any arrays that have them will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shared_profiles.layout import Layout


def shapes_fit(q: Any, k: Any, v: Any) -> bool:
    """Whether q is `[B, H, T, D]` and both k and v are `[B, K, S, D]`, K at least 1; K need not divide H."""
    fit: bool = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3] and k.shape[1] > 0
    return fit


def check_arrays(q: Any, k: Any, v: Any) -> None:
    """Refuses queries, keys and values that do not fit together.

    Args:
        q: `[B, H, T, D]`.
        k, v: `[B, K, S, D]`, H a multiple of K, of q's dtype and on its device.

    Raises:
        ValueError: they are not.
    """
    if not shapes_fit(q, k, v) or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q, k and v must be [B, H, T, D], [B, K, S, D], [B, K, S, D] with H a multiple of K. Got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}. Do not repeat keys for grouped heads."
        )
    if not q.device == k.device == v.device or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must share one device and one dtype. Got {q.device}, {k.device}, {v.device}; "
            f"{q.dtype}, {k.dtype}, {v.dtype}. Move or convert them first."
        )


def check_layouts(layouts: Sequence[Layout], n_batch: int, q_start: int, n_queries: int) -> None:
    """Refuses layouts that are not those of a batch's tokens so far.

    Raises:
        ValueError: not one layout per batch row, or not of `q_start + T` tokens.
    """
    stop = q_start + n_queries
    if len(layouts) != n_batch or any(layout.n_tokens != stop for layout in layouts):
        raise ValueError(
            f"there must be {n_batch} layouts of q_start + T = {stop} tokens, padding included. Got layouts of "
            f"{[layout.n_tokens for layout in layouts]} tokens. Build one layout per batch row from the ids so far."
        )


def check_keys(n_keys: int, stop: int) -> None:
    """Refuses keys that end before the last query.

    Raises:
        ValueError: S is less than `stop`, the position after the last query.
    """
    if n_keys < stop:
        raise ValueError(
            f"k and v must hold all keys up to the last query, S >= {stop}. Got S={n_keys}. Use a cache that keeps "
            "every token, or pad dropped keys of a sliding layer on the left."
        )


def check_categories(categories: Sequence[int] | np.ndarray, n_heads: int) -> None:
    """Refuses categories that are not one per query head.

    Raises:
        ValueError: another number than H.
    """
    if len(categories) != n_heads:
        raise ValueError(f"categories must hold one category per query head, H={n_heads}. Got {len(categories)}.")


def check_window(window: int | None) -> None:
    """Refuses a sliding window in which a token does not even see itself.

    Raises:
        ValueError: it is less than 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None. Got {window}.")
