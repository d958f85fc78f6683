"""The language model: token embeddings in, normalised hidden states out; the caller brings the attention.

`attend(layer, q, k, v)` decides what is attended: it may write a cache, run sparse or dense, and look at the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jax_blindsight.config import Rope, TextConfig
from jax_blindsight.layers import (
    FLOAT32,
    Embedding,
    GatedMLP,
    Linear,
    RMSNorm,
    Rotation,
    inverse_frequencies,
    precision,
    rotate,
    rotation,
)

# Rows of a prompt that pass an MLP at once, and the length from which on they do not pass all together. Compiled for an
# H200, the second half of a layer of a 7B model takes 22.8 GiB of temporary memory at 288K tokens in one piece, 3.3 GiB
# in blocks. A block fills a GPU, so that it should cost no time worth mentioning (an estimate).
_BLOCK, _LONG = 16384, 32768

# (layer, q [B, H, T, D], k [B, K, T, D], v [B, K, T, D]) -> [B, T, H, D]; q and k come rotated.
Attend = Callable[[int, Array, Array, Array], Array]


def rope_rotation(config: TextConfig, rope: Rope, positions: Array) -> Rotation:
    """Rotation of every token.

    Args:
        positions: int `[B, T]`, or `[3, B, T]` where `config.mrope_section` is set: temporal, height, width.

    Returns:
        Cosine and sine, float32 `[B, 1, T, D/2]`, to rotate `[B, heads, T, D]`.
    """
    frequencies = inverse_frequencies(config.head_dim, rope.theta) / np.float32(rope.factor)
    if config.mrope_section is None:
        return rotation((positions[..., None].astype(FLOAT32) * frequencies)[:, None])
    axes = np.repeat(np.arange(len(config.mrope_section)) % 3, config.mrope_section)
    return rotation((jnp.moveaxis(positions[axes], 0, -1).astype(FLOAT32) * frequencies)[:, None])


class Attention(nnx.Module):
    """What stands before and after grouped-query attention."""

    def __init__(self, config: TextConfig) -> None:
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, config.attention_bias)
        self.o_proj = Linear(width, config.hidden_size)
        norm = partial(RMSNorm, config.head_dim, config.norm_eps, config.norm_offset)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.head_dim = config.head_dim

    def project(self, x: Array, by: Rotation) -> tuple[Array, Array, Array]:
        """`[B, T, E]` to q `[B, H, T, D]` and k, v `[B, K, T, D]`; q and k rotated, `by` as of `rope_rotation`."""
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, by), rotate(k, by), v

    def merge(self, out: Array) -> Array:
        """What was attended, `[B, T, H, D]`, to `[B, T, E]`."""
        return self.o_proj(out.reshape(*out.shape[:2], -1))

    def _heads(self, x: Array) -> Array:
        """`[B, T, heads * D]` to `[B, heads, T, D]`."""
        return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, self.head_dim), 1, 2)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each normalised on its way in and, where the family does, on its way out."""

    def __init__(self, config: TextConfig) -> None:
        norm = partial(RMSNorm, config.hidden_size, config.norm_eps, config.norm_offset)
        self.pre_attention_norm, self.pre_mlp_norm = norm(), norm()
        self.post_attention_norm = norm() if config.sandwich_norms else None
        self.post_mlp_norm = norm() if config.sandwich_norms else None
        self.attention = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.activation)

    def __call__(self, x: Array, by: Rotation, layer: int, attend: Attend) -> Array:
        """One layer: `[B, T, E]` to `[B, T, E]`."""
        return self.end(x, attend(layer, *self.begin(x, by)))

    def begin(self, x: Array, by: Rotation) -> tuple[Array, Array, Array]:
        """Up to the attention: `[B, T, E]` to q, k and v, see `Attention.project`."""
        return self.attention.project(self.pre_attention_norm(x), by)

    def end(self, x: Array, out: Array) -> Array:
        """From the attention on: the layer's input `[B, T, E]` and what was attended `[B, T, H, D]` to `[B, T, E]`."""
        branch = self.attention.merge(out)
        x = x + (branch if self.post_attention_norm is None else self.post_attention_norm(branch))
        if x.shape[1] <= _LONG:
            return self._feed_forward(x)
        rows = jnp.swapaxes(x, 0, 1)  # [T, B, E]
        return jnp.swapaxes(lax.map(self._feed_forward, rows, batch_size=_BLOCK), 0, 1)

    def _feed_forward(self, x: Array) -> Array:
        """`[..., E]`, the layer's attention added, with its MLP's output added."""
        branch = self.mlp(self.pre_mlp_norm(x))
        return x + (branch if self.post_mlp_norm is None else self.post_mlp_norm(branch))


class Decoder(nnx.Module):
    """Embeddings, layers, final norm, and the logits' projection where it is not the embedding table."""

    def __init__(self, config: TextConfig) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nnx.List([DecoderLayer(config) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size)
        self.config = config

    def embed(self, ids: Array) -> Array:
        """Token ids `[B, T]` to embeddings `[B, T, E]`, scaled by the factor as rounded to their dtype."""
        embeddings = self.embed_tokens(ids)
        return embeddings * jnp.asarray(self.config.embedding_scale, embeddings.dtype)

    def __call__(self, hidden: Array, positions: Array, attend: Attend) -> Array:
        """Runs the layers and the final norm: `[B, T, E]` to `[B, T, E]`."""
        rotations = {rope: rope_rotation(self.config, rope, positions) for rope in set(self.config.ropes)}
        for i, (layer, rope) in enumerate(zip(self.layers, self.config.ropes, strict=True)):
            hidden = layer(hidden, rotations[rope], i, attend)
        return self.norm(hidden)

    def logits(self, hidden: Array) -> Array:
        """Normalised hidden states `[..., E]` to logits `[..., V]` in float32."""
        table = self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        return jnp.matmul(hidden, table, precision=precision(hidden.dtype), preferred_element_type=FLOAT32)
