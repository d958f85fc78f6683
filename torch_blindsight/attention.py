"""The attention function and mask function that transformers calls, and what one forward tells them.

Both are registered once under one name. What a forward needs travels in a context variable that the patch's hooks
set and clear: no state lives in the functions, and two threads may serve two models. With no prefill announced for the
model that calls, or one that runs dense, both do exactly what transformers' own SDPA does.

Under `torch.compile` a prefill is one opaque operator, `blindsight::prefill`, that looks for the prompt when it runs:
the compiled graph knows nothing of layouts or profiles, and one graph serves every prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shared_profiles import Layout

logger = logging.getLogger("torch_blindsight")

# Must not contain "flash", "sdpa", "flex_attention", "/" or "paged|": transformers gives those names a meaning.
NAME = "blindsight"

# With a mask, torch's fused attention on CUDA multiplies row by row length in 32 bits: with more query-key pairs than
# this, later rows are masked by wrong parts of it, and nothing says so (pytorch issue 187227).
MOST_MASKED_PAIRS = 1 << 32

# Attends for one layer: (prefill, layer, q [B,H,T,D], k [B,K,S,D], v, scale, window) -> [B,T,H,D] contiguous.
AttendLayer = Callable[["Prefill", int, Tensor, Tensor, Tensor, float, int | None], Tensor]


@dataclass
class Prefill:
    """One forward that runs through BlindSight.

    Attributes:
        layouts: one per batch row, of `q_start + T` tokens.
        q_start: position of the first query; more than 0 on a filled cache.
        attend: computes one layer.
        config: the language model's configuration, which tells its layers from another model's.
        differentiable: whether torch can differentiate what `attend` does.
        layers: the layers that came by; the patch checks afterwards that all did.
        padding: `[B, N]`, what masks were last asked for with, if anything.
    """

    layouts: list[Layout]
    q_start: int
    attend: AttendLayer
    config: object
    differentiable: bool = False
    layers: list[int] = field(default_factory=list)
    padding: Tensor | None = None


current_prefill: ContextVar[Prefill | None] = ContextVar("blindsight_prefill", default=None)
# The configuration of the language model whose patched forward is in progress, sparse or dense.
_in_progress: ContextVar[object] = ContextVar("blindsight_in_progress", default=None)


class _Announced:
    """Whether a prefill is announced, as `torch.compile` can see and guard it: it cannot trace a context variable.

    One for all threads, unlike the context variable. Compiled models that prefill in two threads at once may find the
    other's answer here; `blindsight::prefill` and the patch's hooks then raise.
    """

    def __init__(self) -> None:
        self.sparse = False


_announced = _Announced()


def announce(prefill: Prefill | None, config: object = None) -> None:
    """Says what the forward that now begins is.

    Args:
        prefill: None for one that runs dense, or none.
        config: the language model's configuration; it matters where a forward runs dense.
    """
    current_prefill.set(prefill)
    _in_progress.set(config)
    _announced.sparse = prefill is not None


def _runs_dense(config: object) -> bool:
    """Whether the forward in progress is none that BlindSight computes, or of another model than the caller."""
    if torch.compiler.is_compiling():
        return not _announced.sparse
    prefill = current_prefill.get()
    return prefill is None or prefill.config is not config


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

    Raises:
        NotImplementedError: a dense forward that torch would compute wrongly, see `MOST_MASKED_PAIRS`; a layer that
            a backward pass computes again by itself.
    """
    if _runs_dense(module.config):
        # In training, layers may be computed again in the backward pass, outside of any forward.
        if not (torch.compiler.is_compiling() or module.training) and _in_progress.get() is not module.config:
            _refuse_recomputing()
            _warn_of_a_bypass()
        if attention_mask is not None:
            check_masked(query.shape[2] * key.shape[2], query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    # Here, as inside the operator autocast is off.
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if not torch.compiler.is_compiling() and current_prefill.get().differentiable:  # type: ignore[union-attr]
        return _prefill(query, key, value, layer, scale, sliding_window), None
    return prefill_op(query, key, value, layer, scale, sliding_window), None


def _refuse_recomputing() -> None:
    """Refuses a layer that is computed again in a backward pass: whether its prefill was sparse is no longer known.

    Raises:
        NotImplementedError: it is one.
    """
    if torch._C._current_graph_task_id() != -1:
        raise NotImplementedError(
            "layers of a patched model in evaluation mode must not be checkpointed one by one: in the backward pass "
            "nobody knows the prompt. Checkpoint the call of the whole model, or unpatch it."
        )


@cache
def _warn_of_a_bypass() -> None:
    """Once a process: who serves that way does so for every prompt."""
    logger.warning(
        "a forward ran dense, uncounted: it went past the patch, whose hooks are on the model that patch() got. Call "
        "that model itself, not its .forward or a part of it such as .model. This is said once."
    )


def check_masked(n_pairs: int, device: torch.device) -> None:
    """Refuses dense attention with a mask of so many query-key pairs that torch would compute it wrongly.

    Raises:
        NotImplementedError: it would.
    """
    if device.type == "cuda" and n_pairs > MOST_MASKED_PAIRS:
        raise NotImplementedError(
            f"dense attention with a mask must have at most {MOST_MASKED_PAIRS} query-key pairs on CUDA: with more, "
            f"torch uses wrong parts of the mask (pytorch issue 187227). Got {n_pairs}. Prefill in pieces, for example "
            "prefill_chunk_size of generate; sparse prefills need no mask."
        )


def _prefill(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int | None) -> Tensor:
    """One layer of the announced prefill: `[B, H, T, D]`, `[B, K, S, D]` -> `[B, T, H, D]` contiguous."""
    prefill = current_prefill.get()
    if prefill is None:
        raise RuntimeError(
            "a compiled model must be called in one thread at a time, and through the patched model, whose hooks say "
            "what the prompt is. Got a sparse forward with no prompt announced."
        )
    prefill.layers.append(layer)
    missing = prefill.q_start + q.shape[2] - k.shape[2]
    if missing > 0:
        if window is None:
            raise ValueError(
                f"layer {layer} must get the keys of all {prefill.q_start + q.shape[2]} tokens. "
                f"Got {k.shape[2]}: the cache dropped some. Use a cache that keeps full-attention layers whole."
            )
        # A sliding layer's cache holds the last keys only; the others are out of every query's window.
        k, v = (F.pad(x, (0, 0, missing, 0)) for x in (k, v))
    return prefill.attend(prefill, layer, q, k, v, scale, window)


def _autocast(x: Tensor) -> Tensor:
    """The input as SDPA would take it: under autocast in autocast's dtype, unless it is float64."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


# What it computes depends on the announced prompt, which a recorded CUDA graph would not see change.
prefill_op = torch.library.custom_op(
    "blindsight::prefill", _prefill, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@prefill_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(
        "this prefill cannot be differentiated: it is measured, compiled, or computed by an implementation without "
        "gradients. Run it under torch.no_grad(); or for gradients, patch with a profile and impl='portable', and do "
        "not compile."
    )


prefill_op.register_autograd(_no_gradient)


def blindsight_mask(*args, config: PreTrainedConfig, **kwargs) -> Tensor | None:
    """No mask for a prefill that BlindSight computes, transformers' SDPA mask for any other forward."""
    kwargs["config"] = config
    compiling, sparse = torch.compiler.is_compiling(), not _runs_dense(config.get_text_config())
    if sparse and not compiling:
        prefill = current_prefill.get()
        assert prefill is not None
        prefill.padding = kwargs.get("attention_mask")
        if prefill.layers:
            # Masks come before layers: that forward was interrupted, and this one did not come by the patched model.
            announce(None)
            sparse = False
    if sparse:
        return None
    mask = sdpa_mask(*args, **kwargs)
    if mask is not None and not compiling:
        # `generate` makes a static cache's masks before the forward, which needs to know the padding in them.
        mask._blindsight_made_of = kwargs.get("attention_mask")
    return mask


def made_of(mask: Tensor | Mapping[str, Tensor] | None) -> Tensor | Mapping[str, Tensor] | None:
    """The padding mask `[B, N]` or None that `blindsight_mask` made this of, for one kind of layers or for each.

    The mask itself where it is none of those.
    """
    parts = _parts(mask)
    if not parts:  # plain causal, for which SDPA needs no mask
        return None
    if not all(hasattr(part, "_blindsight_made_of") for part in parts):
        return mask
    padding: Tensor | None = parts[0]._blindsight_made_of  # type: ignore[attr-defined]
    return padding


def lost_padding(interrupted: Prefill | None, arguments: Mapping[str, Any]) -> Tensor | None:
    """The padding `[B, N]` that a forward's mask lacks, because it was made while a sparse prefill seemed in progress.

    `generate` makes a static cache's masks before the forward. After a prefill that was interrupted before its layers,
    by Ctrl-C, it gets those of a sparse one: None. With any other cache, None is what the caller gave.
    """
    static = getattr(arguments.get("past_key_values"), "is_compileable", False)
    if interrupted is None or interrupted.layers or not static:
        return None
    return None if _parts(arguments.get("attention_mask")) else interrupted.padding


def _parts(mask: Tensor | Mapping[str, Tensor] | None) -> list[Tensor]:
    """The masks that there are, of one kind of layers or of each."""
    return [part for part in (mask.values() if isinstance(mask, Mapping) else [mask]) if part is not None]


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
