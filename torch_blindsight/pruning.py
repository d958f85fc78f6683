"""Dropping tokens of a prompt on its way through a patched model: before the language model, or between two layers.

                  layers 0 .. k-1              layers k .. L-1
    hidden        a <s> .  .  .  .  <e> b      a <s> .  .  <e> b         kept = pruner(seen) = [0, 1, 3, 4, 6, 7]
    positions     0  1  2  3  4  5   6  7      0  1  3  4   6  7         nothing is numbered anew
    layout        layout                       layout.keep(kept)
    cache         8 keys a layer               6 keys a layer; the next token stands at 8 in all of them

Hooks in front of the decoder layers cut what goes in; the categories, the attention function and its kernels are
those of any prefill. A decode step looks at all keys of its layer's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shared_profiles import Layout
from torch_blindsight.attention import AttendLayer, Prefill, current_prefill
from torch_blindsight.known_tokens import length_of
from torch_blindsight.models import ModelInfo, decoder_layers
from torch_blindsight.modes import SparseMode
from torch_blindsight.prompts import Dense, holds_pictures, worth_it

REFUSAL = (
    "a patch with a pruner takes prompts with images one at a time, whole, unpadded, on a dynamic cache. Got: {}. "
    "Patch without the pruner for others."
)


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention starts from.

    Attributes:
        queries: `[H, N, D]`, rotary position applied.
        keys: `[K, N, D]` likewise.
        scale: factor on their scores.
        window: sliding window in tokens, None where the layer has none.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    window: int | None

    def of_last_token(self) -> Tensor:
        """The attention that the last token pays to every token: `[H, N]` float32, or float64 for float64.

        A token of text looks at everything, whatever the categories, so this is what the model computed for it.
        """
        precise = torch.promote_types(self.queries.dtype, torch.float32)
        query = self.queries[:, -1].to(precise).unflatten(0, (len(self.keys), -1))  # [K, G, D]
        scores = (query @ self.keys.to(precise).transpose(1, 2)).flatten(0, 1) * self.scale
        if self.window is not None:
            scores[:, : -self.window] = -torch.inf
        return scores.softmax(-1)


@dataclass(frozen=True)
class Seen:
    """What a pruner sees of a prompt of N tokens.

    Attributes:
        layout: where its images are.
        hidden: `[N, E]`, what enters the pruner's layer. For layer 0 that is the embeddings, with the features of the
            images, as the language model gets them, in the images' places.
        before: the attention of the layer before; None for layer 0.
    """

    layout: Layout
    hidden: Tensor
    before: LayerAttention | None


class Pruner(Protocol):
    """Chooses the tokens that a prompt goes on with; `torch_blindsight.pruners` has two.

    Attributes:
        layer: what is dropped, is dropped right before this layer. 0: before the language model.
    """

    @property
    def layer(self) -> int:
        """See above."""
        ...

    def __call__(self, seen: Seen) -> np.ndarray:
        """Positions to keep, `[n]` integers, ascending, the prompt's last token among them."""
        ...


@dataclass
class PrunedPrefill(Prefill):
    """A prefill on which tokens are dropped.

    Attributes:
        before: the attention of the layer before the pruner's, until the pruner has seen it.
        kept: positions of the tokens that are left; None until the pruner has chosen.
        next_position: position id of the token after the prompt: `[1, 1]`, or `[3, 1, 1]` and `[4, 1, 1]` for mRoPE.
    """

    before: LayerAttention | None = None
    kept: np.ndarray | None = None
    next_position: Tensor | None = None


_FILLED = "_blindsight_pruned"  # the attribute of a cache that holds its `_Filled`; copies of the cache have it, too


@dataclass(frozen=True)
class _Filled:
    """How a pruned prompt has left a cache: the length it reports, and the next token's position id."""

    length: int
    next_position: Tensor


