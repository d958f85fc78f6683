"""Budgets for models whose heads are split over processes: what the busiest process computes is what counts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgets import Model, made_from, total
from shared_profiles.budget import Budget, budget_of, chosen_point, processes_of, retune, retune_by_thresholds, tune
from shared_profiles.categories import Category
from shared_profiles.classifier import Thresholds
from shared_profiles.path import Path, kept_pairs, path_of
from shared_profiles.profile import CurvePoint, Profile
from shared_profiles.profile_parts import heads_of


def busiest(pairs: np.ndarray, categories: np.ndarray, processes: int) -> float:
    """Pairs that the busiest process computes, layer by layer, counted head by head."""
    n_layers, n_heads = categories.shape
    each, found = n_heads // processes, 0.0
    for layer in range(n_layers):
        parts = [categories[layer, p * each : (p + 1) * each] for p in range(processes)]
        found += max(sum(float(pairs[category, layer]) for category in part) for part in parts)
    return found


@st.composite
def split_costs(draw) -> tuple[np.ndarray, np.ndarray, int]:
    """Harm `[L, H, 4]`, pairs `[4, L]` and a number of processes that divides the heads; with ties and zeros."""
    n_layers, processes, each = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (n_layers, processes * each, 4)
    coarse = draw(st.booleans())
    harm = rng.integers(0, 4, shape) / 4 if coarse else rng.lognormal(0, 3, shape)
    harm[..., 0] = 0
    pairs = rng.integers(1, 5 if coarse else 1000, (4, n_layers)).astype(float)
    pairs[0] = pairs.max(axis=0) + rng.integers(0, 2, n_layers)
    return harm, pairs, processes


def at_price(path: Path, price: float) -> np.ndarray:
    return path.categories(sum(move.slope <= price for move in path.moves))


@given(split_costs())
@settings(max_examples=60)
def test_a_path_goes_down_for_the_busiest(given_costs):
    harm, pairs, processes = given_costs
    path = Path(harm, pairs, processes)
    chosen = [path.categories(step) for step in range(len(path) + 1)]
    assert not chosen[0].any() and path.kept(chosen[0]) == 1
    assert [move.slope for move in path.moves] == sorted(move.slope for move in path.moves)
    costs = [busiest(pairs, categories, processes) for categories in chosen]
    assert all(a > b for a, b in itertools.pairwise(costs))
    assert [path.kept(categories) for categories in chosen] == pytest.approx([cost / costs[0] for cost in costs])
    cheapest = np.broadcast_to(pairs.min(axis=0)[:, None], harm.shape[:2])
    assert costs[-1] == pytest.approx(cheapest[:, : harm.shape[1] // processes].sum())


@given(split_costs())
@settings(max_examples=60)
def test_at_every_price_it_beats_the_path_that_knows_no_processes(given_costs):
    harm, pairs, processes = given_costs
    path, plain = Path(harm, pairs, processes), Path(harm, pairs)
    others = [plain.categories(step) for step in range(len(plain) + 1)]
    for price in {0.0, *(move.slope * factor for move in path.moves for factor in (1.0, 1.001, 1e3))}:
        mine, *theirs = (
            total(harm, choice) + price * busiest(pairs, choice, processes)
            for choice in (at_price(path, price), *others)
        )
        assert mine <= min(theirs) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("processes", [1, 2])
def test_choices_that_save_almost_all_are_told_apart(processes):
    """What they save is the same number in floating point; what they keep is not."""
    harm = np.broadcast_to(np.array([0.0, 0.3, 0.2, 0.1]), (1, 4, 4))
    path = Path(harm, np.array([[1e17], [1.0], [2.0], [3.0]]), processes)
    assert all(np.isfinite(move.slope) for move in path.moves)
    assert (path.categories(len(path)) == Category.SINK).all()


@given(st.integers(0, 2**32), st.sampled_from([(4, 2), (4, 4), (6, 3), (6, 2), (5, 1)]), st.floats(0.001, 10))
@settings(max_examples=40)
def test_with_one_way_to_be_sparse_it_is_the_best_of_all_choices(seed, split, price):
    """By brute force: every subset of a layer's heads made sparse."""
    n_heads, processes = split
    harm = np.zeros((1, n_heads, 4))
    harm[..., 1:] = np.random.default_rng(seed).lognormal(0, 2, (1, n_heads, 1))
    pairs = np.array([[10.0], [1.0], [1.0], [1.0]])
    choices = [np.array([choice]) * Category.INTRA_IMAGE_SINK for choice in itertools.product((0, 1), repeat=n_heads)]
    best = min(total(harm, choice) + price * busiest(pairs, choice, processes) for choice in choices)
    mine = at_price(Path(harm, pairs, processes), price)
    assert total(harm, mine) + price * busiest(pairs, mine, processes) == pytest.approx(best)


