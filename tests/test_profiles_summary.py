"""Summaries: rounded, read-only, and refused where their numbers cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from profile_strategies import summary_of
from shared_profiles.categories import SPARSE, Category
from shared_profiles.summary import Summary

L, H = 2, 3


def test_a_summary_holds_six_digits_read_only():
    summary = summary_of(np.random.default_rng(0), L, H, (0.5,))
    value = float(summary.mass_mean[Category.SINK][0, 0])
    assert value == float(f"{value:.6g}")
    with pytest.raises(ValueError, match="read-only"):
        summary.mass[Category.SINK][0] = 0
    assert summary.shape == (L, H)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_prompts=0), "n_prompts must be a positive integer"),
        (dict(levels=()), "levels must be one or more ascending numbers"),
        (dict(levels=(0.5, 0.5)), "levels must be one or more ascending numbers"),
        (dict(levels=(0.5, 1.5)), "levels must be one or more ascending numbers"),
        (dict(levels=(np.nan,)), "levels must be one or more ascending numbers"),
        (dict(levels=(0.5,)), r"mass\[SINK\] must have shape \(2, 3, 1\). Got \(2, 3, 2\)"),
        (dict(kept={Category.SINK: 0.5}), "kept must have exactly the categories SINK, INTRA_IMAGE"),
        (dict(kept=dict.fromkeys(SPARSE, 1.5)), r"kept\[SINK\] must be in \[0, 1\]. Got 1.5"),
        (dict(pairs=dict.fromkeys(SPARSE, np.ones(L))), "pairs must have all categories"),
        (dict(pairs=dict.fromkeys(Category, np.zeros(L))), r"pairs\[DENSE\] must be more than 0"),
        (dict(pairs={c: np.full(L, 1.0 + c) for c in Category}), r"pairs\[DENSE\] must be .* at least those of every"),
        (dict(pairs=dict.fromkeys(Category, np.array([1.0, -1.0]))), r"pairs\[DENSE\] must be .* Got -1 at layer 1\."),
        (dict(harm={"luck": {}}), "harm may have the rankings gradient, residual. Got luck"),
        (dict(harm={"gradient": {}}), r"harm\[gradient\] must have exactly the categories SINK"),
        (
            dict(harm={"gradient": dict.fromkeys(SPARSE, np.full((L, H), -1.0))}),
            r"harm\[gradient\]\[SINK\] must be finite and at least 0",
        ),
        (dict(mass_mean=dict.fromkeys(SPARSE, np.full((2, 3), 1.1))), r"mass_mean\[SINK\] must be in \[0, 1\]"),
        (dict(mass=dict.fromkeys(SPARSE, np.zeros(2))), r"mass must have shape \(L, H, Q\)"),
        (dict(mass=dict.fromkeys(SPARSE, np.full((2, 3, 2), [0.9, 0.8]))), r"not fall .* Got 0.9, 0.8 at layer 0, he"),
        (dict(error_mean=dict.fromkeys(SPARSE, np.full((2, 3), -1.0))), r"error_mean\[SINK\] must be finite and at l"),
        (dict(error=dict.fromkeys(SPARSE, np.full((2, 3, 2), np.inf))), r"error\[SINK\] must be finite .* Got inf"),
    ],
)
def test_a_summary_refuses(changes, message):
    good = summary_of(np.random.default_rng(0), L, H, (0.0, 0.5))
    fields = {name: getattr(good, name) for name in Summary.__dataclass_fields__}
    assert Summary(**fields) == good
    with pytest.raises(ValueError, match=message):
        Summary(**{**fields, **changes})
