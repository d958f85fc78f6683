"""What scripts/gpu_check.py starts and reads beside the kernels: pytest, clocks, profilers, peers, the source."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import tree_scripts  # puts `scripts` on the path
from shared_profiles import Category, category_mask

clocks, correctness, machine, measure, peers, processes, profile, prompts, results = (
    import_module(f"blindsight_gpu.{name}")
    for name in ("clocks", "correctness", "machine", "measure", "peers", "processes", "profile", "prompts", "results")
)


def test_the_files_with_gpu_tests_are_found(tmp_path):
    """Those with the marker, and those that get it from a module they import, however far away."""
    for name, source in {
        "test_plain": "import helper_of_others",
        "test_marked": "@pytest.mark.gpu",
        "subjects": "CUDA = pytest.param('cuda', marks=pytest.mark.gpu)",
        "between": "from subjects import CUDA",
        "test_far": "    from between import CUDA",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
    assert [path.stem for path in correctness.marked_files(tmp_path)] == ["test_far", "test_marked"]
    here = {path.stem for path in correctness.marked_files(tree_scripts.ROOT / "tests")}
    assert {"test_kernels_triton", "test_kernels_pallas", "test_torch_compile", "test_parity_kernel"} <= here


def test_what_torch_says_of_a_first_backward_pass_on_a_gpu_is_no_error():
    """Autograd's thread may begin with cuBLAS, which says so once, and goes on."""
    said = "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context..."
    warnings.warn(said, UserWarning, stacklevel=1)


def test_tests_of_a_file_share_a_worker(tmp_path, monkeypatch):
    """Under any pytest: groups by marks are lost under 9.2."""
    asked = []

    def begin(command, log, environment):
        log.touch()
        asked.append(command)
        # Workers would share it: JAX warns of a program that another is writing, and warnings are errors.
        assert "JAX_COMPILATION_CACHE_DIR" not in environment
        return argparse.Namespace(wait=lambda end: 5)

    monkeypatch.setattr(correctness, "Logged", begin)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    results = import_module("blindsight_gpu.results").Results(tmp_path / "x.json", "x", {}, dry_run=False, seconds=9)
    assert "no test ran" in correctness._suite(results, measure.Place(dry_run=False))["failure"]
    assert asked[0][asked[0].index("--dist") + 1] == "loadfile"


def test_a_test_that_breaks_the_gpu_fails_no_other(tmp_path):
    """Its worker ends behind it, as one that hangs or crashes, and another goes on with the next test."""
    (tmp_path / "test_a.py").write_text(
        "import os\n"
        "def test_one(): raise RuntimeError('CUDA error: misaligned address')\n"
        "def test_two(): assert os.environ['PYTEST_XDIST_WORKER'] == 'gw1'\n"
    )
    options = ("-p", "conftest", "-p", "no:cacheprovider", "-v", "-n", "1", "--dist", "loadfile")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", tmp_path, tmp_path],
        capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    ends = re.findall(r"(PASSED|FAILED) test_a.py::test_(\w+)", done.stdout)
    assert ends[0] == ("FAILED", "one") and ("PASSED", "two") in ends, done.stdout
    assert "crashed while running 'test_a.py::test_one'" in done.stdout and "2 failed, 1 passed" in done.stdout
    assert "RuntimeError: CUDA error: misaligned address" in done.stdout


@pytest.mark.parametrize(
    "line",
    ["tests/test_a.py::test_{} {} [ 50%]", "[gw3] [ 50%] {1} tests/test_a.py::test_{0} "],
    ids=["alone", "xdist"],
)
def test_a_killed_run_still_says_which_tests_passed(line):
    said = "\n".join(
        [
            "tests/test_a.py::test_one",
            *(line.format(*one) for one in (("one", "PASSED"), ("two", "FAILED"), ("three", "SKIPPED"))),
            "worker 'gw1' crashed while running 'tests/test_a.py::test_four'",
            "tests/test_a.py::test_five",
        ]
    )
    assert correctness.read_log(said) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failed_tests": ["tests/test_a.py::test_four", "tests/test_a.py::test_two"],
        "skipped_for": [],
    }


def test_why_tests_were_skipped_is_told():
    """On a GPU, too, where JAX sees only the CPU."""
    said = "SKIPPED [2] tests/parity_subjects.py:105: needs JAX for CUDA; here cpu\nSKIPPED [1] tests/a.py: none\n"
    row = correctness.read_log("tests/test_a.py::test_one SKIPPED\n" + said)
    assert row["skipped_for"] == ["needs JAX for CUDA; here cpu", "none"]
    tables = import_module("blindsight_gpu.tables")
    assert tables._correctness([row]) == "`pytest -m gpu`: 0 passed, 1 skipped (needs JAX for CUDA; here cpu; none)."
    assert tables._correctness([row | {"skipped": 0}]) == "`pytest -m gpu`: 0 passed, 0 skipped."


