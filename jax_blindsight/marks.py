"""Whether weights are those that were loaded, by digests of a sample of every leaf.

`load` keeps them; whoever relies on a model's fingerprint compares. They are made of bfloat16, as fingerprints are,
so float32 and bfloat16 are one. float16 has fewer exponents: what it makes of the weights has digests of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_blindsight.model import Weights
from shared_profiles.fingerprints import sampled_rows

_CASTS: tuple[tuple[Any, ...], ...] = ((), (np.float16,), (ml_dtypes.bfloat16, np.float16))


def marks_of(weights: Weights) -> frozenset[str]:
    """The digests that weights have, whatever dtype they are cast to; for `has_mark`."""
    rows = _read_sample(weights)
    return frozenset(_digest(rows, casts) for casts in _CASTS)


def has_mark(weights: Weights, marks: frozenset[str]) -> bool:
    """Whether weights are those of the marks, cast or not."""
    return _digest(_read_sample(weights), ()) in marks


def _read_sample(weights: Weights) -> list[np.ndarray]:
    """Some rows of every leaf, on the host; nothing else leaves the devices."""
    rows: list[np.ndarray] = jax.device_get([_rows(leaf) for leaf in jax.tree.leaves(weights)])
    return rows


def _rows(leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    devices = () if isinstance(leaf, np.ndarray) else leaf.devices()
    if len(devices) < 2 and all(device.platform == "cpu" for device in devices):
        return np.asarray(leaf)[sampled_rows(leaf.shape)]  # no copy, and no program
    return _taken(leaf)


@jax.jit
def _taken(leaf: jax.Array) -> jax.Array:
    rows = sampled_rows(leaf.shape)
    return leaf[rows if isinstance(rows, slice) else np.array(rows)]


def _digest(sample: Iterable[np.ndarray], casts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for rows in sample:
        with np.errstate(over="ignore"):  # as JAX casts
            for dtype in (*casts, ml_dtypes.bfloat16):
                rows = rows.astype(dtype)
        digest.update(f"{rows.shape}".encode() + rows.tobytes())
    return digest.hexdigest()
