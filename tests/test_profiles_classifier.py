"""The threshold classifier: the cheapest passing category, per layer and quantile; stricter is never cheaper."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profile_strategies import fingerprint, fractions, summaries
from shared_profiles.categories import SPARSE, Category
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.profile import Profile
from shared_profiles.summary import Summary
from shared_profiles.template import SinkTemplate

DENSE, SINK, INTRA, BOTH = Category
GAMMAS = ("gamma_sink", "gamma_intra", "gamma_dense")


def summary(sink, intra, both, *, kept=(0.1, 0.2, 0.3), levels=(0.5,)) -> Summary:
    """A summary of one head a layer: per category a list over layers of its quantiles, or of one number."""
    mass = {c: np.reshape(v, (len(v), 1, len(levels))) for c, v in zip(SPARSE, (sink, intra, both), strict=True)}
    means = {c: values[:, :, 0] for c, values in mass.items()}
    pairs = {c: np.ones(len(sink)) for c in Category}
    return Summary(9, levels, mass, means, mass, means, dict(zip(SPARSE, kept, strict=True)), pairs)


def chosen(summary: Summary, **thresholds: float) -> list[Category]:
    defaults = dict(gamma_sink=0.9, gamma_intra=0.9, gamma_dense=0.9)
    return [Category(c) for c in classify(summary, Thresholds(**{**defaults, **thresholds}))[:, 0]]


@pytest.mark.parametrize(
    ("sink", "intra", "both", "expected"),
    [
        (0.95, 0.95, 0.97, SINK),
        (0.20, 0.95, 0.97, INTRA),
        (0.20, 0.30, 0.97, BOTH),
        (0.20, 0.30, 0.40, DENSE),
        (0.90, 0.20, 0.95, SINK),  # exactly at the threshold passes
        (0.899999, 0.20, 0.90, BOTH),
    ],
)
def test_the_cheapest_passing_category(sink, intra, both, expected):
    assert chosen(summary([sink], [intra], [both])) == [expected]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ((0.3, 0.2, 0.4), INTRA),
        ((0.3, 0.2, 0.1), BOTH),
        ((0.2, 0.2, 0.2), BOTH),
        ((0.2, 0.2, 0.3), INTRA),
        ((0.1, 0.2, 0.1), BOTH),
    ],
)
def test_cheap_is_what_was_measured_and_ties_see_more(kept, expected):
    assert chosen(summary([1.0], [1.0], [1.0], kept=kept)) == [expected]


def test_a_head_below_gamma_dense_stays_dense():
    two = summary([0.5, 0.93], [0.93, 0.5], [0.94, 0.94])
    assert chosen(two, gamma_dense=0.94) == [INTRA, SINK]
    assert chosen(two, gamma_dense=0.95) == [DENSE, DENSE]


def test_each_gamma_has_its_category():
    one = summary([0.8], [0.8], [0.8])
    assert chosen(one, gamma_sink=0.7, gamma_dense=0.5) == [SINK]
    assert chosen(one, gamma_intra=0.7, gamma_dense=0.5) == [INTRA]
    assert chosen(one, gamma_dense=0.7) == [BOTH]


def test_alpha_is_linear_in_depth_and_capped_at_one():
    three = summary([0.8] * 3, [0.0] * 3, [1.0] * 3)
    assert chosen(three, gamma_sink=0.8, alpha_first=0.5, alpha_last=1.5) == [SINK, SINK, BOTH]
    assert chosen(three, gamma_sink=0.8, alpha_first=1.001, alpha_last=1.0) == [BOTH, BOTH, SINK]
    assert chosen(three, gamma_sink=0.8) == [SINK] * 3
    assert chosen(summary([1.0], [0.0], [1.0]), alpha_first=5, alpha_last=0) == [SINK]


def test_quantile_half_is_the_majority_and_zero_is_everyone():
    one = summary([[0.5, 0.92, 1.0]], [[0.0] * 3], [[0.9, 0.95, 1.0]], levels=(0.0, 0.5, 1.0))
    assert chosen(one) == [SINK]
    assert chosen(one, quantile=0.0) == [BOTH]
    with pytest.raises(ValueError, match=r"one of the stored levels \(0.0, 0.5, 1.0\). Got 0.25"):
        chosen(one, quantile=0.25)


def test_levels_of_twentieths_are_found_however_they_are_written():
    levels = tuple(i / 20 for i in range(21))
    one = summary([[1.0] * 21], [[1.0] * 21], [[1.0] * 21], levels=levels)
    assert all(one.level_index(0.05 * i) == i for i in range(21))


@given(
    summaries(),
    st.fixed_dictionaries(dict.fromkeys(GAMMAS, fractions)),
    st.fixed_dictionaries({"alpha_first": st.floats(0, 2), "alpha_last": st.floats(0, 2)}),
    st.sampled_from(GAMMAS),
    fractions,
)
@settings(max_examples=60)
def test_raising_a_gamma_never_makes_a_head_cheaper(summary, gammas, alphas, which, other):
    low, high = sorted((gammas[which], other))
    cost = np.array([1.0, *(summary.kept[c] for c in SPARSE)])  # by Category
    loose = classify(summary, Thresholds(**{**gammas, **alphas, which: low}))
    strict = classify(summary, Thresholds(**{**gammas, **alphas, which: high}))
    assert loose.dtype == np.int8 and loose.shape == summary.shape
    assert (cost[strict] >= cost[loose]).all()


@given(summaries(), st.fixed_dictionaries(dict.fromkeys(GAMMAS, fractions)))
@settings(max_examples=30)
def test_a_saved_choice_can_be_made_again(summary, gammas):
    thresholds = Thresholds(**gammas)
    categories = classify(summary, thresholds)
    profile = Profile(categories, SinkTemplate(), fingerprint(*summary.shape), summary, thresholds.to_choice())
    loaded = Profile.from_json(profile.to_json())
    again = Thresholds(**{name: loaded.choice[name] for name in asdict(thresholds)})
    np.testing.assert_array_equal(classify(loaded.summary, again), categories)


def test_thresholds_are_what_a_profile_stores():
    """Or a head that is just below one would pass when the choice is made again."""
    for gamma in (0.81234634, 0.812346):
        assert chosen(summary([0.812346], [0.0], [1.0]), gamma_sink=gamma) == [SINK]


def test_thresholds_may_be_numbers_of_numpy():
    given = Thresholds(gamma_sink=np.float32(0.8), alpha_last=np.int64(2), quantile=np.float16(0.25))
    assert given == Thresholds(gamma_sink=0.8, alpha_last=2.0, quantile=0.25)


@pytest.mark.parametrize("name", [*GAMMAS, "quantile"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.9", None, True])
def test_fractions_are_refused_outside_their_range(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 1\]. Got"):
        replace(Thresholds(), **{name: value})


@pytest.mark.parametrize("name", ["alpha_first", "alpha_last"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_alphas_are_refused_outside_their_range(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a number finite and at least 0. Got"):
        replace(Thresholds(), **{name: value})
