"""`blindsight calibrate --budget` and `blindsight profile retune`, as a user types them, on an untrained checkpoint."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from blindsight_cli import profile_main
from blindsight_cli.commands.calibrate import tell_choice
from blindsight_cli.main import app
from shared_profiles import Category
from shared_profiles.budget import Budget, chosen_point, retune
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.path import kept_pairs, pairs_of
from shared_profiles.profile import CurvePoint, Fingerprint, Profile
from tiny_checkpoints import save_checkpoint, save_prompts


def blindsight(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), "qwen2_vl")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prompts(tmp_path_factory.mktemp("data"), (2, 3, 2, 1, 4, 2, 3, 2))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    return save_prompts(folder, (4, 3, 1))


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("profile") / "profile.json"
    args = ("--out", out, "--budget", 0.02, "--held-out", 0.5, "--local-block", 8)
    return out, blindsight("calibrate", checkpoint, prompts, *args)


@pytest.fixture
def profile(calibrated: tuple[Path, Result], tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(calibrated[0].read_text())
    return path


def test_a_budget_leaves_a_measured_curve(calibrated: tuple[Path, Result]) -> None:
    path, result = calibrated
    assert result.exit_code == 0, result.stderr
    profile = Profile.load(path)
    assert (profile.choice["method"], profile.choice["budget"], profile.choice["ranking"]) == (
        "budget",
        0.02,
        "gradient",
    )
    assert profile.provenance is not None and profile.summary is not None
    held = profile.choice["held_out_prompts"]
    assert held + profile.summary.n_prompts == profile.provenance.n_prompts == 7
    point = chosen_point(profile)
    assert point is not None and point.kl <= 0.02 and len(profile.curve) > 2
    assert f"measured on {held} held-out prompts" in result.stderr and "of the 0.02 nats allowed" in result.stderr
    assert "(95% interval: at least " in result.stderr and "so few prompts hide what is rare" in result.stderr
    shown = blindsight("profile", "show", path).stdout
    assert "measured points (> chosen)" in shown and f"{point.kept:.1%}" in shown
    told = json.loads(blindsight("profile", "show", path, "--json").stdout)
    assert len(told["curve"]) == len(profile.curve)


def test_another_budget_needs_no_model(profile: Path, tmp_path: Path) -> None:
    before = Profile.load(profile)
    dearest = before.curve[-1]
    out = tmp_path / "other.json"
    result = blindsight("profile", "retune", profile, "--budget", dearest.kl * 1.001, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    told, after = json.loads(result.stdout), Profile.load(out)
    assert after == retune(before, dearest.kl * 1.001)
    assert told["point"]["kl"] == dearest.kl == after.choice["kl"] and told["choice"] == after.choice
    assert Profile.load(profile) == before
    result = blindsight("profile", "retune", profile, "--budget", 0)
    assert result.exit_code != 0 and "at which some head is sparse" in result.stderr and "--verify" in result.stderr
    assert Profile.load(profile) == before, "never replaced by an all-Dense one"


def test_thresholds_choose_again_and_say_that_nothing_was_measured(profile: Path) -> None:
    before = Profile.load(profile)
    result = blindsight("profile", "retune", profile, "--gamma-dense", 0.3, "--gamma-intra", 0.2)
    assert result.exit_code == 0, result.stderr
    after = Profile.load(profile)
    assert before.summary is not None
    wanted = Thresholds(gamma_dense=0.3, gamma_intra=0.2)
    np.testing.assert_array_equal(after.categories, classify(before.summary, wanted))
    stays = {key: before.choice[key] for key in ("held_out", "sinks")}
    assert after.choice == wanted.to_choice() | stays, "of the template and of the curve"
    assert after.curve == before.curve
    assert "no measured point has these categories" in result.stderr
    assert blindsight("profile", "retune", profile, "--thresholds").exit_code == 0
    assert Profile.load(profile).choice == Thresholds().to_choice() | stays


def test_verifying_measures_on_other_prompts(profile: Path, checkpoint: Path, others: Path) -> None:
    before = Profile.load(profile)
    args = ("--verify", checkpoint, others)
    result = blindsight("profile", "retune", profile, "--gamma-dense", 0.3, *args)
    assert result.exit_code == 0, result.stderr
    after = Profile.load(profile)
    point = chosen_point(after)
    assert point is not None and point.n_prompts == 2
    assert after.curve == (point,), "no point of other prompts stays beside it"
    assert after.choice["held_out"] != before.choice["held_out"]
    result = blindsight("profile", "retune", profile, "--gamma-dense", 0.9, *args)
    assert result.exit_code == 0, result.stderr
    assert point in Profile.load(profile).curve and len(Profile.load(profile).curve) == 2, "the same prompts"
    result = blindsight("profile", "retune", profile, "--budget", 0.05, "--ranking", "residual", *args)
    assert result.exit_code == 0, result.stderr
    searched = Profile.load(profile)
    assert searched.choice["ranking"] == "residual" and {p.n_prompts for p in searched.curve} == {2}
    assert searched.summary == before.summary and searched.choice["held_out"] != before.choice["held_out"]
    point = chosen_point(searched)
    assert point is not None and point.kl <= 0.05


def test_heads_are_chosen_for_several_processes(
    profile: Path, checkpoint: Path, prompts: Path, others: Path, tmp_path: Path
) -> None:
    search = ("--budget", 0.02, "--verify", checkpoint, others)
    result = blindsight("profile", "retune", profile, *search, "--tensor-parallel", 2)
    assert result.exit_code == 0, result.stderr
    made = Profile.load(profile)
    point = chosen_point(made)
    assert point is not None and made.summary is not None and made.choice["processes"] == 2
    busiest = kept_pairs(made.categories, pairs_of(made.summary), 2)
    assert made.choice["busiest"] == pytest.approx(busiest, rel=1e-5)
    assert f"{point.kept:.1%} of the pairs kept ({busiest:.1%} by the busiest of 2 processes)" in result.stderr
    assert "processes 2" in blindsight("profile", "show", profile).stdout
    assert blindsight("profile", "retune", profile, *search).exit_code == 0
    assert Profile.load(profile) == made, "for as many as before"
    assert blindsight("profile", "retune", profile, *search, "--tensor-parallel", 1).exit_code == 0
    assert not {"processes", "busiest"} & set(Profile.load(profile).choice)
    out = tmp_path / "new.json"
    args = ("--out", out, "--budget", 0.02, "--ranking", "error", "--held-out", 0.5, "--tensor-parallel", 4)
    assert blindsight("calibrate", checkpoint, prompts, *args).exit_code == 0
    assert Profile.load(out).choice["processes"] == 4


def test_what_retune_refuses(profile: Path, checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    by_hand, before = tmp_path / "hand.json", profile.read_text()
    Profile.uniform(Category.SINK, Fingerprint("qwen2_vl", 4, 4, 2, 16, "sha256:" + "5e" * 32)).save(by_hand)
    lone = tmp_path / "lone.jsonl"
    lone.write_text(json.dumps({"images": [str(prompts.parent / "0-0.png")], "question": "?"}))
    for code, message, args in (
        (2, "give one of them", (profile,)),
        (2, "give one of them", (profile, "--budget", 1, "--thresholds")),
        (2, "finite number of nats", (profile, "--budget", -1)),
        (2, "multiple of 0.05", (profile, "--quantile", 0.33)),
        (2, "there is no folder", (profile, "--budget", 1, "--out", tmp_path / "no" / "p.json")),
        (2, "--verify CHECKPOINT PROMPTS", (profile, "--budget", 1, "--ranking", "error")),
        (2, "--verify CHECKPOINT PROMPTS", (profile, "--budget", 1, "--tensor-parallel", 2)),
        (2, "must divide", (profile, "--budget", 1, "--verify", checkpoint, prompts, "--tensor-parallel", 3)),
        (2, "must have a measured curve", (by_hand, "--budget", 1)),
        (2, "must hold statistics", (by_hand, "--thresholds")),
        (3, "belong to the model", (by_hand, "--budget", 1, "--verify", checkpoint, prompts)),
        (2, "other prompts than it was made from", (profile, "--budget", 1, "--verify", checkpoint, prompts)),
        (2, "at least two images", (profile, "--budget", 1, "--verify", checkpoint, lone)),
        (2, "a file of its own", (profile, "--budget", 1, "--verify", checkpoint, lone, "--out", lone)),
        (2, "over a profile only", (profile, "--budget", 1, "--out", checkpoint / "model.safetensors")),
        (2, "over a profile only", (profile, "--budget", 1, "--out", checkpoint / "config.json")),
    ):
        result = blindsight("profile", "retune", *args)
        assert (result.exit_code, result.stdout) == (code, ""), (message, result.stderr)
        assert message in " ".join(result.stderr.replace("│", " ").split()), result.stderr
    assert profile.read_text() == before, "nothing is overwritten"


def test_what_calibrate_refuses(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    for code, message, args in (
        (2, "leave out the others", ("--budget", 0.1, "--gamma-dense", 0.5)),
        (2, "leave out the others", ("--thresholds", "--tensor-parallel", 2)),
        (2, "must divide the query heads of a layer. Got 3 for 4", ("--tensor-parallel", 3)),
        (2, "nothing is held out", ("--thresholds", "--held-out", 0.5)),
        (2, "finite number of nats", ("--budget", "nan")),
        (2, "a share of the prompts in (0, 1)", ("--held-out", 1)),
        (2, "the held-out split must have a prompt", ("--held-out", 1e-9)),
    ):
        result = blindsight("calibrate", checkpoint, prompts, "--out", out, *args)
        assert (result.exit_code, result.stdout) == (code, ""), (message, result.stderr)
        assert message in " ".join(result.stderr.replace("│", " ").split()), result.stderr
    assert not out.exists()
    assert Budget().ranking == "gradient"


def test_help_of_retune_states_no_budget_that_it_does_not_take(profile: Path) -> None:
    options = inspect.signature(profile_main.retune, eval_str=True).parameters
    assert options["budget"].annotation.__metadata__[0].show_default is True, "none is stated"
    result = blindsight("profile", "retune", profile)
    assert result.exit_code == 2 and "choose by --budget or by thresholds" in result.stderr


def test_a_choice_that_changes_tokens_is_not_laid_to_few_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    print_ = Fingerprint("qwen2_5_vl", 2, 4, 2, 16, "sha256:" + "5e" * 32)
    choice = {"method": "budget", "budget": 1.0, "reached": True}
    for n, told in ((24, "so few prompts hide what is rare"), (840, "these are many that changed")):
        point = CurvePoint(0.5, 0.3, agreement=0.875, n_prompts=n, heads=("IIII", "IIII"), n_images=(2, 6))
        tell_choice(replace(Profile.uniform(Category.INTRA_IMAGE, print_), choice=choice, curve=(point,)))
        assert told in capsys.readouterr().err
