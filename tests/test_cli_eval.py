"""`blindsight eval` on real checkpoints, as a user types it: figures, resuming, overlap, refusals, both backends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from blindsight_cli.backends.torch_backend import TorchBackend
from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.loading import ask, load_checkpoint, load_image
from blindsight_cli.main import app
from blindsight_cli.prompt_file import open_images
from blindsight_cli.smallvlm.puzzles import KINDS, make_puzzle
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.profile import Profile
from shared_profiles.provenance import DISTRIBUTION, installed
from tiny_checkpoints import save_checkpoint, save_prompts
from torch_blindsight import fingerprint, patch
from torch_blindsight.models import inspect_model

# Seed and number of pictures. With six pictures the shipped model gets the second right dense and wrong sparse (by the
# profile below) and the third wrong either way; the fourth asks for a picture that is not there.
PUZZLES = ((3000000, 4), (3000104, 6), (3000008, 6), (3000001, 1), (3000003, 3), (3000004, 4), (3000005, 3))


def save_items(folder: Path, puzzles: Sequence[tuple[int, int]]) -> Path:
    """Puzzles the small model was trained for; the first has options."""
    lines = []
    for row, (seed, n_images) in enumerate(puzzles):
        puzzle = make_puzzle(max(n_images, 2), seed, KINDS[seed % len(KINDS)])
        names = [f"{row}-{i}.png" for i in range(n_images)]
        for name, picture in zip(names, puzzle.images, strict=False):
            picture.save(folder / name)
        lines.append({"images": names, "question": puzzle.question.text, "answer": puzzle.question.answer})
    lines[0]["options"] = [lines[0]["answer"], "purple"]
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_items(tmp_path_factory.mktemp("items"), PUZZLES)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that makes the shipped model answer differently."""
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    Profile.uniform(Category.INTRA_IMAGE, fingerprint(load_checkpoint(SHIPPED_MODEL)[0])).save(path)
    return path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), "gemma3")


