"""scripts/gpu_check.py without a GPU: every part dry-run, resuming, and what a failing row or part costs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from shared_profiles import category_mask
from tree_scripts import ROOT, python

pytestmark = pytest.mark.timeout(600)  # a dry run of many parts, on a busy machine
PARTS = {
    "torch": ("correctness", "attention", "attention_more", "model", "calibration", "sanitizer", "profile", "tune"),
    "jax": ("bounds", "pallas", "jax_model"),
}
GPU_CHECK = ROOT / "scripts" / "gpu_check.py"

attention, measure, plots, prompts, tables, results, runner = (
    import_module(f"blindsight_gpu.{name}")
    for name in ("attention", "measure", "plots", "prompts", "tables", "results", "runner")
)
COMMANDS = import_module("blindsight_gpu.parts").COMMANDS
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
        assert document["command"].startswith("gpu_check.py --dry-run --out")
        assert document["time"]


@with_torch
def test_few_files_come_of_a_part(dry_run):
    """A result, and a log where other programs spoke."""
    logs = {path.name for path in dry_run("torch").iterdir()} - {f"gpu-{part}.json" for part in PARTS["torch"]}
    assert logs <= {f"gpu-{part}.log" for part in ("correctness", "sanitizer", "profile")}
    (row,) = load(dry_run("torch"), "correctness")["rows"]
    assert "--timeout=150 --timeout-method=thread" in row["command"]
    assert "test session starts" in (dry_run("torch") / "gpu-correctness.log").read_text()


def test_three_commands_run_everything_in_their_time():
    """And each writes few files: a result and, at most, a log for every part."""
    assert set().union(*PARTS.values()) == set(runner.SECONDS)
    assert sorted(part for parts in COMMANDS for part in parts) == sorted(runner.SECONDS)
    for parts in COMMANDS:
        assert f"--part {','.join(parts)}\n" in GPU_CHECK.read_text()
        assert sum(runner.SECONDS[part] for part in parts) <= runner.BUDGET <= 570
        assert len(parts) <= 4


def assert_counted(row: dict, milliseconds: float, shape) -> None:
    """Pairs are those of the heads' masks, of the denominator causal; each takes a product and a sum, twice."""
    n = row["tokens"]
    causal = pairs = shape.heads * sum(range(n + 1))
    if "profile" in row:
        layout = prompts.make_layout(shape, n)
        heads = attention.profiles(shape.heads)[row["profile"]]
        pairs = sum(int(category_mask(layout, head, prompts.TEMPLATE).sum()) for head in heads)
        assert row["kept"] == pytest.approx(pairs / causal, rel=1e-12)
    assert row["useful_tflops"] == pytest.approx(pairs * 2 * 2 * shape.dim / (milliseconds / 1e3) / 1e12, rel=1e-9)


@with_torch
def test_attention_is_compared_with_peers_that_compute_the_same(dry_run):
    rows = load(dry_run("torch"), "attention")["rows"]
    shape, _ = prompts.shapes(measure.Place(dry_run=True))
    for row in rows[1:]:  # behind the plan's
        assert_counted(row, row.get("ours_ms", row.get("dense_ms")), shape)
    rows = [row for row in rows if "profile" in row]
    assert [row["profile"] for row in rows] == list(attention.SOME)
    for row in rows:
        if "all Dense" not in row["profile"]:
            assert row["flex_differs_by"] < 1e-5
            assert 0 < row["flex_mask_ms"] < 1e3 * row["row_seconds"]
            assert row["varlen_note"]
        assert row["first_ms"] > 0
        assert row["denominator"] == "SDPA on the CPU, causal, the same tokens"
        np.testing.assert_allclose(row["speed_up"] * row["kept"] * row["ours_ms"], row["bound_ms"], rtol=1e-9)


