"""Random queries, keys and values for the tests of attention."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_inputs(
    seed: int, batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """`[B, H, T, D]`, and twice `[B, K, S, D]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
