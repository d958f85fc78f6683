"""The study of token pruning, on two questions: its points add up, and what is known is not measured again."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))  # it runs from the tree and is not installed
from blindsight_cli.commands.demo import SHIPPED_MODEL
from tree_scripts import ROOT

pruning, pruning_page = (import_module(f"blindsight_study.{name}") for name in ("pruning", "pruning_page"))


def test_the_study(tmp_path, monkeypatch):
    for module in (pruning, pruning_page):
        monkeypatch.setattr(module, "SHARES", (0.5,))
    path = tmp_path / "pruning.json"
    pruning.PruningStudy(SHIPPED_MODEL, 2, path).measure_all()
    results = json.loads(path.read_text())
    points = results["points"]
    assert len(points) == 2 * (1 + 3)
    assert points["whole 1 dense"]["pairs"] == points["whole 1 dense"]["image_tokens"] == 1
    for name in pruning.PRUNERS:
        dense, sparse = (points[f"{name} 0.5 {way}"] for way in ("dense", "sparse"))
        assert 0.4 < dense["image_tokens"] < 0.6, "an image keeps at least one token"
        assert sparse["pairs"] < dense["pairs"] < 1
        assert sparse["pairs"] < points["whole 1 sparse"]["pairs"]

    again = pruning.PruningStudy(SHIPPED_MODEL, 2, path)
    monkeypatch.setattr(again, "model", None)
    again.measure_all()
    assert again.results == results
    with pytest.raises(ValueError, match=r"number of questions.* Name another --out"):
        pruning.PruningStudy(SHIPPED_MODEL, 3, path)
    assert json.loads(path.read_text()) == results
    pruning_page.write_page(results, tmp_path / "pruning.md", "pruning.svg")
    lines = (tmp_path / "pruning.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if "%" in line and "|" in line] == [
        "whole prompt",
        *pruning.PRUNERS,
    ]
    pruning_page.draw(results, tmp_path / "pruning.svg")
    assert (tmp_path / "pruning.svg").read_text().count("<path") > 6


def test_the_page_is_of_its_results(tmp_path):
    results = ROOT / "docs" / "results"
    pruning_page.write_page(json.loads((results / "pruning.json").read_text()), tmp_path / "p.md", "../pruning.svg")
    assert (tmp_path / "p.md").read_text() == (results / "pruning.md").read_text(), "run scripts/pruning_curve.py"
