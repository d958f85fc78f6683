"""The cycle model of `cycles.py` for the Pallas kernel, and the tables of docs/pallas-hopper.md.

    PYTHONPATH=.venv/cuda-lane JAX_PLATFORMS=cpu .venv/bin/python -m blindsight_gpu.pallas_cycles

with `scripts` on the path too; `make test` made the folder `cuda-lane`. The kernel is compiled with jax's CUDA plug-in,
assembled with the ptxas beside it, disassembled with the tool that comes with Triton. It predicts; nothing is timed.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from blindsight_gpu.cycles import (
    BEGIN,
    CLOCK,
    END,
    FILL,
    FLOPS,
    L2_BYTES,
    SCHEDULERS,
    SMS,
    SPECIAL,
    SYNC,
    Loop,
    makespan,
    predict,
    rate,
    read_loops,
)
from blindsight_gpu.prompts import GEMMA, LENGTHS, QWEN, TEMPLATE, Shape, make_layout
from blindsight_kernels.pallas_compile import compile_kernel
from blindsight_kernels.pallas_configurations import HEAD_DIMS, configuration
from blindsight_kernels.pallas_work import BLOCK_Q, FIELDS, build_pallas_work
from blindsight_kernels.plans import build_plans
from blindsight_kernels.triton_compile import read_cubin
from blindsight_kernels.triton_configurations import configuration as triton_configuration
from shared_profiles import Category, Layout

LOOPS = ("full", "packed, masked", "range, masked")
_WARPS = 8  # of the two compute warpgroups; the memory warpgroup issues 80 instructions a K tile on one of its four
_EMPTY = 500  # cycles of a block that finds no keys in its tile
# Of a device-to-device copy on an H200, bytes read and written a second: what the passes around the kernel can reach.
COPY = 4.3e12


@dataclass(frozen=True)
class Kernel:
    """The tuned configuration of a head dimension as the model sees it.

    Attributes:
        dim: D.
        block_k: keys of a tile.
        loops: one K tile of one compute warpgroup, as `LOOPS`.
    """

    dim: int
    block_k: int
    loops: tuple[Loop, ...]

    @property
    def matrix_cycles(self) -> float:
        """Cycles of the tensor cores for one K tile and both warpgroups; weights come from registers."""
        return 4 * BLOCK_Q * self.block_k * self.dim / FLOPS

    @property
    def bytes(self) -> int:
        """Of keys and values loaded for one K tile."""
        return 2 * self.block_k * self.dim * 2

    def units(self, loop: Loop, l2: float = L2_BYTES) -> dict[str, float]:
        """Cycles that one K tile keeps each unit busy, and `chain`: one warpgroup's own products, softmax and waits.

        The two warpgroups are half a step apart, so the busiest unit decides, or the chain if it is longer. A warpgroup
        keeps the tensor cores until its output product has ended and the next scores are issued: one wait a turn.
        """
        issue, special = loop.instructions * _WARPS / SCHEDULERS, loop.special * _WARPS * 32 / SPECIAL
        return {
            "tensor cores": self.matrix_cycles + 2 * SYNC,
            "issue": issue,
            "exp2": special,
            "L2": self.bytes / l2,
            "chain": self.matrix_cycles / 2 + max(issue, special) / 2 + SYNC,
        }

    def cycles(self, loop: Loop, l2: float = L2_BYTES) -> float:
        """Cycles of one K tile of a block, where L2 gives an SM so many bytes a cycle."""
        return max(self.units(loop, l2).values())


@cache
def read_kernel(dim: int) -> Kernel:
    """Compiles the bfloat16 kernel of a head dimension and reads its machine code.

    Raises:
        RuntimeError: jax's CUDA plug-in or ptxas is not on the path.
    """
    ptx = compile_kernel(dim, "bfloat16").ptx
    nvidia = find_spec("nvidia")
    folders = [] if nvidia is None else list(nvidia.submodule_search_locations or [])
    found = [path for folder in folders for path in Path(folder).glob("cu*/bin/ptxas")]
    if not found:
        raise RuntimeError("assembling needs ptxas on the path of Python. Install constraints-cuda.txt as it says.")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        subprocess.run([found[0], "-arch", "sm_90a", "-o", cubin, source], check=True, capture_output=True)
        sass, _ = read_cubin(cubin.read_bytes(), 0)
    return Kernel(dim, configuration(dim).block_k, tuple(read_loops(sass)))


def predict_pallas(
    shape: Shape, layout: Layout, category: Category, *, l2: float = L2_BYTES, begin: float = BEGIN
) -> tuple[float, float]:
    """Predicted seconds of the kernel, for one layer whose heads all have one category, and of the passes around it."""
    kernel, n = read_kernel(shape.dim), layout.n_tokens
    work = build_pallas_work(build_plans([layout], TEMPLATE), kernel.block_k, n_queries=n, n_keys=n)
    table = dict(zip(FIELDS, work.tiles[category].astype(np.int64).T, strict=True))
    full = sum(table[f"{source}_high"] - table[f"{source}_low"] for source in ("packed", "range"))
    masked = [
        table[f"{source}_n_tiles"] - table[f"{source}_high"] + table[f"{source}_low"] for source in ("packed", "range")
    ]
    used = full + sum(masked) > 0
    cycles = np.where(used, begin + END + FILL, _EMPTY).astype(np.float64)
    for count, loop in zip((full, *masked), kernel.loops, strict=True):
        cycles += count * kernel.cycles(loop, l2)
    rows = len(work.q_tiles) * BLOCK_Q
    wide, narrow = shape.heads * shape.dim * 2, shape.kv_heads * shape.dim * 2  # bytes of a row
    moved = wide * (n + rows) + wide * 2 * n + narrow * 2 * n  # queries gathered, outputs back, values masked
    return makespan(np.tile(cycles, shape.heads), SMS) / CLOCK, moved / COPY


def main() -> None:
    """Prints the tables."""
    print("| tiles | loop | instructions | tensor cores | issue | exp2 | L2 | chain | a K tile | endless loop |")
    print("|---|---|" + "---:|" * 8)
    for dim in HEAD_DIMS:
        kernel = read_kernel(dim)
        for name, loop in zip(LOOPS, kernel.loops, strict=True):
            flops = 4 * BLOCK_Q * kernel.block_k * dim / kernel.cycles(loop)
            units = " | ".join(f"{cycles:,.0f}" for cycles in kernel.units(loop).values())
            print(
                f"| d={dim}: {BLOCK_Q}x{kernel.block_k} | {name} | {loop.instructions} | {units} "
                f"| {kernel.cycles(loop):,.0f} | {flops * SMS * CLOCK / 1e12:.0f} TFLOP/s |"
            )
    print("\n| shape, tokens | category | kernel ms | passes ms | useful TFLOP/s | Triton ms | of Triton |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for shape, n_tokens in ((QWEN, LENGTHS["100K"]), (QWEN, LENGTHS["300K"]), (GEMMA, LENGTHS["100K"])):
        layout = make_layout(shape, n_tokens)
        for category in (Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK, Category.SINK):
            seconds, passes = predict_pallas(shape, layout, category)
            triton = predict(shape, layout, category, triton_configuration(90, shape.dim, 2))
            print(
                f"| {shape.name}, {n_tokens:,} | {category.name} | {1e3 * seconds:.2f} | {1e3 * passes:.2f} "
                f"| {rate(shape, layout, category, seconds + passes):.0f} | {1e3 * triton:.2f} "
                f"| {triton / (seconds + passes):.2f}x |"
            )
    layout, category = make_layout(QWEN, LENGTHS["100K"]), Category.INTRA_IMAGE
    print(
        f"\n| {QWEN.name}, {layout.n_tokens:,}, {category.name}, if | kernel ms | useful TFLOP/s without the passes |"
    )
    print("|---|---:|---:|")
    changes: dict[str, dict[str, float]] = {
        "as it is": {},
        "L2 gives 30 bytes a cycle and SM": dict(l2=30),
        "two blocks share each load of keys": dict(l2=2 * L2_BYTES),
        "the next tile is begun early": dict(begin=0),
        "both of these": dict(l2=2 * L2_BYTES, begin=0),
    }
    for name, change in changes.items():
        seconds, _ = predict_pallas(QWEN, layout, category, **change)
        print(f"| {name} | {1e3 * seconds:.2f} | {rate(QWEN, layout, category, seconds):.0f} |")


if __name__ == "__main__":
    main()
