"""Bucketed lengths: the few sizes to which every array of a prompt is padded, so that compiles stay few."""

from __future__ import annotations

import operator

import numpy as np

_LEAST = 128


def bucket(n: int) -> int:
    """The smallest bucket that holds n.

    Buckets are 128 and, above it, eight sizes an octave: m, 9m/8, 10m/8, ..., 15m/8 for every power of two m.
    So less than 1/8 of a bucket above 128 is padding, and prompts between 1K and 256K tokens fall into 65.

    Args:
        n: what must fit, an integer of any kind, at least 0.

    Raises:
        ValueError: n is negative.
    """
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"n must be at least 0. Got n={n}.")
    if n <= _LEAST:
        return _LEAST
    step = 1 << (n.bit_length() - 4)  # an eighth of an octave
    return -(-n // step) * step


def power_of_two(n: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least n and `minimum`."""
    return 1 << (max(n, minimum) - 1).bit_length()


def pad_first(array: np.ndarray, n: int) -> np.ndarray:
    """Zeros after the first axis, up to length n."""
    padded = np.zeros((n, *array.shape[1:]), array.dtype)  # np.pad takes several times as long
    padded[: len(array)] = array
    return padded


def pad_last(array: np.ndarray, n: int) -> np.ndarray:
    """Zeros after the last axis, up to length n."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, n - array.shape[-1])])
