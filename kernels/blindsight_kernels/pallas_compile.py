"""Compiles the Pallas kernel for an H200 without a GPU, and reads what each configuration uses.

`python -m blindsight_kernels.pallas_compile` writes `pallas_resources.json` beside this file, the committed table that
every change is held against; with `--check` it compares and changes nothing. It wants jax's CUDA plug-in, best in a
folder of its own: where it is installed, jax looks for a GPU at every start. `make test` does this::

    pip install --no-deps --target FOLDER -r constraints-cuda.txt
    PYTHONPATH=FOLDER JAX_PLATFORMS=cpu python -m blindsight_kernels.pallas_compile --check

Lowering (`lower`) needs no plug-in: layouts, transforms and the size of shared memory are checked on any machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blindsight_kernels.pallas_configurations import HEAD_DIMS, Configuration, configuration
from blindsight_kernels.pallas_prefill import DTYPES, pallas_attention
from blindsight_kernels.pallas_requirements import jax, jnp
from blindsight_kernels.pallas_work import FIELDS, PallasWork

TABLE = Path(__file__).with_name("pallas_resources.json")
PLUG_IN = "jax_cuda13_plugin"
_SHORT = {"bfloat16": "bf16", "float16": "fp16"}
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
"""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses, a thread or a block.

    Attributes:
        registers: per thread at the launch; the compute warpgroups take 232, the memory warpgroup 40 of them.
        stack: bytes per thread.
        spill_stores, spill_loads: bytes per thread that ptxas moves to local memory and back.
        shared: bytes of shared memory per block.
        tensor_cores: wgmma instructions.
        bulk_copies: TMA instructions.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    tensor_cores: int
    bulk_copies: int

    def worse_than(self, other: Resources) -> list[str]:
        """Names what this needs more of than another; fewer or more instructions are no harm."""
        costs = ("registers", "stack", "spill_stores", "spill_loads", "shared")
        return [
            f"{name} {getattr(self, name)} > {getattr(other, name)}"
            for name in costs
            if getattr(self, name) > getattr(other, name)
        ]


class Compiled(NamedTuple):
    """A compiled kernel: its virtual assembly and what its machine code uses."""

    ptx: str
    uses: Resources


def name_of(head_dim: int, dtype: str) -> str:
    """The key of a configuration in the table, such as `sm_90a bf16 D=128`."""
    return f"sm_90a {_SHORT[dtype]} D={head_dim}"


def abstract_inputs(head_dim: int, dtype: str, tiles: Configuration | None = None) -> tuple[Any, ...]:
    """Shapes of the arguments of `pallas_attention` for a prompt of 8K tokens: q, k, v, work, categories."""
    heads, kv_heads, n_queries, n_q_tiles, n_slots = 28, 4, 8192, 83, 8

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    work: Any = PallasWork(
        tiles=ints(4, n_q_tiles + n_slots, len(FIELDS)),  # type: ignore[arg-type]  # shapes stand for arrays
        cost=jax.ShapeDtypeStruct((4,), jnp.float32),  # type: ignore[arg-type]
        q_tiles=ints(n_q_tiles, 4),  # type: ignore[arg-type]
        gathered_rows=ints(512),  # type: ignore[arg-type]
        packed=ints(1024),  # type: ignore[arg-type]
        packed_batch=ints(1024),  # type: ignore[arg-type]
        merges=ints(4, 3),  # type: ignore[arg-type]
        span=ints(1, 2),  # type: ignore[arg-type]
        limits=ints(2),  # type: ignore[arg-type]
        block_k=(configuration(head_dim) if tiles is None else tiles).block_k,
        n_batch=1,
        n_queries=n_queries,
        n_keys=n_queries,
        n_slots=n_slots,
    )
    q = jax.ShapeDtypeStruct((1, heads, n_queries, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, kv_heads, n_queries, head_dim), dtype)
    return q, k, k, work, ints(heads)


