"""scripts/gpu_check.py without a GPU: every part dry-run, resuming, and the README rendered from results."""

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

from shared_profiles import Category, category_mask

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "scripts"))
pytestmark = pytest.mark.timeout(600)  # a dry run of many parts, on a busy machine
PARTS = {
    "torch": ("correctness", "attention", "model", "calibration", "sanitizer", "tune"),
    "jax": ("bounds", "pallas", "jax_model"),
}
sys.path.append(str(ROOT / "scripts"))  # it runs from the tree and is not installed

prompts, tables, cycles, measure, peers, results, runner, plots = (
    import_module(f"blindsight_gpu.{name}")
    for name in ("prompts", "tables", "cycles", "measure", "peers", "results", "runner", "plots")
)
# Tests of one group run in one worker, so that one dry run serves them all.
with_torch, with_jax = (pytest.mark.xdist_group(f"gpu_check {name}") for name in PARTS)


def python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs one of our scripts as the README says."""
    environment = {**os.environ, "PYTHONPATH": SOURCE_ROOTS}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> Callable[[str], Path]:
    """`dry_run(group)`: the result folder of a dry run of some of the parts, which has run to its end."""

    @cache
    def run(group: str) -> Path:
        out = tmp_path_factory.mktemp(group)
        done = python("gpu_check.py", "--out", out, "--dry-run", "--part", ",".join(PARTS[group]))
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
    rows = [row for row in load(dry_run("torch"), "attention")["rows"] if "profile" in row]
    assert len(rows) == 3
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
    names = [f"toy Qwen2.5-VL: toy, {side}" for side in ("sparse", "dense", "calibration")]
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
    document = load(dry_run("torch"), "tune")
    (tmp_path / "gpu-tune.json").write_text(json.dumps(document))
    arguments = ("--out", tmp_path, "--dry-run", "--part", "tune", "--resume")
    assert python("gpu_check.py", *arguments).returncode == 0
    assert load(tmp_path, "tune")["rows"] == document["rows"]
    document["rows"][0] = {"case": document["rows"][0]["case"], "failure": "out of memory"}
    (tmp_path / "gpu-tune.json").write_text(json.dumps(document))
    assert python("gpu_check.py", *arguments).returncode == 0
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
    unknown = python("gpu_check.py", "--out", tmp_path, "--part", "speed")
    assert unknown.returncode == 2
    assert "parts must be among correctness, bounds" in unknown.stderr
    spent = python("gpu_check.py", "--out", tmp_path, "--dry-run", "--budget-seconds", "1")
    assert spent.returncode == 1
    assert "correctness: not begun, the budget of 1 s is spent" in spent.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU; here is one")
def test_without_a_gpu_only_a_dry_run_is_possible(tmp_path):
    done = python("gpu_check.py", "--out", tmp_path, "--part", "tune")
    assert done.returncode == 1
    assert "torch.cuda.is_available() is False: use --dry-run" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both-ways"])
@pytest.mark.parametrize("category", list(Category), ids=lambda c: c.name)
def test_peers_get_exactly_our_masks(category, bidirectional):
    layout = prompts.make_layout(prompts.Shape("", 1, 1, 16, 150, bidirectional), 512)
    assert layout.n_images > 2
    table = prompts.row_tables(layout, category, torch.device("cpu"))
    want = category_mask(layout, category, prompts.TEMPLATE)
    np.testing.assert_array_equal(table.visible(torch.arange(512)).numpy(), want)
    partial, full = peers._blocks(table)
    blocks = want.reshape(4, 128, 4, 128)
    np.testing.assert_array_equal(full.numpy(), blocks.all((1, 3)))
    np.testing.assert_array_equal((partial | full).numpy(), blocks.any((1, 3)))


def test_dense_heads_are_spread():
    heads = prompts.mixed(28, 0.3)
    assert [i for i, category in enumerate(heads) if category is Category.DENSE] == [0, 3, 7, 10, 14, 17, 21, 24]
    assert set(prompts.mixed(4, 0.0)) == {Category.INTRA_IMAGE_SINK}


def test_full_size_prompts_are_what_they_are_called():
    place = measure.Place(dry_run=False)
    for shape in prompts.shapes(place):
        for n_tokens in prompts.lengths(place).values():
            layout = prompts.make_layout(shape, n_tokens)
            assert layout.n_tokens == n_tokens
            assert layout.n_tokens % 128 == 0
            image_tokens = layout.n_images * shape.image_tokens
            assert 0.88 * n_tokens < image_tokens < n_tokens


def test_loops_are_read_from_machine_code():
    sass = """
        /*0000*/ MOV R1, c[0x0] ;
        /*0010*/ HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0020*/ @P0 BRA 0x90 ;
        /*0030*/ MUFU.EX2 R2, R3 ;
        /*0040*/ @!P1 BRA 0x10 ;
        /*0050*/ FADD R2, R2, R3 ;
        /*0060*/ @P1 BRA 0x50 ;
        /*0070*/ EXIT ;
        /*0090*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R2 ;
        /*00a0*/ BRA 0x30 ;
    """
    (loop,) = cycles.read_loops(sass)
    assert (loop.instructions, loop.special, loop.matrix) == (4, 1, 1)


def test_the_pallas_model_predicts_what_its_page_says(monkeypatch):
    pallas_cycles = import_module("blindsight_gpu.pallas_cycles")
    counted = tuple(cycles.Loop(instructions, 66, 16) for instructions in (509, 821, 831))
    kernel = pallas_cycles.Kernel(128, 128, counted)
    assert kernel.units(counted[0])["L2"] == pytest.approx(kernel.cycles(counted[0]))  # what limits it
    assert kernel.units(counted[0], l2=100)["tensor cores"] == kernel.cycles(counted[0], l2=100) == 2048 + 300
    monkeypatch.setattr(pallas_cycles, "read_kernel", lambda dim: kernel)
    layout = prompts.make_layout(prompts.QWEN, 100_096)
    seconds, passes = pallas_cycles.predict_pallas(prompts.QWEN, layout, Category.INTRA_IMAGE)
    page = (ROOT / "docs" / "pallas-hopper.md").read_text()
    useful = cycles.rate(prompts.QWEN, layout, Category.INTRA_IMAGE, seconds + passes)
    assert f"| Intra-Image | {1e3 * seconds:.2f} ms | {1e3 * passes:.2f} ms | {useful:.0f} |" in page


def result(part: str, rows: list[dict], **changes) -> dict:
    """A result file as a GPU would give it."""
    gpu = {"name": "NVIDIA H200", "driver_version": "580.1", "clocks.max.sm": "1980 MHz"}
    versions = {"torch": "2.11.0", "triton": "3.6.0", "cudnn": 91900, "jax": "0.11.2"}
    machine = {"gpu": gpu, "versions": versions, "commit": "0123456789abcdef", "source": "s"}
    return dict(part=part, dry_run=False, complete=True, machine=machine, rows=rows, left_out=[]) | changes


ATTENTION = dict(
    case="a", shape="Qwen", heads="28/4, d=128", tokens=36864, profile="all Sink", ours_ms=2.0, speed_up=5.0,
    bound_ms=1.5, useful_tflops=400.0, flex_note="out of GPU memory", varlen_ms=3.0,
    denominator="cuDNN SDPA, causal, the same tokens",
)  # fmt: skip


PALLAS = dict(
    case="p", shape="Qwen", heads="28/4, d=128", tokens=36864, profile="all Sink", pallas_ms=1.6, triton_ms=2.0,
    against_triton=1.25, speed_up=6.0, bound_ms=1.5, tokamax_note="not installed", useful_tflops=500.0, compile_s=7.0,
    kernel="", denominator="cuDNN in JAX, causal, the same tokens",
)  # fmt: skip


def test_the_jax_rows_have_tables_of_their_own(tmp_path):
    sides = [
        dict(case="3B: 36K, sparse", tokens=36864, seconds=2.0, compile_s=40.0, peak_gib=30.0),
        dict(case="3B: 36K, dense", tokens=36864, seconds=5.0, compile_s=20.0, peak_gib=30.0),
        dict(case="12B: 300K, sparse", tokens=299008, note="not run: its KV cache takes 118 GiB"),
    ]
    for part, rows in (("pallas", [PALLAS]), ("jax_model", sides)):
        (tmp_path / f"gpu-{part}.json").write_text(json.dumps(result(part, rows)))
    text = tables.section(tmp_path)
    assert (
        "| Qwen 28/4, d=128, 36,864: all Sink | 1.60 | 2.00 | 1.25x | 6.00x | 1.50 | – not installed | 500 | 7.0 |"
        in text
    )
    assert "| 3B: 36K, 36,864 tokens | 5.00 | 2.00 | 2.50x | 40 | 30 | – |" in text
    assert "| 12B: 300K, 299,008 tokens | – | – not run: its KV cache takes 118 GiB | – | – | – | – |" in text


def test_a_side_of_a_model_that_did_not_fit_has_its_reason(tmp_path):
    row = dict(case="12B: 72K", tokens=73728, images=9, forwards={"sparse": 4}, sparse_s=9.0, sparse_peak_gib=60.0,
        attention_share=0.25, dense_note="not run: masks of 10 GiB")  # fmt: skip
    (tmp_path / "gpu-model.json").write_text(json.dumps(result("model", [row])))
    assert "| 12B: 72K, 73,728 tokens | – not run: masks of 10 GiB | 9.00 | – | 25% |" in tables.section(tmp_path)


def test_two_plots_are_drawn_and_shown_where_there_are_results(tmp_path):
    readme, found = tmp_path / "README.md", tmp_path / "results"
    found.mkdir()
    readme.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    arguments = ("render_results.py", "--readme", readme, "--results", found)
    assert python(*arguments).returncode == 0
    assert "docs/gpu" not in readme.read_text()
    assert not (tmp_path / "docs").exists()
    longer = ATTENTION | dict(tokens=73728, speed_up=9.0)
    dense = dict(case="d", shape="Qwen", tokens=36864, kernel="cuDNN SDPA", dense_ms=10.0, useful_tflops=650.0)
    (found / "gpu-attention.json").write_text(json.dumps(result("attention", [dense, ATTENTION, longer])))
    (found / "gpu-pallas.json").write_text(json.dumps(result("pallas", [PALLAS])))
    assert python(*arguments).returncode == 0
    for name in ("gpu-speed-up.svg", "gpu-tflops.svg"):
        drawn = (tmp_path / "docs" / name).read_text()
        assert f"(docs/{name})" in readme.read_text()
        for line in ("Triton: all Sink", "Pallas: all Sink"):
            assert f"<!-- {line} -->" in drawn
        assert ("the bound: cuDNN SDPA, dense" in drawn) == (name == "gpu-tflops.svg")
    assert python(*arguments, "--check").returncode == 0
    (tmp_path / "docs" / "gpu-tflops.svg").unlink()
    done = python(*arguments, "--check")
    assert done.returncode == 1
    assert "gpu-tflops.svg must be there" in done.stderr


def test_tables_name_machine_denominator_and_misses(tmp_path):
    document = result("attention", [ATTENTION, {"case": "b", "failure": "RuntimeError: x"}], left_out=["c"])
    (tmp_path / "gpu-attention.json").write_text(json.dumps(document))
    text = tables.render(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter", tmp_path)
    assert text.startswith(f"before\n{tables.BEGIN}\nMeasured on one NVIDIA H200 (driver 580.1")
    assert text.endswith(f"{tables.END}\nafter")
    row = "| Qwen 28/4, d=128, 36,864: all Sink | 2.00 | 10.00 | 5.00x | 1.50 | – out of GPU memory | 3.00 | 400 |"
    assert row in text
    assert "cuDNN SDPA, causal, the same tokens" in text
    assert "- b: RuntimeError: x" in text
    assert "- c: left out for want of time" in text


@with_torch
def test_dry_runs_and_mixed_gpus_are_not_published(dry_run, tmp_path):
    with pytest.raises(ValueError, match=r"must be measured on a GPU. Got a dry run"):
        tables.section(dry_run("torch"))
    done = python("render_results.py", "--results", dry_run("torch"))
    assert done.returncode == 1
    assert "Got a dry run" in done.stderr
    other = result("bounds", [])
    other["machine"]["gpu"]["name"] = "NVIDIA H100"
    for document in (result("attention", [ATTENTION]), other):
        (tmp_path / f"gpu-{document['part']}.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"of one GPU. Got NVIDIA H100, NVIDIA H200"):
        tables.section(tmp_path)
    with pytest.raises(ValueError, match="once each"):
        tables.render("no markers", tmp_path)


def test_the_readme_is_up_to_date(tmp_path):
    done = python("render_results.py", "--check")
    assert done.returncode == 0, done.stderr
    stale = tmp_path / "README.md"
    stale.write_text(f"{tables.BEGIN}\nold\n{tables.END}\n")
    done = python("render_results.py", "--check", "--readme", stale)
    assert done.returncode == 1
    assert "out of date: run python scripts/render_results.py" in done.stderr