@with_jax
def test_pallas_is_measured_beside_triton_on_the_same_inputs(dry_run):
    dense, *rows = load(dry_run("jax"), "pallas")["rows"]
    assert dense["kernel"] == "XLA on the CPU"
    assert_counted(dense, dense["dense_ms"], import_module("blindsight_gpu.pallas")._TOY)
    assert [row["profile"] for row in rows] == ["all Intra-Image+Sink", "30% Dense, rest Intra-Image+Sink"]
    for row in rows:
        assert row["differs_by"] < 0.05  # two bfloat16 kernels of the same numbers
        np.testing.assert_allclose(row["against_triton"] * row["pallas_ms"], row["triton_ms"], rtol=1e-9)
        assert_counted(row, row["pallas_ms"], import_module("blindsight_gpu.pallas")._TOY)
        np.testing.assert_allclose(row["speed_up"] * row["pallas_ms"], dense["dense_ms"], rtol=1e-9)
        np.testing.assert_allclose(row["bound_ms"], row["kept"] * dense["dense_ms"], rtol=1e-9)
        assert row["compile_s"] > 0
    assert rows[0]["tokamax_note"]


@with_torch
def test_models_are_measured_dense_and_sparse(dry_run):
    rows = [row for row in load(dry_run("torch"), "model")["rows"] if "sparse_s" in row]
    assert [row["case"] for row in rows] == ["toy Qwen2.5-VL: toy", "toy Gemma-3: toy"]
    for row in rows:
        assert row["forwards"] == {"sparse": 1}
        assert row["attention_share"] > 0
        assert row["beside_share"] > 0
        np.testing.assert_allclose(row["speed_up"] * row["sparse_s"], row["dense_s"], rtol=1e-9)
        dense, sparse = (row[side] + row["tower_s"] for side in ("dense_s", "sparse_s"))
        np.testing.assert_allclose(row["ttft_speed_up"] * sparse, dense, rtol=1e-9)


@with_jax
def test_models_are_measured_in_jax_side_by_side(dry_run):
    rows = load(dry_run("jax"), "jax_model")["rows"]
    names = [f"toy Qwen2.5-VL: toy, {side}" for side in ("sparse", "dense", "calibration", "gradient")]
    assert [row["case"] for row in rows] == [*names, "toy Gemma-3: toy, sparse", "toy Gemma-3: toy, dense"]
    assert [row["case"] for row in rows if "attention_share" in row] == names[:1]
    for row in rows:
        assert row["seconds"] > 0
        assert row["images"] > 1
        if "how" in row:
            assert row["how"].split(":")[0] == row["case"].split(", ")[1]


def test_time_that_a_part_leaves_goes_to_the_others():
    parts = list(runner.SECONDS)
    assert runner._share(parts, sum(runner.SECONDS.values())) == pytest.approx(runner.SECONDS[parts[0]])
    assert runner._share(["jax_model"], 500) == 500
    both = runner.SECONDS["jax_model"] + runner.SECONDS["tune"]
    assert runner._share(["jax_model", "tune"], 2 * both) == pytest.approx(2 * runner.SECONDS["jax_model"])


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
    first.run({"one": lambda: {"value": 1}})
    again = new()
    again.begin(resume=True)
    assert again.get("one")["value"] == 1
    other = new()
    change(other.document["machine"])
    other.begin(resume=True)
    assert other.get("one") is None
    other.write()
    (aside,) = tmp_path.glob("gpu-x-*.json")  # what was measured before is kept
    assert json.loads(aside.read_text())["rows"][0]["value"] == 1


def test_a_failing_case_and_a_deadline_cost_no_other_case(tmp_path, capsys):
    part = results.Results(tmp_path / "gpu-x.json", "x", {}, dry_run=True, seconds=9)

    def good():
        part.deadline = 0
        return {"value": 1}

    part.run({"bad": lambda: 1 / 0, "good": good, "late": lambda: {"value": 2}})
    part.finish()
    assert part.good("bad") is None
    assert part.good("good")["value"] == 1
    document = json.loads(part.path.read_text())
    assert [row["case"] for row in document["rows"]] == ["bad", "good"]
    assert document["rows"][0]["failure"] == "ZeroDivisionError: division by zero"
    assert document["left_out"] == ["late"]
    assert not document["complete"]


