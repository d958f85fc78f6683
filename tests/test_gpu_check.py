"""scripts/gpu_check.py without a GPU: every part dry-run, resuming, and what a failing row or part costs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from tree_scripts import ROOT, SOURCE_ROOTS, python

pytestmark = pytest.mark.timeout(600)  # a dry run of many parts, on a busy machine
PARTS = {
    "torch": ("correctness", "attention", "model", "calibration", "sanitizer", "tune"),
    "jax": ("bounds", "pallas", "jax_model"),
}
GPU_CHECK = ROOT / "scripts" / "gpu_check.py"

tables, results, runner = (import_module(f"blindsight_gpu.{name}") for name in ("tables", "results", "runner"))
# Tests of one group run in one worker, so that one dry run serves them all.
with_torch, with_jax = (pytest.mark.xdist_group(f"gpu_check {name}") for name in PARTS)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> Callable[[str], Path]:
    """`dry_run(group)`: the result folder of a dry run of some of the parts, in one process, that ended well."""

    @cache
    def run(group: str) -> Path:
        out = tmp_path_factory.mktemp(group)
        done = python(Path(__file__).with_name("gpu_dry_run.py"), "--out", out, "--part", ",".join(PARTS[group]))
        assert done.returncode == 0, done.stdout + done.stderr
        for part in PARTS[group]:
            rows = len(load(out, part)["rows"])
            assert f"== {part}: {rows} rows, 0 failed, 0 left out (DRY RUN)" in done.stdout
        return out

    return run


def load(folder: Path, part: str) -> dict:
    return json.loads((folder / f"gpu-{part}.json").read_text())


@pytest.mark.parametrize("group", [pytest.param("torch", marks=with_torch), pytest.param("jax", marks=with_jax)])
def test_every_part_runs_and_says_what_it_depends_on(dry_run, group):
    for part in PARTS[group]:
        document = load(dry_run(group), part)
        assert document["complete"], part
        assert document["dry_run"]
        assert document["rows"], part
        assert {"gpu", "versions", "commit", "source"} <= document["machine"].keys()
        assert {"torch", "triton", "jax", "cuda", "cudnn"} <= document["machine"]["versions"].keys()
        assert document["command"]
        assert document["time"]


def test_every_part_is_dry_run():
    assert set().union(*PARTS.values()) == {*runner.SHARES, *runner.OPTIONAL}


@with_torch
def test_attention_is_compared_with_peers_that_compute_the_same(dry_run):
    all_rows = load(dry_run("torch"), "attention")["rows"]
    rows = [row for row in all_rows if "profile" in row]
    assert len(rows) == 3
    (vendor,) = (row for row in all_rows if "vendor_ms" in row)
    assert vendor["first_ms"] > 0
    for row in rows:
        assert row["flex_differs_by"] < 1e-5
        assert row["varlen_note"]
        assert row["denominator"] == "SDPA on the CPU, causal, the same tokens"
        np.testing.assert_allclose(row["speed_up"] * row["kept"] * row["ours_ms"], row["bound_ms"], rtol=1e-9)


@with_jax
def test_pallas_is_measured_beside_triton_on_the_same_inputs(dry_run):
    dense, *rows = load(dry_run("jax"), "pallas")["rows"]
    assert dense["kernel"] == "XLA on the CPU"
    assert [row["profile"] for row in rows] == ["all Intra-Image+Sink", "30% Dense, rest Intra-Image+Sink"]
    for row in rows:
        assert row["differs_by"] < 0.05  # two bfloat16 kernels of the same numbers
        np.testing.assert_allclose(row["against_triton"] * row["pallas_ms"], row["triton_ms"], rtol=1e-9)
        assert row["compile_s"] > 0
    assert rows[0]["tokamax_note"]


@with_torch
def test_models_are_measured_dense_and_sparse(dry_run):
    rows = [row for row in load(dry_run("torch"), "model")["rows"] if "sparse_s" in row]
    assert [row["case"] for row in rows] == ["toy Qwen2.5-VL: toy", "toy Gemma-3: toy"]
    for row in rows:
        assert row["forwards"] == {"sparse": 1}
        assert row["attention_share"] > 0
        np.testing.assert_allclose(row["speed_up"] * row["sparse_s"], row["dense_s"], rtol=1e-9)


@with_jax
def test_models_are_measured_in_jax_side_by_side(dry_run):
    rows = load(dry_run("jax"), "jax_model")["rows"]
    names = [f"toy Qwen2.5-VL: toy, {side}" for side in ("sparse", "dense", "calibration", "gradient")]
    assert [row["case"] for row in rows] == [*names, "toy Gemma-3: toy, sparse", "toy Gemma-3: toy, dense"]
    for row in rows:
        assert row["seconds"] > 0
        assert row["images"] > 1
        if "how" in row:
            assert row["how"].split(":")[0] == row["case"].split(", ")[1]


def test_time_that_a_part_leaves_goes_to_the_others():
    parts = list(runner.SHARES)
    assert runner._share(parts, sum(runner.SHARES.values())) == pytest.approx(runner.SHARES[parts[0]])
    assert runner._share(["jax_model"], 500) == 500
    assert runner._share(["jax_model", "tune"], 310) == pytest.approx(70)


@with_torch
def test_resuming_keeps_what_is_measured_and_measures_what_failed(dry_run, tmp_path):
    """By the script itself, whose parts have processes of their own."""
    document = load(dry_run("torch"), "tune")
    (tmp_path / "gpu-tune.json").write_text(json.dumps(document))
    arguments = ("--out", tmp_path, "--dry-run", "--part", "tune", "--resume")
    assert python(GPU_CHECK, *arguments).returncode == 0
    assert load(tmp_path, "tune")["rows"] == document["rows"]
    document["rows"][0] = {"case": document["rows"][0]["case"], "failure": "out of memory"}
    (tmp_path / "gpu-tune.json").write_text(json.dumps(document))
    assert python(GPU_CHECK, *arguments).returncode == 0
    assert "failure" not in load(tmp_path, "tune")["rows"][0]


@pytest.mark.parametrize(
    "change",
    [lambda m: m.update(source="other"), lambda m: m["gpu"].update(name="other"), lambda m: m["versions"].update(x=1)],
    ids=["source", "gpu", "versions"],
)
def test_results_of_something_else_are_not_resumed(tmp_path, change):
    def new():
        machine = {"source": "a", "gpu": {"name": "b"}, "versions": {}}
        return results.Results(tmp_path / "gpu-x.json", "x", machine, dry_run=True, seconds=9)

    first = new()
    first.measure("one", lambda: {"value": 1})
    again = new()
    again.resume()
    assert again.get("one")["value"] == 1
    other = new()
    change(other.document["machine"])
    other.resume()
    assert other.get("one") is None


def test_a_failing_case_and_a_deadline_cost_no_other_case(tmp_path, capsys):
    part = results.Results(tmp_path / "gpu-x.json", "x", {}, dry_run=True, seconds=9)
    assert part.measure("bad", lambda: 1 / 0) is None
    assert part.measure("good", lambda: {"value": 1})["value"] == 1
    part.deadline = 0
    assert part.measure("late", lambda: {"value": 2}) is None
    part.finish()
    document = json.loads(part.path.read_text())
    assert [row["case"] for row in document["rows"]] == ["bad", "good"]
    assert document["rows"][0]["failure"] == "ZeroDivisionError: division by zero"
    assert document["left_out"] == ["late"]
    assert not document["complete"]


BREAKS = """
import os, sys, time
from pathlib import Path
from blindsight_gpu.results import Results

