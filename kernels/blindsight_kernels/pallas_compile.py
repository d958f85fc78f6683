"""Compiles the Pallas kernel for an H200 without a GPU, and reads what each configuration uses.

`python -m blindsight_kernels.pallas_compile` writes `pallas_resources.json` beside this file, the committed table that
every change is held against, and demands that eight GPUs need no all-gather. It wants jax's CUDA plug-in, best in an
environment of its own (where it is installed, jax looks for a GPU at every start)::

    pip install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 nvidia-cuda-nvcc

Lowering (`lower`) needs no plug-in: layouts, transforms and the size of shared memory are checked on any machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

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


def name_of(head_dim: int, dtype: str) -> str:
    """The key of a configuration in the table, such as `sm_90a bf16 D=128`."""
    return f"sm_90a {_SHORT[dtype]} D={head_dim}"


def abstract_inputs(
    head_dim: int, dtype: str, *, heads: int = 28, kv_heads: int = 4, tiles: Configuration | None = None
) -> tuple[Any, ...]:
    """Shapes of the arguments of `pallas_attention` for a prompt of 8K tokens: q, k, v, work, categories."""
    n_queries, n_q_tiles, n_slots = 8192, 83, 8

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    work: Any = PallasWork(
        tiles=ints(4, n_q_tiles + n_slots, len(FIELDS)),  # type: ignore[arg-type]  # shapes stand for arrays
        cost=jax.ShapeDtypeStruct((4,), jnp.float32),  # type: ignore[arg-type]
        q_tiles=ints(n_q_tiles, 4),  # type: ignore[arg-type]
        gathered_rows=ints(512),  # type: ignore[arg-type]
        packed=ints(2, 1024),  # type: ignore[arg-type]
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
    return attend.trace(*abstract_inputs(head_dim, dtype, tiles=tiles)).lower(lowering_platforms=("cuda",)).as_text()


def compile_kernel(head_dim: int, dtype: str, tiles: Configuration | None = None) -> Resources:
    """Compiles one configuration for an H200.

    Raises:
        RuntimeError: no CUDA plug-in, or the compiler does not report what it should.
    """
    here = jax.sharding.NamedSharding(_gpus(1), jax.sharding.PartitionSpec())
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract_inputs(head_dim, dtype, tiles=tiles)
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            jax.jit(partial(pallas_attention, scale=head_dim**-0.5, tiles=tiles)).lower(*inputs).compile()
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        return _read(Path(folder))


def compile_sharded(head_dim: int = 128, dtype: str = "bfloat16", n_gpus: int = 8) -> str:
    """Compiles the kernel for several GPUs, heads sharded over them. Returns the optimised program's text."""
    mesh = _gpus(n_gpus)
    replicated, by_head = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, "heads")
    inputs = abstract_inputs(head_dim, dtype, heads=4 * n_gpus, kv_heads=n_gpus)
    specs = (
        by_head,
        by_head,
        by_head,
        jax.tree.map(lambda _: replicated, inputs[3]),
        jax.sharding.PartitionSpec("heads"),
    )
    attend = jax.shard_map(
        partial(pallas_attention, scale=head_dim**-0.5),
        mesh=mesh,
        in_specs=specs,
        out_specs=(jax.sharding.PartitionSpec(None, None, "heads"), by_head),
        check_vma=False,
    )
    placed = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)),
        inputs,
        specs,
    )
    return str(jax.jit(attend).lower(*placed).compile().as_text())


def _gpus(n: int) -> jax.sharding.Mesh:
    """A mesh of H200s that are not there."""
    if importlib.util.find_spec(PLUG_IN) is None:
        raise RuntimeError(
            "compiling for a GPU needs jax's CUDA plug-in. It is not installed: pip install --no-deps "
            f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} nvidia-cuda-nvcc, in an "
            "environment of its own."
        )
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=_H200, topology=f"1x1x{n}")
    return topologies.make_mesh(topology, (n,), ("heads",))


def _read(folder: Path) -> Resources:
    """Reads what Mosaic GPU and ptxas wrote about a kernel."""

    def number(suffix: str, pattern: str) -> int:
        files = list(folder.glob(f"*{suffix}"))
        found = [int(n) for file in files for n in re.findall(pattern, file.read_text(encoding="utf-8"))]
        if len(found) != 1:
            raise RuntimeError(f"the compiler must write {pattern!r} once to *{suffix}. Got {found} in {files}.")
        return found[0]

    (ptx,) = (file.read_text(encoding="utf-8") for file in folder.glob("*.ptx"))
    return Resources(
        registers=number(".ptxas", r"Used (\d+) registers"),
        stack=number(".ptxas", r"(\d+) bytes stack frame"),
        spill_stores=number(".ptxas", r"stack frame, (\d+) bytes spill stores"),
        spill_loads=number(".ptxas", r"stack frame, \d+ bytes spill stores, (\d+) bytes"),
        shared=number(".before_layout_inference.txt", r"dynamic_shared_memory_size %c(\d+)_i32"),
        tensor_cores=ptx.count("wgmma.mma_async"),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
    )


def read_table() -> dict[str, Resources]:
    """The committed table: resources by `name_of`."""
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Resources(**row["uses"]) for name, row in document["kernels"].items()}


def main() -> None:
    """Compiles every tuned configuration, prints and writes the table."""
    lines = []
    for dtype in DTYPES:
        for dim in HEAD_DIMS:
            uses = compile_kernel(dim, dtype)
            print(name_of(dim, dtype), configuration(dim), uses, flush=True)
            row = dict(tiles=asdict(configuration(dim)), uses=asdict(uses))
            lines.append(f"    {json.dumps(name_of(dim, dtype))}: {json.dumps(row)}")
    if "all-gather" in compile_sharded():
        raise RuntimeError("eight GPUs must need no all-gather where heads are sharded. Got one in the program.")
    head = f'{{\n  "jax": {json.dumps(jax.__version__)},\n  "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
