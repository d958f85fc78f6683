"""The report opens with the measured curve, the chosen point marked."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from blindsight_cli.report import CurveRow, ReportData, budget_of, chosen_by, curve_from_profile, render
from blindsight_cli.report.curve import curve_picture
from budgets import tuned_profile
from shared_profiles.budget import retune, retune_by_thresholds
from shared_profiles.classifier import Thresholds
from test_cli_report import sample

ROWS = (
    CurveRow(1.0, 0.0, 1.0, None, 40, None, chosen=False),
    CurveRow(0.6, 0.0005, 0.99, 0.953, 40, (5, 6), chosen=True),
    CurveRow(0.45, 0.021, 0.9, None, None, (6, 6), chosen=False),
)


def report(**changes: object) -> ReportData:
    return replace(sample(), **{"curve": ROWS, "budget": 0.01, "chosen_by": "By <budget>.", **changes})


def test_the_page_opens_with_the_curve() -> None:
    page = render(report())
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections[:2] == ["curve", "heads"]
    assert page.count("By &lt;budget&gt;.") == 1, "said once, where the curve is"
    section = page[page.index('id="curve"') : page.index('id="heads"')]
    assert len(re.findall(r'class="point', section)) == 3 and len(re.findall(r'class="point chosen"', section)) == 1
    assert "budget 0.010" in section and "The 3 measured points" in section
    for cell in ("60.0%", "0.00050", "99.0%", "95.3%", "5-6", "6", "chosen", "–"):
        assert f">{cell}</td>" in section
    without = render(report(curve=(), budget=None))
    assert 'id="curve"' not in without and "By &lt;budget&gt;." in without


def test_points_stand_where_they_belong() -> None:
    drawn = str(curve_picture(ROWS, 0.01))
    boxes = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', drawn)
    x, y = (np.array([float(box[i]) + float(box[2]) / 2 for box in boxes]) for i in (0, 1))
    assert (np.diff(x) > 0).all(), "from few pairs to all"
    assert (np.diff(y) > 0).all(), "more pairs, less divergence, further down"
    line = float(re.search(r'd="M\d+ ([\d.]+)H\d+" class="budget"', drawn)[1])
    assert y[0] < line < y[1] < y[2]
    decades = np.log10([0.021 / 0.01, 0.01 / 0.0005])
    np.testing.assert_allclose((line - y[0]) / (y[1] - line), decades[0] / decades[1], rtol=0.02)
    np.testing.assert_allclose((x[1] - x[0]) / (x[2] - x[0]), 0.15 / 0.55, rtol=0.01)
    assert str(curve_picture(ROWS[:1], None)).count("<rect") == 1


def test_a_curve_travels_as_json() -> None:
    data = report()
    assert ReportData.from_json(data.to_json()) == data
    document = data.to_json()
    del document["curve"], document["budget"]  # written before there was one
    assert ReportData.from_json(document).curve == ()
    document["curve"] = [{**ROWS[0].to_json(), "chosen": 1}]
    with pytest.raises(ValueError, match=r"curve\[0\]: chosen must be true or false"):
        ReportData.from_json(document)
    with pytest.raises(ValueError, match=r"kept must lie in \[0.0, 1.0\]"):
        CurveRow(1.5, 0.0, None, None, None, None, chosen=False)
    with pytest.raises(ValueError, match="kl must be at least 0"):
        CurveRow(0.5, -0.1, None, None, None, None, chosen=False)


def test_what_a_profile_says() -> None:
    profile = tuned_profile()
    rows = curve_from_profile(profile)
    assert [row.kl for row in rows] == [point.kl for point in profile.curve]
    assert [row.kl for row in rows if row.chosen] == [profile.choice["kl"]]
    assert budget_of(profile) == 2.0
    assert "one backward pass" in chosen_by(profile) and "3 held-out prompts" in chosen_by(profile)
    assert "Of them, 100.0% keep their next token (95% interval: at least 43.9%)." in chosen_by(profile)
    assert "No head can be sparse within the budget of 0 nats" in chosen_by(retune(profile, 0.0))
    by_mass = retune_by_thresholds(profile, Thresholds())
    assert budget_of(by_mass) is None and "thresholds on retained mass: gamma_sink 0.95" in chosen_by(by_mass)
    assert "held_out" in by_mass.choice and "held_out" not in chosen_by(by_mass)
    assert not any(row.chosen for row in curve_from_profile(by_mass))
    assert chosen_by(replace(profile, choice={"method": "manual"})) == "Categories were set by hand."
