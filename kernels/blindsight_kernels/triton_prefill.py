"""Prefill attention by the Triton kernel: checks what it is given, builds the work list, launches.

    plans = build_plans(layouts, template, ...)    once a prompt
    work  = build_work(plans, ...)                 once a prompt, on the device
    heads = order_heads(categories, ...)           once for each choice of categories

All three are cached, so a layer costs its launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from blindsight_kernels.checks import check_arrays, check_categories, check_keys, check_layouts
from blindsight_kernels.plans import build_plans
from blindsight_kernels.triton_configurations import GENERATIONS, Configuration, configuration, generation
from blindsight_kernels.triton_kernels import FP_FUSION, merge_kernel, prefill_kernel, triton
from blindsight_kernels.triton_work import N_FIELDS, NO_WINDOW, build_work, order_heads, pack
from shared_profiles.layout import Layout
from shared_profiles.template import SinkTemplate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# TRITON_INTERPRET=1 when the kernels were first imported: they run, slowly, on CPU tensors, and nowhere else.
INTERPRETED = not isinstance(prefill_kernel, triton.runtime.JITFunction)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layouts: Sequence[Layout],
    categories: Sequence[int] | np.ndarray,
    template: SinkTemplate,
    *,
    scale: float,
    window: int | None = None,
    q_start: int = 0,
    max_keys: int | Literal["balanced"] | None = "balanced",
    tiles: Configuration | None = None,
    skip_dense: bool = False,
) -> tuple[Tensor, Tensor]:
    """Prefill attention of a batch, every head by its category.

    Args:
        q: queries `[B, H, T, D]`, row t standing at position `q_start + t`. bfloat16, float16 or float32 on a CUDA GPU
            of compute capability 8.0 or later; D one of 16, 32, 64, 128, 256, contiguous.
        k, v: keys and values `[B, K, S, D]`, H a multiple of K, S at least `q_start + T`; keys beyond are ignored.
        layouts: B layouts of `q_start + T` tokens.
        categories: `[H]` indices into `Category`.
        template: sinks and local blocks.
        scale: factor on the scores, usually `D ** -0.5`; positive.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.
        max_keys: longest key range that one program walks for text rows, see `build_plans`.
        tiles: tile sizes to use instead of the tuned ones.
        skip_dense: leave the rows of `DENSE` heads undefined, for a caller who computes them otherwise.

    Returns:
        `[B, T, H, D]` outputs in q's dtype, contiguous, and `[B, H, T]` natural log-sum-exps of the scaled scores,
        float32. Rows of padding are zero and `-inf`.

    Raises:
        ValueError: inputs that do not fit together, or on the wrong device.
        NotImplementedError: a head dimension, dtype or GPU that this kernel does not serve.
    """
    check_inputs(q, k, v, scale)
    chosen = choose(q) if tiles is None else tiles
    n_batch, n_heads, n_queries, dim = q.shape
    stop = q_start + n_queries
    check_layouts(layouts, n_batch, q_start, n_queries)
    check_keys(k.shape[2], stop)
    check_categories(categories, n_heads)
    plans = build_plans(layouts, template, block_q=chosen.block_q, window=window, q_start=q_start, max_keys=max_keys)
    work = build_work(plans, chosen.block_k, q.device)
    out = q.new_empty(n_batch, n_queries, n_heads, dim)
    lse = q.new_empty(n_batch, n_heads, n_queries, dtype=torch.float32)
    for b, layout in enumerate(layouts):
        for padding in (
            slice(0, max(layout.start - q_start, 0)),
            slice(max(layout.stop - q_start, 0), None),
        ):
            if padding.start < (n_queries if padding.stop is None else padding.stop):
                out[b, padding] = 0
                lse[b, :, padding] = -math.inf
    heads = order_heads(tuple(map(int, categories)), k.shape[1], work, skip_dense)
    if not work.n_tiles or not len(heads):
        return out, lse
    part_out = q.new_empty(n_heads, work.n_slots, chosen.block_q, dim, dtype=torch.float32)
    part_lse = q.new_empty(n_heads, work.n_slots, chosen.block_q, dtype=torch.float32)
    sizes = dict(D=dim, BLOCK_Q=chosen.block_q)
    with torch.cuda.device_of(q):
        prefill_kernel[(len(heads) * work.n_tiles,)](
            q,
            *(_source(x, stop, chosen) for x in (k, v)),
            *(_source(pack(x, work), len(work.packed_index), chosen) for x in (k, v)),
            out,
            lse,
            part_out,
            part_lse,
            work.tiles,
            heads,
            work.gathered_rows,
            work.packed_positions,
            work.n_tiles,
            work.n_slots,
            n_queries,
            n_heads,
            q_start,
            NO_WINDOW if window is None else window,
            scale * math.log2(math.e),
            *q.stride()[:3],
            BLOCK_K=chosen.block_k,
            TMA=chosen.tma,
            N_FIELDS=N_FIELDS,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",  # read for float32 only
            **sizes,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
        if work.n_slots:
            merge_kernel[(len(heads) * len(work.merges),)](
                part_out,
                part_lse,
                out,
                lse,
                heads,
                work.merges,
                work.gathered_rows,
                len(work.merges),
                work.n_slots,
                n_queries,
                n_heads,
                q_start,
                num_warps=chosen.num_warps,
                enable_fp_fusion=FP_FUSION,
                **sizes,
            )
    return out, lse


def choose(q: Tensor) -> Configuration:
    """The tiles that the kernel runs with for queries like these, on their device.

    Raises:
        NotImplementedError: the kernel has no tiles for their head dimension.
    """
    major = 9 if INTERPRETED else torch.cuda.get_device_capability(q.device)[0]
    return configuration(generation(major), q.shape[-1], q.dtype.itemsize)


def check_device(device: torch.device) -> None:
    """Refuses a device on which the kernel does not run.

    Raises:
        ValueError: not a GPU, or not the CPU where kernels are interpreted.
        NotImplementedError: a GPU older than compute capability 8.0.
    """
    if INTERPRETED:
        if device.type != "cpu":
            raise ValueError(
                f"the Triton kernel must get CPU tensors where it is interpreted (TRITON_INTERPRET=1). Got {device}. "
                "Unset TRITON_INTERPRET to run on a GPU."
            )
        return
    if device.type != "cuda":
        raise ValueError(
            f"the Triton kernel must get tensors on a CUDA GPU. Got {device}. Move the model to a GPU, or use the "
            "portable implementation, which runs anywhere."
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise NotImplementedError(
            "the Triton kernel needs a GPU of compute capability 8.0 (Ampere) or later. Got "
            f"{torch.cuda.get_device_name(device)} with {torch.cuda.get_device_capability(device)}. Use the portable "
            "implementation."
        )


def check_support(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Refuses a device, dtype or head dimension that the kernel does not serve.

    Raises:
        ValueError, NotImplementedError: as `check_device`; or another dtype or head dimension.
    """
    check_device(device)
    if dtype not in DTYPES:
        raise NotImplementedError(
            f"the Triton kernel computes in {', '.join(map(str, DTYPES))}. Got {dtype}. Convert q, k and v, or use "
            "the portable implementation."
        )
    configuration(GENERATIONS[0], head_dim, dtype.itemsize)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Refuses what the kernel cannot compute, as `triton_attention` says."""
    check_arrays(q, k, v)
    check_support(q.device, q.dtype, q.shape[-1])
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, usually D ** -0.5. Got {scale}.")
    if q.stride(3) != 1:
        raise ValueError(f"q must be contiguous along D. Got strides {q.stride()}. Call q.contiguous().")
    for name, x in (("k", k), ("v", v)):
        if x.stride(3) != 1 or x.data_ptr() % 16 or any(s * x.itemsize % 16 for s in _strides(x)[:3]):
            raise ValueError(
                f"{name} must be contiguous along D, with rows that start at multiples of 16 bytes. Got strides "
                f"{x.stride()} of {x.itemsize} bytes at an address {x.data_ptr() % 16} bytes past such a multiple. "
                f"Call {name}.contiguous()."
            )


def _source(x: Tensor, n_keys: int, tiles: Configuration) -> Any:
    """The first `n_keys` keys of `[B, K, S, D]` for the kernel: a tensor descriptor, or pointer and strides."""
    strides = _strides(x)
    if not tiles.tma:
        return x, *strides[:3]
    return triton.tools.tensor_descriptor.TensorDescriptor(
        x, [x.shape[0], x.shape[1], n_keys, x.shape[3]], strides, [1, 1, tiles.block_k, x.shape[3]]
    )


def _strides(x: Tensor) -> list[int]:
    """Strides, with that of a dimension of one element, which may be anything, replaced by a harmless one."""
    return [stride if size > 1 else x.shape[3] for stride, size in zip(x.stride(), x.shape, strict=True)]
