"""Small rules for values that get stored: six significant digits, read-only arrays, equality by value."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np


def rounded(value: float) -> float:
    """A float to six significant digits, which its decimal form then gives back exactly; -0.0 becomes 0.0."""
    return float(f"{value:.6g}") + 0.0


def rounded_array(values: np.ndarray) -> np.ndarray:
    """A read-only float64 array of the same shape, every element `rounded`."""
    return read_only(np.array([rounded(v) for v in values.ravel().tolist()], dtype=np.float64).reshape(values.shape))


def read_only(array: np.ndarray) -> np.ndarray:
    """The same array, no longer writable."""
    array.setflags(write=False)
    return array


def is_integer(value: object, least: int) -> bool:
    """Whether a value is a Python integer, not a bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether a value is a real number of Python's or NumPy's, not a bool."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def same_fields(a: Any, b: Any) -> bool:
    """Whether two instances of one dataclass are equal, with arrays and dicts of arrays compared by value."""
    return type(a) is type(b) and all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b
