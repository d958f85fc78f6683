"""What is measured on held-out prompts: the divergence, and the group of prompts on which it is worst."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_profiles.measured import MOST_GROUPS, SMALLEST_GROUP, Measured, divergence, divergence_of_one, groups


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**32))
def test_divergence_is_that_of_the_definition(n, size, seed):
    rng = np.random.default_rng(seed)
    p, q = (rng.dirichlet(np.ones(size), n) for _ in range(2))
    kl, agree = divergence(np.log(p), np.log(q))
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(agree, p.argmax(axis=1) == q.argmax(axis=1))
    assert divergence(np.log(p), np.log(p))[0].max() == 0


def test_impossible_tokens_count_nothing():
    with np.errstate(divide="ignore"):
        dense = np.log(np.array([[0.5, 0.5, 0.0]]))
    assert divergence(dense, dense)[0][0] == 0
    assert divergence(dense, np.log([[0.25, 0.25, 0.5]]))[0][0] == pytest.approx(np.log(2))


def test_one_next_token_diverges_by_a_finite_number():
    with np.errstate(divide="ignore"):
        dense = np.log([0.5, 0.5, 0.0])
    assert divergence_of_one(dense, np.log([0.25, 0.25, 0.5])) == pytest.approx(np.log(2))
    assert divergence_of_one(dense, dense + 1e-17) == divergence_of_one(dense, dense + 1e-12) == 0
    for sparse in (np.full(3, np.nan), dense[::-1]):
        with pytest.raises(ValueError, match="must give finite probabilities"):
            divergence_of_one(dense, sparse)


counts_of_images = st.lists(st.integers(2, 40), min_size=1, max_size=200).map(np.array)


@given(counts_of_images)
def test_groups_part_the_prompts_by_their_number_of_images(n_images):
    found = groups(n_images)
    held = [((n_images >= least) & (n_images <= most)).sum() for least, most in found]
    assert sum(held) == len(n_images), "every prompt is in one of them"
    ends = [end for group in found for end in reversed(group)]
    assert ends == sorted(ends, reverse=True) and set(ends) <= set(n_images.tolist()), "from the most images down"
    assert len(found) <= MOST_GROUPS
    enough = max(SMALLEST_GROUP, len(n_images) / MOST_GROUPS)
    assert min(held) >= min(enough, len(n_images))
    # No group but the last, which takes what is left, could have done with fewer.
    for (least, _), size in list(zip(found, held, strict=True))[:-1]:
        assert size - (n_images == least).sum() < enough


def test_groups_of_a_few():
    assert groups(np.array([6] * 8 + [5] * 3 + [4] * 5 + [2] * 7)) == [(6, 6), (2, 5)]
    assert groups(np.array([2, 3, 4])) == [(2, 4)]
    assert groups(np.array([40] * 3)) == [(40, 40)]
    assert groups(np.arange(2, 202)) == [(182 - 20 * i, 201 - 20 * i) for i in range(10)]


@given(counts_of_images, st.integers(0, 2**32))
def test_the_worst_group_counts(n_images, seed):
    kl = np.random.default_rng(seed).random(len(n_images))
    worst, (least, most) = Measured(kl, kl > 0, n_images).worst()
    inside = (n_images >= least) & (n_images <= most)
    assert worst == pytest.approx(kl[inside].mean())
    assert worst >= kl.mean() * (1 - 1e-12), "never better than the mean over all"


def test_many_cheap_prompts_do_not_hide_the_dear_ones():
    n_images = np.repeat([2, 3, 6], [50, 40, 10])
    measured = Measured(np.where(n_images == 6, 0.02, 0.0), np.ones(100, dtype=bool), n_images)
    assert measured.kl.mean() == pytest.approx(0.002)
    assert measured.worst() == (pytest.approx(0.02), (6, 6))


def test_a_divergence_that_is_no_number_is_the_worst():
    n_images = np.repeat([2, 6], 8)
    kl = np.where(n_images == 2, np.nan, 1.0)
    worst, where = Measured(kl, kl > 0, n_images).worst()
    assert np.isnan(worst) and where == (2, 2)