def lower(head_dim: int, dtype: str, tiles: Configuration | None = None) -> str:
    """Lowers one configuration for CUDA, on any machine. Returns the program's text."""
    attend = jax.jit(partial(pallas_attention, scale=head_dim**-0.5, tiles=tiles))
    return attend.trace(*abstract_inputs(head_dim, dtype, tiles)).lower(lowering_platforms=("cuda",)).as_text()


def compile_kernel(head_dim: int, dtype: str) -> Compiled:
    """Compiles one configuration for an H200.

    Raises:
        RuntimeError: no CUDA plug-in, or the compiler does not report what it should.
    """
    here = jax.sharding.NamedSharding(absent_gpus((1,), ("heads",)), jax.sharding.PartitionSpec())
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract_inputs(head_dim, dtype)
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            jax.jit(partial(pallas_attention, scale=head_dim**-0.5)).lower(*inputs).compile()
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        return _read(Path(folder))


def absent_gpus(shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.sharding.Mesh:
    """A mesh of H200s that are not there, to compile for.

    Raises:
        RuntimeError: no CUDA plug-in.
    """
    if importlib.util.find_spec(PLUG_IN) is None:
        raise RuntimeError(
            "compiling for a GPU needs jax's CUDA plug-in. It is not installed: pip install --no-deps --target FOLDER "
            f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} nvidia-cuda-nvcc, and put FOLDER "
            "on PYTHONPATH."
        )
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    from jax.experimental import topologies

    n = math.prod(shape)
    topology = topologies.get_topology_desc(platform="cuda", target_config=_H200, topology=f"1x1x{n}")
    return topologies.make_mesh(topology, shape, axes)


def _read(folder: Path) -> Compiled:
    """Reads what Mosaic GPU and ptxas wrote about a kernel."""

    def number(suffix: str, pattern: str) -> int:
        files = list(folder.glob(f"*{suffix}"))
        found = [int(n) for file in files for n in re.findall(pattern, file.read_text(encoding="utf-8"))]
        if len(found) != 1:
            raise RuntimeError(f"the compiler must write {pattern!r} once to *{suffix}. Got {found} in {files}.")
        return found[0]

    (ptx,) = (file.read_text(encoding="utf-8") for file in folder.glob("*.ptx"))
    uses = Resources(
        registers=number(".ptxas", r"Used (\d+) registers"),
        stack=number(".ptxas", r"(\d+) bytes stack frame"),
        spill_stores=number(".ptxas", r"stack frame, (\d+) bytes spill stores"),
        spill_loads=number(".ptxas", r"stack frame, \d+ bytes spill stores, (\d+) bytes"),
        shared=number(".before_layout_inference.txt", r"dynamic_shared_memory_size %c(\d+)_i32"),
        tensor_cores=ptx.count("wgmma.mma_async"),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
    )
    return Compiled(ptx, uses)


def read_table() -> dict[str, Resources]:
    """The committed table: resources by `name_of`."""
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Resources(**row["uses"]) for name, row in document["kernels"].items()}


def main() -> int:
    """Compiles every tuned configuration; writes the table, or compares with it: 1 where something got worse."""
    parser = argparse.ArgumentParser(prog="pallas_compile", description="Compiles the Pallas kernel for an H200.")
    parser.add_argument("--check", action="store_true", help="compare with the committed table, change nothing")
    check = parser.parse_args().check
    lines, complaints = [], []
    for dtype in DTYPES:
        for dim in HEAD_DIMS:
            begun, name = time.perf_counter(), name_of(dim, dtype)
            uses = compile_kernel(dim, dtype).uses
            print(f"{name} {configuration(dim)} {uses}, {time.perf_counter() - begun:.1f} s", flush=True)
            if check:
                complaints += [f"{name}: {worse}" for worse in uses.worse_than(read_table()[name])]
            row = dict(tiles=asdict(configuration(dim)), uses=asdict(uses))
            lines.append(f"    {json.dumps(name)}: {json.dumps(row)}")
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        return 1
    if not check:
        head = f'{{\n  "jax": {json.dumps(jax.__version__)},\n  "kernels": {{\n'
        TABLE.write_text(head + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
