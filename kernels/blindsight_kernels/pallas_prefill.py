"""Prefill attention by the Pallas kernel: checks what it is given, gathers rows and packed keys, launches, merges.

    plans = build_plans(layouts, template, ...)  # plans.py                             once a prompt
    work  = build_pallas_work(plans, configuration(D).block_k, n_queries=T, n_keys=S)   once a prompt
    out, lse = pallas_attention(q, k, v, work, categories, scale=...)                   every layer, under jit

Rows of queries are gathered into the kernel's own buffer of full tiles, and its outputs back: one pass over each, bound
by memory (8.6 GB at 300K tokens, 28 heads and D=128), in the place where the layout of heads changes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from blindsight_kernels.checks import shapes_fit
from blindsight_kernels.pallas_configurations import SHARED_MEMORY, Configuration, configuration
from blindsight_kernels.pallas_kernel import NEVER, prefill_kernel
from blindsight_kernels.pallas_requirements import jax, jnp, lax, plgpu
from blindsight_kernels.pallas_work import ALIGNMENT, BLOCK_Q, BOTH_WAYS, GATHERED, PallasWork
from shared_profiles.categories import Category

DTYPES = ("bfloat16", "float16")
LEFT_OUT = -1  # in the place of a category: the head is not computed


def pallas_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    work: PallasWork,
    categories: jax.typing.ArrayLike,
    *,
    scale: float,
    kv_heads: Sequence[int] | None = None,
    tiles: Configuration | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Prefill attention of a batch, every head by its category. Works under `jit` and `shard_map`.

    One compiled program serves all categories, layouts, windows and offsets of a bucket: the arrays of `work` and
    `categories` may be tracers.

    Args:
        q: queries `[B, H, T, D]`, row t standing at position `q_start + t`. bfloat16 or float16 on a Hopper GPU; D one
            of 64, 128, 256.
        k, v: keys and values `[B, K, S, D]`, S a multiple of 8. Those beyond a sequence's real tokens are ignored,
            whatever they hold.
        work: the batch's work list, built for this T and S.
        categories: `[H]` int32 indices into `Category`, `LEFT_OUT` for a head that something else computes: zeros and
            `-inf`. Checked where they are not traced.
        scale: factor on the scores, usually `D ** -0.5`; positive.
        kv_heads: `[H]` the kv head that each query head reads, where q holds some of a model's heads only, as when its
            dense heads go to another kernel. Default: H is a multiple of K, and head h reads kv head `h // (H // K)`.
        tiles: tile sizes to use instead of the tuned ones; the work list must have been built for them.
        interpret: simulate the kernel on a CPU.

    Returns:
        `[B, T, H, D]` outputs in q's dtype and `[B, H, T]` natural log-sum-exps of the scaled scores, float32. Rows
        that no tile has, padding for one, are zero and `-inf`.

    Raises:
        ValueError: inputs that do not fit together.
        NotImplementedError: a head dimension, dtype or device that this kernel does not serve. Traced arrays do not
            tell their device: ask `check_devices` before `jit`, or jax's compiler will refuse in its own words.
    """
    check_inputs(q, k, v, work, categories, scale, kv_heads)
    if interpret is None and isinstance(q, jax.Array) and not isinstance(q, jax.core.Tracer):
        check_devices(q.devices())
    chosen = configuration(q.shape[3]) if tiles is None else tiles
    if chosen.shared_memory(q.shape[3]) > SHARED_MEMORY:
        raise ValueError(
            f"tiles must fit the {SHARED_MEMORY >> 10} KB of shared memory of a block. Got {chosen} with "
            f"D={q.shape[3]}, which take {chosen.shared_memory(q.shape[3]) >> 10} KB. Use fewer keys or stages."
        )
    if work.block_k != chosen.block_k:
        raise ValueError(
            f"the work list must be built with block_k={chosen.block_k}. Got block_k={work.block_k}. Ask "
            "configuration(D)."
        )
    if kv_heads is None:
        kv_heads = [head // (q.shape[1] // k.shape[1]) for head in range(q.shape[1])]
    heads = jnp.asarray(categories, jnp.int32), jnp.asarray(kv_heads, jnp.int32)
    return _attention(q, k, v, work, *heads, scale=float(scale), chosen=chosen, interpret=interpret)


# Of its own: equal layers of a model are traced and lowered once.
@partial(jax.jit, static_argnames=("scale", "chosen", "interpret"))
def _attention(q, k, v, work, categories, kv_heads, *, scale, chosen, interpret):
    n_batch, n_heads, n_queries, dim = q.shape
    index, oldest, newest, row_of = rows_of(work)
    q_rows = q.swapaxes(0, 1).reshape(n_heads, -1, dim)[:, index]  # [H, R, D]
    real = jnp.arange(work.n_keys)[:, None]
    real = (real >= work.span[:, 0, None, None, None]) & (real < work.span[:, 1, None, None, None])  # [B, 1, S, 1]
    v = jnp.where(real, v, 0)  # what is not looked at has the weight zero, but zero times NaN is NaN
    packed_k, packed_v = (_pack(x, work) for x in (k, v))
    heads = order_heads(categories, work.cost, kv_heads)
    tiles = jnp.pad(work.tiles, ((0, 1), (0, 0), (0, 0)))  # LEFT_OUT, the last, has no keys anywhere
    out, lse, part_out, part_lse = prefill_kernel(
        q_rows,
        k,
        v,
        packed_k,
        packed_v,
        tiles,
        heads,
        oldest,
        newest,
        jnp.asarray(work.packed),
        n_slots=work.n_slots,
        scale=scale,
        configuration=chosen,
        interpret=interpret,
    )
    out, lse = _merge(out, lse, part_out, part_lse, work.merges)
    seen = (row_of >= 0)[:, None] & (categories >= 0)  # [B * T, H]
    out = jnp.where(seen[:, :, None], out[row_of], 0)  # [B * T, H, D]
    lse = jnp.where(seen.T, lse[:, row_of], -jnp.inf)  # [H, B * T]
    return (
        out.reshape(n_batch, n_queries, n_heads, dim),
        lse.reshape(n_heads, n_batch, n_queries).swapaxes(0, 1),
    )


def rows_of(work: PallasWork) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Expands the q_tiles of a work list, on the device.

    Returns:
        `[R]` index of each row's query among `B * T`, and the oldest and newest position that it may look at; absent
        rows repeat the last of their tile. And `[B * T]` the row of each query, -1 for none. All int32.
    """
    batch, start, n_rows, kind = jnp.asarray(work.q_tiles).T[:, :, None]  # [n_q_tiles, 1] each
    q_start, window = work.limits[0], work.limits[1]
    offset = jnp.arange(BLOCK_Q, dtype=jnp.int32)
    at = start + jnp.minimum(offset, jnp.maximum(n_rows - 1, 0))
    gathered_rows = jnp.asarray(work.gathered_rows)
    gathered = gathered_rows[jnp.minimum(at, len(gathered_rows) - 1)]
    position = jnp.where(kind & GATHERED, gathered, at)  # [n_q_tiles, 128]
    index = jnp.maximum(batch * work.n_queries + position - q_start, 0)
    newest = jnp.where(kind & BOTH_WAYS, jnp.iinfo(jnp.int32).max, position)
    n = work.n_batch * work.n_queries
    target = jnp.where(offset < n_rows, index, n).reshape(-1)
    row_of = jnp.full(n, -1, jnp.int32).at[target].set(jnp.arange(target.size, dtype=jnp.int32), mode="drop")
    return index.reshape(-1), (position - window + 1).reshape(-1), newest.reshape(-1), row_of


def order_heads(categories: jax.Array, cost: jax.Array, kv_heads: jax.Array) -> jax.Array:
    """Heads in the order of the launch: the most expensive KV group first, and in it the most expensive head.

    Args:
        categories: `[H]` int32.
        cost: `[4]` float32, of each category.
        kv_heads: `[H]` int32, the kv head that each reads.

    Returns:
        `[H, 3]` int32: head, kv head, category; 4 for one that is left out.
    """
    head = jnp.arange(len(categories), dtype=jnp.int32)
    categories = jnp.where(categories < 0, len(cost), categories)
    own = jnp.pad(jnp.asarray(cost), (0, 1))[categories]
    of_group = jnp.where(kv_heads[:, None] == kv_heads, own, 0).sum(axis=1)
    order = jnp.lexsort((head, -own, kv_heads, -of_group))
    return jnp.stack([head, kv_heads, categories], axis=1)[order]


def _pack(x: jax.Array, work: PallasWork) -> jax.Array:
    """Gathers the packed keys or values of a layer: `[B, K, S, D]` -> `[K, P, D]`."""
    return x[jnp.asarray(work.packed_batch), :, jnp.asarray(work.packed)].swapaxes(0, 1)


def _merge(out, lse, part_out, part_lse, merges):
    """Joins the parts of long ranges by their log-sum-exps, in the order of their keys."""
    merges = jnp.asarray(merges)
    part_lse = part_lse.transpose(1, 2, 0)  # [n_slots, 128, H]
    shape = (len(merges), *part_out.shape[1:])  # [n_merges, 128, H, D]

    def add(j, state):
        acc, total, peak = state
        slot = merges[:, 1 + j]
        there = (slot >= 0)[:, None, None]  # where not, the slot may never have been written
        of_part = jnp.where(there, part_lse[slot], NEVER)
        new = jnp.maximum(peak, of_part)
        before, weight = jnp.exp(peak - new), jnp.exp(of_part - new)
        return (
            acc * before[..., None] + jnp.where(there[..., None], part_out[slot], 0) * weight[..., None],
            total * before + weight,
            new,
        )

    empty = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:3], jnp.float32), jnp.full(shape[:3], NEVER, jnp.float32)
    acc, total, peak = lax.fori_loop(0, merges.shape[1] - 1, add, empty)
    merged = (acc / total[..., None]).astype(out.dtype)
    out = out.reshape(-1, *shape[1:]).at[merges[:, 0]].set(merged, mode="drop").reshape(out.shape)
    merged_lse = (peak + jnp.log(total)).transpose(2, 0, 1)  # [H, n_merges, 128]
    lse = lse.reshape(len(lse), -1, BLOCK_Q).at[:, merges[:, 0]].set(merged_lse, mode="drop").reshape(lse.shape)
    return out, lse


def check_devices(devices: Iterable[jax.Device]) -> None:
    """Refuses devices on which the kernel cannot run.

    Raises:
        NotImplementedError: a device is not a Hopper GPU.
    """
    for device in devices:
        capability = getattr(device, "compute_capability", "none")
        if device.platform != "gpu" or not capability.startswith("9."):
            raise NotImplementedError(
                "the Pallas kernel needs a Hopper GPU (compute capability 9.0: H100, H200, GH200) and jax for CUDA "
                f"(pip install 'jax[cuda13]'). Got {device.device_kind} on platform {device.platform}, compute "
                f"capability {capability}. Use the portable implementation, which runs anywhere."
            )


def check_dtype(dtype: np.dtype) -> None:
    """Refuses what the kernel does not compute in.

    Raises:
        NotImplementedError: the dtype is neither bfloat16 nor float16.
    """
    if dtype.name not in DTYPES:
        raise NotImplementedError(
            f"the Pallas kernel computes in {' and '.join(DTYPES)}. Got {dtype.name}. Convert q, k and v, or use the "
            "portable implementation."
        )


def check_inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    work: PallasWork,
    categories: jax.typing.ArrayLike,
    scale: float,
    kv_heads: Sequence[int] | None = None,
) -> None:
    """Refuses what the kernel cannot compute, as `pallas_attention` says."""
    if not shapes_fit(q, k, v) or (kv_heads is None and q.shape[1] % k.shape[1]):
        raise ValueError(
            "q, k and v must be [B, H, T, D], [B, K, S, D], [B, K, S, D] with H a multiple of K. Got "
            f"{q.shape}, {k.shape}, {v.shape}. Do not repeat keys for grouped heads."
        )
    if kv_heads is not None and (len(kv_heads) != q.shape[1] or not set(kv_heads) <= set(range(k.shape[1]))):
        raise ValueError(
            f"kv_heads must name one of the K={k.shape[1]} kv heads for each of H={q.shape[1]} query heads. Got "
            f"{list(kv_heads)}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype. Got {q.dtype}, {k.dtype}, {v.dtype}. Convert them first.")
    check_dtype(q.dtype)
    configuration(q.shape[3])
    if k.shape[2] % ALIGNMENT:
        raise ValueError(
            f"k and v must have a multiple of {ALIGNMENT} keys, which TMA demands. Got S={k.shape[2]}. Allocate the "
            "cache in such a size; what lies beyond the prompt is not looked at."
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, usually D ** -0.5. Got {scale}.")
    given, wanted = (q.shape[0], q.shape[2], k.shape[2]), (work.n_batch, work.n_queries, work.n_keys)
    if given != wanted:
        raise ValueError(
            f"the work list must be for B={given[0]}, T={given[1]}, S={given[2]}. Got one for B={wanted[0]}, "
            f"T={wanted[1]}, S={wanted[2]}. Build it from the layouts of this very prompt or chunk, with n_queries=T "
            "and n_keys=S."
        )
    if jnp.shape(categories) != (q.shape[1],):
        raise ValueError(
            f"categories must hold one category per query head, H={q.shape[1]}. Got shape {jnp.shape(categories)}."
        )
    known = list(map(int, Category))
    if not isinstance(categories, jax.core.Tracer) and not np.isin(categories, [LEFT_OUT, *known]).all():
        raise ValueError(
            f"categories must be among {known}, or {LEFT_OUT} for none. Got {np.asarray(categories).tolist()}."
        )
