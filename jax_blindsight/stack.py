"""The decoder's layers one after another, each by programs that all layers share.

    hidden ──► _begin ──► q, k, v ──► attend, the caller's ──► out ──► _end ──► hidden
       └──► read, the caller's, before the layer writes over it

A layer's weights, its rotation and what it attends to are data, so each of these programs is compiled once, however
many layers there are and whatever their heads do. Calling them costs the host some tenths of a millisecond a layer,
while the device computes. `hidden` is one buffer from the first layer to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jax_blindsight.config import ModelConfig, Rope
from jax_blindsight.decoder import Attend, rope_rotation
from jax_blindsight.layers import Rotation
from jax_blindsight.model import Weights, begin_layer, end_layer
from jax_blindsight.params import Params
from jax_blindsight.sharding import sharded_heads, sharded_rows


def run_layers(
    params: Params,
    hidden: Array,
    positions: np.ndarray,
    attend: Attend,
    read: Callable[[Array], None] | None = None,
) -> Array:
    """Runs all decoder layers.

    Args:
        params: the model.
        hidden: `[B, T, E]` embeddings; consumed.
        positions: int, mRoPE `[3, B, T]` or `[B, T]` as the family has it.
        attend: `(layer, q [B, H, T, D], k [B, K, T, D], v) -> [B, T, H, D]`, called once per layer, not traced; q and k
            are rotated and not scaled.
        read: called with what each layer reads, `[B, T, E]`; to keep it, copy it.

    Returns:
        `[B, T, E]`, not yet normalised.
    """
    config, mesh = params.config, params.mesh
    rotations = rotations_of(params, positions)
    layers = params.weights["decoder"]["layers"]
    for i, rope in enumerate(config.text.ropes):
        if read is not None:
            read(hidden)
        # Nothing here keeps q, k and v alive beside the MLP.
        out = attend(i, *_begin(layers[i], hidden, rotations[rope], config=config, mesh=mesh))
        hidden = _end(layers[i], hidden, out, config=config, mesh=mesh)
    return hidden


def rotations_of(params: Params, positions: np.ndarray) -> dict[Rope, Rotation]:
    """The rotations of a prompt's tokens, by each of the model's ropes; `positions` as in `run_layers`."""
    config = params.config
    return {rope: _rotation(positions, config=config, rope=rope) for rope in set(config.text.ropes)}


def begin(params: Params, layer: int, hidden: Array, by: Rotation) -> tuple[Array, Array, Array]:
    """q, k and v of a layer that reads `[B, T, E]`, by the program of `run_layers`; nothing is consumed."""
    weights = params.weights["decoder"]["layers"][layer]
    return _begin(weights, hidden, by, config=params.config, mesh=params.mesh)


@partial(jax.jit, static_argnames=("config", "rope"))
def _rotation(positions: Array, *, config: ModelConfig, rope: Rope) -> Rotation:
    return rope_rotation(config.text, rope, positions)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _begin(
    weights: Weights, hidden: Array, by: Rotation, *, config: ModelConfig, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    q, k, v = begin_layer(weights, config, sharded_rows(mesh, hidden), by)
    return sharded_heads(mesh, q), sharded_heads(mesh, k), sharded_heads(mesh, v)


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="hidden")
def _end(weights: Weights, hidden: Array, out: Array, *, config: ModelConfig, mesh: Mesh | None) -> Array:
    return sharded_rows(mesh, end_layer(weights, config, hidden, out))
