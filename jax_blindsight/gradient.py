"""What each head's change would do to the answer, from one backward pass through the dense model.

What is propagated back is `xi . logits`, `xi` the random vector of `shared_profiles.fisher`, which says why.

The backward pass goes layer by layer, each recomputed from what it read, by programs that all layers share:

    forward, keeping each layer's input ──► logits ──► d/d(last output)
    layer L-1 again:  q, k, v ──► o, lse ──► d/d(o) ──► d/d(q, k, v) ──► d/d(its input) ──► layer L-2 again ──► ...

so that one layer is in flight at a time, and memory grows with the prompt, not with its square: the attention's own
gradients are made of its outputs and log-sum-exps, a block of rows by a block of keys at a time (Dao et al. 2022,
algorithm 4).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_blindsight.config import ModelConfig
from jax_blindsight.layers import Rotation, precision
from jax_blindsight.model import Weights, begin_layer, end_layer, final_norm, unembed
from jax_blindsight.observe import Observer
from jax_blindsight.sharding import MODEL, on_devices, sharded_rows
from jax_blindsight.stack import begin, rotations_of
from shared_profiles import Category, Layout
from shared_profiles.fisher import fisher_vector, magnified
from shared_profiles.layout import concatenated_ranges

# Rows and keys of a block of the attention's gradients at most, and its scores over all heads: 128 MiB in float32. A
# block is some ten kernels: small ones fill a GPU with launches. Powers of two divide every bucket as far as it allows.
_ON_CPU, _ON_GPU = (256, 512), (1024, 2048)
_MOST_SCORES = 1 << 25


def measure_with_gradient(observer: Observer, seed: int) -> None:
    """Runs one prompt forward and back, and measures every layer with its gradient.

    Args:
        observer: measures.
        seed: of the prompt, see `shared_profiles.fisher`.
    """
    params, layout = observer.params, observer.layout
    config, mesh, weights = params.config, params.mesh, params.weights
    visible = {window: visible_keys(layout, observer.bucket, window) for window in set(config.text.windows)}
    inputs: list[Array] = []

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        return observer.attend(layer, q, k, v, Category.DENSE)[0]

    last = observer.run(attend_layer, lambda read: inputs.append(read.copy()))
    row = np.int32(layout.stop - 1)
    vector, observer.unit = magnified(fisher_vector(np.asarray(_logits(weights, last, row, config=config)), seed))
    gradient = _by_last(weights, last, row, vector, config=config)
    rotations = rotations_of(params, observer.positions)
    for layer in reversed(range(config.text.n_layers)):
        read, by = inputs.pop(), rotations[config.text.ropes[layer]]
        its_weights = weights["decoder"]["layers"][layer]
        q, k, v = begin(params, layer, read, by)
        out, lse = observer.attend(layer, q, k, v, Category.DENSE)
        gradient, by_out = _end_backward(its_weights, read, out, gradient, config=config, mesh=mesh)
        observer.measure(layer, q, k, v, (out, lse), read, by_out)
        keys = visible[config.text.windows[layer]]
        by_qkv = attention_backward(q, k, v, out, lse, by_out, keys, scale=config.text.scale, mesh=mesh)
        gradient = _begin_backward(its_weights, read, by, by_qkv, gradient, config=config, mesh=mesh)


def visible_keys(layout: Layout, n: int, window: int | None) -> np.ndarray:
    """The keys that each row of a dense head looks at: `[2, n]` int32, the first one and one beyond the last.

    Rows of padding look at none.
    """
    rows = np.arange(n)
    first = np.full(n, layout.start) if window is None else np.maximum(layout.start, rows - window + 1)
    stop = rows + 1
    if layout.bidirectional:
        begin, end = layout.images[:, 1], layout.images[:, 2]
        stop[concatenated_ranges(begin, end)] = np.repeat(end, end - begin)
    is_real = (rows >= layout.start) & (rows < layout.stop)
    return np.where(is_real, [first, stop], 0).astype(np.int32)


@partial(jax.jit, static_argnames=("scale", "mesh"))
def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    by_out: Array,
    visible: Array,
    *,
    scale: float,
    mesh: Mesh | None = None,
) -> tuple[Array, Array, Array]:
    """The gradients by q, k and v of attention that was computed before.

    Args:
        q: `[1, H, T, D]`.
        k, v: `[1, K, T, D]`, H a multiple of K; finite everywhere.
        out: `[1, T, H, D]`, what was attended.
        lse: `[1, H, T]`, the log-sum-exps of the scaled scores.
        by_out: `[1, T, H, D]`, the gradient by `out`.
        visible: `[2, T]`, see `visible_keys`.
        scale: factor on the scores.
        mesh: over whose model axis heads are dealt out.

    Returns:
        As q, k and v, in their dtype; summed in at least float32.
    """
    heads, rows = P(None, MODEL), P(None, None, MODEL)
    on_cpu, on_gpu = (partial(_attention_backward, scale=scale, block=block) for block in (_ON_CPU, _ON_GPU))
    by_device = partial(lax.platform_dependent, cuda=on_gpu, default=on_cpu)
    run = on_devices(mesh, by_device, (heads, heads, heads, rows, heads, rows, P()), (heads,) * 3)
    by_q, by_k, by_v = run(q, k, v, out, lse, by_out, visible)
    return by_q, by_k, by_v


def _attention_backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    by_out: Array,
    visible: Array,
    *,
    scale: float,
    block: tuple[int, int],
) -> tuple[Array, Array, Array]:
    _, n_kv, n, dim = k.shape
    n_rows, n_keys = (math.gcd(n, size) for size in block)
    while n_rows * n_keys * q.shape[1] > _MOST_SCORES and n_rows > 1:
        n_rows //= 2
    wide = jnp.promote_types(q.dtype, jnp.float32)
    dot = partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=wide)
    by_head = jnp.swapaxes(by_out[0], 0, 1)  # [H, T, D]
    # What the softmax takes off every gradient of a row's weights.
    taken = (jnp.swapaxes(out[0], 0, 1).astype(wide) * by_head.astype(wide)).sum(axis=-1)  # [H, T]
    k, v = k[0], v[0]
    # Rows of the query heads of one kv head are rows alike: [K, G, T, ...].
    by_row = [x.reshape(n_kv, -1, n, *x.shape[2:]) for x in (q[0], by_head, lse[0], taken)]
    group = by_row[0].shape[1]

    def add_rows(sums: tuple[Array, Array], block: Array) -> tuple[tuple[Array, Array], Array]:
        """A block of rows: `[K, T, D]` sums by k and v, and its own gradients by q, `[K, G, R, D]`."""
        some_q, some_by, some_lse, some_taken = (
            lax.dynamic_slice_in_dim(x, block * n_rows, n_rows, axis=2).reshape(n_kv, group * n_rows, *x.shape[3:])
            for x in by_row
        )
        first, stop = lax.dynamic_slice_in_dim(visible, block * n_rows, n_rows, axis=1)  # [R]
        lowest = jnp.where(first < stop, first, n).min()
        first, stop = (jnp.tile(x, group)[:, None] for x in (first, stop))  # [G * R, 1]

        def add_keys(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            by_q, by_k, by_v = sums
            at = i * n_keys
            some_k, some_v = (lax.dynamic_slice_in_dim(x, at, n_keys, axis=1) for x in (k, v))
            key = at + jnp.arange(n_keys, dtype=jnp.int32)
            scores = dot("kxd,kcd->kxc", some_q, some_k) * scale
            weights = jnp.where((key >= first) & (key < stop), jnp.exp(scores - some_lse[..., None]), 0.0)
            by_weights = dot("kxd,kcd->kxc", some_by, some_v)
            by_scores = (weights * (by_weights - some_taken[..., None]) * scale).astype(q.dtype)
            by_q += dot("kxc,kcd->kxd", by_scores, some_k)
            by_k = _add_at(by_k, at, dot("kxc,kxd->kcd", by_scores, some_q))
            by_v = _add_at(by_v, at, dot("kxc,kxd->kcd", weights.astype(q.dtype), some_by))
            return by_q, by_k, by_v

        nothing = jnp.zeros((n_kv, group * n_rows, dim), wide)
        n_blocks = (stop.max() + n_keys - 1) // n_keys
        by_q, by_k, by_v = lax.fori_loop(lowest // n_keys, n_blocks, add_keys, (nothing, *sums))
        return (by_k, by_v), by_q.reshape(n_kv, group, n_rows, dim).astype(q.dtype)

    nothing = jnp.zeros((n_kv, n, dim), wide)
    (by_k, by_v), by_q = lax.scan(add_rows, (nothing, nothing), jnp.arange(n // n_rows, dtype=jnp.int32))
    by_q = jnp.moveaxis(by_q, 0, 2).reshape(q.shape)  # from [n / R, K, G, R, D]
    return by_q, by_k[None].astype(k.dtype), by_v[None].astype(v.dtype)


def _add_at(sums: Array, at: Array, more: Array) -> Array:
    """`[K, T, D]` with `[K, C, D]` added from row `at` on."""
    old = lax.dynamic_slice_in_dim(sums, at, more.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(sums, old + more, at, axis=1)


@partial(jax.jit, static_argnames="config")
def _logits(weights: Weights, hidden: Array, row: Array, *, config: ModelConfig) -> Array:
    """Logits `[1, V]` float32 of the token after a row of the last layer's `[1, T, E]`."""
    return unembed(weights, config, final_norm(weights, config, jnp.take(hidden, row, axis=1)))


