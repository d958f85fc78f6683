"""How numbers are written: units, significant digits, the margin of a difference; what medians and bounds are of."""

from __future__ import annotations

import numpy as np
import pytest

from blindsight_cli.commands import bench
from blindsight_cli.output import span
from blindsight_cli.report import figures
from blindsight_cli.timing import median_pair
from shared_profiles import Category, Layout, SinkTemplate, category_mask


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
