"""The small models: processors, packed questions against questions asked alone, and training that can be resumed."""

from __future__ import annotations

import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch

from blindsight_cli.backends import load_backend
from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.loading import load_checkpoint, load_processor
from blindsight_cli.smallvlm import evaluate
from blindsight_cli.smallvlm import train as training
from blindsight_cli.smallvlm.build import FAMILIES, make_model, make_processor
from blindsight_cli.smallvlm.curriculum import RECIPES, SHIPPED, Recipe, Stage
from blindsight_cli.smallvlm.evaluate import compare, make_mixed_puzzles, make_puzzles, to_inputs
from blindsight_cli.smallvlm.optimizers import OPTIMIZERS, Muon
from blindsight_cli.smallvlm.packed import SLOT, PackedLayout, PictureBank, make_batch, packed_logits, prepare
from blindsight_cli.smallvlm.puzzles import COLORS, KINDS, SHAPES, make_puzzle
from blindsight_cli.smallvlm.vocabulary import IMAGE_PAD, VOCAB
from shared_profiles import Category, Layout, category_mask
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile
from torch_blindsight import fingerprint, patch
from torch_blindsight.models import inspect_model

families = pytest.mark.parametrize("family", FAMILIES)


def seen(picture) -> tuple[str, str]:
    """The colour and the shape in a picture, by its pixels: where they are lit, how wide, and how much of their box."""
    pixels = np.asarray(picture).astype(int)
    lit = pixels.max(-1) - pixels.min(-1) > 80
    mean = pixels[lit].mean(0)
    (color,) = (name for name, rgb in COLORS.items() if (np.array(rgb) > 127).tolist() == (mean > 110).tolist())
    top, bottom, left, right = *np.flatnonzero(lit.any(1))[[0, -1]], *np.flatnonzero(lit.any(0))[[0, -1]]
    box = lit[top : bottom + 1, left : right + 1]
    if box.mean() > 0.65:
        return color, "square" if box.mean() > 0.9 else "circle"
    return color, "cross" if box[-3].mean() < 0.5 else "triangle"


def test_answers_are_what_the_pictures_show():
    """Read anew from the question's words and the pixels; where the pictures allow both, yes as often as no."""
    open_, missing = [], 0
    for seed in range(240):
        puzzle = make_puzzle(2 + seed % 5, seed, KINDS[seed % 6])
        words, text = puzzle.question.text.rstrip("?").split(), puzzle.question.text
        colors, shapes = zip(*map(seen, puzzle.images), strict=True)
        assert [list(COLORS)[c] for c in puzzle.colors] == list(colors)
        assert [SHAPES[s] for s in puzzle.shapes] == list(shapes)
        numbers = [int(n) - 1 for n in re.findall(r"\d+", text)]
        match puzzle.question.kind:
            case "color" | "shape" as kind:
                answer = {"color": colors, "shape": shapes}[kind][numbers[0]]
            case "which":
                hits = [i for i, one in enumerate(zip(colors, shapes, strict=True)) if one == tuple(words[-2:])]
                answer = str(hits[0] + 1) if hits else "none"
            case "count":
                answer = str(colors.count(words[-1]))
            case kind:
                values, (i, j) = {"same color": colors, "same shape": shapes}[kind], numbers
                assert i != j
                answer = "yes" if values[i] == values[j] else "no"
                open_ += [answer] if 1 < values.count(values[i]) < len(values) else []
        assert puzzle.question.answer == answer, text
        if puzzle.question.kind == "which":
            missing += answer == "none"
    assert 0.4 < open_.count("yes") / len(open_) < 0.6 and len(open_) > 30
    assert 0 < missing < 12  # of 40
    mixed = make_mixed_puzzles(7, 240)
    assert [len(puzzle.images) for puzzle in mixed] == [2, 3, 4, 5, 6, 2, 3]
    assert [puzzle.question.kind for puzzle in mixed] == [*KINDS, KINDS[0]]