BREAKS = """
import os, sys, time
from pathlib import Path
from blindsight_gpu.results import Results

alone = "--alone" in sys.argv
part = Results(Path(sys.argv[1]), "x", {}, dry_run=True, seconds=99, row_seconds=2, alone=alone)
part.go_on() if "--go-on" in sys.argv else None
def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
cases = {"one": dict, "crash": lambda: os._exit(9), "two": dict, "poison": fail, "three": dict,
         "hang": lambda: time.sleep(60), "four": dict}
part.run({"one": dict, "two": dict, "three": dict} if alone else cases)
part.finish()
"""


@pytest.fixture
def run_part(tmp_path, monkeypatch) -> Callable[..., list[int]]:
    """`run_part(*flags)`: the statuses of the processes that a part of such rows takes."""

    def run(*always: str) -> list[int]:
        statuses = []

        def process(part, path, end, flags, environment):
            command = [sys.executable, "-c", BREAKS, str(path), *flags, *always]
            assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
            statuses.append(subprocess.run(command, env=environment, check=False, timeout=100).returncode)
            return statuses[-1]

        monkeypatch.setattr(runner, "_process", process)
        asked = argparse.Namespace(resume=False, dry_run=False, command="")
        runner._run("x", tmp_path / "gpu-x.json", 100, asked, runner._environment(str(tmp_path)))
        return statuses

    return run


def test_rows_that_count_by_process_have_one_each(run_part, tmp_path):
    assert run_part("--alone") == [results.NEXT, results.NEXT, 0]
    document = load(tmp_path, "x")
    assert [row["case"] for row in document["rows"]] == ["one", "two", "three"]
    assert document["complete"]


def test_a_row_that_breaks_its_process_costs_no_other_row(run_part, tmp_path):
    assert run_part() == [9, results.POISONED, 1, 0]
    document = load(tmp_path, "x")
    failures = {row["case"]: row.get("failure") for row in document["rows"]}
    assert list(failures) == ["one", "crash", "two", "poison", "three", "hang", "four"]
    assert failures["crash"] == failures["hang"] == "ended its process, or took more than 2 s"
    assert "illegal memory access" in failures["poison"]
    assert [case for case, failure in failures.items() if failure is None] == ["one", "two", "three", "four"]
    assert not document["complete"]
    assert document["running"] is None


def test_a_row_stopped_at_its_parts_limit_has_failed(tmp_path, monkeypatch):
    """And those behind it are named as left out."""

    def process(part, path, end, flags, environment):
        document = {"rows": [], "running": "slow", "left_out": ["late"], "dry_run": True}
        path.write_text(json.dumps(document))

    monkeypatch.setattr(runner, "_process", process)
    asked = argparse.Namespace(resume=False, dry_run=False, command="")
    assert not runner._run("x", tmp_path / "gpu-x.json", 100, asked, {})
    document = load(tmp_path, "x")
    assert document["rows"] == [{"case": "slow", "failure": "was stopped at the limit of its part, 100 s"}]
    assert document["left_out"] == ["late"]
    assert document["running"] is None


@pytest.mark.parametrize("part", ["attention", "calibration", "jax_model", "model", "pallas"])
def test_what_breaks_before_measuring_costs_rows_and_no_part(tmp_path, monkeypatch, part):
    """A model that does not fit, say: every row that needs it says so."""
    module = import_module(f"blindsight_gpu.{part}")

    def fail(*_, **__):
        raise MemoryError("does not fit")

    for name in ("make_model", "make_params", "two_inputs", "Inputs"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, fail)
    found = results.Results(tmp_path / "gpu-x.json", "x", {}, dry_run=True, seconds=99)
    module.run(found, measure.Place(dry_run=True))
    assert len(found.document["rows"]) >= 2
    assert {row["failure"] for row in found.document["rows"]} == {"MemoryError: does not fit"}
    assert found.document["left_out"] == []


def test_a_dense_model_that_breaks_costs_no_sparse_figure():
    model = import_module("blindsight_gpu.model")

    def forward(turn=0):
        raise RuntimeError("no plan")

    place = measure.Place(dry_run=True)
    assert model._side("dense", forward, place) == {"dense_note": "failed: RuntimeError: no plan"}
    with pytest.raises(RuntimeError, match="no plan"):
        model._side("sparse", forward, place)


