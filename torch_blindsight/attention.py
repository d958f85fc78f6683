"""The attention function and mask function that transformers calls, and what one forward tells them.

Both are registered once under one name. What a forward needs travels in a context variable that the patch's hooks
set and clear: no state lives in the functions, and two threads may serve two models. With no prefill announced, or
one that runs dense, both do exactly what transformers' own SDPA does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shared_profiles import Layout

# Must not contain "flash", "sdpa", "flex_attention", "/" or "paged|": transformers gives those names a meaning.
NAME = "blindsight"

# Attends for one layer: (layer, q [B,H,T,D], k [B,K,S,D], v, scale, window) -> [B,T,H,D] contiguous.
AttendLayer = Callable[["Prefill", int, Tensor, Tensor, Tensor, float, int | None], Tensor]


@dataclass
class Prefill:
    """One forward that runs through BlindSight.

    Attributes:
        layouts: one per batch row, of `q_start + T` tokens.
        q_start: position of the first query; more than 0 on a filled cache.
        attend: computes one layer.
        layers: the layers that came by; the patch checks afterwards that all did.
    """

    layouts: list[Layout]
    q_start: int
    attend: AttendLayer
    layers: list[int] = field(default_factory=list)


current_prefill: ContextVar[Prefill | None] = ContextVar("blindsight_prefill", default=None)


def blindsight_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' attention interface wants it.

    Args:
        module: the attention module; its `layer_idx` says which layer this is.
        query: `[B, H, T, D]`, rotary position applied.
        key, value: `[B, K, S, D]`, the cache included.
        attention_mask: used by dense forwards only.
        scaling: factor on the scores.
        sliding_window: window in tokens of a sliding layer, else None.

    Returns:
        `[B, T, H, D]` contiguous, and None for the weights.
    """
    prefill = current_prefill.get()
    if prefill is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    prefill.layers.append(layer)
    missing = prefill.q_start + query.shape[2] - key.shape[2]
    if missing > 0:
        if sliding_window is None:
            raise ValueError(
                f"layer {layer} must get the keys of all {prefill.q_start + query.shape[2]} tokens. "
                f"Got {key.shape[2]}: the cache dropped some. Use a cache that keeps full-attention layers whole."
            )
        # A sliding layer's cache holds the last keys only; the others are out of every query's window.
        key, value = (F.pad(x, (0, 0, missing, 0)) for x in (key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return prefill.attend(prefill, layer, query, key, value, scale, sliding_window), None


def blindsight_mask(*args, **kwargs) -> Tensor | None:
    """No mask for a prefill that BlindSight computes, transformers' SDPA mask for any other forward."""
    return sdpa_mask(*args, **kwargs) if current_prefill.get() is None else None


def register() -> None:
    """Makes `NAME` known to transformers; harmless to repeat."""
    AttentionInterface.register(NAME, blindsight_attention)
    AttentionMaskInterface.register(NAME, blindsight_mask)


def registered() -> bool:
    """Whether transformers' tables hold our two functions under `NAME`."""
    return (
        NAME in ALL_ATTENTION_FUNCTIONS
        and ALL_ATTENTION_FUNCTIONS[NAME] is blindsight_attention
        and NAME in ALL_MASK_ATTENTION_FUNCTIONS
        and ALL_MASK_ATTENTION_FUNCTIONS[NAME] is blindsight_mask
    )
