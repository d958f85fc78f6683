"""The attention of the JAX backend: one entry point, every head by its category.

    work for "portable"            ──►  loops over the work list in XLA (portable.py), on every platform
    work for "pallas"              ──►  the Pallas kernel (blindsight_kernels), on a Hopper GPU
    dense heads, plain, CUDA       ──►  cuDNN, through `jax.nn.dot_product_attention`, with either

The categories are data: layers that differ in nothing else run the same programs. There are two of them where `attend`
is called outside of `jit`: one for all heads, and, where cuDNN serves, a small one for each number of dense heads.

On a mesh each device computes its own rows and heads, in `jax.shard_map`. Nothing is sent around and nothing branches:
the categories are split over the heads like everything else.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import backend
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from blindsight_kernels.checks import shapes_fit
from jax_blindsight.portable import attend_sequence
from jax_blindsight.sharding import DATA, MODEL, check_batch, on_devices
from jax_blindsight.work import AttentionWork
from shared_profiles import Category

if TYPE_CHECKING:
    from blindsight_kernels.pallas_work import PallasWork

_LEFT_OUT = -1  # instead of a category: the head is not computed
_CUDNN_ROWS = 128  # T a multiple of this: cuDNN before 9.15.1 was wrong elsewhere


def attend(
    q: Array,
    k: Array,
    v: Array,
    work: AttentionWork | PallasWork,
    *,
    categories: jax.typing.ArrayLike | tuple[int, ...],
    window: int | None,
    scale: float,
    bidirectional: bool,
    lse: bool = True,
    mesh: Mesh | None = None,
    interpret: Any = None,
) -> tuple[Array, Array | None]:
    """Prefill attention of a batch, every head by its category; the meaning is `shared_profiles.masks`.

    Args:
        q: queries `[B, H, T, D]`, row t at position `q_start + t` of the work. The portable implementation takes
            float32, bfloat16, float16 and float64, any D; the Pallas kernel bfloat16 and float16, D of 64, 128 or 256.
        k, v: keys and values `[B, K, S, D]`, H a multiple of K. Those beyond a sequence's real tokens are ignored,
            whatever they hold.
        work: of these sequences, built by `implementations.build_work` for this window, T and S.
        categories: `[H]`, one value of `Category` per query head. May be traced.
        window: sliding window in tokens, None for none.
        scale: factor on the scores, usually `D ** -0.5`.
        bidirectional: whether an image's tokens look at later ones of the same image.
        lse: whether the log-sum-exps are wanted. Without them, and with categories that are not traced, dense heads of
            a causal layer without a window go to cuDNN on CUDA, in bfloat16 and float16 with D at most 128 and a
            multiple of 8 and T a multiple of 128, in prompts that start at position 0 with no padding on their left.
            (JAX returns cuDNN's log-sum-exps rounded to q's dtype.)
        mesh: "data" x "model": rows are dealt out over the one axis and heads over the other.
        interpret: `plgpu.InterpretGPUParams` to simulate the Pallas kernel on a CPU.

    Returns:
        `[B, T, H, D]` outputs in q's dtype, and with `lse` `[B, H, T]` log-sum-exps of the scaled scores, float32
        (float64 for float64), else None. Rows of padding and rows beyond the real ones are zero and `-inf`.

    Raises:
        ValueError: shapes, dtypes, categories or the work do not fit together.
        NotImplementedError: a head dimension, dtype or device that the Pallas kernel does not serve. Traced arrays do
            not tell their device: ask `implementations.implementation` before `jit`.
    """
    _check(q, k, v, work, categories, mesh)
    portable = isinstance(work, AttentionWork)
    if not portable and interpret is None and not isinstance(q, jax.core.Tracer):
        from blindsight_kernels.pallas_prefill import check_devices

        check_devices(q.devices())
    n_vendor = 0
    if not lse and interpret is None and not isinstance(categories, jax.core.Tracer):
        n_vendor = _count_for_cudnn(q, np.asarray(categories), window, bidirectional, mesh)
    arrays = q, k, v, work, jnp.asarray(categories, jnp.int32)
    options = dict(scale=float(scale), mesh=mesh)
    out, sums = _by_category(*arrays, window=window, lse=lse, spare_dense=n_vendor > 0, interpret=interpret, **options)
    if n_vendor:
        out = _add_dense(out, *arrays, n_dense=n_vendor, **options)
    return out, sums


_HEADS, _OUT = P(DATA, MODEL), P(DATA, None, MODEL)


@partial(jax.jit, static_argnames=("window", "scale", "lse", "spare_dense", "mesh", "interpret"))
def _by_category(
    q: Array,
    k: Array,
    v: Array,
    work: AttentionWork | PallasWork,
    categories: Array,
    *,
    window: int | None,
    scale: float,
    lse: bool,
    spare_dense: bool,
    mesh: Mesh | None,
    interpret: Any,
) -> tuple[Array, Array | None]:
    """All heads; with `spare_dense` those not that `_add_dense` computes."""

    def on_device(
        q: Array, k: Array, v: Array, work: AttentionWork | PallasWork, categories: Array
    ) -> tuple[Array, Array]:
        work = _own(work, mesh)
        if spare_dense:
            categories = jnp.where(_by_cudnn(work) & (categories == Category.DENSE), _LEFT_OUT, categories)
        if isinstance(work, AttentionWork):
            run = partial(attend_sequence, categories=categories, window=window, scale=scale)
            return lax.map(lambda row: run(*row), (q, k, v, work))
        from blindsight_kernels.pallas_prefill import pallas_attention

        return pallas_attention(q, k, v, work, categories, scale=scale, interpret=interpret)

    specs = _HEADS, _HEADS, _HEADS, jax.tree.map(lambda _: P(DATA), work), P(MODEL)
    out, sums = on_devices(mesh, on_device, specs, (_OUT, _HEADS))(q, k, v, work, categories)
    return out, sums if lse else None


@partial(jax.jit, static_argnames=("n_dense", "scale", "mesh"), donate_argnames="out")
def _add_dense(
    out: Array,
    q: Array,
    k: Array,
    v: Array,
    work: AttentionWork | PallasWork,
    categories: Array,
    *,
    n_dense: int,
    scale: float,
    mesh: Mesh | None,
) -> Array:
    """The outputs with those of the dense heads, by cuDNN: up to `n_dense` on each device."""

    def on_device(
        out: Array, q: Array, k: Array, v: Array, work: AttentionWork | PallasWork, categories: Array
    ) -> Array:
        work = _own(work, mesh)

        def cudnn(out: Array) -> Array:
            n, (n_heads, n_kv) = q.shape[2], (q.shape[1], k.shape[1])
            real = jnp.arange(n)[:, None] < jnp.asarray(work.span)[:, 1, None, None, None]  # [B, 1, T, 1]
            (heads,) = jnp.nonzero(categories == Category.DENSE, size=n_dense, fill_value=n_heads)
            kv = heads // (n_heads // n_kv)
            # The keys beyond the real ones come after every real row, but 0 x NaN would be NaN.
            keys = (jnp.where(real, jnp.take(x[:, :, :n], kv, axis=1, mode="clip"), 0) for x in (k, v))
            by_row = (jnp.swapaxes(x, 1, 2) for x in (jnp.take(q, heads, axis=1, mode="clip"), *keys))
            dense = jax.nn.dot_product_attention(*by_row, scale=scale, is_causal=True, implementation="cudnn")
            return out.at[:, :, heads].set(jnp.where(jnp.swapaxes(real, 1, 2), dense, 0), mode="drop")

        return lax.cond(_by_cudnn(work), cudnn, lambda out: out, out)

    def elsewhere(out: Array, *_: Any) -> Array:
        return out

    specs = _OUT, _HEADS, _HEADS, _HEADS, jax.tree.map(lambda _: P(DATA), work), P(MODEL)
    run = on_devices(mesh, partial(lax.platform_dependent, cuda=on_device, default=elsewhere), specs, _OUT)
    return run(out, q, k, v, work, categories)


def _own(work: AttentionWork | PallasWork, mesh: Mesh | None) -> AttentionWork | PallasWork:
    """A device's own work. That of the portable implementation leads with B and is split already."""
    if mesh is None or isinstance(work, AttentionWork):
        return work
    return jax.tree.map(lambda x: x[0], work)


