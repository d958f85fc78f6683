"""Models that transformers has split over several processes (`tp_plan`): each computes its own heads, of all tokens.

    process 0: heads 0 .. H/n-1   ─┐
    process 1: heads H/n .. 2H/n-1 ├─► output projections, summed over the processes
    ...                           ─┘

Attention needs nothing of another process's heads, so a prefill is sparse as it is elsewhere. A layer takes as long as
the process with most to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def local_heads(model: nn.Module, attentions: Sequence[Any], n_heads: int) -> range:
    """The query heads that this process computes.

    Args:
        model: a Hugging Face model.
        attentions: its attention modules.
        n_heads: query heads of a layer, those of all processes.

    Raises:
        NotImplementedError: the projections are split, but not by heads, or in a way that they do not tell.
    """
    if (getattr(model, "tp_size", None) or 1) == 1:
        return range(n_heads)
    found = {_share(attention.q_proj.weight) for attention in attentions}
    rank, n = found.pop() if len(found) == 1 else (0, 0)
    if n == 0 or n_heads % n:
        raise NotImplementedError(
            "a tensor-parallel model must have the query projections of all layers split evenly by heads "
            f"(tp_plan, not quantized). Got {n_heads} heads over {model.tp_size} processes, split otherwise. "
            "Load it with device_map instead, which spreads whole layers over several GPUs."
        )
    return range(n_heads // n * rank, n_heads // n * (rank + 1))


def _share(weight: Tensor) -> tuple[int, int]:
    """Which part a process has of a projection, and of how many; (0, 0) where that cannot be told."""
    if not isinstance(weight, DTensor):
        return 0, 0
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    return (mesh.get_local_rank(), mesh.size()) if placements == (Shard(0),) else (0, 0)


def require_agreement(attentions: Sequence[Any], choice: object) -> None:
    """Checks that all processes of a tensor-parallel model have the same profile; all of them must call this.

    Args:
        attentions: its attention modules.
        choice: what decides how this process computes; picklable, None if it has no profile.

    Raises:
        ValueError: another process has another one.
    """
    group = attentions[0].q_proj.weight.device_mesh.get_group()
    choices: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(choices, choice, group=group)
    other = [rank for rank, theirs in enumerate(choices) if theirs != choices[0]]
    if other:
        raise ValueError(
            "all processes of a tensor-parallel model must have the same profile. Got another one, or none, in those "
            f"of rank {', '.join(map(str, other))} than in that of rank 0. Pass the path of one file that all can read."
        )