def blindsight(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def evaluated(checkpoint: Path, items: Path, profile: Path, out: Path, *args: object, code: int = 0) -> dict[str, Any]:
    """The result of a run that must end with this exit code, once it is the printed one."""
    result = blindsight("eval", checkpoint, items, "--profile", profile, "--out", out, "--json", *args)
    assert result.exit_code == code, result.stderr
    written = json.loads(out.read_text())
    assert json.loads(result.stdout) == written
    return written


def samples(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.with_suffix(".samples.jsonl").read_text().splitlines()[1:]]


def without_times(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("prefill", "provenance", "samples")}


def test_the_figures_are_the_librarys(items: Path, profile: Path, tmp_path: Path, monkeypatch) -> None:
    timed: list[bool] = []  # of each prefill, whether it was sparse

    def seconds(self: TorchBackend, prompt: Any, way: Profile | None) -> float:
        timed.append(way is not None)
        return 1.0 if way is not None else 3.0

    monkeypatch.setattr(TorchBackend, "prefill_seconds", seconds)
    told = evaluated(SHIPPED_MODEL, items, profile, tmp_path / "r.json", "--timed", 3)
    assert [s["line"] for s in samples(tmp_path / "r.json") if s["seconds"]] == [1, 4, 7], "spread over the file"
    assert timed == [False, True, True, False, False, True], "neither arm is always first"
    assert told["prefill"] == {"n": 3, "dense_seconds": 3.0, "sparse_seconds": 1.0, "ratio": 3.0}
    model, processor = load_checkpoint(SHIPPED_MODEL)
    judged, n_heads = Profile.load(profile), 6 * 8
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    right, divergences, pairs = [], [], np.zeros(2, int)
    for line, sample in zip(lines, samples(tmp_path / "r.json"), strict=True):
        inputs = ask(processor, [load_image(items.parent / name) for name in line["images"]], line["question"])
        layout = Layout.from_ids(inputs["input_ids"][0].numpy(), inspect_model(model).special)
        scores, texts = [], []
        for way in (None, judged):
            handle = None if way is None else patch(model, way, break_even=False)
            with torch.no_grad():
                scores.append(model(**inputs, logits_to_keep=1).logits[0, -1].double().log_softmax(-1))
                ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            if handle is not None:
                handle.unpatch()
            texts.append(processor.decode(ids, skip_special_tokens=True).strip())
        assert texts == [sample["dense"]["text"], sample["sparse"]["text"]]
        right.append([text == line["answer"] for text in texts])
        divergences.append(float((scores[0].exp() * (scores[0] - scores[1])).sum()))
        assert sample["kl"] == pytest.approx(divergences[-1], rel=1e-3, abs=1e-9)
        category = Category.INTRA_IMAGE if layout.n_images > 1 else Category.DENSE
        masks = [category_mask(layout, c, judged.template) for c in (Category.DENSE, category)]
        pairs += [n_heads * int(mask.sum()) for mask in masks]
        assert [sample[arm]["pairs"] for arm in ("dense", "sparse")] == [n_heads * int(mask.sum()) for mask in masks]
        assert (sample["n_tokens"], sample["n_images"]) == (layout.n_tokens, len(line["images"]))
    dense, sparse = np.array(right).T
    assert (dense.sum(), sparse.sum()) == (5, 4)
    assert (told["dense"]["right"], told["sparse"]["right"]) == (dense.sum(), sparse.sum())
    assert told["difference"]["only_dense_right"] == (dense & ~sparse).sum()
    assert told["difference"]["only_sparse_right"] == (sparse & ~dense).sum()
    assert told["kl_nats"]["mean"] == pytest.approx(np.mean(divergences), rel=1e-3)
    assert told["kept_flops"] == pytest.approx(pairs[1] / pairs[0]) and told["kept_inter_image_flops"] == 0.0
    assert told["effective_share"] == pytest.approx(6 / 7)
    assert told["ran"] == {"sparse": 6, "dense: fewer than two images": 1}
    assert told["marks"] == []
    assert told["overlap"]["checked"] is False and "does not say what it was made from" in told["overlap"]["told"]
    assert told["run"]["fingerprint"]["digest"] == judged.fingerprint.digest
    packages = (DISTRIBUTION, "torch", "transformers", "numpy")
    assert told["run"]["versions"] == {name: installed(name) for name in packages}
    assert told["provenance"]["sparse"]["profile"] == str(profile) and told["provenance"]["hardware"]


def test_a_killed_run_goes_on(items: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("eval", SHIPPED_MODEL, items, "--profile", profile, "--out", tmp_path / "r.json", "--timed", 0)
    asked: list[int] = []

    def interrupted(prompt: Any, path: Path) -> list[Image.Image]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(prompt.line)
        return open_images(prompt, path)

    with monkeypatch.context() as patched:
        patched.setattr("blindsight_cli.evaluation.runner.open_images", interrupted)
        result = blindsight(*command)
    file = tmp_path / "r.samples.jsonl"
    assert result.exit_code == 130 and "goes on from there" in result.stderr
    assert asked == [s["line"] for s in samples(tmp_path / "r.json")] == [1, 2, 3]
    assert not (tmp_path / "r.json").exists()
    file.write_bytes(file.read_bytes() + b'{"line": 4, "dig')  # and once more, in the middle of a line
    result = blindsight(*command)
    assert result.exit_code == 0 and "3 of 7 items are there" in result.stderr
    assert [s["line"] for s in samples(tmp_path / "r.json")] == [1, 2, 3, 4, 5, 6, 7]
    whole = evaluated(SHIPPED_MODEL, items, profile, tmp_path / "whole.json", "--timed", 0)
    assert without_times(json.loads((tmp_path / "r.json").read_text())) == without_times(whole)
    # A finished run is not asked again; another one never takes its place.
    before = file.read_bytes()
    monkeypatch.setattr("blindsight_cli.evaluation.runner.open_images", None)
    assert blindsight(*command).exit_code == 0
    result = blindsight(*command, "--limit", 2)
    assert result.exit_code == 2 and "very run" in result.stderr
    (tmp_path / "r.json").unlink()
    result = blindsight(*command, "--limit", 2)
    assert result.exit_code == 2 and "n_items: there 7, here 2" in result.stderr
    assert file.read_bytes() == before


def test_a_picture_that_was_replaced_makes_another_run(profile: Path, tmp_path: Path) -> None:
    """One of the same name and size: what was answered about the old one is not taken for it."""
    items = save_items(tmp_path, PUZZLES[:1])
    first, second = (tmp_path / f"0-{i}.png" for i in range(2))
    for path in (first, second):
        path.write_bytes(path.read_bytes().ljust(1 << 16, b"\0"))
    command = ("eval", SHIPPED_MODEL, items, "--profile", profile, "--out", tmp_path / "r.json", "--timed", 0)
    assert blindsight(*command).exit_code == 0
    first.write_bytes(second.read_bytes())
    (tmp_path / "r.json").unlink()
    result = blindsight(*command)
    assert result.exit_code == 2 and "it is of another: items: there" in " ".join(result.stderr.lower().split())


def test_in_words(items: Path, profile: Path, tmp_path: Path) -> None:
    twice = items.with_name("twice.jsonl")
    twice.write_text(items.read_text().partition("\n")[0] + "\n" + items.read_text())
    result = blindsight(
        *("eval", SHIPPED_MODEL, twice, "--profile", profile, "--out", tmp_path / "r.json", "--limit", 3, "--letters")
    )
    assert result.exit_code in (0, 1)
    for text in ("accuracy", "sparse - dense", "McNemar", "invalid answers", "same answer", "nats", "between images"):
        assert text in result.stdout, text
    assert "not checked" in result.stderr and "saved" in result.stderr
    assert "1 of 3 items repeat others: the interval is too narrow" in result.stderr


def test_items_that_were_calibrated_on_are_refused(untrained: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "r.json"
    data.mkdir()
    prompts = save_prompts(data, (2, 3, 2))
    first, second, third = prompts.read_text().splitlines()
    calibration, items = data / "calibration.jsonl", data / "others.jsonl"
    lone = json.dumps({**json.loads(first), "images": ["0-0.png"]})  # shows a calibration nothing
    prompts.write_text(f"{first}\n{lone}\n{second}\n{third}\n")
    calibration.write_text(f"{first}\n{lone}\n{second}\n")
    made = tmp_path / "p.json"
    result = blindsight("calibrate", untrained, calibration, "--out", made, "--gamma-dense", 0.3, "--local-block", 8)
    assert result.exit_code == 0, result.stderr
    command = ("eval", untrained, "--profile", made, "--out", out)

    unrelated = data / "unrelated.jsonl"
    unrelated.write_text(f"{third}\n")
    for more in ((), ("--limit", 1), ("--limit", 2, "--calibration", unrelated)):  # by the hash in the profile alone
        result = blindsight(*command, prompts, *more)
        assert result.exit_code == 2 and "made from the first 2 multi-image prompts" in result.stderr
    shutil.copy(data / "1-0.png", data / "copy.png")  # under another name, with another question before it
    again = json.loads(second)
    again["images"][0] = "copy.png"
    shares = {**json.loads(third), "images": ["copy.png", "2-1.png"]}
    items.write_text(f"{third}\n{json.dumps(again)}\n")
    result = blindsight(*command, items, "--calibration", calibration)
    assert result.exit_code == 2 and "1 of" in result.stderr and "lines 2" in result.stderr
    assert not out.exists() and not out.with_suffix(".samples.jsonl").exists()

    asks = {**json.loads(third), "question": json.loads(first)["question"]}  # the same, about other pictures
    items.write_text("\n".join([third, json.dumps(shares), json.dumps(asks)]))
    told = evaluated(untrained, items, made, out, "--calibration", calibration, "--max-new-tokens", 2, code=1)
    assert told["overlap"]["checked"] and "made from it, by its hash" in told["overlap"]["told"]
    assert told["n_with_calibration_pictures"] == 1
    assert told["marks"] and all("no right answer" in mark for mark in told["marks"])  # it is not trained
    result = blindsight(*command[:-1], tmp_path / "q.json", items, "--limit", 1, "--max-new-tokens", 1)
    assert "name its file with --calibration" in result.stderr
    unrelated.write_text(f"{first}\n")
    told = evaluated(untrained, items, made, tmp_path / "u.json", "--calibration", unrelated, "--limit", 1, code=1)
    assert told["overlap"]["checked"] and "could not be shown" in told["overlap"]["told"]


def test_what_is_refused_early(untrained: Path, items: Path, profile: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    lone = save_items(tmp_path, ((0, 1), (1, 1)))
    (tmp_path / "taken.json").write_text("{}")
    out = ("--out", tmp_path / "r.json")
    result = blindsight("eval", untrained, items, *out)
    assert result.exit_code == 2 and "blindsight calibrate" in result.stderr  # no profile anywhere
    result = blindsight("eval", untrained, items, *out, "--profile", profile)
    assert result.exit_code == 3 and "digest" in result.stderr
    result = blindsight("eval", SHIPPED_MODEL, items, "--profile", profile, "--out", tmp_path / "taken.json")
    assert result.exit_code == 2 and "new file" in result.stderr
    monkeypatch.setattr("blindsight_cli.commands.evaluate.load_backend", None)  # nothing below gets that far
    for message, args in (
        ("Got none", (SHIPPED_MODEL, tmp_path / "empty.jsonl", *out)),
        ("at least two images", (SHIPPED_MODEL, lone, *out)),
        ("it is a folder", (SHIPPED_MODEL, items, "--out", tmp_path)),
        ("no config.json", (tmp_path, items, *out)),
    ):
        result = blindsight("eval", *args)
        assert (result.exit_code, result.stdout) == (2, "") and message in result.stderr, message
    assert (tmp_path / "taken.json").read_text() == "{}" and not list(tmp_path.glob("*samples*"))


def test_a_profile_that_drops_nothing_is_marked(untrained: Path, items: Path, tmp_path: Path) -> None:
    made = tmp_path / "p.json"
    Profile.uniform(Category.DENSE, fingerprint(load_checkpoint(untrained)[0])).save(made)
    told = evaluated(untrained, items, made, tmp_path / "r.json", "--limit", 2, "--max-new-tokens", 1, code=1)
    assert told["marks"][0].startswith("sparsity did nothing") and told["ran"] == {"dense: all heads are Dense": 2}
    assert told["effective_share"] == 0.0 and told["kept_flops"] == 1.0 and told["kl_nats"]["max"] < 1e-9


def test_a_single_picture_keeps_everything(untrained: Path, tmp_path: Path) -> None:
    """SINK would cut even one image into local blocks, but such a prompt runs dense, and is counted so."""
    items, made = save_items(tmp_path, ((0, 1), (1, 2))), tmp_path / "p.json"
    blocks = SinkTemplate(local_block=8)
    Profile.uniform(Category.SINK, fingerprint(load_checkpoint(untrained)[0]), blocks).save(made)
    evaluated(untrained, items, made, tmp_path / "r.json", "--max-new-tokens", 1, "--timed", 0, code=1)
    lone, pair = samples(tmp_path / "r.json")
    assert lone["sparse"]["ran"] == "dense: fewer than two images" and pair["sparse"]["ran"] == "sparse"
    assert lone["sparse"]["pairs"] == lone["dense"]["pairs"] and pair["sparse"]["pairs"] < pair["dense"]["pairs"]


def test_both_backends_see_the_same(untrained: Path, tmp_path: Path) -> None:
    items, made = save_items(tmp_path, ((0, 2), (1, 2))), tmp_path / "p.json"
    Profile.uniform(Category.INTRA_IMAGE, fingerprint(load_checkpoint(untrained)[0])).save(made)
    args = ("--max-new-tokens", 2, "--timed", 1)
    for name in ("torch", "jax"):
        evaluated(untrained, items, made, tmp_path / f"{name}.json", *args, "--backend", name, code=1)
    for mine, theirs in zip(samples(tmp_path / "jax.json"), samples(tmp_path / "torch.json"), strict=True):
        assert mine.pop("kl") == pytest.approx(theirs.pop("kl"), rel=1e-3, abs=1e-6)
        assert bool(mine.pop("seconds")) == bool(theirs.pop("seconds"))
        assert mine == theirs
    result = blindsight("eval", untrained, items, "--profile", made, "--out", tmp_path / "torch.json", *args[:2])
    assert result.exit_code == 2  # other options are another run
