"""`blindsight calibrate` and `blindsight run` on real, untrained checkpoints, as a user types them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from blindsight_cli.backends import Answer
from blindsight_cli.backends.torch_backend import TorchBackend
from blindsight_cli.commands.calibrate import save_or_keep
from blindsight_cli.commands.run import COMPARE_REPEATS
from blindsight_cli.launched import Place, launched
from blindsight_cli.loading import DTYPES, ask, load_checkpoint, load_image, pick_device
from blindsight_cli.main import app
from blindsight_cli.prompt_file import read_prompts
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.classifier import Thresholds
from shared_profiles.lookup import FILE_NAME, cache_path
from shared_profiles.profile import Profile
from shared_profiles.statistics import Statistics
from tiny_checkpoints import save_checkpoint, save_prompts
from torch_blindsight import calibrate, fingerprint, patch
from torch_blindsight.models import inspect_model

QUESTION = "Is the color of images 1 and 2 the same?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model before training; tests that write into it take a copy."""
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prompts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sparse_profile(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    profile = Profile.uniform(Category.INTRA_IMAGE, fingerprint(load_checkpoint(checkpoint)[0]))
    profile.save(path)
    return path


def blindsight(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def pictures(prompts: Path, n_images: int = 4) -> list[str]:
    """The options that name the first pictures of the last prompt."""
    return [option for i in range(n_images) for option in ("--image", str(prompts.parent / f"3-{i}.png"))]


def ask_json(checkpoint: Path, prompts: Path, *args: object, n_images: int = 4) -> dict[str, Any]:
    result = blindsight("run", checkpoint, *pictures(prompts, n_images), "--question", QUESTION, *args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "gemma3"])
def test_calibrate_then_run(family: str, prompts: Path, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / family, family)
    result = blindsight("calibrate", folder, prompts, "--gamma-dense", 0.3, "--gamma-intra", 0.3)
    assert result.exit_code == 0, result.stderr
    assert str(folder / FILE_NAME) in result.stdout and "1 of 4 prompts have fewer" in result.stderr
    profile = Profile.load(folder / FILE_NAME)
    assert profile.fingerprint.family == family and profile.categories.any()
    assert profile.provenance is not None and profile.provenance.dataset == "prompts.jsonl"
    assert profile.provenance.n_prompts == 3
    assert "learned from 3 prompts, with their share" in result.stdout and "sinks: 0 (" in result.stdout
    assert "learned from 3 prompts" in blindsight("profile", "show", folder / FILE_NAME).stdout
    answered = ask_json(folder, prompts, "--max-new-tokens", 3)
    assert answered["profile"] == str(folder / FILE_NAME)
    assert [run["ran"] for run in answered["runs"]] == ["sparse"]
    assert 0 < answered["runs"][0]["kept"] < 1


def test_calibrate_gives_what_the_library_gives(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    args = ("--out", out, "--gamma-dense", 0.4, "--quantile", 0.25, "--local-block", 8, "--alpha-last", 0.5)
    result = blindsight("calibrate", checkpoint, prompts, *args, "--json")
    told, profile = json.loads(result.stdout), Profile.load(out)
    model, processor = load_checkpoint(checkpoint)
    inputs = [ask(processor, [load_image(i) for i in p.images], p.question) for p in read_prompts(prompts)]
    expected = calibrate(model, inputs, thresholds=Thresholds(), template=profile.template)
    assert profile.summary == expected.summary and profile.template.local_block == 8
    assert told["digest"] == expected.fingerprint.digest
    assert told["dataset_hash"] == profile.provenance.dataset_hash == expected.provenance.dataset_hash  # type: ignore[union-attr]
    assert (told["n_prompts"], told["n_skipped"], sum(told["counts"].values())) == (3, 1, 48)
    wanted = {"gamma_sink": 0.95, "gamma_dense": 0.4, "quantile": 0.25, "alpha_first": 1.0, "alpha_last": 0.5}
    assert wanted.items() <= profile.choice.items()


def test_calibrate_goes_on_where_it_was_interrupted(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch
) -> None:
    out, state = tmp_path / "p.json", tmp_path / "state.npz"
    command = ("calibrate", checkpoint, prompts, "--thresholds", "--out", out, "--sinks", "0,1:1")
    seen = []

    def interrupted(path: Path) -> Image.Image:
        if path.name.startswith("3-"):
            raise KeyboardInterrupt
        seen.append(path.name)
        return load_image(path)

    with monkeypatch.context() as patched:
        patched.setattr("blindsight_cli.prompt_file.load_image", interrupted)
        result = blindsight(*command, "--state", state)
    assert result.exit_code == 130 and "goes on from there" in result.stderr
    assert not out.exists() and len(Statistics.load(state)) == 2 and len(seen) == 5
    assert blindsight(*command, "--state", state).exit_code == 0
    assert Profile.load(out).template == SinkTemplate((0, 1), (1,))
    # Another machine's state is all that is needed: nothing is measured again, and its template is the one.
    whole = tmp_path / "whole.json"
    monkeypatch.setattr("torch_blindsight.calibration._measure", None)
    result = blindsight("calibrate", checkpoint, prompts, "--thresholds", "--out", whole, "--merge", state)
    assert result.exit_code == 0 and "sinks: 0, 1 from an image's start, 1 from its end; not learned" in result.stdout
    assert Profile.load(out).summary == Profile.load(whole).summary


def test_torchrun_deals_out_what_torch_does(checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch) -> None:
    """Two processes: `test_torch_scale_out`. One of them alone is as if it were not there."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with launched("jax") as place:
        assert place == Place(is_first=True, device=None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = blindsight("calibrate", checkpoint, prompts, "--out", tmp_path / "p.json", "--backend", "jax")
    assert (result.exit_code, result.stdout) == (2, "") and "work of --backend torch only" in result.stderr


def test_calibrate_says_when_nothing_passes(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    result = blindsight("calibrate", checkpoint, prompts, "--out", tmp_path / "p.json", "--gamma-dense", 1)
    assert result.exit_code == 0 and "no head passed" in result.stderr
    assert not Profile.load(tmp_path / "p.json").categories.any()


def test_calibrate_replaces_no_profile_by_one_of_dense_heads(
    checkpoint: Path, prompts: Path, sparse_profile: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.json"
    out.write_bytes(sparse_profile.read_bytes())
    result = blindsight("calibrate", checkpoint, prompts, "--out", out, "--gamma-dense", 1)
    assert result.exit_code == 0 and f"{out} stays as it was" in result.stderr
    assert out.read_bytes() == sparse_profile.read_bytes()
    assert not Profile.load(tmp_path / "p.dense.json").categories.any()


def test_a_profile_that_cannot_be_saved_is_kept(
    checkpoint: Path, prompts: Path, sparse_profile: Path, tmp_path: Path, monkeypatch
) -> None:
    out, temporary = tmp_path / "out" / "p.json", tmp_path / "temporary"
    profile, full, really_replace = Profile.load(sparse_profile), [out.parent], os.replace
    out.parent.mkdir()
    temporary.mkdir()

    def replace(source: Path, target: Path) -> None:
        if any(folder in target.parents for folder in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        really_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    result = blindsight("calibrate", checkpoint, prompts, "--out", out, "--sinks", "0:1", "--thresholds")
    kept = cache_path(profile.fingerprint)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"No space left on device: '{out}'" in result.stderr and f"kept in {kept}" in result.stderr
    assert Profile.load(kept).fingerprint == profile.fingerprint
    full.append(kept.parent)
    with pytest.raises(OSError, match=rf"'{kept}'. It is kept in {temporary}"):
        save_or_keep(profile, out)
    assert Profile.load(next(temporary.rglob("*.json"))) == profile
    full.append(temporary)
    with pytest.raises(OSError, match=r"is lost: .* with --state"):
        save_or_keep(profile, out)


def test_calibrate_refuses_early(checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("blindsight_cli.commands.calibrate.load_backend", None)  # nothing gets that far
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "one.jsonl").write_text('{"images": [], "question": "?"}\n')
    alien = tmp_path / "alien"
    alien.mkdir()
    (alien / "config.json").write_text('{"model_type": "llama"}')
    os.mkfifo(tmp_path / "pipe")
    out, mine = ("--out", tmp_path / "p.json"), tmp_path / "s.npz"
    for code, message, args in (
        (2, "Got none", (checkpoint, tmp_path / "empty.jsonl", *out)),
        (2, "at least two images", (checkpoint, tmp_path / "one.jsonl", *out)),
        (2, "there is no folder", (checkpoint, prompts, "--out", tmp_path / "no" / "p.json")),
        (2, "it is a folder", (checkpoint, prompts, *out, "--state", tmp_path)),
        (2, "it is a device or a pipe", (checkpoint, prompts, "--out", tmp_path / "pipe")),
        (2, "multiple of 0.05", (checkpoint, prompts, *out, "--quantile", 0.33)),
        (2, "multiple of 8", (checkpoint, prompts, *out, "--local-block", 12)),
        (2, "such as 0,1:1,2. Got '0,1'", (checkpoint, prompts, *out, "--sinks", "0,1")),
        (2, "offsets of at least 1", (checkpoint, prompts, *out, "--sinks", "0:0")),
        (2, "below 2^31", (checkpoint, prompts, *out, "--sinks", f"0,{10**20}:1")),
        (2, "which is also PROMPTS", (checkpoint, prompts, "--out", prompts)),
        (2, "over a profile only", (checkpoint, prompts, "--out", checkpoint / "config.json")),
        (2, "which is also --state", (checkpoint, prompts, *out, "--state", tmp_path / "p.json")),
        (2, "which is also --merge", (checkpoint, prompts, *out, "--state", mine, "--merge", mine)),
        (2, "There is no", (checkpoint, prompts, *out, "--merge", tmp_path / "absent.npz")),
        (2, "no config.json", (tmp_path, prompts, *out)),
        (2, "hf download Qwen/Some-VL", ("Qwen/Some-VL", prompts, *out)),
        (3, "'llama'", (alien, prompts, *out)),
    ):
        result = blindsight("calibrate", *args)
        assert (result.exit_code, result.stdout) == (code, ""), message
        assert message in result.stderr


def test_compare_reports_what_the_library_computes(checkpoint: Path, prompts: Path, sparse_profile: Path) -> None:
    told = ask_json(checkpoint, prompts, "--profile", sparse_profile, "--compare", "--max-new-tokens", 4)
    model, processor = load_checkpoint(checkpoint)
    images = [load_image(prompts.parent / f"3-{i}.png") for i in range(4)]
    inputs = ask(processor, images, QUESTION)

    @torch.no_grad()
    def next_token() -> torch.Tensor:
        return model(**inputs, use_cache=False).logits[0, -1].double().log_softmax(-1)

    dense = next_token()
    text = processor.tokenizer.decode(model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :])
    with patch(model, sparse_profile, break_even=False):
        sparse = next_token()
    kl = float((dense.exp() * (dense - sparse)).sum())
    assert told["kl_nats"] == pytest.approx(kl, rel=1e-3, abs=1e-9) and kl > 0
    assert [run["mode"] for run in told["runs"]] == ["dense", "sparse"] and told["runs"][0]["answer"] in text
    layout = Layout.from_ids(inputs["input_ids"][0].numpy(), inspect_model(model).special)
    profile = Profile.load(sparse_profile)
    dense_pairs, kept_pairs = (
        int(category_mask(layout, c, profile.template).sum()) for c in (Category.DENSE, Category.INTRA_IMAGE)
    )
    assert told["runs"][1]["kept"] == pytest.approx(kept_pairs / dense_pairs)
    assert told["runs"][0]["attention_flops"] == 4 * 16 * 48 * dense_pairs
    assert (told["n_tokens"], told["n_images"]) == (layout.n_tokens, 4)
    seconds = [run["prefill_seconds"] for run in told["runs"]]
    assert told["speedup"] == pytest.approx(seconds[0] / seconds[1]) and told["prefill_repeats"] == COMPARE_REPEATS


def test_compare_refuses_what_is_no_probability(
    checkpoint: Path, prompts: Path, sparse_profile: Path, monkeypatch
) -> None:
    answer = TorchBackend.answer
    for bad in (np.nan, -np.inf):

        def spoilt(self: TorchBackend, inputs: Any, profile: Profile | None, n: int, bad: float = bad) -> Answer:
            given = answer(self, inputs, profile, n)
            return given if profile is None else replace(given, log_probs=np.full_like(given.log_probs, bad))

        monkeypatch.setattr(TorchBackend, "answer", spoilt)
        args = (*pictures(prompts), "--question", QUESTION, "--compare", "--profile", sparse_profile)
        result = blindsight("run", checkpoint, *args)
        assert (result.exit_code, result.stdout) == (2, "") and "must give finite probabilities" in result.stderr


def test_compare_in_words(checkpoint: Path, prompts: Path, sparse_profile: Path) -> None:
    result = blindsight(
        *("run", checkpoint, *pictures(prompts), "--question", QUESTION, "--compare", "--profile", sparse_profile)
    )
    assert result.exit_code == 0
    for text in ("dense", "sparse", "answer", "% of dense", "4 images", "KL of its first token", str(sparse_profile)):
        assert text in result.stdout, text


def test_dense_and_short_prompts(checkpoint: Path, prompts: Path, sparse_profile: Path) -> None:
    told = ask_json(checkpoint, prompts, "--dense", "--max-new-tokens", 1)
    assert told["profile"] is None and told["runs"][0]["ran"] == "dense" and told["runs"][0]["kept"] == 1
    assert told["kl_nats"] is None and told["speedup"] is None
    args = ("run", checkpoint, *pictures(prompts, 1), "--question", QUESTION, "--profile", sparse_profile)
    result = blindsight(*args)
    assert (
        result.exit_code == 0 and "ran dense: fewer than two images" in result.stderr and "1 image\n" in result.stdout
    )
    told = ask_json(checkpoint, prompts, "--profile", sparse_profile, "--dtype", "bfloat16")
    assert told["runs"][0]["ran"] == "sparse"


def test_without_a_profile_the_prompt_is_measured(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    result = blindsight("run", checkpoint, *pictures(prompts), "--question", QUESTION, "--max-new-tokens", 1)
    assert result.exit_code == 0 and "measured" in result.stdout
    assert "ran dense and was measured" in result.stderr and "blindsight calibrate" in result.stderr
    assert not (tmp_path / "cache").exists() and not (checkpoint / FILE_NAME).exists()
    result = blindsight("run", checkpoint, *pictures(prompts), "--question", QUESTION, "--compare")
    assert (result.exit_code, result.stdout) == (2, "") and "blindsight calibrate" in result.stderr


def test_foreign_and_damaged_profiles(checkpoint: Path, prompts: Path, sparse_profile: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=1)
    question = (*pictures(prompts), "--question", QUESTION)
    result = blindsight("run", other, *question, "--profile", sparse_profile)
    assert result.exit_code == 3 and "digest" in result.stderr and "Traceback" not in result.stderr
    assert blindsight("profile", "validate", sparse_profile, "--model", checkpoint).exit_code == 0
    result = blindsight("profile", "validate", sparse_profile, "--model", other)
    assert (result.exit_code, result.stdout) == (3, "") and "digest" in result.stderr
    (other / FILE_NAME).write_text(sparse_profile.read_text())
    assert blindsight("run", other, *question).exit_code == 3  # found beside the checkpoint
    (other / FILE_NAME).write_text("{}")
    assert blindsight("run", other, *question).exit_code == 3


def test_a_patch_that_transformers_does_not_take_is_an_incompatibility(
    checkpoint: Path, prompts: Path, sparse_profile: Path, monkeypatch
) -> None:
    monkeypatch.setattr("torch_blindsight.handle.registered", lambda: False)
    result = blindsight("run", checkpoint, *pictures(prompts), "--question", QUESTION, "--profile", sparse_profile)
    assert (result.exit_code, result.stdout) == (3, "") and "blindsight doctor" in result.stderr


def test_run_refuses_contradictions_and_bad_pictures(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    question = (*pictures(prompts), "--question", QUESTION)
    assert blindsight("run", checkpoint, *question, "--dense", "--compare").exit_code == 2
    assert blindsight("run", checkpoint, "--question", QUESTION).exit_code == 2
    assert blindsight("run", checkpoint, *question, "--dtype", "int8").exit_code == 2
    text = tmp_path / "a.png"
    text.write_text("no picture")
    result = blindsight("run", checkpoint, "--image", text, "--question", QUESTION)
    assert result.exit_code == 2 and str(text) in result.stderr
    result = blindsight("run", checkpoint, *question, "--device", "nosuch")
    assert result.exit_code == 2 and "'nosuch'" in result.stderr


def damaged(checkpoint: Path, folder: Path, damage: str) -> Path:
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    match damage:
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "cut weights":
            (folder / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:100_000])
        case "other sizes":
            config["text_config"]["intermediate_size"] = 256
        case "more layers":
            config["text_config"] |= {"num_hidden_layers": 7, "layer_types": ["full_attention"] * 7}
        case "impossible config":
            config["text_config"]["num_hidden_layers"] = 7
        case "no processor":
            for name in ("tokenizer.json", "processor_config.json"):
                (folder / name).unlink()
    text = "{" if damage == "no json" else json.dumps(config)
    (folder / "config.json").write_text(text)
    return folder


DAMAGE = ("no weights", "cut weights", "other sizes", "more layers", "impossible config", "no processor", "no json")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(damage: str, checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path / "model", damage)
    result = blindsight("run", folder, *pictures(prompts), "--question", QUESTION, "--dense")
    assert (result.exit_code, result.stdout) == (2, "")
    assert str(folder) in result.stderr and "Traceback" not in result.stderr


def test_pictures_of_any_kind_become_upright_rgb(tmp_path: Path) -> None:
    for mode, name in (("L", "a.png"), ("RGBA", "b.png"), ("P", "c.gif"), ("1", "d.bmp"), ("CMYK", "e.jpg")):
        Image.new(mode, (8, 4)).save(tmp_path / name)
        assert (load_image(tmp_path / name).mode, load_image(tmp_path / name).size) == ("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)


def test_sixteen_bits_are_scaled_and_other_numbers_refused(tmp_path: Path) -> None:
    """Pillow alone cuts at 255, so that a picture of 16 bits is white, and one of fractions black."""
    grey = np.array([[0, 255, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert np.asarray(load_image(tmp_path / name))[0].tolist() == [[x] * 3 for x in (0, 0, 128, 255)]
    for dtype in (np.float32, np.int32):
        Image.fromarray(grey.astype(dtype)).save(tmp_path / "b.tif")
        with pytest.raises(ValueError, match=r"Got .*b\.tif: its pixels are 32-bit numbers"):
            load_image(tmp_path / "b.tif")


def test_devices_and_dtypes(checkpoint: Path) -> None:
    assert pick_device("cpu") == "cpu" and pick_device(None) in ("cpu", "cuda")
    assert next(load_checkpoint(checkpoint, dtype="bfloat16")[0].parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=f"must be one of {', '.join(DTYPES)}"):
        load_checkpoint(checkpoint, dtype="int8")
