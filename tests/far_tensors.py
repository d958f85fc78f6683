"""The Triton kernels, interpreted, on tensors that are huge in address space only; run in a worker process.

The tensors lie in a sparse file of which only the touched pages exist. It reaches as far below each tensor's beginning
as above, so that an offset computed in 32 bits, which wraps around, reads or writes zeros there instead of crashing.
"""

from __future__ import annotations

import math
import mmap
import tempfile

import numpy as np
import torch

N, BATCH, HEADS, KV_HEADS, DIM = 40, 3, 3, 3, 16


def far_tensor(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros with these strides, in a sparse file that reaches equally far to both sides of the first element."""
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * reach * dtype.itemsize)
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=dtype)
    middle = reach // 64 * 64
    return whole.as_strided(shape, strides, middle)


def run(far: dict[str, tuple[int, ...]], split: bool, skip_dense: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Both kernels, launched as `triton_attention` does, with some tensors spread out; dense outputs and log-sum-exps.

    Args:
        far: strides of `q`, `k`, or the sizes `out` `[T, H]` and `parts` `[n_slots]` that the kernels are told.
        split: text rows in parts, which the merge joins.
        skip_dense: leave the first head, which is `DENSE`, out of both.
    """
    from blindsight_kernels.triton_configurations import Configuration
    from blindsight_kernels.triton_kernels import merge_kernel, prefill_kernel
    from blindsight_kernels.triton_prefill import _source
    from blindsight_kernels.triton_work import N_FIELDS, NO_WINDOW, build_work, order_heads, pack
    from shared_profiles import Category, Layout, SinkTemplate, build_plan

    tiles = Configuration(16, 16, 4, 2, tma=False)
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, strides: tuple[int, ...] | None) -> torch.Tensor:
        x = torch.randn(BATCH, heads, N, DIM, generator=generator)
        return x if strides is None else far_tensor(tuple(x.shape), strides, x.dtype).copy_(x)

    q = draw(HEADS, far.get("q"))
    k, v = draw(KV_HEADS, far.get("k")), draw(KV_HEADS, far.get("k"))
    layout = Layout(N, 0, N, np.array([(4, 5, 16, 17), (17, 18, 30, 31)]))
    plan = build_plan(layout, SinkTemplate(local_block=16), tile_rows=16, max_keys=16 if split else None)
    work = build_work((plan,) * BATCH, tiles.block_k, q.device)
    heads = order_heads((Category.DENSE, Category.SINK, Category.INTRA_IMAGE_SINK), KV_HEADS, work, skip_dense)
    n_queries, n_heads = far.get("out", (N, HEADS))
    (n_slots,) = far.get("parts", (work.n_slots,))
    out = far_tensor((BATCH, N, HEADS, DIM), (n_queries * n_heads * DIM, n_heads * DIM, DIM, 1), torch.float32)
    lse = far_tensor((BATCH, HEADS, N), (n_heads * n_queries, n_queries, 1), torch.float32)
    block = tiles.block_q
    part_out = far_tensor((HEADS, max(n_slots, 1), block, DIM), (n_slots * block * DIM, block * DIM, DIM, 1), q.dtype)
    part_lse = far_tensor((HEADS, max(n_slots, 1), block), (n_slots * block, block, 1), q.dtype)
    scale = 0.3 * math.log2(math.e)
    prefill_kernel[(len(heads) * work.n_tiles,)](
        q, *(_source(x, N, tiles) for x in (k, v)),
        *(_source(pack(x, work), len(work.packed_index), tiles) for x in (k, v)),
        out, lse, part_out, part_lse, work.tiles, heads, work.gathered_rows, work.packed_positions,
        work.n_tiles, n_slots, n_queries, n_heads, 0, NO_WINDOW, scale, *q.stride()[:3],
        D=DIM, BLOCK_Q=block, BLOCK_K=tiles.block_k, N_FIELDS=N_FIELDS, PRECISION="ieee", TMA=False,
    )  # fmt: skip
    if len(work.merges):
        merge_kernel[(len(heads) * len(work.merges),)](
            part_out, part_lse, out, lse, heads, work.merges, work.gathered_rows,
            len(work.merges), n_slots, n_queries, n_heads, 0, D=DIM, BLOCK_Q=block,
        )  # fmt: skip
    return out.numpy().copy(), lse.numpy().copy()
