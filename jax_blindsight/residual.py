"""How far a head's change moves the residual stream: what ranks heads where no gradient can be had.

A layer adds `W_o o` to what it reads, `x`. A change of one head's output moves that by `W_o change`, relative to the
stream `||W_o change|| / ||x||`. Gemma 3 normalizes `W_o o` before adding it; the norm of a row then scales its changes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_blindsight.config import ModelConfig
from jax_blindsight.model import Weights, attention_branch

Stream = tuple[Array, Array]  # what `moved` needs of a layer: [H, D, D] and [T]


@partial(jax.jit, static_argnames="config")
def stream_of(weights: Weights, hidden: Array, out: Array, *, config: ModelConfig) -> Stream:
    """What `moved` needs of a layer, float32.

    Args:
        weights: of the layer.
        hidden: `[1, T, E]`, what it reads.
        out: `[1, T, H, D]`, its dense outputs.
        config: of the model.

    Returns:
        `W_o^T W_o` of each head, `[H, D, D]`, and by what each row scales what it adds, over its norm, `[T]`.
    """
    text = config.text
    kernel = weights["attention"]["o_proj"]["kernel"].astype(jnp.float32).reshape(text.n_heads, text.head_dim, -1)
    grams = jnp.einsum("hde,hfe->hdf", kernel, kernel, precision=lax.Precision.HIGHEST)
    added = jnp.ones(hidden.shape[1], jnp.float32)
    if text.sandwich_norms:
        before, after = (_norms(x) for x in attention_branch(weights, config, out))
        added = after / jnp.maximum(before, jnp.finfo(jnp.float32).tiny)
    norms = _norms(hidden)
    return grams, jnp.where(norms == 0, 0.0, added / jnp.where(norms == 0, 1.0, norms))  # zeros have no scale


def moved(stream: Stream, change: Array) -> Array:
    """`(||W_o change|| / ||x||)^2` of every head, `[T, H]`, of changes `[T, H, D]` float32."""
    grams, scales = stream
    turned = jnp.einsum("thd,hdf->thf", change, grams, precision=lax.Precision.HIGHEST)
    return jnp.maximum((turned * change).sum(axis=-1), 0.0) * scales[:, None] ** 2


def _norms(x: Array) -> Array:
    """`[1, T, E]` to `[T]`, float32."""
    return jnp.linalg.norm(x[0].astype(jnp.float32), axis=-1)