@partial(jax.jit, static_argnames="config", donate_argnames="hidden")
def _by_last(weights: Weights, hidden: Array, row: Array, vector: Array, *, config: ModelConfig) -> Array:
    """The gradient of `vector . logits` by the last layer's `[1, T, E]`."""
    _, back = jax.vjp(lambda hidden: _logits(weights, hidden, row, config=config), hidden)
    return back(vector)[0]


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="gradient")
def _end_backward(
    weights: Weights, hidden: Array, out: Array, gradient: Array, *, config: ModelConfig, mesh: Mesh | None
) -> tuple[Array, Array]:
    """From the gradient by a layer's output `[1, T, E]` to those by its input, past its attention, and by `out`."""
    _, back = jax.vjp(partial(end_layer, weights, config), hidden, out)
    by_hidden, by_out = back(gradient)
    return sharded_rows(mesh, by_hidden), by_out


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="gradient")
def _begin_backward(
    weights: Weights,
    hidden: Array,
    by: Rotation,
    by_qkv: tuple[Array, Array, Array],
    gradient: Array,
    *,
    config: ModelConfig,
    mesh: Mesh | None,
) -> Array:
    """The gradient by a layer's input `[1, T, E]`: past its attention, as given, and through it."""
    _, back = jax.vjp(lambda hidden: begin_layer(weights, config, hidden, by), hidden)
    return sharded_rows(mesh, gradient + back(by_qkv)[0])
