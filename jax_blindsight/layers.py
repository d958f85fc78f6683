"""The layers that all families share: projections, norms, MLPs, rotary embedding.

A module declares its parameters and computes on whatever dtype they have. Kernels are `[in, out]`. Sums, norms,
activations and rotations are float32; float32 products are never rounded to TF32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

FLOAT32 = jnp.float32
NEGATIVE = -1e30  # instead of -inf: a row with no key stays finite

Rotation = tuple[Array, Array]  # cosine and sine


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """The precision to pass to a product of this dtype: full float32, the hardware's own for narrower types."""
    return lax.Precision.HIGHEST if dtype == FLOAT32 else None


def parameter(*shape: int) -> nnx.Param:
    """A parameter of this shape; its values and its dtype come from a checkpoint."""
    return nnx.Param(jnp.zeros(shape, FLOAT32))


def activation(name: str) -> Callable[[Array], Array]:
    """An activation function by its transformers name; computed in float32, returned in the input's dtype."""
    function = {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    }[name]
    return lambda x: function(x.astype(FLOAT32)).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`: `[..., n_in]` to `[..., n_out]`."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        self.kernel = parameter(n_in, n_out)
        self.bias = parameter(n_out) if bias else None

    def __call__(self, x: Array) -> Array:
        """Projects; the bias is added before the result is rounded."""
        y = jnp.matmul(x, self.kernel[...], precision=precision(x.dtype), preferred_element_type=FLOAT32)
        if self.bias is not None:
            y += self.bias[...].astype(FLOAT32)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """A table of rows: ids `[...]` to `[..., n_features]`. An id outside the table gives its nearest row."""

    def __init__(self, n_rows: int, n_features: int) -> None:
        self.embedding = parameter(n_rows, n_features)

    def __call__(self, ids: Array) -> Array:
        """Looks up rows."""
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis; with `offset` it multiplies with 1 + scale (Gemma)."""

    def __init__(self, n_features: int, eps: float, offset: bool = False) -> None:
        self.scale = parameter(n_features)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Array) -> Array:
        """Normalises `[..., n_features]`."""
        y = x.astype(FLOAT32)
        y *= lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (y * (1.0 + self.scale[...].astype(FLOAT32))).astype(x.dtype)
        return self.scale[...] * y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis."""

    def __init__(self, n_features: int, eps: float) -> None:
        self.scale, self.bias = parameter(n_features), parameter(n_features)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalises `[..., n_features]`."""
        y = x.astype(FLOAT32)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(FLOAT32) + self.bias[...].astype(FLOAT32)).astype(x.dtype)


class MLP(nnx.Module):
    """Two projections with an activation between them; both have a bias."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int, act: str) -> None:
        self.fc1, self.fc2 = Linear(n_in, n_hidden, bias=True), Linear(n_hidden, n_out, bias=True)
        self.act = activation(act)

    def __call__(self, x: Array) -> Array:
        """`[..., n_in]` to `[..., n_out]`."""
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, n_features: int, n_hidden: int, act: str, bias: bool = False) -> None:
        self.gate_proj, self.up_proj = Linear(n_features, n_hidden, bias), Linear(n_features, n_hidden, bias)
        self.down_proj = Linear(n_hidden, n_features, bias)
        self.act = activation(act)

    def __call__(self, x: Array) -> Array:
        """`[..., n_features]` to the same."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def inverse_frequencies(n_features: int, theta: float) -> np.ndarray:
    """Angles per position of the rotary embedding: `[n_features / 2]` float32."""
    exponents = np.arange(0, n_features, 2, dtype=np.float32) / np.float32(n_features)
    return (1.0 / np.float64(theta) ** exponents).astype(np.float32)


def rotation(angles: Array) -> Rotation:
    """Cosine and sine of angles, float32; computed once, or XLA computes them again for every head of every layer."""
    return lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(x: Array, by: Rotation) -> Array:
    """Rotates the pairs `(x[i], x[i + D/2])`, in float32.

    Args:
        x: `[..., D]`.
        by: cosine and sine, `[..., D/2]`, broadcast against x.
    """
    cos, sin = by
    a, b = jnp.split(x.astype(FLOAT32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
