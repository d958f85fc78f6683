"""How numbers are written: units, significant digits, margins; what bars, masks, medians and bounds show."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from blindsight_cli.commands import bench
from blindsight_cli.main import app
from blindsight_cli.output import results, span
from blindsight_cli.report import FlopsPoint, MaskExample, Segment, figures
from blindsight_cli.report.charts import flops_bars, mask_picture, share_bars
from blindsight_cli.timing import median_pair
from shared_profiles import Category, Layout, SinkTemplate, category_mask, count_pairs


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (figures.percent, 0.9233, "92.3%"),
        (figures.percent, 0.00031, "0.031%"),
        (figures.percent, 1.0, "100.0%"),
        (figures.points, -0.005, "\N{MINUS SIGN}0.5"),
        (figures.points, -0.0001, "0.0"),
        (figures.seconds, 0.0123, "12.3 ms"),
        (figures.seconds, 0.9999, "1.00 s"),
        (figures.seconds, 2.5e-6, "2.50 µs"),
        (figures.seconds, 600, "10.0 min"),
        (figures.ratio, 2.7, "2.70×"),
        (figures.ratio, 45.21, "45.2×"),
        (figures.ratio, 123.4, "123×"),
        (figures.ratio, 9.96, "9.96×"),
        (figures.nats, 0.0027, "0.0027"),
        (figures.nats, 3.2e-7, "3.2·10⁻⁷"),
        (figures.nats, 0.0, "0"),
        (figures.flops, 1.254e12, "1.25 TFLOP"),
        (figures.flops, 999.9e9, "1.00 TFLOP"),
        (span, (5, 6), "5-6"),
        (span, (6, 6), "6"),
        (span, None, ""),
        (figures.parameters, 7_620_000_000, "7.62 B"),
    ],
)
def test_numbers_are_written_with_the_digits_they_have(write, value, text: str) -> None:
    assert write(value) == text


def test_margin_shrinks_with_questions_and_never_vanishes() -> None:
    assert figures.margin(0.98, 1200) == pytest.approx(1.96 * (25 / 1202 / 1200) ** 0.5)
    assert figures.margin(1.0, 10) > 0.15


def test_medians_leave_the_first_turn_out() -> None:
    """Of each side on its own, measured in turns."""
    turns: list[str] = []

    def side(name: str, *seconds: int):
        left = iter(seconds)
        return lambda: turns.append(name) or next(left)

    assert median_pair(side("dense", 99, 7, 1, 3), side("sparse", 99, 2, 9, 5), repeats=3) == (3, 5)
    assert turns == ["dense", "sparse"] * 4


def test_bench_states_the_bound_of_the_pairs(monkeypatch) -> None:
    """Of two images with their delimiters, no text: kept pairs by the masks."""
    monkeypatch.setattr(bench, "_CASES", ((2, 12),))
    (row,) = bench.bench_attention(1)
    layout = Layout(24, 0, 24, np.array([[0, 1, 11, 12], [12, 13, 23, 24]]))
    ways = Category.DENSE, Category.INTRA_IMAGE_SINK
    dense, kept = (category_mask(layout, category, SinkTemplate()).sum() for category in ways)
    assert row["bound"] == pytest.approx(dense / kept, rel=1e-12)
    assert row["ratio"] == pytest.approx(row["dense_s"] / row["sparse_s"], rel=1e-12)
    assert row["share_of_bound"] == pytest.approx(row["ratio"] / row["bound"], rel=1e-12)
    assert bench.even_layout(2, 10, text=2).images.tolist() == [[2, 3, 11, 12], [14, 15, 23, 24]]


@pytest.mark.parametrize("width", [None, 40])
def test_tables_of_bench_are_cut_nowhere(width, monkeypatch, capsys) -> None:
    """Not in a pipe whose reader asked for colours, either: rich takes a dumb terminal to be 80 wide."""
    texts = {"case": "16 images x 512 tokens, 8 heads, d=128", "denominator": "scaled_dot_product_attention(causal)"}
    figures = {"dense_s": 1.044, "sparse_s": 0.186, "ratio": 5.6, "bound": 13.6, "share_of_bound": 0.41}
    for name, value in {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    console = results() if width is None else Console(width=width, height=9)
    console.print(bench._table("attention", [texts | figures]))
    shown = capsys.readouterr().out
    assert "…" not in shown and (width or all(text in shown for text in texts.values()))


def test_bench_tells_its_figures_where_the_disk_is_full(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {"plan": lambda repeats: [{"case": "x", "plan_ms": 1.5}]})
    out = tmp_path / "bench.json"
    command = ["bench", "plan", "--json", "--out", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
    before = out.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and str(out) in done.stderr
    assert json.loads(done.stdout)["rows"][0]["plan_ms"] == 1.5 and out.read_bytes() == before


def test_bars_are_as_high_as_their_axis_says() -> None:
    """Dense totals in FLOPs, four for a pair and dimension, and in percent; parts of what is kept above one another."""
    points = FlopsPoint(2, 10, 10, 20, 30, 10, 5, 30), FlopsPoint(4, 20, 40, 80, 60, 40, 10, 60)
    for drawn, dense in ((flops_bars(points, 16), [3.84, 11.52]), (share_bars(points), [100, 100])):
        ticks = re.findall(r'y="([\d.]+)" text-anchor="end"[^>]*>([\d.]+)', str(drawn))
        rules = re.findall(r'd="M44.0 ([\d.]+)H', str(drawn))
        assert [y for y, _ in ticks] == rules
        (floor, zero), (top, most) = ((float(y), float(value)) for y, value in (ticks[0], ticks[-1]))
        assert zero == 0
        bars = re.findall(r'<rect x="[\d.]+" y="([\d.]+)" width="30" height="([\d.]+)" class="([^"]+)"', str(drawn))
        y, height = np.array([bar[:2] for bar in bars], float).T
        shown = most * (floor - y) / (floor - top)  # each bar's upper end on the axis
        assert shown[[0, 7]] == pytest.approx(dense, rel=1e-3)
        assert [bar[2] for bar in bars[4:7]] == ["p-text kept", "p-intra kept", "p-inter kept"]
        assert shown[4:7] == pytest.approx(np.array([30, 40, 45]) / 60 * dense[0], rel=1e-3)
        assert height[4:7] == pytest.approx(np.array([30, 10, 5]) / 60 * dense[0] / most * (floor - top), rel=2e-3)
    assert "(kFLOP)" in str(flops_bars(points, 16))


@pytest.mark.parametrize("apart", [True, False], ids=["pictures", "film"])
def test_colours_of_a_mask_are_its_counted_pairs(apart: bool) -> None:
    """Whose a delimiter is, between two pictures that touch and around a film without any."""
    lengths = [2, 1, 4, 1, 1, 4, 1, 2] if apart else [2, 1, 4, 4, 1, 2]
    short = {1: "delimiter", 2: "text", 4: "image"}
    images = [[2, 3, 7, 8], [8, 9, 13, 14]] if apart else [[2, 3, 7, 7], [7, 7, 11, 12]]
    layout, n = Layout(sum(lengths), 0, sum(lengths), np.array(images)), sum(lengths)
    for category in Category:
        rows = category_mask(layout, category, SinkTemplate()).astype(int)
        masks = {category.name: tuple("".join(map(str, row)) for row in rows.tolist())}
        drawn = str(mask_picture(MaskExample(tuple(Segment(short[k], k) for k in lengths), masks), category.name))
        areas = dict.fromkeys(("text", "intra", "inter"), 0.0)
        for path, part in re.findall(r' d="([^"]*)" class="p-(\w+)"', drawn):
            areas[part] += sum(int(length) for length in re.findall(r"h(\d+)v", path)) / (460 // n)
        pairs = count_pairs(layout, category, SinkTemplate())
        assert areas == {"text": pairs.text_rows + pairs.image_text, "intra": pairs.intra, "inter": pairs.inter}
