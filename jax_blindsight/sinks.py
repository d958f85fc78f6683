"""Measuring which tokens of other images draw attention: `torch_blindsight.sinks` in JAX, one prompt at a time.

The weight of one query-key pair is `exp(score - lse)`. A few keys of every image and the text are gathered, and what
all image rows give to each of them is summed, a block of rows at a time; two log-sum-exps tell the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_blindsight.buckets import power_of_two
from jax_blindsight.layers import precision
from jax_blindsight.observe import observer_of
from jax_blindsight.params import Params
from jax_blindsight.settings import with_own_settings
from jax_blindsight.sharding import MODEL, on_devices
from shared_profiles import Category, SinkTemplate
from shared_profiles.sink_statistics import REACH, SinkMass, SinkRows

# Rows of a block at most, and least capacity for gathered keys.
_ROWS, _KEYS = 64, 128


@with_own_settings
def measure_sinks(params: Params, inputs: Mapping[str, Any], *, impl: str | None = None) -> SinkMass | None:
    """Where the image rows of one prompt look; None if it has fewer than two images.

    Args:
        params: the model.
        inputs: what the checkpoint's processor returns as NumPy arrays, one prompt.
        impl: what computes the attention; as in `sparse_prefill`.

    Raises:
        ValueError: the prompt is malformed.
        NotImplementedError, ImportError: see `sparse_prefill`.
    """
    # Neither category that is attended knows sinks, so any template will do.
    observer = observer_of(params, inputs, SinkTemplate(), impl)
    if observer is None:
        return None
    config, n, found = params.config, observer.bucket, SinkRows.of(observer.layout)
    stops = np.zeros(n, dtype=np.int32)  # rows that are not measured see nothing
    stops[found.rows] = found.stops
    keys = np.full(power_of_two(len(found.keys), _KEYS), n, dtype=np.int32)  # nobody sees one beyond the last
    keys[: len(found.keys)] = found.keys
    looked: list[tuple[Array, Array]] = []

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        out, dense = observer.attend(layer, q, k, v, Category.DENSE)
        _, intra = observer.attend(layer, q, k, v, Category.INTRA_IMAGE)
        static = dict(scale=config.text.scale, window=config.text.windows[layer], mesh=params.mesh)
        looked.append(_look(q, k, dense, intra, keys, stops, **static))
        return out

    observer.run(attend_layer)
    by_key, kept = (np.stack(x).astype(np.float64) / len(found.rows) for x in zip(*jax.device_get(looked), strict=True))
    which = np.eye(2 * REACH + 2)[found.bins]  # [P, bins]
    return SinkMass.of(observer.layout, config.text.windows, by_key[..., : len(which)] @ which, kept)


@partial(jax.jit, static_argnames=("scale", "window", "mesh"))
def _look(
    q: Array,
    k: Array,
    dense: Array,
    intra: Array,
    keys: Array,
    stops: Array,
    *,
    scale: float,
    window: int | None,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """What rows of one layer give to some keys, and to their own image and text together, summed over the rows.

    Args:
        q: `[1, H, T, D]`.
        k: `[1, K, T, D]`, H a multiple of K.
        dense, intra: `[1, H, T]` log-sum-exps of the scaled scores of heads run `DENSE` and `INTRA_IMAGE`.
        keys: `[P]` int32 positions.
        stops: `[T]` int32: a row looks at keys before this one; 0 for rows that do not count.
        scale: factor on the scores.
        window: the layer's sliding window.
        mesh: over whose model axis heads are dealt out.

    Returns:
        `[H, P]` and `[H]`, at least float32.
    """
    heads = P(None, MODEL)
    run = on_devices(
        mesh, partial(_look_on_device, scale=scale, window=window), (heads,) * 4 + (P(), P()), (P(MODEL),) * 2
    )
    by_key, kept = run(q, k, dense, intra, keys, stops)
    return by_key, kept


def _look_on_device(
    q: Array, k: Array, dense: Array, intra: Array, keys: Array, stops: Array, *, scale: float, window: int | None
) -> tuple[Array, Array]:
    n_kv, n = k.shape[1:3]
    size, wide = math.gcd(n, _ROWS), jnp.promote_types(q.dtype, jnp.float32)
    packed = jnp.take(k[0], keys, axis=1, mode="clip")  # [K, P, D]
    grouped, sums = (x[0].reshape(n_kv, -1, *x.shape[2:]) for x in (q, dense))  # [K, G, T, ...]

    def add_rows(so_far: Array, block: Array) -> tuple[Array, None]:
        some_q, some_sums = (lax.dynamic_slice_in_dim(x, block * size, size, axis=2) for x in (grouped, sums))
        rows = block * size + jnp.arange(size, dtype=jnp.int32)[:, None]
        stop = lax.dynamic_slice_in_dim(stops, block * size, size)[:, None]
        scores = jnp.einsum("kgrd,kpd->kgrp", some_q, packed, precision=precision(q.dtype), preferred_element_type=wide)
        seen = keys < stop if window is None else (keys < stop) & (keys > rows - window)  # [R, P]
        weights = jnp.where(seen, jnp.exp(scores * scale - some_sums[..., None]), 0.0)
        return so_far + weights.sum(axis=2), None

    nothing = jnp.zeros((*grouped.shape[:2], len(keys)), wide)
    by_key, _ = lax.scan(add_rows, nothing, jnp.arange(n // size, dtype=jnp.int32))
    kept = jnp.where(stops > 0, jnp.exp(intra[0] - dense[0]), 0.0).sum(axis=-1)
    return by_key.reshape(-1, len(keys)), kept
