"""The budget: the path is the lower hull of every head, and the search ends at its best measured point."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgets import Model, made_from, total, tuned_profile
from profile_strategies import fingerprint, plain_profile
from shared_profiles.budget import (
    EVALUATIONS,
    Budget,
    budget_of,
    chosen_point,
    rankings_for,
    retune,
    retune_by_thresholds,
    tune,
    verify,
)
from shared_profiles.categories import Category
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.path import Path, kept_pairs, path_of
from shared_profiles.profile import CurvePoint, Profile
from shared_profiles.profile_parts import heads_of

sizes = st.tuples(st.integers(1, 5), st.integers(1, 6))


@st.composite
def costs(draw) -> tuple[np.ndarray, np.ndarray]:
    """Harm `[L, H, 4]` and pairs `[4, L]`, with ties and zeros."""
    n_layers, n_heads = draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    coarse = draw(st.booleans())
    harm = rng.integers(0, 4, (n_layers, n_heads, 4)) / 4 if coarse else rng.random((n_layers, n_heads, 4))
    harm[..., 0] = 0
    pairs = rng.integers(1, 5 if coarse else 1000, (4, n_layers)).astype(float)
    pairs[0] = pairs.max(axis=0) + rng.integers(0, 2, n_layers)
    return harm, pairs


# --- the path


@given(costs())
@settings(max_examples=60)
def test_every_step_is_the_best_choice_at_some_price(given_costs):
    """Found again by brute force, head by head: no choice has less harm + price * pairs."""
    harm, pairs = given_costs
    path = Path(harm, pairs)
    slopes = [move.slope for move in path.moves]
    assert slopes == sorted(slopes)
    for step in range(len(path) + 1):
        categories = path.categories(step)
        # Any price between this step's slope and the next; where they are equal, that price.
        below = slopes[step - 1] if step else 0.0
        price = (below + slopes[step]) / 2 if step < len(path) else below
        value = harm + price * pairs.T[:, None]
        best = value.min(axis=-1).sum()
        assert total(value, categories) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(costs())
@settings(max_examples=60)
def test_a_path_goes_from_dense_to_the_cheapest_and_always_down(given_costs):
    harm, pairs = given_costs
    path = Path(harm, pairs)
    chosen = [path.categories(step) for step in range(len(path) + 1)]
    assert not chosen[0].any()
    cost = np.broadcast_to(pairs.T[:, None], harm.shape)
    assert total(cost, chosen[-1]) == pytest.approx(cost.min(axis=-1).sum())
    kept = [path.kept(categories) for categories in chosen]
    assert all(a > b for a, b in itertools.pairwise(kept)) and kept[0] == 1
    harms = [total(harm, categories) for categories in chosen]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(harms))
    assert len(path) <= 3 * harm[..., 0].size


def test_windows_make_layers_differ():
    """A layer whose window hides other images anyway has nothing to save, and is never touched."""
    harm = np.tile([0.0, 0.1, 0.2, 0.3], (2, 1, 1))
    path = Path(harm, np.array([[10, 100], [10, 20], [10, 10], [10, 30]]))
    assert {move.layer for move in path.moves} == {1}
    assert path.kept(path.categories(len(path))) == pytest.approx(20 / 110)


def test_between_equals_a_head_gets_what_sees_more():
    """Where images are no longer than a local block, `SINK` computes what `INTRA_IMAGE_SINK` does."""
    path = Path(np.array([[[0.0, 0.1, 0.3, 0.1]]]), np.array([[9.0], [2.0], [2.0], [2.0]]))
    assert path.categories(len(path)) == Category.INTRA_IMAGE_SINK


def test_heads_that_are_alike_give_way_one_by_one():
    """A budget finds the nearest choice, however sums of 0.3 are rounded; a head takes a straight line in one move."""
    path = Path(np.tile([0.0, 0.6, 0.0, 0.3], (1, 8, 1)), np.array([[7.0], [1.0], [7.0], [4.0]]))
    sparse = [np.count_nonzero(path.categories(step) == Category.SINK) for step in range(len(path) + 1)]
    assert sparse == list(range(9))


@pytest.mark.parametrize(
    ("harm", "pairs", "message"),
    [
        (np.zeros((1, 1, 3)), np.ones((4, 1)), r"shape \(L, H, 4\)"),
        (np.zeros((1, 1, 4)), np.ones((4, 2)), r"pairs \(4, L\)"),
        (np.array([[[0.0, 0, 0, 0], [0.1, 0, 0, 0]]]), np.ones((4, 1)), "harm of DENSE 0"),
        (np.array([[[0, -1, 0, 0]]]), np.ones((4, 1)), "at least 0"),
        (np.array([[[0, np.nan, 0, 0]]]), np.ones((4, 1)), "finite"),
    ],
)
def test_a_path_refuses(harm, pairs, message):
    with pytest.raises(ValueError, match=message):
        Path(harm, pairs)


# --- the search


@given(costs(), st.floats(0, 1))
@settings(max_examples=60)
def test_an_additive_divergence_gives_the_best_point_of_the_path(given_costs, share):
    harm, pairs = given_costs
    profile = made_from(harm, pairs)
    path = path_of(profile.summary, "gradient")
    stored = profile.summary.harm_of("gradient")
    kls = [CurvePoint(1, total(stored, path.categories(step))).kl for step in range(len(path) + 1)]
    budget = Budget(share * kls[-1])
    model = Model(lambda categories: total(stored, categories))
    tuned = tune(profile, budget, model)
    best = max(step for step, kl in enumerate(kls) if kl <= budget.kl)
    assert kept_pairs(tuned.categories, path.pairs) == pytest.approx(path.kept(path.categories(best)))
    assert len(model.asked) <= EVALUATIONS and len(set(model.asked)) == len(model.asked)
    assert tuned.choice["kl"] <= budget.kl
    # Every point that was measured is there, and the dense model.
    assert {point.heads for point in tuned.curve} == {*model.asked, heads_of(path.categories(0))}
    assert chosen_point(tuned).kl == tuned.choice["kl"]
    kept = [point.kept for point in tuned.curve]
    assert kept == sorted(kept, reverse=True)


@given(costs(), st.floats(0, 0.3), st.integers(0, 2**32))
@settings(max_examples=60)
def test_a_divergence_that_jumps_about_still_ends_within_the_budget(given_costs, allowed, seed):
    profile = made_from(*given_costs)

    def noisy(categories: np.ndarray) -> float:
        return float(np.random.default_rng([seed, *categories.flat]).random()) if categories.any() else 0.0

    model = Model(noisy)
    tuned = tune(profile, Budget(allowed), model)
    assert len(model.asked) <= EVALUATIONS
    if tuned.categories.any():
        assert heads_of(tuned.categories) in model.asked
        assert noisy(tuned.categories) <= Budget(allowed).kl * (1 + 1e-5)
        assert tuned.choice["reached"] is True
    else:
        assert tuned.choice["reached"] is False and tuned.choice["kl"] == 0
    within = [point.kept for point in tuned.curve if point.kl <= Budget(allowed).kl]
    assert chosen_point(tuned).kept == min(within)


def test_a_long_path_stops_at_twelve():
    rng = np.random.default_rng(0)
    harm = np.sort(rng.random((80, 40, 4)), axis=-1)[..., [0, 3, 2, 1]]  # 3,200 heads, about 6,000 moves
    harm[..., 0] = 0
    profile = made_from(harm, np.repeat([[100.0], [1.0], [20.0], [50.0]], 80, axis=1))
    stored = profile.summary.harm_of("gradient")
    model = Model(lambda categories: total(stored, categories))
    assert len(path_of(profile.summary, "gradient")) > 2**EVALUATIONS
    tuned = tune(profile, Budget(500.0), model)
    assert len(model.asked) == EVALUATIONS
    assert 490 < tuned.choice["kl"] <= 500


@pytest.mark.parametrize("kl", [0.0, 1e-9])
def test_a_budget_that_buys_nothing_is_marked(kl):
    profile = made_from(np.tile([0.0, 0.5, 0.5, 0.5], (2, 3, 1)), np.repeat([[9.0], [1.0], [2.0], [3.0]], 2, axis=1))
    tuned = tune(profile, Budget(kl), Model(lambda categories: 0.5 * (categories > 0).sum()))
    assert not tuned.categories.any()
    assert tuned.choice["reached"] is False and tuned.choice["budget"] == kl
    assert chosen_point(tuned) == CurvePoint(1.0, 0.0, None, 1.0, 3, ("DDD", "DDD"))


def test_a_budget_may_be_a_number_of_numpy():
    assert Budget(np.float32(0.1)) == Budget(np.float64(0.1)) == Budget(0.1)
    assert Budget(np.int64(1)) == Budget(1.0)


@pytest.mark.parametrize("kl", [-1e-9, math.nan, math.inf, "0.1", True])
def test_a_budget_refuses(kl):
    with pytest.raises(ValueError, match=r"the budget must be a finite number of nats.* Try 0\.01"):
        Budget(kl)
    with pytest.raises(ValueError, match=r"the ranking must be one of gradient, residual, error\. Got 'luck'"):
        Budget(0.1, "luck")


def test_what_a_calibration_is_asked_for():
    """By the options of `calibrate`: a budget unless there are thresholds, and the harm that it takes."""
    mine = Budget(0.2, "residual")
    assert [budget_of(x, None, 8) for x in (None, 0.2, mine)] == [Budget(), Budget(0.2), mine]
    assert budget_of(None, Thresholds(quantile=0.25), 8) is None
    with pytest.raises(ValueError, match="by a budget or by thresholds"):
        budget_of(0.2, Thresholds(), 8)
    with pytest.raises(ValueError, match=r"multiple of 0\.05 in \[0, 1\]\. Got 0\.33"):
        budget_of(None, Thresholds(quantile=0.33), 8)
    assert [rankings_for(x) for x in (None, Budget(ranking="error"), mine)] == [(), (), ("residual",)]
    assert rankings_for(Budget()) == ("gradient", "residual")


def test_a_search_refuses():
    profile = made_from(np.tile([0.0, 0.5, 0.5, 0.5], (2, 3, 1)), np.repeat([[9.0], [1.0], [2.0], [3.0]], 2, axis=1))
    with pytest.raises(ValueError, match=r"that was measured: gradient, error\. Got 'residual'"):
        tune(profile, Budget(0.1, "residual"), Model(lambda _: 0.0))
    with pytest.raises(ValueError, match=r"must be a finite number\. Got nan over 3 prompts"):
        tune(profile, Budget(0.1), Model(lambda _: math.nan))
    with pytest.raises(ValueError, match="Got nan over 0 prompts"):
        tune(profile, Budget(0.1), Model(lambda _: 0.0, n=0))
    by_hand = Profile.uniform(Category.DENSE, fingerprint())
    with pytest.raises(ValueError, match=r"must hold statistics.*Run calibrate"):
        tune(by_hand, Budget(0.1), Model(lambda _: 0.0))
    with pytest.raises(ValueError, match="must hold statistics"):
        retune_by_thresholds(by_hand, Thresholds())


# --- another budget, later


def test_a_profile_is_retuned_from_its_curve():
    tuned = Profile.from_json(tuned_profile().to_json())
    assert tuned == tuned_profile()
    for point in tuned.curve:
        again = retune(tuned, point.kl)
        np.testing.assert_array_equal(again.categories, point.categories)
        assert again.choice == tuned.choice | {
            "budget": point.kl,
            "kl": point.kl,
            "reached": bool(point.categories.any()),
        }
        assert again.curve == tuned.curve and again.summary == tuned.summary
    assert retune(tuned, 1e9).categories.all()
    between = sorted(point.kl for point in tuned.curve)
    assert retune(tuned, (between[1] + between[2]) / 2).choice["kl"] == between[1]


def test_a_curve_without_categories_cannot_be_retuned():
    with pytest.raises(ValueError, match=r"must have a measured curve.*--verify CHECKPOINT PROMPTS"):
        retune(replace(plain_profile(), curve=(CurvePoint(0.5, 0.1),)), 0.2)
    lone = replace(plain_profile(), curve=(CurvePoint(0.5, 0.1, heads=("III", "III")),))
    with pytest.raises(ValueError, match=r"a point within the budget of 0\.05 nats. Its points go from 0\.1 on"):
        retune(lone, 0.05)
    assert (retune(lone, 0.1).categories == Category.INTRA_IMAGE).all()


def test_thresholds_choose_from_the_same_statistics_and_can_be_verified():
    tuned, thresholds = tuned_profile(), Thresholds(gamma_dense=0.3, gamma_intra=0.3, gamma_sink=0.3)
    by_mass = retune_by_thresholds(tuned, thresholds)
    np.testing.assert_array_equal(by_mass.categories, classify(tuned.summary, thresholds))
    measured_on = {"held_out": tuned.choice["held_out"]}
    assert by_mass.choice == thresholds.to_choice() | measured_on and by_mass.curve == tuned.curve
    assert by_mass.categories.any() and chosen_point(by_mass) is None
    measured = verify(by_mass, Model(lambda _: 0.125, n=7), **measured_on)
    point = chosen_point(measured)
    assert (point.kl, point.n_prompts, point.agreement) == (0.125, 7, 1.0)
    assert len(measured.curve) == len(tuned.curve) + 1
    assert measured.choice == by_mass.choice
    kept = [point.kept for point in measured.curve]
    assert kept == sorted(kept, reverse=True)
    again = verify(measured, Model(lambda _: 0.25), **measured_on)
    assert again.curve != measured.curve and len(again.curve) == len(measured.curve)


def test_a_curve_is_of_one_set_of_prompts():
    """Easy prompts and hard ones: a budget is never served from points of both."""
    tuned = retune_by_thresholds(tuned_profile(), Thresholds(gamma_dense=0.3, gamma_intra=0.3, gamma_sink=0.3))
    for known in (tuned, replace(tuned, choice=Thresholds().to_choice())):
        verified = verify(known, Model(lambda _: 0.5), held_out="sha256:others")
        assert verified.curve == (chosen_point(verified),) and verified.choice["held_out"] == "sha256:others"
        assert retune(verified, 0.5).choice["held_out"] == "sha256:others"
        with pytest.raises(ValueError, match=r"Its points go from 0\.5 on"):
            retune(verified, 0.25)