def test_the_figures_of_a_checkpoint_are_of_its_own_profile(monkeypatch, capsys):
    """And of no other where one is named that is not there."""
    monkeypatch.setattr(sys, "argv", ["x", str(SHIPPED_MODEL), "--questions", "2", "--images", "3"])
    evaluate.main()
    said = capsys.readouterr().out.splitlines()
    model, processor = load_backend("torch", SHIPPED_MODEL, device="cpu"), load_processor(SHIPPED_MODEL)
    row, *_ = compare(model, processor, Profile.load(SHIPPED_MODEL / FILE_NAME), make_puzzles(3, 2, 1_000_000))
    assert said[0].startswith(f"3 images, 2 questions: dense {row.dense:.2%}, sparse {row.sparse:.2%}, ")
    assert said[0].endswith(f"KL {row.kl:.5f} nats, kept FLOPs {row.kept_flops:.1%}") and row.kept_flops < 0.9
    assert [line.split()[0] for line in said[1:]] == ["color", "shape"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--profile", "nothing.json"])
    with pytest.raises(FileNotFoundError):
        evaluate.main()


def test_dense_against_sparse_is_counted_as_by_hand(no_grad):
    """In batches of four, padded, against plain transformers on one question after the other."""
    model, processor = load_checkpoint(SHIPPED_MODEL, dtype="float32")
    profile = Profile.uniform(Category.INTRA_IMAGE, fingerprint(model))
    puzzles = make_puzzles(6, 6, 3_000_102)
    row, dense, sparse = compare(load_backend("torch", SHIPPED_MODEL, device="cpu"), processor, profile, puzzles,
        batch_size=4)  # fmt: skip
    logs, kept = [], np.zeros(2, int)
    for puzzle in puzzles:
        inputs = to_inputs(processor, [puzzle])
        logs.append([])
        for way in (None, profile):
            handle = way and patch(model, way, break_even=False)
            logs[-1].append(model(**inputs).logits[0, -1].double().log_softmax(-1))
            if handle:
                handle.unpatch()
        layout = Layout.from_ids(inputs["input_ids"][0].numpy(), inspect_model(model).special)
        kept += [category_mask(layout, c, profile.template).sum() for c in (Category.INTRA_IMAGE, Category.DENSE)]
    answers = [[processor.tokenizer.convert_ids_to_tokens(int(pair[i].argmax())) for pair in logs] for i in (0, 1)]
    expected = [puzzle.question.answer for puzzle in puzzles]
    right = [np.equal(way, expected) for way in answers]
    assert [list(dense.answers), list(sparse.answers)] == answers and right[0].sum() > right[1].sum() > 0
    assert (row.n_images, row.n_questions) == (6, 6)
    assert (row.dense, row.sparse) == (right[0].mean(), right[1].mean())
    assert row.agreement == np.equal(*answers).mean() < 1
    assert row.kl == pytest.approx(np.mean([float((p.exp() * (p - q)).sum()) for p, q in logs]), rel=1e-3)
    assert row.kept_flops == pytest.approx(kept[0] / kept[1], rel=1e-12)
    for i, kind in enumerate(row.by_kind):
        assert (kind.kind, kind.n_questions) == (KINDS[i], 1)
        assert (kind.dense, kind.sparse) == (right[0][i], right[1][i])


@families
def test_the_processor_gives_the_ids_and_pixels_that_training_makes_itself(family, no_grad):
    """The prompt of a puzzle, through the real processor: the packed prefix, the question's words, equal pixels."""
    puzzle = make_puzzle(3, 7, "same color")
    inputs = to_inputs(make_processor(family), [puzzle])
    layout = PackedLayout(make_model(family), 3, 1)
    words = [VOCAB[w] for w in puzzle.question.text.lower().rstrip("?").split() if w in VOCAB]
    assert inputs["input_ids"][0].tolist() == [*layout.prefix.tolist(), *words]
    pixels = FAMILIES[family].to_pixels(np.stack([np.asarray(image) for image in puzzle.images]))
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-6, rtol=0)
    types = inputs["token_type_ids" if family == "gemma3" else "mm_token_type_ids"]
    assert (types[0, : len(layout.prefix)] == layout.is_image).all()


