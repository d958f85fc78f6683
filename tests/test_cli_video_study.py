"""The study of videos: what its forms are, and that its page says what its results say."""

from __future__ import annotations

import json
from importlib import import_module

import numpy as np
import pytest
import torch

from blindsight_cli.smallvlm import build, evaluate
from shared_profiles import SPARSE, Category, Layout, SinkTemplate, category_mask
from torch_blindsight.models import inspect_model
from torch_blindsight.prompts import read_layouts
from tree_scripts import ROOT

video, video_page = (import_module(f"blindsight_study.{name}") for name in ("video", "video_page"))
_N, _TOKENS = 3, build.IMAGE_TOKENS


@pytest.mark.usefixtures("no_grad")
def test_forms():
    """Films are pictures to the model, to the last bit; a film is the same pictures without what is between them."""
    model, processor = build.make_model().eval(), build.make_processor()
    puzzles = evaluate.make_puzzles(_N, 2, 0)
    info, found = inspect_model(model), {}
    for form in video.FORMS:
        inputs = video.to_inputs(processor, puzzles, form)
        layouts, _ = read_layouts(inputs, info.family, info.special)
        found[form] = layouts[0], model(**inputs).logits[:, -1]
        assert all(layout.n_images == _N for layout in layouts)
    assert found["films"][0] == found["pictures"][0]
    assert torch.equal(found["films"][1], found["pictures"][1])
    text, delimiters = len(found["film"][0].text), found["film"][0].images[:, 1] - found["film"][0].images[:, 0]
    assert delimiters.tolist() == [1] + [0] * (_N - 1)
    assert len(found["unnumbered"][0].text) == text == len(found["pictures"][0].text) - _N
    lengths = {form: layout.stop - layout.start for form, (layout, _) in found.items()}
    film = text + _N * _TOKENS + 2
    assert lengths == {
        "pictures": film + 2 * (_N - 1) + _N,
        "films": film + 2 * (_N - 1) + _N,
        "unnumbered": film + 2 * (_N - 1),
        "film": film,
    }


def test_the_page_is_of_its_results(tmp_path):
    results = ROOT / "docs" / "results"
    video_page.write_page(json.loads((results / "video.json").read_text()), tmp_path / "video.md")
    assert (tmp_path / "video.md").read_text() == (results / "video.md").read_text(), "run scripts/video_study.py"


def test_pairs_of_a_long_video_are_those_of_its_masks():
    """Of 15 words, a video with one pair of delimiters or one for each frame, and 32 words."""
    film = [(15, 16, 36, 36), (36, 36, 56, 56), (56, 56, 76, 77)]
    apart = [(15, 16, 36, 37), (37, 38, 58, 59), (59, 60, 80, 81)]
    for row, images in zip(video.long_video(n_frames=3, n_tokens=20), (film, apart), strict=True):
        n = images[-1][3] + 32
        masks = {c: category_mask(Layout(n, 0, n, np.array(images)), c, SinkTemplate()) for c in Category}
        kept = {c.name: masks[c].sum() / masks[Category.DENSE].sum() for c in SPARSE}
        assert (row["tokens"], row["frames"]) == (n, 3) and row["kept"] == pytest.approx(kept, rel=1e-12)
