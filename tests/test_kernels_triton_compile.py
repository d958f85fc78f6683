"""The Triton kernels compiled ahead of time for three GPU generations, held against the committed table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="compiles with Triton, which is not installed")

import triton

from blindsight_kernels import triton_compile, triton_prefill
from blindsight_kernels.triton_compile import (
    ELEMENT_SIZES,
    TABLE,
    Compiled,
    Resources,
    compile_kernel,
    kernels,
    name_of,
    read_table,
)
from blindsight_kernels.triton_configurations import configuration, generation
from shared_profiles import Category, Layout, SinkTemplate

SHARED_MEMORY = {
    80: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes a program may use; 80 stands for 8.6 and 8.9 too


KERNELS = list(kernels())


@pytest.mark.parametrize(
    ("gpu", "dim", "dtype", "merge"), KERNELS, ids=[name_of(*kernel).replace(" ", "-") for kernel in KERNELS]
)
def test_compiles_no_worse_than_the_table(gpu, dim, dtype, merge):
    name = name_of(gpu, dim, dtype, merge)
    ptx, _, uses = compile_kernel(gpu, dim, dtype, merge)
    products = dtype != "fp32" and not merge
    assert uses.shared <= SHARED_MEMORY[gpu]
    assert ("wgmma" in ptx) == (gpu == 90 and products)
    assert (uses.tensor_cores > 0) == products
    assert (uses.bulk_loads > 0) == (products and configuration(gpu, dim, ELEMENT_SIZES[dtype]).tma)
    if triton.__version__ == json.loads(TABLE.read_text(encoding="utf-8"))["triton"]:
        worse = uses.worse_than(read_table()[name])
        assert not worse, (
            f"{name} uses {worse}: undo it, or rewrite the table with python -m blindsight_kernels.triton_compile"
        )


def test_the_table_has_every_tuned_configuration():
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    tuned = {
        name_of(*kernel): vars(configuration(kernel[0], kernel[1], ELEMENT_SIZES[kernel[2]])) for kernel in kernels()
    }
    assert {name: row["tiles"] for name, row in rows.items()} == tuned


def test_nothing_in_the_table_is_spilled():
    for name, uses in read_table().items():
        assert uses.spill_stores == uses.spill_loads == uses.stack == 0, name


def test_the_table_is_of_the_pinned_triton():
    """With another, nothing would be held against it."""
    pins = (Path(__file__).resolve().parents[1] / "constraints.txt").read_text(encoding="utf-8")
    assert f"\ntriton=={json.loads(TABLE.read_text(encoding='utf-8'))['triton']}\n" in pins


def test_the_table_is_written_as_it_is_committed(monkeypatch, tmp_path):
    uses = read_table()
    monkeypatch.setattr(triton_compile, "compile_kernel", lambda *kernel: Compiled("", "", uses[name_of(*kernel)]))
    monkeypatch.setattr(triton_compile, "TABLE", tmp_path / TABLE.name)
    triton_compile.main()
    assert (tmp_path / TABLE.name).read_text() == TABLE.read_text().replace(
        json.loads(TABLE.read_text())["triton"], triton.__version__
    )


def test_the_table_says_how_many_programs_an_sm_runs():
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    for kernel in kernels():
        row = rows[name_of(*kernel)]
        assert row["programs_per_sm"] == Resources(**row["uses"]).programs(kernel[0], row["tiles"]["num_warps"]) > 0


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "programs"),
    [(64, 164896, 8, 1), (64, 77824, 4, 2), (128, 1000, 8, 2), (32, 0, 4, 16), (16, 0, 1, 32), (129, 0, 4, 3)],
    ids=["shared", "shared-with-its-reserve", "registers", "warps", "programs", "registers-in-units-of-8"],
)
def test_programs_of_an_sm_are_limited_by(registers, shared, num_warps, programs):
    uses = Resources(registers, 0, 0, 0, shared=shared, tensor_cores=0, bulk_loads=0)
    assert uses.programs(90, num_warps) == programs


def test_worse_is_named():
    good = Resources(registers=128, stack=0, spill_stores=0, spill_loads=0, shared=1000, tensor_cores=8, bulk_loads=4)
    assert good.worse_than(good) == []
    bad = Resources(registers=129, stack=0, spill_stores=2, spill_loads=0, shared=900, tensor_cores=0, bulk_loads=4)
    assert bad.worse_than(good) == ["registers 129 > 128", "spill_stores 2 > 0", "tensor_cores 0 < 8"]


@pytest.mark.parametrize(("major", "tiles_of"), [(8, 80), (9, 90), (10, 100), (12, 80)], ids="sm_{}x".format)
def test_every_gpu_gets_tiles_that_fit_it(monkeypatch, major, tiles_of):
    assert generation(major) == tiles_of
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    for dtype in (torch.bfloat16, torch.float32):
        assert triton_prefill.choose(torch.zeros(1, 64, dtype=dtype)) == configuration(tiles_of, 64, dtype.itemsize)


def launch_both(monkeypatch, launch) -> None:
    """Calls `launch(q, options)` for either kernel of a prompt whose text is computed in parts."""
    q = torch.zeros(1, 1, 200, 16)
    kernel = type("Kernel", (), {"__getitem__": lambda *_: lambda *_, **options: launch(q, options)})()
    monkeypatch.setattr(triton_prefill, "INTERPRETED", True)
    for name in ("prefill_kernel", "merge_kernel"):
        monkeypatch.setattr(triton_prefill, name, kernel)
    layout = Layout(200, 0, 200, np.array([[4, 5, 20, 20]]))
    triton_prefill.triton_attention(q, q, q, [layout], [Category.SINK], SinkTemplate(), scale=1.0, max_keys=32)


def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch):
    current, where = [None], []

    @contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch_both(monkeypatch, lambda q, options: where.append(current[-1] is q))
    assert where == [True, True]


def test_products_are_added_in_one_instruction_whatever_is_the_default(monkeypatch):
    """Both launches ask for it, as compiling ahead of time does: without, there is an eighth more arithmetic."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert "fma.rn.f32" in compile_kernel(90, 16, "bf16", merge=True).ptx
    asked = []
    launch_both(monkeypatch, lambda q, options: asked.append(options))
    assert [options["enable_fp_fusion"] for options in asked] == [True, True]
    assert asked[0]["PRECISION"] == "ieee"  # float32