def test_what_is_stopped_at_its_limit_ends_with_its_children_and_leaves_its_log(tmp_path):
    child = "import time; open('child', 'w').close(); time.sleep(2); open('late', 'w').close()"
    parent = f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); print('begun', flush=True)\n"
    parent += f"subprocess.run([sys.executable, '-c', {child!r}])"
    running = processes.Logged([sys.executable, "-c", parent], tmp_path / "log", os.environ)
    while not (tmp_path / "child").exists():
        time.sleep(0.01)
    assert running.wait(0) is None
    assert (tmp_path / "log").read_text() == "begun\n"
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def fake_nvidia_smi(folder: Path, lines: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("lines", "want"),
    [
        (
            "99, 1980, 690.5, 0x4\\n98, 1500, 700.1, 0x1000\\n3, 345, 80.0, 0x1\\n",
            {"sm_mhz": [1500, 1980], "watts": [690.5, 700.1], "throttle": "0x1004"},
        ),
        ("3, 345, 80.0, 0x1\\n", {"clocks_note": "no sample under load"}),
        ("no such field\\n", {"clocks_note": "no sample: no such field"}),
    ],
    ids=["busy", "idle", "refused"],
)
def test_clocks_are_those_under_load(tmp_path, monkeypatch, lines, want):
    fake_nvidia_smi(tmp_path, lines)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    begun, watch = time.monotonic(), clocks.Clocks()
    for _ in range(1000):
        if (found := watch.since(begun)) == want:
            break
        time.sleep(0.01)
    assert found == want


def test_the_profilers_metrics_are_read():
    head = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    rows = ['"0","k","GPU Speed Of Light Throughput","Memory Throughput","%","61.2"']
    rows += [
        '"0","k","Memory Workload Analysis","Memory Throughput","Gbyte/s","1,204"',
        '"0","k","x","Block Size","","256"',
    ]
    said = "\n".join(["==PROF== Connected", head, *rows, "==PROF== Disconnected"])
    assert profile.read_metrics(said) == {"Memory Throughput (%)": "61.2", "Memory Throughput (Gbyte/s)": "1,204"}
    assert profile.read_metrics("==ERROR== ERR_NVGPUCTRPERM") == {}


@pytest.mark.parametrize("ending", ["echo ERR_NVGPUCTRPERM; exit 1", "exit 0"], ids=["refused", "silent"])
def test_a_profiler_that_counts_nothing_is_named(tmp_path, monkeypatch, ending):
    tool = tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\n{ending}\n")
    tool.chmod(0o755)
    results = import_module("blindsight_gpu.results").Results(
        tmp_path / "gpu-p.json", "p", {}, dry_run=True, seconds=60
    )
    monkeypatch.setattr(profile, "_without_counters", lambda *_: {"kernels_us": {}})
    row = profile._row("Triton, Dense", str(tool), results, measure.Place(dry_run=True))
    assert row["ncu_note"].startswith("ncu ended with")
    assert ("ERR_NVGPUCTRPERM: no permission" in row["ncu_note"]) == ("echo" in ending)
    assert row["kernels_us"] == {}


