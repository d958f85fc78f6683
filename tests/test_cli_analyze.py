"""`blindsight analyze`: its figures, its page, the colours of its maps, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from blindsight_cli.analysis import Analysis
from blindsight_cli.analysis.measure import HeadMap, chosen_heads
from blindsight_cli.analysis.page import strongest
from blindsight_cli.analysis.pictures import RULER, layer_strength, map_png, parts
from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.loading import load_checkpoint
from blindsight_cli.main import app
from blindsight_cli.smallvlm.evaluate import CALIBRATION_SEEDS, make_mixed_puzzles, to_inputs
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.profile import Profile
from shared_profiles.sink_statistics import SinkMass
from tiny_checkpoints import save_checkpoint, save_prompts
from torch_blindsight import fingerprint
from torch_blindsight.models import inspect_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def blindsight(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def analyzed(*args: object) -> dict[str, Any]:
    result = blindsight("analyze", *args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def images_of(page: str) -> list[str]:
    return re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_page_shows_every_head_and_loads_nothing(family: str, tmp_path: Path) -> None:
    """A prompt file, no profile: shares that sum to 1, one map per head, no address in the page."""
    folder, out = save_checkpoint(tmp_path / family, family), tmp_path / "page.html"
    data = tmp_path / "data"
    data.mkdir()
    found = analyzed(folder, save_prompts(data), "--out", out)
    assert found["n_prompts"] == 3  # of four, one has a single image
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-4)
    assert sum(found["shares_without_delimiters"].values()) == pytest.approx(1, abs=1e-4)
    assert found["kl"] > 0 and found["right"] is None
    page = out.read_text(encoding="utf-8")
    n_heads = 48 if family == "qwen2_5_vl" else 16
    assert len(images_of(page)) == n_heads
    assert "://" not in page and "<script" not in page and "default-src 'none'" in page
    assert page.count("<svg") == page.count("</svg>") >= 3
    assert "Category shares" not in page


def test_a_profile_is_drawn_over_the_maps(checkpoint: Path, tmp_path: Path, no_grad: None) -> None:
    """Puzzles, and a profile of one category: it is named on every map with the weight that its mask keeps."""
    out, file = tmp_path / "page.html", tmp_path / "profile.json"
    model, processor = load_checkpoint(checkpoint, dtype="float32")
    Profile.uniform(Category.SINK, fingerprint(model), SinkTemplate(local_block=8)).save(file)
    result = blindsight("analyze", checkpoint, "--puzzles", 3, "--profile", file, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "same answer on" in result.stdout and ", right " in result.stdout
    page = out.read_text(encoding="utf-8")
    assert [", sink: " in alt for alt in images_of(page)] == [True] * 48
    assert "Category shares" in page and "4 images" in page
    model.set_attn_implementation("eager")
    inputs = to_inputs(processor, make_mixed_puzzles(3, CALIBRATION_SEEDS)[2:])
    weights = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0].numpy()  # [L, H, N, N]
    layout = Layout.from_ids(inputs["input_ids"][0].numpy(), inspect_model(model).special)
    mask = category_mask(layout, Category.SINK, SinkTemplate(local_block=8))
    rows = np.concatenate([np.arange(first, last) for _, first, last, _ in layout.images[1:]])
    kept = (weights * mask)[:, :, rows].sum(-1).mean(-1).ravel()
    told = [float(re.search(r"sink: ([\d.]+) kept", alt)[1]) for alt in images_of(page)]
    np.testing.assert_allclose(told, kept, atol=0.0051)


def test_right_answers_are_those_of_the_model(tmp_path: Path, no_grad: None) -> None:
    """With delimiters, by transformers alone; without, at most as many others as answers that changed."""
    found = analyzed(SHIPPED_MODEL, "--puzzles", 5, "--out", tmp_path / "page.html")
    model, processor = load_checkpoint(SHIPPED_MODEL, dtype="float32")
    asked = make_mixed_puzzles(5, CALIBRATION_SEEDS)
    ids = [int(model(**to_inputs(processor, [puzzle])).logits[0, -1].argmax()) for puzzle in asked]
    said = processor.tokenizer.convert_ids_to_tokens(ids)
    right = np.mean([a == puzzle.question.answer for a, puzzle in zip(said, asked, strict=True)])
    assert found["right"][0] == pytest.approx(right)
    assert abs(found["right"][1] - right) <= 1 - found["same_answer"] + 1e-9


def test_what_cannot_be_analyzed_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """No prompts, two sources of prompts, prompts of one image, a page that cannot be written."""
    single = tmp_path / "single.jsonl"
    single.write_text(save_prompts(tmp_path, (1,)).read_text())
    for args, message in (
        ((), "needs prompts"),
        ((single, "--puzzles", 2), "Give one of them"),
        (("--puzzles", 3, "--limit", 1), "--limit takes the first prompts of a file"),
        ((single,), "at least two images"),
        ((single, "--out", single), "--out must name a file of its own"),
        (("--puzzles", 2, "--out", checkpoint / "config.json"), "--out may write over an HTML page only"),
        (("--puzzles", 2, "--out", tmp_path / "no" / "page.html"), "there is no folder"),
    ):
        result = blindsight("analyze", checkpoint, *args)
        assert result.exit_code == 2
        assert message in result.stderr


def test_colours_tell_kept_pairs_from_dropped_ones() -> None:
    """Blue where the category keeps, orange where it drops, white where the model never looks; the darkest wins."""
    layout = Layout(14, 0, 14, np.array([[1, 2, 6, 7], [7, 8, 12, 13]]))
    kept = category_mask(layout, Category.INTRA_IMAGE, SinkTemplate())
    weights = np.tril(np.ones((14, 14), np.float32))
    weights[9, 3] = 0  # dropped, and no weight: a pale orange

    def pixels(head: HeadMap, layout: Layout) -> np.ndarray:
        picture = Image.open(io.BytesIO(base64.b64decode(map_png(head, layout)))).convert("RGB")
        return np.asarray(picture)[RULER:, RULER:].astype(int)

    drawn = pixels(HeadMap(0, 0, Category.INTRA_IMAGE, weights, kept, 1.0), layout)
    assert drawn.shape == (14, 14, 3)
    red, blue = drawn[..., 0], drawn[..., 2]
    causal = np.tri(14, dtype=bool)
    assert (drawn[~causal] == 255).all()
    assert ((blue > red) == (kept & causal)).all()
    assert drawn[9, 3].sum() > drawn[9, 2].sum()
    many = Layout(600, 0, 600, np.array([[1, 2, 300, 301], [301, 302, 598, 599]]))
    weights = np.zeros((600, 600), np.float32)
    weights[np.arange(600), 0] = 1
    weights[450, 100] = 4
    kept = category_mask(many, Category.INTRA_IMAGE, SinkTemplate())
    drawn = pixels(HeadMap(0, 0, Category.INTRA_IMAGE, weights, kept, 1.0), many)
    assert drawn.shape == (200, 200, 3)
    assert drawn[150, 33].sum() < drawn[150, 34].sum() and drawn[150, 33, 0] > drawn[150, 33, 2]


def test_heads_are_chosen_from_every_category_across_the_depth() -> None:
    """All of a small model; of a large one twelve of each category, from the first layers to the last."""
    assert len(chosen_heads(np.zeros((8, 8)))) == 64
    categories = np.zeros((30, 30), int)
    categories[10:], categories[29, 0] = 2, 1
    heads = chosen_heads(categories)
    assert len(heads) == len(set(heads)) == 25 and heads == sorted(heads)
    assert (29, 0) in heads and (0, 0) in heads and (29, 29) in heads


def test_layer_figures_count_heads_by_their_mass() -> None:
    """A head that looks at other images ten times as much counts ten times; parts sum to what there is."""
    others = np.zeros((1, 2, 5))
    others[0, 0], others[0, 1, 0] = 0.01, 0.5
    own = 1 - others.sum(-1)
    mass = SinkMass(own, np.zeros_like(own), others, np.ones((1, 5)))
    assert layer_strength(mass)[0, 0] == pytest.approx(0.51 / 0.11, rel=1e-5)
    np.testing.assert_allclose(parts(mass)[0], [0.725, 0, 0.26, 0.015], rtol=1e-4)


def test_the_strongest_offsets_and_what_becomes_of_them() -> None:
    """By the layer where each is strongest; without delimiters in that same layer; sinks from either end are marked."""
    others = np.full((2, 1, 5), 0.01)
    others[1, 0, 0], others[0, 0, 3] = 0.40, 0.20
    ablated = np.full((2, 1, 5), 0.01)
    ablated[1, 0, 0], ablated[0, 0, 0] = 0.02, 0.9
    with_, without = (SinkMass(1 - x.sum(-1), np.zeros((2, 1)), x, np.ones((2, 5))) for x in (others, ablated))
    template = SinkTemplate((0,), (2,), 8)
    rows = strongest(Analysis(3, with_, without, template, template, None, 0.0, 1.0, None, None, ()), most=3)
    assert [(row["offset"], row["layer"]) for row in rows[:2]] == [("+0", 1), ("\N{MINUS SIGN}2", 0)]
    assert [row["strength"] for row in rows[:2]] == pytest.approx([0.40 / 0.088, 0.20 / 0.048], rel=1e-5)
    assert rows[0]["without"] == pytest.approx(0.02 / 0.012, rel=1e-5)
    assert rows[0]["share"] == pytest.approx(0.205, rel=1e-5)
    assert [row["is_sink"] for row in rows] == [True, True, False]
