"""The Pallas kernel lowered for CUDA without a GPU, the table of what it uses, and, with the plug-in, compiled anew."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jax", reason="the Pallas kernel needs jax, which is not installed")

import jax
from jax._src.core import jaxprs_in_params
from jax.experimental.pallas import mosaic_gpu as plgpu

from blindsight_kernels import pallas_compile
from blindsight_kernels.pallas_compile import (
    PLUG_IN,
    TABLE,
    Compiled,
    Resources,
    abstract_inputs,
    lower,
    name_of,
    read_table,
)
from blindsight_kernels.pallas_configurations import HEAD_DIMS, SHARED_MEMORY, Configuration, configuration
from blindsight_kernels.pallas_prefill import DTYPES, pallas_attention
from blindsight_kernels.pallas_work import build_pallas_work
from blindsight_kernels.plans import build_plans
from shared_profiles import Layout, SinkTemplate

ROOT = Path(__file__).resolve().parents[1]
KERNELS = [(dim, dtype) for dtype in DTYPES for dim in HEAD_DIMS]
NAMES = [name_of(*kernel).replace(" ", "-") for kernel in KERNELS]


@pytest.mark.parametrize(("dim", "dtype"), KERNELS, ids=NAMES)
def test_lowers_for_cuda_as_one_kernel(dim, dtype):
    text = lower(dim, dtype)
    assert text.count("custom_call @mosaic_gpu") == 1


def steps(dim: int, interpret: plgpu.InterpretGPUParams | None = None) -> str:
    """What the warpgroups do to shared memory, barriers and registers, a line each, in the order of the source."""
    lines = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if re.match("barrier_|copy_|commit_|wait_|wgmma_|dot_general|set_max_registers|while", name):
                barriers = re.findall(r"barrier(\[\d*\])", str([x.aval for x in equation.invars]))
                lines.append(" ".join([name, *map(str, filter(None, [equation.params.get("n")])), *barriers]))
            lines.extend(["product:"] * (name == "run_state"))
            for inner in jaxprs_in_params(equation.params):
                walk(inner)
            lines.extend(["done"] * (name == "run_state"))

    attend = partial(pallas_attention, scale=1.0, interpret=interpret)
    walk(jax.make_jaxpr(attend)(*abstract_inputs(dim, "bfloat16")).jaxpr)
    return "\n".join(lines)


@pytest.mark.parametrize("dim", HEAD_DIMS, ids="D{}".format)
def test_a_gpu_runs_what_the_simulator_finds_free_of_races(dim):
    """But for products with values, and waits for slots that nothing fills again, which only the simulator wants."""
    gpu, simulated = re.sub("product:\n|done\n", "", steps(dim)), steps(dim, plgpu.InterpretGPUParams())
    same, n_products = re.subn(r"dot_general\ncommit_smem", "wgmma_ref", simulated)
    same, n_waits = re.subn(r"while .*\n(barrier_wait .*\n){2}(?=set_max)", "", same)
    assert (n_products, n_waits) == (3, 1)
    assert gpu == same
    here, searched = (re.sub(r"\[\d+\]", "[n]", steps(d)) for d in (dim, 64))  # whatever the number of slots
    assert here == searched  # at D=256 no race is looked for: it takes the simulator long


def test_slots_are_freed_after_the_products_that_read_them():
    """The simulator ends a product where it begins; on a GPU it ends where its sums are read, or its block."""
    keys = re.findall(r"wgmma_ref\n(.*)\n(.*)\nwgmma_accumulator_deref_p\n(.*)", steps(128))
    assert keys == [("barrier_arrive []", "barrier_wait []", "barrier_arrive [3]")] * 3
    values = re.findall(r"product:\nwgmma_ref\n(.*)\ndone\n(.*)", steps(128))
    assert values == [("barrier_wait [3]", "barrier_arrive [3]")] * 3


def test_the_warpgroups_registers_fit_a_multiprocessor():
    """Else the compute warpgroups wait for theirs for ever."""
    memory, compute = map(int, re.findall(r"set_max_registers_p (\d+)", steps(128)))
    assert 128 * (memory + 2 * compute) <= 65536
    assert memory % 8 == compute % 8 == 0


def test_one_program_serves_the_prompts_profiles_and_windows_of_a_bucket():
    traced = []

    @jax.jit
    def attend(q, k, v, work, categories):
        traced.append(1)
        return pallas_attention(q, k, v, work, categories, scale=0.125)

    q = jax.ShapeDtypeStruct((1, 4, 1024, 64), "bfloat16")
    k = jax.ShapeDtypeStruct((1, 2, 1024, 64), "bfloat16")
    for n, n_images, window, categories in ((1000, 3, None, [0, 1, 2, 3]), (950, 5, 100, [3, 3, 3, 3])):
        begin, length = 10 + np.arange(n_images) * (900 // n_images), 600 // n_images
        layout = Layout(n, 0, n, np.stack([begin, begin + 1, begin + length - 1, begin + length], axis=1))
        plans = build_plans([layout], SinkTemplate(), window=window, q_start=n_images)
        work = build_pallas_work(plans, 128, n_queries=1024, n_keys=1024)
        attend.trace(q, k, k, work, np.array(categories))
    assert len(traced) == 1


def test_other_tiles_are_lowered_unless_they_do_not_fit():
    assert "@mosaic_gpu" in lower(64, "bfloat16", Configuration(64, 2))
    with pytest.raises(ValueError, match=r"smem_bytes=\d+ > max_smem_bytes=232448|227 KB"):
        lower(128, "bfloat16", Configuration(256, 2))


@pytest.mark.parametrize(("dim", "dtype"), KERNELS, ids=NAMES)
def test_the_table_has_no_spills_and_fits_an_h200(dim, dtype):
    uses = read_table()[name_of(dim, dtype)]
    assert uses.spill_stores == uses.spill_loads == uses.stack == 0
    assert configuration(dim).shared_memory(dim) < uses.shared <= SHARED_MEMORY
    assert uses.registers * 384 <= 65536
    assert uses.tensor_cores > 0
    assert uses.bulk_copies > 0


def test_the_table_has_every_tuned_configuration():
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    tuned = {name_of(dim, dtype): vars(configuration(dim)) for dim, dtype in KERNELS}
    assert {name: row["tiles"] for name, row in rows.items()} == tuned


def test_worse_is_named():
    good = Resources(168, stack=0, spill_stores=0, spill_loads=0, shared=1000, tensor_cores=8, bulk_copies=4)
    assert good.worse_than(good) == []
    bad = Resources(168, stack=8, spill_stores=8, spill_loads=0, shared=900, tensor_cores=9, bulk_copies=3)
    assert bad.worse_than(good) == ["stack 8 > 0", "spill_stores 8 > 0"]


def test_what_the_compiler_wrote_is_read(tmp_path):
    said = "304 bytes stack frame, 348 bytes spill stores, 408 bytes spill loads\nUsed 168 registers, used 9 barriers"
    (tmp_path / "a.ptxas").write_text(f"ptxas info    : Function properties for blindsight_prefill\n    {said}")
    (tmp_path / "a.before_layout_inference.txt").write_text("gpu.launch dynamic_shared_memory_size %c231544_i32 {")
    (tmp_path / "a.ptx").write_text("wgmma.mma_async.sync\nwgmma.mma_async.sync\ncp.async.bulk.tensor.3d\n")
    assert pallas_compile._read(tmp_path).uses == Resources(168, 304, 348, 408, 231544, 2, 1)
    (tmp_path / "b.ptxas").write_text(said)
    with pytest.raises(RuntimeError, match=r"once to \*\.ptxas. Got \[168, 168\]"):
        pallas_compile._read(tmp_path)


def test_the_check_fails_where_something_got_worse(monkeypatch, tmp_path, capsys):
    """And without `--check` the table is written as it is committed."""
    uses = read_table()

    def main(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["pallas_compile", *arguments])
        return pallas_compile.main()

    monkeypatch.setattr(pallas_compile, "compile_kernel", lambda *kernel: Compiled("", uses[name_of(*kernel)]))
    monkeypatch.setattr(pallas_compile, "TABLE", tmp_path / TABLE.name)
    (tmp_path / TABLE.name).write_text(f"{TABLE.read_text()}\n")
    assert main("--check") == 0
    uses["sm_90a fp16 D=64"] = replace(uses["sm_90a fp16 D=64"], spill_loads=4)
    assert main("--check") == 1
    assert capsys.readouterr().err == "sm_90a fp16 D=64: spill_loads 4 > 0\n"
    assert (tmp_path / TABLE.name).read_text() == f"{TABLE.read_text()}\n"
    uses["sm_90a fp16 D=64"] = read_table()["sm_90a fp16 D=64"]
    assert main() == 0
    assert (tmp_path / TABLE.name).read_text() == TABLE.read_text()


def python(*arguments: str, lane: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python with the folder of the plug-in on its path, or without."""
    path = os.pathsep.join(filter(None, [str(lane or ""), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": ""}  # optimized as for a user
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=560, check=False, env=environment
    )


patient = pytest.mark.timeout(600)  # about 40 seconds where nothing else runs


@pytest.fixture(scope="module")
def lane() -> Path | None:
    """The folder in which `make test` installs what compiles for a GPU; None where the environment itself has it."""
    if importlib.util.find_spec(PLUG_IN) is not None:
        return None
    folder = Path(sys.prefix) / "cuda-lane"
    if not (folder / PLUG_IN).is_dir():
        assert "BLINDSIGHT_CI" not in os.environ, f"CI must install constraints-cuda.txt into {folder}"
        pytest.skip(f"compiles with jax's CUDA plug-in, which `make test` installs into {folder}; it is not there")
    return folder


@pytest.mark.skipif(importlib.util.find_spec(PLUG_IN) is not None, reason="jax's CUDA plug-in is installed")
def test_a_missing_plug_in_is_named():
    done = python("-c", f"from blindsight_kernels.pallas_compile import *\ncompile_kernel(128, {DTYPES[0]!r})")
    assert "compiling for a GPU needs jax's CUDA plug-in. It is not installed: pip install" in done.stderr


def test_the_plug_in_and_the_table_are_of_the_pinned_jax():
    pins = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "constraints-cuda.txt")}
    (version,) = re.findall(r"^jax==(.+)$", pins["constraints.txt"], re.M)
    assert re.findall(r"^jax-cuda13-\w+==(.+)$", pins["constraints-cuda.txt"], re.M) == [version] * 2
    assert json.loads(TABLE.read_text(encoding="utf-8"))["jax"] == version


@patient
def test_compiles_no_worse_than_the_table(lane):
    done = python("-m", "blindsight_kernels.pallas_compile", "--check", lane=lane)
    assert done.returncode == 0, (
        f"{done.stderr[-2000:]}\nUndo it, or rewrite the table: python -m blindsight_kernels.pallas_compile"
    )
    assert [line.split(" Configuration")[0] for line in done.stdout.splitlines() if " D=" in line] == [
        name_of(*kernel) for kernel in KERNELS
    ]


@patient
def test_eight_gpus_need_no_all_gather(lane):
    """And the kernel stands by itself, not in a fusion with a slice of its arguments."""
    done = python(str(ROOT / "tests" / "eight_gpus.py"), lane=lane)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "kernels: 1 {'all-gather': False, 'dynamic-slice-fusion': False}"
