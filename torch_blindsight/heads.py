"""Reading, writing and adding to some heads or rows of a tensor: without a copy where they are neighbours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def as_index(numbers: np.ndarray, device: torch.device) -> slice | Tensor:
    """What indexes these heads or rows: a slice where they are neighbours."""
    if len(numbers) and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers).to(device)


def take(source: Tensor, rows: slice | Tensor, heads: slice | Tensor) -> Tensor:
    """`source[rows, heads]` of `[T, H, ...]`, also where rows and heads are both lists."""
    return source[_both(rows, heads)]


def put(target: Tensor, rows: slice | Tensor, heads: slice | Tensor, value: Tensor) -> None:
    """`target[rows, heads] = value` for `[T, H, ...]`, also where rows and heads are both lists."""
    target[_both(rows, heads)] = value.to(target.dtype)


def add(target: Tensor, rows: slice | Tensor, heads: slice | Tensor, value: Tensor) -> None:
    """`target[rows, heads] += value`, likewise; neither list names one twice."""
    target[_both(rows, heads)] += value.to(target.dtype)


def _both(rows: slice | Tensor, heads: slice | Tensor) -> tuple[slice | Tensor, slice | Tensor]:
    if isinstance(rows, Tensor) and isinstance(heads, Tensor):
        rows = rows[:, None]
    return rows, heads
