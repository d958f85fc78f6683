"""An attention of transformers' that does as it is told: which keys each query sees comes with the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "by_masks"


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, allowed: Sequence, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Plain softmax attention, q `[B, H, N, D]`, over the keys that `allowed`, of each layer `[B, H, N, N]`, names."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    weights = scores.masked_fill(~torch.as_tensor(allowed[module.layer_idx]), -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
