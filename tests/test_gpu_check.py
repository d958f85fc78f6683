"""scripts/gpu_check.py without a GPU: every part dry-run, resuming, and the README rendered from results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from shared_profiles import Category, category_mask

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "scripts"))
PARTS = ("correctness", "bounds", "attention", "model", "calibration", "tune")
sys.path.append(str(ROOT / "scripts"))  # it runs from the tree and is not installed

prompts, tables, cycles, measure, peers, results = (
    import_module(f"blindsight_gpu.{name}") for name in ("prompts", "tables", "cycles", "measure", "peers", "results")
)


def python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs one of our scripts as the README says."""
    environment = {**os.environ, "PYTHONPATH": SOURCE_ROOTS}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[Path, str]:
    """The result folder of a dry run of every part, and what it printed."""
    out = tmp_path_factory.mktemp("results")
    done = python("gpu_check.py", "--out", out, "--dry-run", "--part", ",".join(PARTS))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def load(folder: Path, part: str) -> dict:
    return json.loads((folder / f"gpu-{part}.json").read_text())


def test_every_part_runs_and_says_what_it_depends_on(dry_run):
    out, said = dry_run
    for part in PARTS:
        document = load(out, part)
        assert document["complete"], part
        assert document["dry_run"]
        assert document["rows"], part
        assert {"gpu", "versions", "commit", "source"} <= document["machine"].keys()
        assert {"torch", "triton", "cuda", "cudnn"} <= document["machine"]["versions"].keys()
        assert document["command"]
        assert document["time"]
        assert f"== {part}: {len(document['rows'])} rows, 0 failed, 0 left out (DRY RUN)" in said


def test_attention_is_compared_with_peers_that_compute_the_same(dry_run):
    rows = [row for row in load(dry_run[0], "attention")["rows"] if "profile" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["flex_differs_by"] < 1e-5
        assert row["varlen_note"]
        assert row["denominator"] == "SDPA on the CPU, causal, the same tokens"
        np.testing.assert_allclose(row["speed_up"] * row["kept"] * row["ours_ms"], row["bound_ms"], rtol=1e-9)


def test_resuming_keeps_what_is_measured_and_measures_what_failed(dry_run, tmp_path):
    document = load(dry_run[0], "tune")
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


def result(part: str, rows: list[dict], **changes) -> dict:
    """A result file as a GPU would give it."""
    gpu = {"name": "NVIDIA H200", "driver_version": "580.1", "clocks.max.sm": "1980 MHz"}
    versions = {"torch": "2.11.0", "triton": "3.6.0", "cudnn": 91900}
    machine = {"gpu": gpu, "versions": versions, "commit": "0123456789abcdef", "source": "s"}
    return dict(part=part, dry_run=False, complete=True, machine=machine, rows=rows, left_out=[]) | changes


ATTENTION = dict(
    case="a", shape="Qwen", heads="28/4, d=128", tokens=36864, profile="all Sink", ours_ms=2.0, speed_up=5.0,
    bound_ms=1.5, useful_tflops=400.0, flex_note="out of GPU memory", varlen_ms=3.0,
    denominator="cuDNN SDPA, causal, the same tokens",
)  # fmt: skip


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


def test_dry_runs_and_mixed_gpus_are_not_published(dry_run, tmp_path):
    with pytest.raises(ValueError, match=r"must be measured on a GPU. Got a dry run"):
        tables.section(dry_run[0])
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
