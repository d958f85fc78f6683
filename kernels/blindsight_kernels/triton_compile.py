"""Compiles the Triton kernels ahead of time, without a GPU, and reads what each configuration uses.

`python -m blindsight_kernels.triton_compile` writes `triton_resources.json` beside this file: the committed table that
a test holds every change against. Versions of Triton move registers and spills about; a table makes that visible.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from blindsight_kernels.triton_configurations import GENERATIONS, HEAD_DIMS, Configuration, configuration
from blindsight_kernels.triton_kernels import FP_FUSION, merge_kernel, prefill_kernel, triton
from blindsight_kernels.triton_work import N_FIELDS

TABLE = Path(__file__).with_name("triton_resources.json")
ELEMENT_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}  # by Triton's names of the dtypes
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Multiprocessor(NamedTuple):
    """What programs share on one streaming multiprocessor (SM): CUDA's programming guide, "compute capabilities".

    Attributes:
        registers: of 32 bits.
        warps, programs: at once, at most.
        shared: bytes of shared memory, of which every program takes `_RESERVED` more than it asks for.
    """

    registers: int
    warps: int
    programs: int
    shared: int


MULTIPROCESSORS = {  # sm_80 stands for 8.6 too, which has the least of its generation
    80: Multiprocessor(65536, 48, 16, 100 * 1024),
    90: Multiprocessor(65536, 64, 32, 228 * 1024),
    100: Multiprocessor(65536, 64, 32, 228 * 1024),
}
_RESERVED = 1024


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses, a thread or a program.

    Attributes:
        registers: per thread.
        stack: bytes per thread, more than 0 where something is spilled.
        spill_stores, spill_loads: instructions that move registers to local memory and back.
        shared: bytes of shared memory per program.
        tensor_cores: matrix instructions: wgmma on Hopper, tcgen05 on Blackwell, mma before; 0 without tensor cores.
        bulk_loads: TMA loads.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    tensor_cores: int
    bulk_loads: int

    def worse_than(self, other: Resources) -> list[str]:
        """Names what this needs more of, or uses less of the hardware, than another."""
        costs = ("registers", "stack", "spill_stores", "spill_loads", "shared")
        uses = ("tensor_cores", "bulk_loads")
        worse = [
            f"{name} {getattr(self, name)} > {getattr(other, name)}"
            for name in costs
            if getattr(self, name) > getattr(other, name)
        ]
        return worse + [
            f"{name} {getattr(self, name)} < {getattr(other, name)}"
            for name in uses
            if getattr(self, name) < getattr(other, name)
        ]

    def programs(self, gpu: int, num_warps: int) -> int:
        """Programs that one SM runs at once: what registers, warps and shared memory allow together.

        Args:
            gpu: a key of `MULTIPROCESSORS`.
            num_warps: warps of a program.
        """
        sm = MULTIPROCESSORS[gpu]
        per_warp = -(-self.registers * 32 // 256) * 256  # a warp's registers are allotted in units of 256
        return min(
            sm.programs,
            sm.warps // num_warps,
            sm.registers // per_warp // num_warps,
            sm.shared // (self.shared + _RESERVED),
        )


class Compiled(NamedTuple):
    """A kernel compiled ahead of time: its PTX, its machine code as text, and what it uses."""

    ptx: str
    sass: str
    uses: Resources


def name_of(gpu: int, head_dim: int, dtype: str, merge: bool = False) -> str:
    """The key of a kernel in the table, such as `sm_90 bf16 D=128` or `sm_90 bf16 D=128 merge`."""
    return f"sm_{gpu} {dtype} D={head_dim}{' merge' * merge}"


def kernels() -> Iterator[tuple[int, int, str, bool]]:
    """Every kernel of the table: generation, head dimension, dtype, and whether it is the merge."""
    for gpu in GENERATIONS:
        for dtype in ELEMENT_SIZES:
            for dim in HEAD_DIMS:
                yield from ((gpu, dim, dtype, False), (gpu, dim, dtype, True))


def compile_kernel(
    gpu: int, head_dim: int, dtype: str, merge: bool = False, *, tiles: Configuration | None = None
) -> Compiled:
    """Compiles one configuration of the prefill kernel, or the merge that belongs to it.

    Args:
        gpu: compute capability times ten: 80, 90 or 100.
        head_dim: D.
        dtype: "bf16", "fp16" or "fp32".
        merge: compile the merge instead.
        tiles: tile sizes to try instead of the tuned ones.

    Raises:
        RuntimeError: the kernels were imported with TRITON_INTERPRET=1.
    """
    if not isinstance(prefill_kernel, triton.runtime.JITFunction):
        raise RuntimeError("compiling needs Triton's compiler. Got TRITON_INTERPRET=1 in the environment: unset it.")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tiles = configuration(gpu, head_dim, ELEMENT_SIZES[dtype]) if tiles is None else tiles
    kernel = merge_kernel if merge else prefill_kernel
    constants: dict[str, Any] = dict(D=head_dim, BLOCK_Q=tiles.block_q)
    if not merge:
        precision = "ieee" if dtype == "fp32" else "tf32"
        constants |= dict(BLOCK_K=tiles.block_k, N_FIELDS=N_FIELDS, PRECISION=precision, TMA=tiles.tma)
    keys = (
        f"tensordesc<{dtype}[1, 1, {tiles.block_k}, {head_dim}]>" if tiles.tma else (f"*{dtype}", "i32", "i32", "i32")
    )
    pointers = dict(q=dtype, out=dtype, lse="fp32", part_out="fp32", part_lse="fp32")
    pointers |= {name: "i32" for name in ("tiles", "heads", "rows", "positions", "merges")}
    types: dict[str, Any] = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
    types |= {name: keys for name in ("k", "v", "packed_k", "packed_v")}
    types |= {name: "constexpr" for name in constants} | {"scale": "fp32"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("_ptr") or name.startswith("stride"):
            aligned.append((i,))
        elif isinstance(signature[name], tuple):
            aligned += [(i, j) for j in range(len(signature[name]))]
    attrs: dict[tuple[int, ...], list] = {index: [["tt.divisibility", 16]] for index in aligned}
    if not merge:
        attrs[(kernel.arg_names.index("PRECISION"),)] = []  # as of a launch, whose program is then this one, cached
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=FP_FUSION)
    compiled = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)
    return Compiled(compiled.asm["ptx"], *read_cubin(compiled.asm["cubin"], compiled.metadata.shared))


def read_cubin(cubin: bytes, shared: int) -> tuple[str, Resources]:
    """Reads the machine code of a compiled kernel, and from it registers and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{_CUOBJDUMP} -res-usage must print REG and STACK. Got: {usage[-300:]}")

    def count(pattern: str) -> int:
        return len(re.findall(rf"\s(?:{pattern})[.\s]", code))

    return code, Resources(
        int(found[1]), int(found[2]), count("STL"), count("LDL"), shared, count("HGMMA|HMMA|UTCHMMA"), count("UTMALDG")
    )


def _cuobjdump(*arguments: str) -> str:
    """Runs the tool that ships with Triton; it finds nvdisasm beside itself on the path."""
    path = os.pathsep.join([str(_CUOBJDUMP.parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [str(_CUOBJDUMP), *arguments], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    return done.stdout


def read_table() -> dict[str, Resources]:
    """The committed table: resources by `name_of`."""
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Resources(**row["uses"]) for name, row in document["kernels"].items()}


def main() -> None:
    """Compiles every tuned configuration, prints and writes the table."""
    rows = {}
    for gpu, dim, dtype, merge in kernels():
        tiles = configuration(gpu, dim, ELEMENT_SIZES[dtype])
        uses = compile_kernel(gpu, dim, dtype, merge).uses
        row = dict(tiles=asdict(tiles), uses=asdict(uses), programs_per_sm=uses.programs(gpu, tiles.num_warps))
        rows[name_of(gpu, dim, dtype, merge)] = row
        print(name_of(gpu, dim, dtype, merge), *asdict(tiles).values(), uses, row["programs_per_sm"], flush=True)
    lines = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    head = f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
