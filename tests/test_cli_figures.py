"""How the report writes numbers: units, significant digits, and the margin of a difference."""

from __future__ import annotations

import pytest

from blindsight_cli.output import span
from blindsight_cli.report import figures


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
