"""The Triton kernel compiled ahead of time for three GPU generations, held against the committed table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="compiles with Triton, which is not installed")

import triton

from blindsight_kernels.triton_compile import TABLE, Resources, compile_kernel, name_of, read_table
from blindsight_kernels.triton_configurations import ELEMENT_SIZES, GENERATIONS, HEAD_DIMS, configuration, generation

SHARED_MEMORY = {
    80: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes a program may use; 80 stands for 8.6 and 8.9 too
KERNELS = [(gpu, size, dim) for gpu in GENERATIONS for size in ELEMENT_SIZES for dim in HEAD_DIMS]


@pytest.mark.parametrize(
    ("gpu", "size", "dim"), KERNELS, ids=[name_of(g, d, s).replace(" ", "-") for g, s, d in KERNELS]
)
def test_compiles_no_worse_than_the_table(gpu, size, dim):
    name = name_of(gpu, dim, size)
    ptx, uses = compile_kernel(gpu, dim, size)
    assert uses.shared <= SHARED_MEMORY[gpu]
    if dim in (64, 128):
        assert uses.spill_stores == uses.spill_loads == uses.stack == 0
    assert ("wgmma" in ptx) == (gpu == 90 and size == 2)
    assert (uses.tensor_cores > 0) == (size == 2)
    assert (uses.bulk_loads > 0) == configuration(gpu, dim, size).tma
    if triton.__version__ == json.loads(TABLE.read_text(encoding="utf-8"))["triton"]:
        worse = uses.worse_than(read_table()[name])
        assert not worse, (
            f"{name} uses {worse}: undo it, or rewrite the table with python -m blindsight_kernels.triton_compile"
        )


def test_the_table_has_every_tuned_configuration():
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    tuned = {name_of(g, d, s): vars(configuration(g, d, s)) for g, s, d in KERNELS}
    assert {name: row["tiles"] for name, row in rows.items()} == tuned


def test_worse_is_named():
    good = Resources(registers=128, stack=0, spill_stores=0, spill_loads=0, shared=1000, tensor_cores=8, bulk_loads=4)
    assert good.worse_than(good) == []
    bad = Resources(registers=129, stack=0, spill_stores=2, spill_loads=0, shared=900, tensor_cores=0, bulk_loads=4)
    assert bad.worse_than(good) == ["registers 129 > 128", "spill_stores 2 > 0", "tensor_cores 0 < 8"]


@pytest.mark.parametrize(("major", "tiles_of"), [(8, 80), (9, 90), (10, 100), (12, 80)], ids="sm_{}x".format)
def test_every_gpu_gets_tiles_that_fit_it(major, tiles_of):
    assert generation(major) == tiles_of


def test_interpreted_kernels_are_not_compiled():
    code = "from blindsight_kernels.triton_compile import compile_kernel; compile_kernel(90, 64, 2)"
    source = f"import os; os.environ['TRITON_INTERPRET'] = '1'; {code}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip().endswith("Got TRITON_INTERPRET=1 in the environment: unset it.")
