"""The blocks that all vision towers share, and their attention: within segments, memory linear in the patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jax_blindsight.config import VisionConfig
from jax_blindsight.layers import (
    FLOAT32,
    MLP,
    NEGATIVE,
    GatedMLP,
    LayerNorm,
    Linear,
    RMSNorm,
    Rotation,
    precision,
    rotate,
)
from jax_blindsight.vision_inputs import BlockGroup, Segments


def segment_attention(q: Array, k: Array, v: Array, segments: Segments) -> Array:
    """Softmax attention of every patch within its own segment.

    Args:
        q, k, v: `[H, P, D]`.
        segments: which patches belong together.

    Returns:
        `[P, H, D]`; padding patches get the result of another patch.
    """
    rows = [_group_attention(q, k, v, group) for group in segments.groups]
    return jnp.concatenate(rows)[segments.slot]


def _group_attention(q: Array, k: Array, v: Array, group: BlockGroup) -> Array:
    """The rows of all blocks of a group, `[n * rows, H, D]`."""
    n_heads, _, head_dim = q.shape
    high = precision(q.dtype)

    def block(starts: tuple[Array, Array, Array, Array]) -> Array:
        query_start, key_start, key_first, key_last = starts
        q_block = lax.dynamic_slice_in_dim(q, query_start, group.rows, axis=1)
        k_block, v_block = (lax.dynamic_slice_in_dim(x, key_start, group.width, axis=1) for x in (k, v))
        scores = jnp.einsum("hqd,hkd->hqk", q_block, k_block, precision=high, preferred_element_type=FLOAT32)
        slot = jnp.arange(group.width)
        scores = jnp.where((slot >= key_first) & (slot < key_last), scores * head_dim**-0.5, NEGATIVE)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("hqk,hkd->qhd", weights, v_block, precision=high, preferred_element_type=FLOAT32)
        return out.astype(q.dtype)

    starts = (group.query_start, group.key_start, group.key_first, group.key_last)

    def step(i: Array, out: Array) -> Array:
        some = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * group.step, group.step), starts)
        return lax.dynamic_update_slice_in_dim(out, jax.vmap(block)(some), i * group.step, axis=0)

    out = jnp.zeros((len(group.query_start), group.rows, n_heads, head_dim), q.dtype)
    return lax.fori_loop(0, group.n_steps, step, out).reshape(-1, n_heads, head_dim)


class VisionAttention(nnx.Module):
    """Multi-head attention within segments."""

    def __init__(self, config: VisionConfig) -> None:
        width = config.hidden_size
        if config.fused_qkv:
            self.qkv = Linear(width, 3 * width, bias=True)
        else:
            self.q_proj, self.k_proj, self.v_proj = (Linear(width, width, bias=True) for _ in range(3))
        self.proj = Linear(width, width, bias=True)
        self.n_heads, self.fused = config.n_heads, config.fused_qkv

    def __call__(self, x: Array, segments: Segments, by: Rotation | None) -> Array:
        """Attends: `[P, width]` to `[P, width]`; `by` `[P, D/2]` rotates queries and keys."""
        parts = jnp.split(self.qkv(x), 3, axis=-1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.reshape(len(x), self.n_heads, -1).swapaxes(0, 1) for part in parts)  # [H, P, D]
        if by is not None:
            q, k = rotate(q, by), rotate(k, by)
        return self.proj(segment_attention(q, k, v, segments).reshape(x.shape))


class VisionBlock(nnx.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config: VisionConfig) -> None:
        norm = RMSNorm if config.rms_norm else LayerNorm
        self.norm1, self.norm2 = (norm(config.hidden_size, config.norm_eps) for _ in range(2))
        self.attention = VisionAttention(config)
        width, n_hidden = config.hidden_size, config.intermediate_size
        if config.gated:
            self.mlp: GatedMLP | MLP = GatedMLP(width, n_hidden, config.activation, bias=True)
        else:
            self.mlp = MLP(width, n_hidden, width, config.activation)

    def __call__(self, x: Array, segments: Segments, by: Rotation | None = None) -> Array:
        """One block: `[P, width]` to `[P, width]`."""
        x = x + self.attention(self.norm1(x), segments, by)
        return x + self.mlp(self.norm2(x))
