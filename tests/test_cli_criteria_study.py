"""The comparison of criteria at toy size, and that its page says what the results say."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.held_out import HeldOut
from blindsight_cli.smallvlm import evaluate
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile, ProfileMismatchError
from tree_scripts import ROOT

compare_criteria = import_module("compare_criteria")
criteria, criteria_page, page = (
    import_module(f"blindsight_study.{name}") for name in ("criteria", "criteria_page", "page")
)


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


def test_a_state_is_not_where_its_profile_goes(tmp_path):
    """The profile was saved over the statistics that it was made from."""
    with pytest.raises(ValueError, match=r"must not end in \.json"):
        compare_criteria.Study(SHIPPED_MODEL, 8, 8, tmp_path / "state.json")
    assert not any(tmp_path.iterdir())


def test_its_defaults_are_those_of_the_published_results(monkeypatch, tmp_path):
    """Others would be refused, and only after the calibration."""
    profile = Profile.load(SHIPPED_MODEL / FILE_NAME)

    class Began(Exception):
        pass

    def ask(puzzles: list) -> None:
        raise Began

    def study(checkpoint: Path, n_prompts: int, n_held_out: int, state: Path) -> SimpleNamespace:
        assert n_held_out == profile.choice["held_out_prompts"]
        return SimpleNamespace(profile=profile, statistics=range(n_prompts), ask=ask)

    monkeypatch.setattr(compare_criteria, "Study", study)
    monkeypatch.setattr(sys, "argv", ["x", "--state", str(tmp_path / "state.npz")])
    with pytest.raises(Began):
        compare_criteria.main()


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("compare_criteria", ("--prompts", "--held-out", "--questions", "--target-questions")),
        ("pruning_curve", ("--questions",)),
        ("video_study", ("--prompts", "--questions")),
        ("blindsight_cli.smallvlm.evaluate", ("--questions",)),
        ("blindsight_cli.smallvlm.train", ("--steps",)),
    ],
)
def test_what_is_counted_is_at_least_one(script, options, monkeypatch, tmp_path, capsys):
    main = import_module(script).main
    for option in options:
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "results"), option, "0"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert f"argument {option}: must be at least 1. Got 0." in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_effects_are_counted_question_by_question():
    """One both right, two lost, three won, four both wrong, two of these alike."""
    said, instead, expected = np.array([[*"0120121220"], [*"0201011212"], [*"0121010001"]], int)
    sure = np.log(np.full((3, 3), 0.1) + 0.7 * np.eye(3))
    found = page.effect(sure[said], sure[instead], expected)
    assert found["answers"] == {"both": 1, "only_dense": 2, "only_sparse": 3, "neither": 4}
    assert found["agreement"] == 0.3
    assert found["kl"] == pytest.approx(0.7 * 0.7 * np.log(8))  # of 0.8, 0.1, 0.1 and its mirror image


def test_the_page_is_of_its_results(tmp_path):
    results = ROOT / "docs" / "results"
    criteria_page.write_page(
        criteria_page.read_studies(results / "criteria"), tmp_path / "criteria.md", "../criteria.svg"
    )
    assert (tmp_path / "criteria.md").read_text() == (results / "criteria.md").read_text(), "run compare_criteria.py"
