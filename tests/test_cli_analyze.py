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
from PIL import Image
from typer.testing import CliRunner, Result

from blindsight_cli.analysis.measure import HeadMap, chosen_heads
from blindsight_cli.analysis.pictures import RULER, layer_strength, map_png, parts
from blindsight_cli.loading import load_checkpoint
from blindsight_cli.main import app
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.profile import Profile
from shared_profiles.sink_statistics import SinkMass
from tiny_checkpoints import save_checkpoint, save_prompts
from torch_blindsight import fingerprint


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


def test_a_profile_is_drawn_over_the_maps(checkpoint: Path, tmp_path: Path) -> None:
    """Puzzles, and a profile of one category: it is named on every map, and the shares by layer are drawn."""
    out, file = tmp_path / "page.html", tmp_path / "profile.json"
    Profile.uniform(Category.SINK, fingerprint(load_checkpoint(checkpoint)[0])).save(file)
    result = blindsight("analyze", checkpoint, "--puzzles", 3, "--profile", file, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "same answer on" in result.stdout and ", right " in result.stdout
    page = out.read_text(encoding="utf-8")
    assert [", sink: " in alt for alt in images_of(page)] == [True] * 48
    assert "Category shares" in page and "4 images" in page


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
