"""The comparison of criteria at toy size, and that its page says what the results say."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import pytest

from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.held_out import HeldOut
from blindsight_cli.smallvlm import evaluate
from shared_profiles.profile import ProfileMismatchError
from tree_scripts import ROOT

compare_criteria = import_module("compare_criteria")
criteria, criteria_page = (import_module(f"blindsight_study.{name}") for name in ("criteria", "criteria_page"))


def test_the_study(tmp_path, monkeypatch):
    """Every part runs and adds up; a second run measures nothing and ends with the same results."""
    monkeypatch.setattr(criteria, "LEFT", (0.5, 0.12))
    monkeypatch.setattr(criteria, "BOOTSTRAPS", 3)
    monkeypatch.setattr(criteria, "FEW", (6, 12))
    monkeypatch.setattr(criteria, "KNOBS", {"gamma_dense": (0.3, 1.0)})
    monkeypatch.setattr(criteria, "SINKS", {name: criteria.SINKS[name] for name in list(criteria.SINKS)[::3]})
    sizes = ["--prompts", "18", "--held-out", "7", "--questions", "3", "--target-questions", "4", "--random", "1"]
    command = ["x", "--state", tmp_path / "toy.npz", "--name", "toy", "--out", tmp_path / "results", *sizes]
    monkeypatch.setattr(sys, "argv", [str(x) for x in command])
    (tmp_path / "results").mkdir()
    compare_criteria.main()
    path = tmp_path / "results" / "criteria" / "toy.json"
    before, found = path.read_bytes(), json.loads(path.read_text())
    assert [row["criterion"] for row in found["criteria"][::2]] == ["gradient", "residual", "error", "mass", "random 0"]
    for half, eighth in zip(found["criteria"][::2], found["criteria"][1::2], strict=True):
        assert eighth["kept"] < half["kept"] < 1
        assert sum(half["answers"].values()) == 3
    (chosen,) = found["target"]
    assert sum(chosen["answers"].values()) == 4 and chosen["held_out"]["kl"] <= evaluate.BUDGET
    assert list(found["stability"]["bootstrap"].values())[-1]["least"] > 0.5
    assert [len(draws) for draws in found["stability"]["few"].values()] == [criteria.DRAWS] * 2
    assert len({row["on"] for row in found["transfer"]}) == 5
    assert [row["knob"] for row in found["knobs"]] == ["defaults", "gamma_dense 0.3", "gamma_dense 1"]
    assert found["knobs"][1]["kept"] < found["knobs"][0].get("kept", 1)
    few, more = found["sinks"]
    assert few["kept"] < more["kept"]
    assert "| gamma_dense 1 | 100% |" in (tmp_path / "results" / "criteria.md").read_text()

    monkeypatch.setattr(HeldOut, "log_probs", lambda *_: pytest.fail("was measured already"))
    compare_criteria.main()
    assert path.read_bytes() == before

    for other, error in (
        (["--questions", "4"], SystemExit),
        (["--prompts", "17"], ValueError),
        (["--checkpoint", SHIPPED_MODEL.with_name("blindsight-tiny-qwen2_vl")], ProfileMismatchError),
    ):
        monkeypatch.setattr(sys, "argv", [str(x) for x in [*command, *other]])
        with pytest.raises(error):
            compare_criteria.main()
        assert path.read_bytes() == before


def test_the_page_is_of_its_results(tmp_path):
    results = ROOT / "docs" / "results"
    criteria_page.write_page(
        criteria_page.read_studies(results / "criteria"), tmp_path / "criteria.md", "../criteria.svg"
    )
    assert (tmp_path / "criteria.md").read_text() == (results / "criteria.md").read_text(), "run compare_criteria.py"