@pytest.mark.skipif(triton.__version__ != "3.6.0", reason="looks into Triton 3.6")
@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 2, 200, 128), "bf16"), ((2, 2, 200, 64), "fp32")], ids=["tma", "pointers"]
)
def test_a_launch_compiles_what_the_table_is_of(monkeypatch, shape, dtype):
    """The very same sources: what a launch has compiled, Triton's cache has for whoever reads its machine code."""
    sources = []

    def record(source, **_):
        sources.append((source.hash(), source.fn))
        return MagicMock()

    here = dict(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: target, **here))
    for kernel in (triton_prefill.prefill_kernel, triton_prefill.merge_kernel):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    monkeypatch.setattr(triton.compiler, "compile", record)
    monkeypatch.setattr(triton, "compile", record)
    monkeypatch.setattr(triton_prefill, "check_support", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_compile, "read_cubin", lambda *_: ("", None))
    layout = Layout(200, 0, 200, np.array([[4, 5, 20, 20]]))
    q = torch.zeros(shape, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    triton_prefill.triton_attention(
        q, q, q, [layout] * len(q), [Category.SINK] * 2, SinkTemplate(), scale=1.0, max_keys=32
    )
    for merge in (False, True):
        compile_kernel(90, shape[3], dtype, merge)
    assert len(sources) == 4 and sources[:2] == sources[2:]


def test_interpreted_kernels_are_not_compiled():
    code = "from blindsight_kernels.triton_compile import compile_kernel; compile_kernel(90, 64, 'bf16')"
    source = f"import os; os.environ['TRITON_INTERPRET'] = '1'; {code}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip().endswith("Got TRITON_INTERPRET=1 in the environment: unset it.")
