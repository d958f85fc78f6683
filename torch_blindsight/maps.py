"""Attention maps of some heads on one short prompt, for looking at: the one place where a T x S matrix exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_profiles import Category, Layout, SinkTemplate, category_mask
from torch_blindsight.attention import AttendLayer, Prefill
from torch_blindsight.implementations import Attend, Name
from torch_blindsight.modes import Mode
from torch_blindsight.sinks import observing

MOST_TOKENS = 1024


class MapMode:
    """Runs a prefill dense and keeps the attention weights of some heads; a `Mode`.

    Attributes:
        layout: of the prompt that was drawn.
        maps: per (layer, head), `[N, N]` float32.
    """

    def __init__(self, attend: Attend, heads: Sequence[tuple[int, int]]) -> None:
        self._attend, self._heads = attend, heads
        self.layout: Layout | None = None
        self.maps: dict[tuple[int, int], np.ndarray] = {}

    def prefill(self, layouts: list[Layout], q_start: int, arguments: dict[str, Any]) -> tuple[str, AttendLayer]:
        """Keeps this prompt."""
        if q_start or len(layouts) != 1:
            got = f"{len(layouts)} from position {q_start} on"
            raise ValueError(f"prompts must be drawn one at a time, and whole. Got {got}.")
        if layouts[0].n_tokens > MOST_TOKENS:
            raise ValueError(f"a drawn prompt must have at most {MOST_TOKENS} tokens. Got {layouts[0].n_tokens}.")
        self.layout = layouts[0]
        return "measured", self.attend

    def after(self, prefill: Prefill, arguments: dict[str, Any]) -> Mode:
        """Goes on."""
        return self

    def attend(
        self, prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Dense attention of one layer, `[1, T, H, D]`; an `AttendLayer`."""
        (layout,) = prefill.layouts
        template = SinkTemplate()  # dense heads do not look at it
        heads = [Category.DENSE] * q.shape[1]
        out, lse = self._attend(q, k, v, prefill.layouts, heads, template, scale=scale, window=window)
        drawn = [head for at, head in self._heads if at == layer]
        if drawn:
            mask = torch.from_numpy(category_mask(layout, Category.DENSE, template, window=window)).to(q.device)
            group = q.shape[1] // k.shape[1]
            for head in drawn:
                scores = (q[0, head].float() @ k[0, head // group].float().T) * scale
                weights = torch.exp(scores - lse[0, head, :, None]).masked_fill(~mask, 0.0)
                self.maps[layer, head] = weights.float().cpu().numpy()
        return out


def attention_maps(
    model: nn.Module, prompt: Mapping[str, Any], heads: Sequence[tuple[int, int]], *, impl: Name | None = None
) -> tuple[Layout, dict[tuple[int, int], np.ndarray]]:
    """The attention weights of some heads.

    Args:
        model: a supported Hugging Face model, not patched.
        prompt: what the model's processor returns for one prompt of at least two images.
        heads: (layer, head) of those to keep.
        impl: what computes the attention; as in `patch`.

    Returns:
        The prompt's layout, and per (layer, head) the weights `[N, N]` float32; rows sum to 1.

    Raises:
        ValueError: the prompt is malformed, too long to draw, or has fewer than two images; or the model is patched.
        ValueError, NotImplementedError, ImportError: the implementation cannot serve this model; it is tensor-parallel.
    """
    with observing(model, lambda _, attend: MapMode(attend, heads), impl) as mode:
        model(**prompt, use_cache=False, logits_to_keep=1)
    if mode.layout is None:
        raise ValueError("a drawn prompt must have at least two images. Got fewer.")
    return mode.layout, mode.maps
