"""`--backend jax`: the same commands, the same documents, figures as PyTorch's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from blindsight_cli.main import app
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile
from shared_profiles.statistics import Statistics
from tiny_checkpoints import save_checkpoint, save_prompts

QUESTION = "Is the color of images 1 and 2 the same?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), "gemma3")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prompts(tmp_path_factory.mktemp("data"), (2, 3))


def blindsight(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def calibrate(checkpoint: Path, prompts: Path, out: Path, *args: object) -> Profile:
    how = ("--gamma-dense", 0.5, "--sinks", "0,1:1,2", "--local-block", 8)
    result = blindsight("calibrate", checkpoint, prompts, "--out", out, *how, *args)
    assert result.exit_code == 0, result.stderr
    return Profile.load(out)


def run(checkpoint: Path, prompts: Path, *args: object) -> dict[str, Any]:
    pictures = [option for i in range(3) for option in ("--image", str(prompts.parent / f"1-{i}.png"))]
    result = blindsight("run", checkpoint, *pictures, "--question", QUESTION, "--max-new-tokens", 8, *args, "--json")
    assert result.exit_code == 0, result.stderr
    return {**json.loads(result.stdout), "said": result.stderr}


def test_both_backends_calibrate_and_answer_alike(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """JAX goes on from a state that torch began, and needs to measure one prompt only."""
    state, out = tmp_path / "state.npz", tmp_path / "jax.json"
    calibrate(checkpoint, prompts, tmp_path / "first.json", "--state", state, "--limit", 1)
    ours = calibrate(checkpoint, prompts, out, "--state", state, "--backend", "jax")
    theirs = calibrate(checkpoint, prompts, tmp_path / "torch.json")
    assert len(Statistics.load(state)) == 2
    np.testing.assert_array_equal(ours.categories, theirs.categories)
    assert ours.provenance is not None and theirs.provenance is not None
    assert ours.provenance.dataset_hash == theirs.provenance.dataset_hash
    assert "jax" in ours.provenance.versions and ours.categories.any()

    told = [run(checkpoint, prompts, "--compare", "--profile", out, "--backend", name) for name in ("torch", "jax")]
    assert told[0].keys() == told[1].keys()
    for name in ("n_tokens", "n_images", "profile", "prefill_repeats"):
        assert told[0][name] == told[1][name]
    assert told[0]["kl_nats"] == pytest.approx(told[1]["kl_nats"], rel=1e-3, abs=1e-6)
    for mine, other in zip(told[1]["runs"], told[0]["runs"], strict=True):
        assert mine.pop("prefill_seconds") > 0 and other.pop("prefill_seconds") > 0
        assert mine == other
    assert told[1]["runs"][1]["ran"] == "sparse"


def test_without_a_profile_the_prompt_runs_dense(checkpoint: Path, prompts: Path) -> None:
    told = run(checkpoint, prompts, "--backend", "jax")
    assert told["runs"][0]["ran"] == "dense: there is no profile of this model" and told["profile"] is None
    assert "blindsight calibrate" in told["said"] and "measured" not in told["said"]


def test_dense_needs_no_profile(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    """Whatever lies beside the checkpoint; who asks for sparse is told."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / FILE_NAME).write_text("{}")
    told = run(folder, prompts, "--backend", "jax", "--dense")
    assert told["runs"][0]["ran"] == "dense" and told["profile"] is None
    question = ("--image", prompts.parent / "0-0.png", "--question", QUESTION, "--backend", "jax")
    result = blindsight("run", folder, *question)
    assert result.exit_code == 3 and FILE_NAME in result.stderr


def test_what_is_refused(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    question = ("--image", prompts.parent / "0-0.png", "--question", QUESTION, "--backend", "jax")
    result = blindsight("run", checkpoint, *question, "--device", "nosuch")
    assert result.exit_code == 2 and "'nosuch'" in result.stderr
    other = save_checkpoint(tmp_path / "other", "gemma3", seed=1)
    profile = calibrate(other, prompts, tmp_path / "p.json")
    result = blindsight("run", checkpoint, *question, "--profile", tmp_path / "p.json")
    assert result.exit_code == 3 and "digest" in result.stderr
    (other / FILE_NAME).write_text(profile.to_json())
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:1000])
    result = blindsight("run", other, *question)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert blindsight("run", checkpoint, *question[:-1], "tpu").exit_code == 2