class Pruning:
    """Makes a patched model prune its prompts. What it cannot prune, it refuses; prompts without images stay whole.

    Args:
        model: the model.
        info: its attention-relevant facts.
        pruner: chooses the tokens.

    Raises:
        ValueError: the model has no such layer, or this is no pruner.
    """

    def __init__(self, model: nn.Module, info: ModelInfo, pruner: Pruner) -> None:
        layer = getattr(pruner, "layer", None)
        if isinstance(pruner, type) or not callable(pruner) or layer is None:
            raise ValueError(
                "a pruner must be an object with a layer, to be called with a prompt, like DivPrune(0.5). "
                f"Got {pruner!r:.200}."
            )
        if not isinstance(layer, int | np.integer) or not 0 <= layer < info.n_layers:
            raise ValueError(f"a pruner's layer must be one of the model's {info.n_layers}. Got {layer}.")
        self.pruner, self._info = pruner, info
        self._decoder: Any = model.get_decoder()  # type: ignore[operator]  # of every transformers model
        self._layers = decoder_layers(model, info)

    def hooks(self) -> list[Any]:
        """Hangs the hooks; removing them undoes it."""
        hooks = [
            layer.register_forward_pre_hook(partial(self._before_layer, i), with_kwargs=True)
            for i, layer in enumerate(self._layers)
        ]
        return [*hooks, self._decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)]

    def must_prune(self, arguments: Mapping[str, Any], training: bool) -> bool:
        """Whether a forward is a prompt with images.

        Args:
            arguments: the forward's arguments by name.
            training: whether the model is in training mode.

        Raises:
            ValueError: it is one that cannot be pruned, or follows a pruned one and is no decode step.
        """
        ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        past = length_of(cache)
        filled: _Filled | None = getattr(cache, _FILLED, None)
        if filled is not None:
            self._check_step(arguments, past - filled.length)
            return False
        if ids is not None:
            is_step = past > 0 and ids.shape[1] == 1
            if is_step or not holds_pictures(ids, self._info.special):
                return False
        mask, labels, rows = arguments.get("attention_mask"), arguments.get("labels"), arguments.get("logits_to_keep")
        slides = [layer.is_sliding for layer in cache.layers] if cache is not None else []
        compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in (self._decoder, *self._layers))
        refusals = {
            "embeddings instead of input_ids": ids is None,
            "a batch of several prompts": ids is not None and len(ids) > 1,
            "a prompt in pieces, or a second turn": past > 0,
            "padding": isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all(),
            "training mode, or labels": training or labels is not None,
            "logits_to_keep as a tensor": isinstance(rows, Tensor),
            "a compiled language model": compiled,
            "a static cache": getattr(cache, "is_compileable", False),
            "a cache that keeps sliding layers whole; use DynamicCache(config=model.config)": cache is not None
            and slides != [w is not None for w in self._info.windows]
            and any(self._info.windows),
        }
        for what, is_so in refusals.items():
            if is_so:
                raise ValueError(REFUSAL.format(what))
        return True

    def _check_step(self, arguments: Mapping[str, Any], n_decoded: int) -> None:
        """Refuses what does not follow a pruned prompt."""
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        masked = isinstance(mask, Tensor) and not mask.all()
        if ids is None or ids.shape != (1, 1) or n_decoded < 0 or masked:
            given = "no input_ids" if ids is None else f"input_ids of shape {tuple(ids.shape)}"
            raise ValueError(
                "a pruned prompt must be followed by decode steps of one token, input_ids of shape (1, 1), its cache "
                f"uncut and unmasked. Got {given}, {'some tokens masked, ' * masked}{n_decoded} tokens decoded so far. "
                "For another turn, prefill the whole conversation on a new cache."
            )

    def prefill(self, layout: Layout, mode: SparseMode, arguments: dict[str, Any]) -> tuple[str, PrunedPrefill]:
        """What to count this prompt as, and its prefill; one that does not pay to run sparsely is pruned all the same.

        Args:
            layout: the whole prompt.
            mode: how it is computed, and whether that pays.
            arguments: the forward's arguments by name.
        """
        try:
            worth_it([layout], 0)
            how, attend = mode.prefill([layout], 0, arguments)
        except Dense as reason:
            how, attend = f"dense: {reason}", mode.attend_dense
        differentiable = mode.implementation.differentiable
        prefill = PrunedPrefill([layout], 0, self._noting(attend), self._info.config, differentiable)
        return f"{how}, pruned", prefill

    def next_position(self, cache: Any) -> Tensor | None:
        """The position id of the token that a decode step adds; None for a cache of no pruned prompt."""
        filled: _Filled | None = getattr(cache, _FILLED, None)
        return None if filled is None else filled.next_position + (length_of(cache) - filled.length)

    def after(self, prefill: PrunedPrefill, cache: Any) -> None:
        """Notes what a prefill has left in its cache.

        Raises:
            RuntimeError: nothing was dropped: the hooks were not called.
        """
        if prefill.kept is None or prefill.next_position is None:
            raise RuntimeError("the decoder layers must be called with their hooks. Got a prefill that was not pruned.")
        if cache is not None:
            setattr(cache, _FILLED, _Filled(length_of(cache), prefill.next_position))

    def _noting(self, attend: AttendLayer) -> AttendLayer:
        """`attend`, keeping what the pruner wants to see of the layer before its own."""

        def attend_and_note(
            prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
        ) -> Tensor:
            if layer == self.pruner.layer - 1 and isinstance(prefill, PrunedPrefill):
                prefill.before = LayerAttention(q[0].detach(), k[0].detach(), scale, window)
            return attend(prefill, layer, q, k, v, scale, window)

        return attend_and_note

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes which position id comes after the prompt."""
        prefill = current_prefill.get()
        if isinstance(prefill, PrunedPrefill):
            positions, device = kwargs.get("position_ids"), kwargs["inputs_embeds"].device
            if positions is None:  # then transformers counts
                positions = torch.full((1, 1), prefill.layouts[0].n_tokens - 1, device=device)
            prefill.next_position = positions[..., -1:] + 1

    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Drops the tokens at the pruner's layer; from there on, cuts what the model passes besides."""
        prefill = current_prefill.get()
        if not isinstance(prefill, PrunedPrefill):
            # One mask for all layers does not fit caches of several lengths, and one new token sees all of each.
            is_step = hasattr(kwargs.get("past_key_values"), _FILLED)
            return (args, kwargs | {"attention_mask": None}) if is_step else None
        if layer < self.pruner.layer:
            return None
        hidden = args[0]
        if layer == self.pruner.layer:
            prefill.kept = self._choose(prefill, hidden[0])
            hidden = _select(hidden, 1, prefill.kept)
        assert prefill.kept is not None
        cut: dict[str, Any] = {
            "position_embeddings": tuple(_select(x, -2, prefill.kept) for x in kwargs["position_embeddings"])
        }
        if kwargs.get("position_ids") is not None:
            cut["position_ids"] = _select(kwargs["position_ids"], -1, prefill.kept)
        return (hidden, *args[1:]), kwargs | cut

    def _choose(self, prefill: PrunedPrefill, hidden: Tensor) -> np.ndarray:
        """Asks the pruner about hidden states `[N, E]`; from here on the prefill's layout is of the kept tokens."""
        layout, before, prefill.before = prefill.layouts[0], prefill.before, None
        kept = np.asarray(self.pruner(Seen(layout, hidden.detach(), before)))
        prefill.layouts = [layout.keep(kept)]
        if kept[-1] != layout.n_tokens - 1:
            raise ValueError(
                f"a pruner must keep the prompt's last token, {layout.n_tokens - 1}, which the next one follows. "
                f"Got {kept[-1]} as the last to keep."
            )
        return kept.astype(np.int64)


def _select(x: Tensor, dim: int, kept: np.ndarray) -> Tensor:
    """The kept entries along one dimension."""
    return x.index_select(dim, torch.from_numpy(kept).to(x.device))
