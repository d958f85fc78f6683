"""How far a head's change moves the residual stream: what ranks heads where no gradient can be had.

A layer adds `W_o o` to what it reads, `x`. A change of one head's output moves that by `W_o change`, relative to the
stream `||W_o change|| / ||x||`. Gemma 3 normalizes `W_o o` before adding it; the norm of a row then scales its changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_blindsight.models import ModelInfo, decoder_layers


class ResidualStream:
    """Norms of what every layer reads, noted while a forward passes; a context manager.

    Args:
        model: the model.
        info: its attention-relevant facts.
    """

    def __init__(self, model: nn.Module, info: ModelInfo) -> None:
        self._layers = decoder_layers(model, info)
        self._shape = info.n_heads, info.head_dim
        self._norms: dict[int, Tensor] = {}  # by layer, [B, T]
        self._grams: dict[int, Tensor] = {}  # by layer, [H, D, D] float32: W_o^T W_o of each head
        self._hooks: list[Any] = []

    def __enter__(self) -> ResidualStream:
        for i, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_pre_hook(self._noting(i), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def moved(self, layer: int, b: int, rows: Tensor, dense: Tensor, change: Tensor) -> Tensor:
        """`(||W_o change|| / ||x||)^2` of every head: `[n, H]`.

        Args:
            layer: which.
            b: batch row.
            rows: `[n]`, which queries.
            dense: `[B, T, H, D]`, the layer's dense outputs.
            change: `[n, H, D]` float32, what a category changes in these rows.
        """
        moved = torch.einsum("nhd,hde,nhe->nh", change, self._gram(layer, dense), change).clamp_min(0)
        norms = self._norms[layer][b, rows]
        scale = torch.where(norms == 0, 0.0, self._added(layer, dense[b, rows]) / norms)  # zeros have no scale
        return moved * scale[:, None] ** 2

    def _gram(self, layer: int, like: Tensor) -> Tensor:
        if layer not in self._grams:
            n_heads, dim = self._shape
            # What the projection does to unit vectors is its weight, quantized or with adapters as it may be.
            units = torch.eye(n_heads * dim, dtype=like.dtype, device=like.device)
            project = self._layers[layer].self_attn.o_proj
            columns = project(units).float() - project(torch.zeros_like(units[:1])).float()  # [H * D, E]; no bias
            by_head = columns.view(n_heads, dim, -1)
            self._grams[layer] = by_head @ by_head.mT
        return self._grams[layer]

    def _added(self, layer: int, dense: Tensor) -> Tensor | float:
        """By what each row `[n, H, D]` of the attention's output is scaled on its way to the stream: `[n]`."""
        module = self._layers[layer]
        if not hasattr(module, "pre_feedforward_layernorm"):  # without it, what follows attention norms the next part
            return 1.0
        projected = module.self_attn.o_proj(dense.flatten(1))
        norms = [x.float().norm(dim=-1) for x in (module.post_attention_layernorm(projected), projected)]
        return norms[0] / norms[1].clamp_min(torch.finfo(torch.float32).tiny)

    def _noting(self, layer: int) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0]  # [B, T, E]
            precise = torch.promote_types(hidden.dtype, torch.float32)
            self._norms[layer] = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=precise)

        return note