@families
def test_packed_questions_answer_as_if_each_stood_alone(family, no_grad):
    """Logits of a packed batch in float64 equal the plain model's, question by question; Gemma's windows bind."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = make_model(family).double().eval()
    for p in model.parameters():  # scores spread enough for a wrong mask to show
        p.mul_(5 if p.ndim > 1 else 1)
    layout = PackedLayout(model, 6, 12)
    ids, goal, pixels, _ = make_batch(FAMILIES[family], layout, PictureBank(1, rng), [1] * len(KINDS), 1, rng)
    pixels = pixels.double()
    n = len(layout.prefix)
    inputs = dict(pixel_values=pixels)
    type_name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
    if family == "gemma3":
        assert n > model.config.text_config.sliding_window
    else:
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]] * 6)
    expected = []
    for slot, wanted in zip(ids[0, n:].split(SLOT), goal[0, n:].split(SLOT), strict=True):
        at = torch.nonzero(wanted != -100)[:, 0]
        alone = torch.cat([layout.prefix, slot[: at[-1] + 1]])[None]
        inputs |= {"attention_mask": torch.ones_like(alone), type_name: (alone == VOCAB[IMAGE_PAD]).long()}
        expected.append(model(input_ids=alone, **inputs).logits[0, n + at])
    prepare(model)
    packed = packed_logits(model, layout, ids, pixels, goal)
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-9, rtol=1e-9)


@pytest.fixture
def toy(monkeypatch):
    """Training at toy size: nothing compiled, few pictures, a state every second step."""
    monkeypatch.setattr(training, "compile_layers", lambda model: None)
    monkeypatch.setattr(training, "VARIANTS", 1)
    monkeypatch.setattr(training, "STATE_EVERY", 2)
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    stage = Stage(9, (1, 2), None, 2, 3, (1, 1, 0, 0, 0, 0))
    monkeypatch.setattr(training, "RECIPES", {name: Recipe(1e-3, 5, (stage,)) for name in RECIPES})


def weights(folder):
    """The bytes of a checkpoint's weights."""
    return (folder / "model.safetensors").read_bytes()


@families
def test_an_interrupted_training_ends_with_the_bits_of_an_uninterrupted_one(family, toy, tmp_path, monkeypatch):
    """Killed after step 3 of 5, with the state of step 2, and resumed: the same weights and record, no state left."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training.train(whole, family, SHIPPED[family], 5, 0)
    advance = training.Training.advance

    def killed(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(training.Training, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        training.train(parts, family, SHIPPED[family], 5, 0)
    assert json.loads((parts / "training.json").read_text())["steps"] == 2
    assert weights(parts) != weights(whole)
    monkeypatch.setattr(training.Training, "advance", advance)
    training.train(parts, family, SHIPPED[family], 5, 0)
    assert weights(parts) == weights(whole)
    assert sorted(p.name for p in parts.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert not (parts / training.STATE).exists()
    assert (parts / "training.json").read_bytes() == (whole / "training.json").read_bytes()
    model, processor = load_checkpoint(parts)
    assert type(model) is FAMILIES[family].model
    assert type(processor) is type(make_processor(family))


def test_a_training_is_never_continued_as_another_one(toy, tmp_path, monkeypatch):
    """A folder with the state of other settings, or with a finished training, is left alone."""
    training.train(tmp_path, "qwen2_vl", "muon", 2, 0)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="finished training"):
        training.train(tmp_path, "qwen2_vl", "muon", 2, 0)
    begun = training.Training("qwen2_vl", "muon", 4, 0)
    begun.advance()
    begun.save(tmp_path / "begun")
    for optimizer, seed in (("muon", 1), ("adamw", 0)):
        with pytest.raises(ValueError, match="must be the state of this training"):
            training.train(tmp_path / "begun", "qwen2_vl", optimizer, 4, seed)
    assert weights(tmp_path) == before


def test_a_training_writes_over_nothing_else(tmp_path):
    """Such as another checkpoint, whose weights would be gone; a file is refused before the first step."""
    (tmp_path / "config.json").write_text("{}")
    for out in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match="must be a new or empty folder, or hold a training's state"):
            training.train(out, "qwen2_vl", "muon", 2, 0)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_stages_lead_from_one_picture_to_six():
    """Every recipe's stages end where the next begins; the last one asks every kind about up to six pictures."""
    assert set(SHIPPED) == set(FAMILIES)
    assert set(SHIPPED.values()) <= set(RECIPES) == set(OPTIMIZERS)
    for recipe in RECIPES.values():
        stages = recipe.stages
        assert [recipe.stage_at(step) for step in (0, stages[0].until, 10**6)] == [stages[0], stages[1], stages[-1]]
        assert stages[0].images == (1,)
        assert max(stages[-1].images) == 6
        assert min(stages[-1].weights) > 0


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_steps_like_torch_s(shape):
    """The same weights as `torch.optim.Muon` after three steps, but for its bfloat16."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    moved = []
    for make in (Muon, partial(torch.optim.Muon, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight], lr=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        moved.append(weight.detach() - start)
    torch.testing.assert_close(*moved, atol=0.02 * float(moved[1].abs().max()), rtol=0)
