"""A cycle model of the prefill kernel on Hopper, from the compiled machine code and a prompt's work list.

`python -m blindsight_gpu.cycles` prints the tables of docs/triton-hopper.md, which explains the model. It predicts;
part `tune` of gpu_check sets measured times beside its predictions.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from blindsight_gpu.prompts import GEMMA, LENGTHS, QWEN, TEMPLATE, Shape, make_layout
from blindsight_kernels.plans import build_plans
from blindsight_kernels.triton_compile import ELEMENT_SIZES, compile_kernel
from blindsight_kernels.triton_configurations import Configuration, configuration
from blindsight_kernels.triton_work import build_work
from shared_profiles import Category, Layout, count_pairs

# Per streaming multiprocessor (SM) and cycle. FLOPs: 989 TFLOP/s of dense bf16 over 132 SMs at 1.83 GHz. Special
# functions: CUDA's programming guide, throughput of ex2. L2: about 5.5 TB/s for all SMs, as microbenchmarks report.
SMS, FLOPS, SPECIAL, SCHEDULERS, SHARED_BYTES, L2_BYTES = 132, 4096, 16, 4, 128, 25
# Cycles of waiting that no arithmetic covers, from the latencies of Hopper microbenchmarks: a loop iteration's
# barriers and wgmma's own latency; filling a loop's pipeline once; a program's dependent loads up to its queries;
# normalizing and storing.
SYNC, FILL, BEGIN, END = 150, 1000, 2500, 700
# The clock at which an endless unmasked loop of the model gives what stock Triton attention is reported to reach on
# Hopper at d=128, 407 to 487 TFLOP/s: not the boost clock, for power limits it in matrix products.
CLOCK = 1.4e9
LOOPS = ("packed", "packed, masked", "range", "range, masked")


@dataclass(frozen=True)
class Loop:
    """One iteration of a loop, which is one K tile: what a warp issues.

    Attributes:
        instructions: all.
        special: exp2 and reciprocals.
        matrix: wgmma instructions.
    """

    instructions: int
    special: int
    matrix: int


def read_loops(sass: str) -> list[Loop]:
    """The innermost loops of a kernel that hold matrix products, in the order of `LOOPS`."""
    code = [
        (int(address, 16), text) for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+([^;]*);", sass, re.M)
    ]
    index = {address: i for i, (address, _) in enumerate(code)}
    spans = []
    for i, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.append((index[int(target[1], 16)], i + 1))
    holding = [span for span in spans if any("HGMMA" in text for _, text in code[slice(*span)])]
    innermost = [a for a in holding if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in holding)]
    # Waiting for a barrier is moved behind the kernel's end; its way back into a loop is no loop of its own.
    true = [a for a in innermost if not any(b[0] < a[0] < b[1] < a[1] for b in innermost)]
    loops = []
    for span in sorted(true):
        count = Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split(".")[0].split()[0] for _, text in code[slice(*span)])
        loops.append(Loop(sum(count.values()), count["MUFU"], count["HGMMA"]))
    return loops


@dataclass(frozen=True)
class Kernel:
    """A compiled configuration as the model sees it.

    Attributes:
        tiles, dim: what was compiled.
        loops: the four loops.
        programs: programs that an SM runs at once.
        spills: instructions.
    """

    tiles: Configuration
    dim: int
    loops: tuple[Loop, ...]
    programs: int
    spills: int

    @property
    def matrix_cycles(self) -> float:
        """Cycles of the tensor cores for one K tile.

        In the scores both operands come from shared memory, for every 64 rows anew, which narrow tiles of keys cannot
        hide; in the output the weights are in registers.
        """
        tiles, bands = self.tiles, self.tiles.block_q // 64
        split = max(tiles.num_warps // 4 // bands, 1)  # warpgroups that share a band of 64 rows read it each
        read = bands * self.dim // 16 * (split * 64 + tiles.block_k) * 16 * ELEMENT_SIZES["bf16"]
        half = 2 * tiles.block_q * tiles.block_k * self.dim / FLOPS
        return max(half, read / SHARED_BYTES) + half

    @property
    def bytes(self) -> int:
        """Of keys and values loaded for one K tile."""
        return 2 * self.tiles.block_k * self.dim * ELEMENT_SIZES["bf16"]

    def cycles(self, loop: Loop) -> float:
        """Cycles of one iteration as one program sees it while the SM is full.

        A single program issues products, waits for them, then computes weights: the two add up, because its barriers
        hold all its warps together. Several programs overlap; then the busiest unit decides.
        """
        vector = max(loop.instructions * self.tiles.num_warps / SCHEDULERS, self._special(loop))
        alone = self.matrix_cycles + vector + SYNC
        return max(alone, self.programs * max(self.matrix_cycles, vector, self.bytes / L2_BYTES))

    def _special(self, loop: Loop) -> float:
        return loop.special * self.tiles.num_warps * 32 / SPECIAL


@cache
def read_kernel(dim: int, tiles: Configuration) -> Kernel:
    """Compiles a configuration for Hopper in bfloat16 and reads its machine code."""
    compiled = compile_kernel(90, dim, "bf16", tiles=tiles)
    uses = compiled.uses
    programs = uses.programs(90, tiles.num_warps)
    return Kernel(tiles, dim, tuple(read_loops(compiled.sass)), programs, uses.spill_stores + uses.spill_loads)


def predict(shape: Shape, layout: Layout, category: Category, tiles: Configuration) -> float:
    """Predicted seconds of one layer whose heads all have one category."""
    kernel = read_kernel(shape.dim, tiles)
    plans = build_plans([layout], TEMPLATE, block_q=tiles.block_q)
    table = build_work(plans, tiles.block_k, torch.device("cpu")).tiles[category].numpy().astype(np.int64)
    iterations = []
    for start, full, n_full, stop in (table[:, 5:9].T, table[:, 9:13].T):
        before = -(-(full - start) // tiles.block_k)
        iterations += [n_full, before - (-(stop - full - n_full * tiles.block_k) // tiles.block_k)]
    cycles = np.full(len(table), float(BEGIN + END))
    for n, loop in zip(iterations, kernel.loops, strict=True):
        cycles += n * kernel.cycles(loop) + FILL * (n > 0)
    return makespan(np.tile(cycles, shape.heads), SMS * kernel.programs) / CLOCK


def makespan(cycles: np.ndarray, slots: int) -> float:
    """When the last of these programs ends, each begun, in order, where one has ended before."""
    free = [0.0] * slots
    for one in cycles.tolist():
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def rate(shape: Shape, layout: Layout, category: Category, seconds: float) -> float:
    """Useful TFLOP/s."""
    return 4 * shape.dim * shape.heads * count_pairs(layout, category, TEMPLATE).total / seconds / 1e12


CANDIDATES = {
    64: [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3)],
    128: [(128, 128, 8, 2), (128, 64, 8, 3), (128, 32, 4, 2), (128, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2)],
    256: [(128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2), (64, 32, 4, 2)],
}


def candidates(dim: int) -> list[Configuration]:
    """Configurations worth measuring at a head dimension on Hopper; the tuned one comes first."""
    return [Configuration(*numbers, tma=True) for numbers in CANDIDATES[dim]]


def main() -> None:
    """Prints the tables."""
    print("| tiles | SM runs | spills | wgmma | full loop: instructions, cycles | masked range loop | endless loop |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for dim in (128, 256):
        for tiles in candidates(dim):
            kernel = read_kernel(dim, tiles)
            full, masked = kernel.loops[2:]
            flops = kernel.programs * 4 * tiles.block_q * tiles.block_k * dim / kernel.cycles(full)
            name = f"d={dim}: {tiles.block_q}x{tiles.block_k}, {tiles.num_warps} warps, {tiles.num_stages} stages"
            print(
                f"| {name} | {kernel.programs} | {kernel.spills} | {full.matrix} | {full.instructions}, "
                f"{kernel.cycles(full):.0f} | {masked.instructions}, {kernel.cycles(masked):.0f} "
                f"| {flops * SMS * CLOCK / 1e12:.0f} TFLOP/s |"
            )
    print("\n| shape, tokens | category | tiles | predicted ms | useful TFLOP/s |")
    print("|---|---|---|---:|---:|")
    for shape, n_tokens in ((QWEN, LENGTHS["100K"]), (QWEN, LENGTHS["300K"]), (GEMMA, LENGTHS["100K"])):
        layout = make_layout(shape, n_tokens)
        for category in (Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK, Category.SINK):
            for tiles in candidates(shape.dim):
                seconds = predict(shape, layout, category, tiles)
                chosen = " (chosen)" * (tiles == configuration(90, shape.dim, 2))
                print(
                    f"| {shape.name}, {n_tokens:,} | {category.name} | {tiles.block_q}x{tiles.block_k}, "
                    f"{tiles.num_warps} warps, {tiles.num_stages} stages{chosen} | {1e3 * seconds:.2f} "
                    f"| {rate(shape, layout, category, seconds):.0f} |"
                )


if __name__ == "__main__":
    main()