def test_every_check_of_the_sanitizer_is_told_apart(tmp_path, monkeypatch):
    """They run side by side; what each says is kept, and none breaks the process that waits for them."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$@"\necho "== ERROR SUMMARY: 0 errors"\n'
        'case "$*" in *Pallas) ;; *memcheck*) echo "CUDA error: unspecified launch failure"; exit 99;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    sanitizer, results = (import_module(f"blindsight_gpu.{name}") for name in ("sanitizer", "results"))
    found = results.Results(tmp_path / "gpu-sanitizer.json", "sanitizer", {}, dry_run=False, seconds=60)
    sanitizer.run(found, measure.Place(dry_run=False))
    rows = {row["case"]: row for row in found.document["rows"]}
    assert list(rows) == ["memcheck: Triton", "memcheck: Pallas", "racecheck: Triton", "racecheck: Pallas"]
    assert rows["memcheck: Pallas"]["memcheck"] == "== ERROR SUMMARY: 0 errors"
    assert [case for case, row in rows.items() if "found something" in row.get("failure", "")] == ["memcheck: Triton"]
    log = (tmp_path / "gpu-sanitizer.log").read_text()
    assert log.count("exit status") == 4
    assert log.count("--report-api-errors no") == 2
    assert {path.name for path in tmp_path.iterdir()} == {tool.name, "gpu-sanitizer.json", "gpu-sanitizer.log"}


def test_the_measured_source_is_not_the_measuring_script(tmp_path, monkeypatch):
    """Or mending the script would make earlier results those of something else."""
    for name in ("kernels/blindsight_kernels", "scripts/blindsight_gpu"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    before = machine._source_digest()
    (tmp_path / "scripts/blindsight_gpu/more.py").write_text("x = 1\n")
    assert machine._source_digest() == before
    (tmp_path / "kernels/blindsight_kernels/more.py").write_text("x = 1\n")
    assert machine._source_digest() != before


def test_without_git_the_commit_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("BLINDSIGHT_COMMIT", raising=False)
    assert machine._commit() is None
    monkeypatch.setenv("BLINDSIGHT_COMMIT", "0123abc")
    assert machine._commit() == "0123abc"


def attend(q, k, v, mask):
    """Plain attention and its log-sum-exp: `[T, H, D]`, `[S, K, D]`, `[T, S]` -> `[T, H, D]`, `[H, T]`."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def plain_varlen(q, k, v, edges_q, edges_k, most_q, most_k, *, return_aux, window_size=(-1, -1)):
    """`varlen_attn` on a CPU."""
    parts = []
    for a, b, c, d in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False):
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        parts.append(attend(q[a:b], k[c:d], v[c:d], mask.tril(d - c - (b - a)) if window_size == (-1, 0) else mask))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow, and right, on a CPU
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both-ways"])
@pytest.mark.parametrize("category", [Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK], ids=lambda c: c.name)
def test_the_varlen_composition_computes_every_row_that_we_do(monkeypatch, category, bidirectional):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    monkeypatch.setattr(peers.torch, "compile", lambda function, **_: function)
    place, shape = measure.Place(dry_run=True), prompts.Shape("", 2, 1, 16, 90, bidirectional)
    layout = prompts.make_layout(shape, 384)
    compose = peers.VarlenComposition(layout, category, place, kv_heads=1, dim=16, bytes_each=4)
    q, k, v = prompts.make_inputs(shape, 384, place, 0)
    mask = torch.from_numpy(category_mask(layout, category, prompts.TEMPLATE))
    want, _ = attend(*(x[0].transpose(0, 1) for x in (q, k, v)), mask)
    np.testing.assert_allclose(compose(q, k, v).numpy(), want.numpy(), atol=2e-6)


@pytest.mark.parametrize("said", ["No available kernel.", "cuDNN Frontend error: No valid execution plans built."])
def test_what_cudnn_cannot_run_goes_to_flash(monkeypatch, said):
    answers = [RuntimeError(said), "out"]

    def attend(*_, **__):
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", attend)
    assert peers.causal_dense(*[torch.ones(1)] * 3, measure.Place(dry_run=False)) == ("out", "flash SDPA")


def test_flex_attention_is_compiled_for_each_length(monkeypatch):
    asked = []
    monkeypatch.setattr(peers.torch, "compile", lambda function, **options: asked.append(options))
    peers._compiled.cache_clear()
    peers._compiled()
    peers._compiled.cache_clear()
    assert asked == [{"dynamic": False}]


def test_a_process_ends_without_what_libraries_do_at_its_end(tmp_path):
    """Which may crash, so that the status was another, or hang to the part's limit."""
    path = tmp_path / "gpu-sanitizer.json"
    arguments = ["", "sanitizer", str(path), str(time.monotonic() + 99), "--dry-run", "--command", ""]
    program = f"import atexit, os, runpy, sys; sys.argv = {arguments}; atexit.register(os._exit, 9)\n"
    done = tree_scripts.python("-c", program + "runpy.run_module('blindsight_gpu', run_name='__main__')")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results.read(path)["complete"] and "compute-sanitizer: " in done.stdout


def test_attention_that_breaks_alone_costs_no_prefill(monkeypatch):
    jax_model = import_module("blindsight_gpu.jax_model")

    def fail(*_):
        raise MemoryError("does not fit")

    done = argparse.Namespace(logits=(), how="sparse", impl="pallas")
    for name, stand_in in (
        ("make_params", lambda *_: None),
        ("sparse_prefill", lambda *_, **__: done),
        ("Inputs", fail),
    ):
        monkeypatch.setattr(jax_model, name, stand_in)
    place = measure.Place(dry_run=True)
    row = jax_model._prefill(jax_model.sizes(place)[0], 128, False, place)
    assert row["seconds"] >= 0 and row["attention_note"] == "failed: MemoryError: does not fit"
