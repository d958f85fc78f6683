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
from jax_blindsight.vision_segments import Segments


def segment_attention(q: Array, k: Array, v: Array, segments: Segments) -> Array:
    """Softmax attention of every patch within its own segment.

    Args:
        q, k, v: `[H, P, D]`.
        segments: which patches belong together.

    Returns:
        `[P, H, D]`; padding patches get the result of another patch.
    """
    n_heads, n_patches, head_dim = q.shape
    rows, tile, high = segments.rows, segments.tile, precision(q.dtype)
    blocks = segments.query_start, segments.key_start, segments.n_tiles
    patches = segments.first, segments.last

    def attend(i: Array, out: Array) -> Array:
        query_start, key_start, n_tiles = (lax.dynamic_slice_in_dim(x, i, segments.step) for x in blocks)  # [S]
        queries = _slices(q, query_start, rows, axis=1)  # [S, H, rows, D]
        first, last = (_slices(jnp.asarray(x), query_start, rows)[..., None] for x in patches)

        def take(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, highest, weight = state
            begin = key_start + t * tile
            start = jnp.minimum(begin, n_patches - tile)  # the last slice begins earlier, but sees no key twice
            some_k, some_v = (_slices(x, start, tile, axis=1) for x in (k, v))
            key = (start[:, None] + jnp.arange(tile))[:, None]  # [S, 1, tile]
            seen = (key >= jnp.maximum(first, begin[:, None, None])) & (key < last)  # [S, rows, tile]
            scores = jnp.einsum("shqd,shkd->shqk", queries, some_k, precision=high, preferred_element_type=FLOAT32)
            scores = jnp.where(seen[:, None], scores * head_dim**-0.5, NEGATIVE)
            risen = jnp.maximum(highest, scores.max(axis=-1))
            weights, kept = jnp.exp(scores - risen[..., None]), jnp.exp(highest - risen)
            added = jnp.einsum(
                "shqk,shkd->shqd", weights.astype(v.dtype), some_v, precision=high, preferred_element_type=FLOAT32
            )
            return total * kept[..., None] + added, risen, weight * kept + weights.sum(axis=-1)

        lines = (segments.step, n_heads, rows)
        none = jnp.zeros((*lines, head_dim), FLOAT32), jnp.full(lines, NEGATIVE, FLOAT32), jnp.zeros(lines, FLOAT32)
        total, _, weight = lax.fori_loop(0, n_tiles[0], take, none)
        done = (total / weight[..., None]).astype(q.dtype).swapaxes(1, 2)
        return lax.dynamic_update_slice_in_dim(out, done, i, axis=0)

    out = jnp.zeros((len(segments.query_start), rows, n_heads, head_dim), q.dtype)
    out = lax.fori_loop(0, segments.n_steps, lambda i, out: attend(i * segments.step, out), out)
    return out.reshape(-1, n_heads, head_dim)[segments.slot]


def _slices(x: Array, starts: Array, n: int, axis: int = 0) -> Array:
    """A slice of length n from each start, `[len(starts), ...]`."""
    return jax.vmap(lambda start: lax.dynamic_slice_in_dim(x, start, n, axis))(starts)


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
