"""Compiles the Triton kernel ahead of time, without a GPU, and reads what each configuration uses.

`python -m blindsight_kernels.triton_compile` writes `triton_resources.json` beside this file: the committed table that
a test holds every change against. Versions of Triton move registers and spills about; a table makes that visible.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blindsight_kernels.triton_configurations import ELEMENT_SIZES, GENERATIONS, HEAD_DIMS, Configuration, configuration
from blindsight_kernels.triton_kernels import prefill_kernel, triton
from blindsight_kernels.triton_work import N_FIELDS

TABLE = Path(__file__).with_name("triton_resources.json")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_TYPES = {2: "bf16", 4: "fp32"}


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


def name_of(gpu: int, head_dim: int, element_size: int) -> str:
    """The key of a configuration in the table, such as `sm_90 bf16 D=128`."""
    return f"sm_{gpu} {_TYPES[element_size]} D={head_dim}"


def compile_kernel(
    gpu: int, head_dim: int, element_size: int, tiles: Configuration | None = None
) -> tuple[str, Resources]:
    """Compiles one configuration of the prefill kernel.

    Args:
        gpu: compute capability times ten: 80, 90 or 100.
        head_dim: D.
        element_size: 2 (bfloat16) or 4 (float32).
        tiles: tile sizes to try instead of the tuned ones.

    Returns:
        The PTX and the resources.

    Raises:
        RuntimeError: the kernels were imported with TRITON_INTERPRET=1.
    """
    if not isinstance(prefill_kernel, triton.runtime.JITFunction):
        raise RuntimeError("compiling needs Triton's compiler. Got TRITON_INTERPRET=1 in the environment: unset it.")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tiles = configuration(gpu, head_dim, element_size) if tiles is None else tiles
    dtype = _TYPES[element_size]
    keys = (
        f"tensordesc<{dtype}[1, 1, {tiles.block_k}, {head_dim}]>" if tiles.tma else (f"*{dtype}", "i32", "i32", "i32")
    )
    constants = dict(
        D=head_dim,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        N_FIELDS=N_FIELDS,
        PRECISION="ieee" if element_size == 4 else "tf32",
        TMA=tiles.tma,
    )
    pointers = dict(
        q=dtype, out=dtype, lse="fp32", part_out="fp32", part_lse="fp32", tiles="i32", heads="i32", rows="i32"
    )
    types: dict[str, Any] = {f"{name}_ptr": f"*{kind}" for name, kind in {**pointers, "positions": "i32"}.items()}
    types |= {name: keys for name in ("k", "v", "packed_k", "packed_v")}
    types |= {name: "constexpr" for name in constants} | {"scale": "fp32"}
    signature = {name: types.get(name, "i32") for name in prefill_kernel.arg_names}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(prefill_kernel.arg_names):
        if name.endswith("_ptr") or name.startswith("stride"):
            aligned.append((i,))
        elif isinstance(signature[name], tuple):
            aligned += [(i, j) for j in range(len(signature[name]))]
    source = ASTSource(
        fn=prefill_kernel,
        signature=signature,
        constexprs=constants,
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)
    return compiled.asm["ptx"], _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, shared: int) -> Resources:
    """Reads registers and instructions from a compiled kernel."""
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

    return Resources(
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
    for gpu in GENERATIONS:
        for size in ELEMENT_SIZES:
            for dim in HEAD_DIMS:
                tiles = configuration(gpu, dim, size)
                _, uses = compile_kernel(gpu, dim, size)
                rows[name_of(gpu, dim, size)] = dict(tiles=asdict(tiles), uses=asdict(uses))
                print(name_of(gpu, dim, size), *asdict(tiles).values(), uses, flush=True)
    lines = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    head = f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
