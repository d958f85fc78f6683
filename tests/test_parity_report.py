"""`scripts/parity_report.py`: what it writes, what the page shows, and what its exit code says."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import parity_document
from blindsight_cli.report.parity import render_parity, size
from parity_attention import CASES, compare
from parity_document import count, plan_part
from parity_model import Bar, Trace

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "parity_report.py"


@pytest.fixture(scope="module")
def main():
    """The script's function; it runs from the tree."""
    return runpy.run_path(str(SCRIPT))["main"]


def traces(error: float) -> tuple[Bar, Trace]:
    """A model of one layer in two frameworks, the second off by `error` at the layer's values."""
    names = ("embeddings", "layer 0 keys", "layer 0 values", "layer 0 attention", "layer 0 output", "logits")
    truth = Trace({name: np.ones((3, 2)) for name in names}, "reference")
    plain = Trace({name: x + 1e-6 for name, x in truth.points.items()}, "sdpa", np.zeros((1, 4), int))
    values = {"layer 0 values": truth.points["layer 0 values"] + error}
    other = Trace(truth.points | values, "portable", np.full((1, 4), int(error > 0)))
    return Bar(truth, plain), other


def document(error: float) -> dict:
    """A document of all parts; with an error, one thing differs in each but the plans."""
    bar, other = traces(error)
    subject = SimpleNamespace(bars={True: bar}, traces={("torch", True): bar.plain, ("jax", True): other})
    case = CASES[1]
    wrong = replace(case.truth, lse=case.truth.lse + error)
    pairs = [parity_document.plain(x) for x in compare(case, {"xla": case.truth, "pallas": wrong})]
    losses = {
        "transformers": dict(impl="reference", kl=1e-4),
        "jax": dict(impl="portable", kl=1e-4 * (1 + 1e3 * error)),
    }
    gap = dict(error=error, relative=error)
    parts = dict(
        plan=plan_part("cpu")[:1],
        kernel=[dict(case="<case>", pairs=pairs, equal=error == 0)],
        model=[dict(model="tiny", n_tokens=3, runs=list(parity_document.runs_of(subject)))],
        bfloat16=[dict(family="gemma3", lost=losses, allowed=2e-4, equal=error == 0)],
        profile=[
            dict(family="gemma3", prompts=4, gaps=dict(mass=gap, error=gap), categories=error == 0, equal=error == 0)
        ],
    )
    machine = dict(gpu=None, versions=dict(jax="0.11.2", torch="2.11.0", cuda=None), commit=None, source="abc")
    n, equal = count(parts)
    return parts | dict(
        comparisons=n, equal=equal, time="2026", seconds=1.0, command="x", machine=machine, device="cpu"
    )


def test_the_page_of_equal_frameworks():
    page = render_parity(document(0.0))
    assert "✗" not in page
    assert "27 of 27 comparisons" in page
    assert "&lt;case&gt;" in page and "<case>" not in page
    assert "default-src 'none'" in page
    assert not any(outside in page for outside in ("http:", "https:", "src=", "<script"))


def test_the_page_names_what_differs():
    made = document(0.01)
    page = render_parity(made)
    assert made["comparisons"] - made["equal"] == 2 + (2 + 1) + 1 + 1
    assert f"{made['equal']} of 27 comparisons" in page
    assert "first divergence: layer 0 values, equal up to layer 0 keys. Error 0.01" in page
    assert "first divergence: token 0 of row 0 is 1, not 0" in page


def test_what_is_not_a_number_is_said_and_valid_json():
    bar, other = traces(0.0)
    gone = replace(other, points=other.points | {"logits": np.full((3, 2), np.nan)})
    row = parity_document.plain(bar.gaps(gone)[-1])
    assert json.loads(json.dumps(row, allow_nan=False)) == row and not row["equal"]
    assert size(row["error"]) == size(row["relative"]) == "not a number"
    assert (size(0.00123), size(123456.0)) == ("0.0012", "1.2e+05")


def test_the_script_writes_both_files(main, tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--part", "plan"]) == 0
    held = json.loads((tmp_path / "parity.json").read_text())
    assert held["comparisons"] == held["equal"] == 3 * len(held["plan"]) > 0
    assert {"torch", "triton", "jax", "jaxlib", "flax", "numpy", "python"} <= held["machine"]["versions"].keys()
    assert held["command"].endswith("--part plan") and held["device"] == "cpu" and held["machine"]["source"]
    assert (tmp_path / "parity.html").read_text(encoding="utf-8") == render_parity(held)
    assert "comparisons are within what is allowed" in capsys.readouterr().out


def test_the_script_fails_where_something_differs(main, tmp_path, monkeypatch):
    monkeypatch.setitem(
        parity_document.PARTS,
        "plan",
        lambda device: [dict(difference=dict(xla="row 3"), equal=False, keys=1, prompt="p")],
    )
    assert main(["--out", str(tmp_path), "--part", "plan"]) == 1
    assert "✗ differs</span> row 3" in (tmp_path / "parity.html").read_text(encoding="utf-8")


def test_unknown_parts_are_refused(main, capsys):
    with pytest.raises(SystemExit):
        main(["--part", "plans"])
    assert "parts must be among plan, kernel, model, bfloat16, profile. Got plans." in capsys.readouterr().err