part = Results(Path(sys.argv[1]), "x", {}, dry_run=True, seconds=99, row_seconds=2)
part.go_on() if "--go-on" in sys.argv else None
def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
for case, function in {"one": dict, "crash": lambda: os._exit(9), "two": dict, "poison": fail, "three": dict,
                       "hang": lambda: time.sleep(60), "four": dict}.items():
    part.measure(case, function)
part.finish()
"""


def test_a_row_that_breaks_its_process_costs_no_other_row(tmp_path, monkeypatch):
    statuses = []

    def process(part, path, seconds, flags):
        command = [sys.executable, "-c", BREAKS, str(path), *flags]
        environment = {**os.environ, "PYTHONPATH": SOURCE_ROOTS}
        statuses.append(subprocess.run(command, env=environment, check=False, timeout=100).returncode)
        return statuses[-1]

    monkeypatch.setattr(runner, "_process", process)
    asked = argparse.Namespace(resume=False, dry_run=False)
    runner._run("x", tmp_path / "gpu-x.json", 100, asked)
    assert statuses == [9, results.POISONED, 1, 0]
    document = load(tmp_path, "x")
    failures = {row["case"]: row.get("failure") for row in document["rows"]}
    assert list(failures) == ["one", "crash", "two", "poison", "three", "hang", "four"]
    assert failures["crash"] == failures["hang"] == "ended its process, or took more than 2 s"
    assert "illegal memory access" in failures["poison"]
    assert [case for case, failure in failures.items() if failure is None] == ["one", "two", "three", "four"]
    assert not document["complete"]
    assert document["running"] is None


def test_bad_requests_are_refused(tmp_path):
    unknown = python(GPU_CHECK, "--out", tmp_path, "--part", "speed")
    assert unknown.returncode == 2
    assert "parts must be among correctness, bounds" in unknown.stderr
    spent = python(GPU_CHECK, "--out", tmp_path, "--dry-run", "--budget-seconds", "1")
    assert spent.returncode == 1
    assert "correctness: not begun, the budget of 1 s is spent" in spent.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU; here is one")
def test_without_a_gpu_only_a_dry_run_is_possible(tmp_path):
    done = python(GPU_CHECK, "--out", tmp_path, "--part", "tune")
    assert done.returncode == 1
    assert "torch.cuda.is_available() is False: use --dry-run" in done.stdout
    assert not list(tmp_path.iterdir())


@with_torch
def test_dry_runs_are_not_published(dry_run):
    with pytest.raises(ValueError, match=r"must be measured on a GPU. Got a dry run"):
        tables.section(dry_run("torch"))
    done = python(ROOT / "scripts" / "render_results.py", "--results", dry_run("torch"))
    assert done.returncode == 1
    assert "Got a dry run" in done.stderr