def test_a_head_waits_for_those_beside_it():
    """Two processes of two heads. The harmless pair is in one of them: it saves nothing before the other gives way."""
    harm = np.zeros((1, 4, 4))
    harm[0, :, 1:] = np.array([0.001, 0.002, 0.5, 9.0])[:, None]
    pairs = np.array([[10.0], [2.0], [2.0], [2.0]])
    steps = [Path(harm, pairs, 2).categories(step)[0] != Category.DENSE for step in range(3)]
    np.testing.assert_array_equal(steps, [[False] * 4, [True, False, True, False], [True] * 4])
    alone = [Path(harm, pairs).categories(step)[0] != Category.DENSE for step in range(3)]
    np.testing.assert_array_equal(alone[2], [True, True, False, False])


@pytest.fixture
def profile() -> Profile:
    rng = np.random.default_rng(3)
    harm = rng.lognormal(0, 2, (3, 8, 4))
    harm[..., 0] = 0
    return made_from(harm, np.repeat([[90.0], [10.0], [20.0], [30.0]], 3, axis=1))


def test_a_search_says_how_many_processes_it_was_for(profile):
    stored = profile.summary.harm_of("gradient")
    model = Model(lambda categories: total(stored, categories))
    pairs = path_of(profile.summary, "gradient").pairs
    shares = {}
    for processes in (1, 4):
        tuned = tune(profile, Budget(2.0, processes=processes), model)
        assert processes_of(tuned) == processes and chosen_point(tuned) is not None
        assert chosen_point(tuned).kept == pytest.approx(kept_pairs(tuned.categories, pairs), rel=1e-5)
        shares[processes] = busiest(pairs, tuned.categories, 4) / busiest(pairs, tuned.categories * 0, 4)
        if processes == 4:
            assert tuned.choice["busiest"] == pytest.approx(shares[4], rel=1e-5)
            by_mass = retune_by_thresholds(tuned, Thresholds())
            share = busiest(pairs, by_mass.categories, 4) / busiest(pairs, by_mass.categories * 0, 4)
            assert (by_mass.choice["processes"], by_mass.choice["busiest"]) == (4, pytest.approx(share, rel=1e-5))
            assert retune(by_mass, 2.0).choice["processes"] == 4  # what was told stays when the way of choosing changes
            again = retune(tuned, 2.0)
            assert (again.choice, heads_of(again.categories)) == (tuned.choice, heads_of(tuned.categories))
            assert Profile.from_json(tuned.to_json()) == tuned
        else:
            assert not {"processes", "busiest"} & set(tuned.choice)
    assert shares[4] < 0.9 * shares[1]


def test_a_stored_point_is_chosen_by_the_busiest(profile):
    """Of two measured points one computes less in all, the other less in its busiest process."""
    uneven = ("DDSSSSSS", "SSSSSSSS", "SSSSSSSS")
    even = ("DSDSDSDS", "SSSSSSSS", "SSSSSSSS")
    kept = {heads: kept_pairs(CurvePoint(0.5, 0.0, heads=heads).categories, np.array([[90.0] * 3] + [[10.0] * 3] * 3))
            for heads in (uneven, even)}  # fmt: skip
    curve = tuple(CurvePoint(kept[heads], 0.1, agreement=1.0, n_prompts=3, heads=heads) for heads in (uneven, even))
    measured = replace(profile, curve=curve, choice={"method": "manual"})
    assert heads_of(retune(measured, 1.0).categories) == uneven
    for_four = retune(replace(measured, choice={"method": "manual", "processes": 4}), 1.0)
    assert heads_of(for_four.categories) == even and for_four.choice["processes"] == 4
    for processes, message in (("4", "processes must be an integer"), (3, "must divide the query heads")):
        with pytest.raises(ValueError, match=message):
            retune(replace(measured, choice={"method": "manual", "processes": processes}), 1.0)


def test_heads_that_do_not_come_out_even_are_refused(profile):
    message = "number of processes must divide the query heads of a layer. Got 3 for 8 heads"
    with pytest.raises(ValueError, match=message):
        tune(profile, Budget(1.0, processes=3), Model(lambda _: 0.0))
    with pytest.raises(ValueError, match=message):
        budget_of(Budget(processes=3), None, 8)
    assert budget_of(Budget(processes=4), None, 8) == Budget(processes=4)
    for processes in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="processes must be an integer of at least 1"):
            Budget(processes=processes)
