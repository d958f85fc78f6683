"""The ways to compute a prefill's attention, and which of them serves a model.

| name | what it is | where |
|---|---|---|
| `triton` | the Triton kernel; for dense heads of long prompts the vendor's | CUDA; CPU if TRITON_INTERPRET=1 |
| `portable` | plain torch, differentiable | any device |
| `reference` | the float64 definition in NumPy, slow | any device |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from blindsight_kernels.reference import reference_attention
from shared_profiles import Layout, SinkTemplate
from torch_blindsight.break_even import PORTABLE_COSTS, TRITON_COSTS, Costs
from torch_blindsight.models import ModelInfo
from torch_blindsight.portable import portable_attention

Name = Literal["triton", "portable", "reference"]


class Attend(Protocol):
    """Prefill attention of a batch, every head by its category; `portable_attention` says what the arguments are."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layouts: Sequence[Layout],
        categories: Sequence[int] | np.ndarray,
        template: SinkTemplate,
        *,
        scale: float,
        window: int | None = None,
        q_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Gives `[B, T, H, D]` contiguous and `[B, H, T]`."""
        ...


@dataclass(frozen=True)
class Implementation:
    """One way to compute a prefill's attention.

    Attributes:
        name: as `patch(impl=...)` takes it.
        attend: the computation.
        differentiable: whether torch can differentiate it.
        costs: what running sparsely costs beside the arithmetic; None where speed is not the point.
    """

    name: Name
    attend: Attend
    differentiable: bool
    costs: Costs | None


def implementation(name: str | None, model: nn.Module, info: ModelInfo) -> Implementation:
    """The implementation for a model.

    Args:
        name: which; None for `triton` where the model is on a CUDA device, `portable` elsewhere.
        model: the model, whose device and dtype count.
        info: its attention-relevant facts.

    Raises:
        ValueError: an unknown name, or `triton` for a model that is not on a GPU.
        NotImplementedError: `triton` cannot serve the model's GPU, dtype or head dimension.
        ImportError: Triton is missing or too old.
    """
    if name is not None and name not in get_args(Name):
        raise ValueError(f"impl must be one of {', '.join(get_args(Name))}, or None. Got {name!r}.")
    devices = attention_devices(info)
    name = name or ("triton" if all(device.type == "cuda" for device in devices) else "portable")
    if name == "portable":
        return Implementation("portable", portable_attention, True, PORTABLE_COSTS)
    if name == "reference":
        return Implementation("reference", _reference, False, None)
    from blindsight_kernels.triton_prefill import check_support  # imports Triton
    from torch_blindsight.mixed import mixed_attention

    for device in devices:
        check_support(device, getattr(model, "dtype", torch.float32), info.head_dim)
    return Implementation("triton", mixed_attention, False, TRITON_COSTS)


def attention_devices(info: ModelInfo) -> set[torch.device]:
    """Where a model's attention is computed."""
    # Of some quantizers' projections all tensors are buffers.
    return {
        next(chain(projection.parameters(), projection.buffers())).device
        for projection in (attention.q_proj for attention in info.attentions)
    }


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layouts: Sequence[Layout],
    categories: Sequence[int] | np.ndarray,
    template: SinkTemplate,
    *,
    scale: float,
    window: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """`reference_attention` of tensors."""
    q64, k64, v64 = (x.detach().double().cpu().numpy() for x in (q, k, v))
    out, lse = reference_attention(
        q64, k64, v64, layouts, categories, template, scale=scale, window=window, q_start=q_start
    )
    precise = torch.promote_types(q.dtype, torch.float32)
    return q.new_tensor(np.ascontiguousarray(out.transpose(0, 2, 1, 3))), q.new_tensor(lse, dtype=precise)
