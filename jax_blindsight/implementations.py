"""The ways to compute a prefill's attention in JAX, which of them serves a model, and what each is told about a prompt.

| name | what it is | where | its work |
|---|---|---|---|
| `pallas` | the Pallas kernel, cuDNN for dense heads where it serves | Hopper GPUs | `PallasWork` |
| `portable` | loops in XLA, cuDNN for dense heads on CUDA | any device | `AttentionWork` |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np

from jax_blindsight.work import AttentionWork, attention_work, check_layouts
from shared_profiles import Layout, SinkTemplate

if TYPE_CHECKING:
    from blindsight_kernels.pallas_work import PallasWork

Name = Literal["pallas", "portable"]


def implementation(name: str | None, devices: Iterable[jax.Device], dtype: np.dtype, head_dim: int) -> Name:
    """The implementation for a model.

    Args:
        name: which; None for `pallas` where the model is on CUDA devices, `portable` elsewhere. On CUDA there is no
            silent change to XLA: what the kernel cannot serve is refused.
        devices: that the model's weights are on.
        dtype: of its weights.
        head_dim: D.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: `pallas` cannot serve these devices, this dtype or head dimension.
        ImportError: jax is too old for the Pallas kernel.
    """
    devices = list(devices)
    if name is not None and name not in get_args(Name):
        raise ValueError(f"impl must be one of {', '.join(get_args(Name))}, or None. Got {name!r}.")
    if name == "portable" or (name is None and not all(is_cuda(device) for device in devices)):
        return "portable"
    try:
        from blindsight_kernels.pallas_configurations import configuration
        from blindsight_kernels.pallas_prefill import check_devices, check_dtype

        check_devices(devices)
        check_dtype(dtype)
        configuration(head_dim)
    except (ImportError, NotImplementedError) as error:
        raise type(error)(f'{error} Here: impl="portable".') from error
    return "pallas"


def is_cuda(device: jax.Device) -> bool:
    """Whether a device is an NVIDIA GPU."""
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def build_work(
    impl: Name,
    layouts: Sequence[Layout],
    template: SinkTemplate,
    *,
    head_dim: int,
    window: int | None = None,
    q_start: int = 0,
    n_queries: int,
    n_keys: int,
    dense: Sequence[bool] | None = None,
    n_shards: int | None = None,
) -> AttentionWork | PallasWork:
    """What an implementation is told about a batch; layers with the same window share it.

    Args:
        impl: which.
        layouts: one a batch row, of `q_start` + (real number of queries) tokens each, padding included.
        template: sinks and local blocks.
        head_dim: D.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.
        n_queries: T of the queries, bucketed.
        n_keys: S of the keys, bucketed: T, or the capacity of the cache. A multiple of 8, as all buckets are.
        dense: the batch rows in which every head attends densely, whatever its category. Default: none.
        n_shards: the size of the mesh's data axis, which must divide the batch; None without a mesh.

    Raises:
        ValueError: layouts of different lengths or both directions, more tokens than the buckets hold, or `dense` of
            another length than `layouts`.
    """
    sizes: dict[str, Any] = dict(window=window, q_start=q_start, n_queries=n_queries, n_keys=n_keys)
    if impl == "portable":
        return attention_work(layouts, template, dense=dense, **sizes)  # its rows are dealt out as they are
    from blindsight_kernels.pallas_configurations import configuration
    from blindsight_kernels.pallas_work import build_pallas_work, stack_pallas_works
    from blindsight_kernels.plans import build_plans

    lone = [False] * len(layouts) if dense is None else dense
    check_layouts(layouts, lone, **sizes)
    share = len(layouts) // (n_shards or 1)
    works = []
    for first in range(0, len(layouts), share):
        rows = slice(first, first + share)
        plans = build_plans(layouts[rows], template, window=window, q_start=q_start)
        block_k = configuration(head_dim).block_k
        works.append(
            build_pallas_work(plans, block_k, n_queries=n_queries, n_keys=n_keys, dense=tuple(map(bool, lone[rows])))
        )
    return works[0] if n_shards is None else stack_pallas_works(works)