def _by_cudnn(work: AttentionWork | PallasWork) -> Array:
    """Whether cuDNN computes the dense heads: on CUDA, of plain prompts."""
    yes, no = (lambda: jnp.asarray(True)), (lambda: jnp.asarray(False))
    return is_plain(work) & lax.platform_dependent(cuda=yes, default=no)


def is_plain(work: AttentionWork | PallasWork) -> Array | np.bool:
    """Whether no prompt of a batch has a past or padding on its left, so that causal means row t sees keys up to t.

    In NumPy for a work in NumPy, stacked or not.
    """
    q_start = work.q_start if isinstance(work, AttentionWork) else work.limits[..., 0]
    return (q_start == 0).all() & (work.span[..., 0] == 0).all()


def _count_for_cudnn(
    q: Array, categories: np.ndarray, window: int | None, bidirectional: bool, mesh: Mesh | None
) -> int:
    """The dense heads that cuDNN may compute, as far as is known before a program runs: the most on any device."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[3] > 128 or q.shape[3] % 8 or q.shape[2] % _CUDNN_ROWS:
        return 0
    if window is not None or bidirectional or not has_cuda():
        return 0
    by_device = (categories == Category.DENSE).reshape(1 if mesh is None else mesh.shape[MODEL], -1)
    return int(by_device.sum(axis=1).max())


def has_cuda() -> bool:
    """Whether JAX runs on CUDA by default."""
    return "cuda" in backend.get_backend().platform_version


def _check(
    q: Array,
    k: Array,
    v: Array,
    work: AttentionWork | PallasWork,
    categories: Any,
    mesh: Mesh | None,
) -> None:
    """Refuses what does not fit together."""
    if not shapes_fit(q, k, v) or q.shape[1] % k.shape[1] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "q, k and v must be [B, H, T, D], [B, K, S, D], [B, K, S, D] of one dtype with H a multiple of K. Got "
            f"{q.shape}, {k.shape}, {v.shape}; {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if mesh is not None:
        check_batch(mesh, q.shape[0])
    given, wanted = _sizes_of(work, mesh), (q.shape[0], q.shape[2], k.shape[2])
    if given != wanted:
        raise ValueError(
            f"the work must be of B, T, S = {wanted}. Got one of {given}. Build it from the layouts of this batch with "
            "n_queries=T and n_keys=S."
        )
    if np.shape(categories) != (q.shape[1],) or not (
        isinstance(categories, jax.core.Tracer) or np.isin(categories, list(map(int, Category))).all()
    ):
        raise ValueError(
            f"categories must hold one of {list(map(int, Category))} per query head, H={q.shape[1]}. Got {categories}."
        )


def _sizes_of(work: AttentionWork | PallasWork, mesh: Mesh | None) -> tuple[int, ...]:
    """B, T and S that a work is of."""
    if isinstance(work, AttentionWork):
        return *work.gathered_rows.shape, work.n_keys
    n_shards = work.span.shape[0] if mesh is not None and work.span.ndim == 3 else 1
    return n_shards * work.n_batch, work.n_queries, work.n_keys