def test_a_peer_that_breaks_the_gpu_ends_its_process():
    assert results.note_of(ValueError("no such mask")) == "failed: ValueError: no such mask"
    triton = "an illegal instruction was encountered"  # what Triton puts before it has brackets
    others = ("device-side assert triggered", "hardware stack error", "invalid program counter", "CUDA_ERROR_ASSERT")
    for said in ("CUDA error: misaligned address", "CUDA_ERROR_MISALIGNED_ADDRESS", triton, *others):
        with pytest.raises(RuntimeError, match=said):
            results.note_of(RuntimeError(said))
    for said in ("CUDA out of memory.", "Triton Error [CUDA]: invalid argument", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        assert results.note_of(RuntimeError(said)) == f"failed: RuntimeError: {said}"


def test_a_prediction_that_fails_costs_no_measured_time(monkeypatch):
    tune = import_module("blindsight_gpu.tune")
    tiles = tune.Configuration(16, 16, 4, 2, tma=True)
    place = argparse.Namespace(dry_run=False, dtype=torch.float32)
    for name, value in (("free", None), ("two_inputs", None), ("seconds_per_call", 0.5), ("rate", 9.0)):
        monkeypatch.setattr(tune, name, lambda *_, value=value: value)
    monkeypatch.setattr(tune, "predict", lambda *_: 1 / 0)
    row = tune._tiles_row(tune.QWEN, 4096, tiles, place)
    assert row["ours_ms"] == 500
    assert row["predicted_note"] == "failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("seconds", ["nan", "inf", "-5", "0"])
def test_a_budget_that_is_no_time_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        runner._parse(["--out", "x", "--part", "bounds", "--budget-seconds", seconds])
    assert f"seconds must be finite and above 0. Got {seconds}" in capsys.readouterr().err


def test_bad_requests_are_refused(tmp_path):
    unknown = python(GPU_CHECK, "--out", tmp_path, "--part", "speed")
    assert unknown.returncode == 2
    assert "parts must be among correctness, attention" in unknown.stderr
    spent = python(GPU_CHECK, "--out", tmp_path, "--part", "bounds,tune", "--dry-run", "--budget-seconds", "1")
    assert spent.returncode == 1
    assert "estimated: bounds 75 s, tune 70 s; 145 s of 1 s" in spent.stdout
    assert "bounds: not begun, the 1 s are spent" in spent.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU; here is one")
def test_without_a_gpu_only_a_dry_run_is_possible(tmp_path):
    done = python(GPU_CHECK, "--out", tmp_path, "--part", "tune")
    assert done.returncode == 1
    assert "torch.cuda.is_available() is False: use --dry-run" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [pytest.param("torch", marks=with_torch), pytest.param("jax", marks=with_jax)])
def test_rows_of_every_part_become_tables_and_plots(dry_run, group, tmp_path):
    """As if a GPU had measured them: no figure is lost between the two."""
    for part in PARTS[group]:
        (tmp_path / f"gpu-{part}.json").write_text(json.dumps(load(dry_run(group), part) | {"dry_run": False}))
    text = tables.section(tmp_path)
    shown = {"ours_ms", "pallas_ms", "dense_s", "sparse_s", "tower_s", "pack_ms", "flex_ms", "triton_ms", "speed_up"}
    for part in set(PARTS[group]) - {"jax_model", "tune"}:
        for row in load(tmp_path, part)["rows"]:
            assert all(f"{row[name]:.2f}" in text for name in shown & row.keys()), row
    assert "Not measured" not in text
    assert len(plots.draw(tables.measured(tmp_path), tmp_path)) == 2


@with_torch
def test_dry_runs_are_not_published(dry_run):
    with pytest.raises(ValueError, match=r"must be measured on a GPU. Got a dry run"):
        tables.section(dry_run("torch"))
    done = python(ROOT / "scripts" / "render_results.py", "--results", dry_run("torch"))
    assert done.returncode == 1
    assert "Got a dry run" in done.stderr
