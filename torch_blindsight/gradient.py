"""What each head's change would do to the answer, from one backward pass through the dense model.

What is propagated back is `xi . logits`, `xi` the random vector of `shared_profiles.fisher`, which says why.

The backward pass goes layer by layer, each recomputed from what it read:

    forward, keeping each layer's input ──► logits ──► d/d(last output)
    layer L-1 again ──► d/d(its o), d/d(its input) ──► layer L-2 again ──► ...

so that one layer's graph exists at a time, and memory grows with the prompt, not with its square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_profiles import Category, Layout, SinkTemplate
from shared_profiles.fisher import fisher_vector, magnified, prompt_seed
from torch_blindsight.attention import Prefill, announce
from torch_blindsight.models import decoder_layers, unpack
from torch_blindsight.observe import ObserveMode, Observer
from torch_blindsight.portable import portable_attention
from torch_blindsight.prompts import next_token_logits


class GradientMode(ObserveMode):
    """Measures prompts whose gradients follow; a `Mode`. `measure_with_gradient` drives it."""

    observer: GradientObserver | None

    def _observer(self, layouts: list[Layout]) -> Observer:
        return GradientObserver(layouts, self.info, self.template, self._attend, self._stream)


class GradientObserver(Observer):
    """Runs dense in the forward; measures each layer when it is computed again, once its gradient is known."""

    again = False  # whether layers are being computed again
    _seen: tuple[Tensor, tuple[Tensor, Tensor, Tensor, float, int | None]] | None = None

    def __call__(
        self, prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Dense attention of one layer, `[B, T, H, D]`; differentiable and kept for `measure` the second time."""
        if not self.again:
            heads = [Category.DENSE] * q.shape[1]
            return self._attend(q, k, v, self.layouts, heads, self.template, scale=scale, window=window)[0]
        out = differentiable_dense(q, k, v, self.layouts, self.template, scale, window)
        self._seen = out, (q.detach(), k.detach(), v.detach(), scale, window)
        return out

    def backward(self, calls: list[tuple[Any, tuple, dict[str, Any]]], gradient: Tensor) -> None:
        """Computes every layer again, the last first, and measures it with its gradient.

        Args:
            calls: the layers with the arguments they were called with; the first argument is what they read.
            gradient: `[B, T, E]`, by the last layer's output.
        """
        self.again = True
        announce(Prefill(self.layouts, 0, self, self.config, differentiable=True))
        try:
            for number in reversed(range(len(calls))):
                layer, (hidden, *args), kwargs = calls.pop()
                hidden = hidden.detach().requires_grad_()
                outputs = layer(hidden, *args, **kwargs)
                assert self._seen is not None
                out, (q, k, v, scale, window) = self._seen
                by_out = None
                if out.requires_grad:
                    gradient, by_out = torch.autograd.grad(outputs, (hidden, out), gradient, allow_unused=True)
                if by_out is None:  # nothing came through the projections
                    raise NotImplementedError(
                        f"the ranking 'gradient' needs layers that can be differentiated. Layer {number} cannot: "
                        f"{type(layer.self_attn.o_proj).__name__} has no backward pass. Rank by 'residual': "
                        "Budget(..., 'residual'), --ranking residual."
                    )
                self._seen = None
                del outputs, out, hidden
                self.measure(number, q, k, v, scale, window, by_out)
        finally:
            announce(None)


@torch.inference_mode(False)
@torch.enable_grad()
def measure_with_gradient(model: nn.Module, mode: GradientMode, prompt: Mapping[str, Any]) -> Observer | None:
    """Runs one prompt forward and back, under an installed handle of `mode`; None if it has fewer than two images."""
    mode.observer = None
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = decoder_layers(model, mode.info)
    calls: list[tuple[Any, tuple, dict[str, Any]]] = []
    last: list[Tensor] = []

    def call(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((layer, args, kwargs))

    def cut(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The last layer's output becomes a leaf: only what follows it is differentiated at once."""
        torch.set_grad_enabled(True)
        last.append(output.detach().requires_grad_())
        return last[0]

    hooks = [layer.register_forward_pre_hook(call, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(cut))
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():  # until `cut`: embeddings that ask for gradients would keep a graph of all layers
            logits = next_token_logits(model, prompt)  # [1, V]
        if mode.observer is None:
            return None
        for hook in hooks:
            hook.remove()
        seed = prompt_seed(prompt["input_ids"].cpu().numpy())
        vector, unit = magnified(fisher_vector(logits.detach().float().cpu().numpy(), seed))
        (gradient,) = torch.autograd.grad(logits.float(), last.pop(), torch.from_numpy(vector).to(logits.device))
        unpack(model)
        mode.observer.backward(calls, gradient)
        mode.observer.harm["gradient"] *= np.float32(unit**2)
        return mode.observer
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def differentiable_dense(
    q: Tensor, k: Tensor, v: Tensor, layouts: list[Layout], template: SinkTemplate, scale: float, window: int | None
) -> Tensor:
    """The model's own attention, `[B, T, H, D]`, whose backward needs no S x S matrix."""
    n = q.shape[2]
    causal = all(x.start == 0 and x.stop == n and not x.bidirectional for x in layouts)
    if causal and (window is None or window >= n):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).contiguous()
    heads = [Category.DENSE] * q.shape[1]
    return portable_attention(q, k, v, layouts, heads, template, scale=scale, window=window)[0]
