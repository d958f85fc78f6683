"""Paired statistics against published examples, scipy, and their own definition: how often an interval covers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binomtest

from blindsight_cli.evaluation.statistics import Z_95, PairedCounts, least_agreement, wilson

small = st.integers(0, 60)
tables = st.tuples(small, small, small, small).filter(any).map(lambda counts: PairedCounts(*counts))


def test_published_examples() -> None:
    """Airways before and after (Fagerland, Lydersen and Laake 2014); Altman 2000, Table 6.2; both by this method."""
    low, high = PairedCounts(1, 7, 1, 12).interval()
    assert (round(low, 3), round(high, 3)) == (-0.507, -0.026)
    assert PairedCounts(1, 7, 1, 12).p_value() == pytest.approx(0.0703, abs=5e-5)
    low, high = PairedCounts(14, 0, 5, 22).interval()
    assert (round(low, 3), round(high, 3)) == (0.011, 0.226)


@given(st.integers(0, 500), st.integers(0, 500))
def test_mcnemar_is_the_binomial_test_of_the_unequal_pairs(only_dense: int, only_sparse: int) -> None:
    p = PairedCounts(3, only_dense, only_sparse, 5).p_value()
    unequal = only_dense + only_sparse
    assert p == pytest.approx(binomtest(only_dense, unequal).pvalue if unequal else 1.0, rel=1e-9)


def test_mcnemar_of_many_pairs() -> None:
    assert PairedCounts(0, 20_300, 19_800, 9).p_value() == pytest.approx(binomtest(20_300, 40_100).pvalue, rel=1e-6)
    assert PairedCounts(0, 9_000, 0, 9).p_value() == 0.0  # 2^-8999 has no float


@given(st.integers(0, 300), st.integers(0, 300))
@example(0, 27)  # where the formula is a rounding below 0
@example(10, 0)
def test_wilson_is_scipys(right: int, wrong: int) -> None:
    if right + wrong == 0:
        return
    ours = wilson(right, right + wrong)
    theirs = binomtest(right, right + wrong).proportion_ci(method="wilson")
    np.testing.assert_allclose(ours, (theirs.low, theirs.high), atol=1e-12)
    assert ((ours[0] == 0), (ours[1] == 1)) == (right == 0, wrong == 0)
    assert least_agreement(right / (right + wrong), right + wrong) == ours[0]


@given(tables)
def test_interval_is_about_the_difference_and_mirrors(counts: PairedCounts) -> None:
    low, high = counts.interval()
    assert -1 - 1e-12 <= low <= counts.difference <= high <= 1 + 1e-12
    swapped = PairedCounts(counts.both, counts.only_sparse, counts.only_dense, counts.neither)
    np.testing.assert_allclose(swapped.interval(), (-high, -low), atol=1e-12)
    assert swapped.p_value() == counts.p_value()
    wider = counts.interval(2 * Z_95)
    assert wider[0] <= low and high <= wider[1]


@pytest.mark.parametrize(
    "cells", [(0.9, 0.02, 0.02, 0.06), (0.5, 0.1, 0.05, 0.35), (0.25, 0.25, 0.25, 0.25), (0.05, 0.3, 0.0, 0.65)]
)
def test_interval_covers_the_truth_as_often_as_it_says(cells: tuple[float, ...], n: int = 24) -> None:
    """Every table of n pairs, weighed with its exact probability."""
    truth, covered = cells[2] - cells[1], 0.0
    for both, only_dense, only_sparse in itertools.product(range(n + 1), repeat=3):
        counts = (both, only_dense, only_sparse, n - both - only_dense - only_sparse)
        if counts[3] < 0 or any(c and not p for c, p in zip(counts, cells, strict=True)):
            continue
        low, high = PairedCounts(*counts).interval()
        if low <= truth <= high:
            weight = math.lgamma(n + 1) + sum(
                c * math.log(p) - math.lgamma(c + 1) for c, p in zip(counts, cells, strict=True) if c
            )
            covered += math.exp(weight)
    assert 0.93 < covered < 1.0 + 1e-9


def test_one_unequal_pair_in_thousands_gives_a_narrow_interval() -> None:
    """The scale of the project's own claim: 4,000 questions, and 0.3 points."""
    low, high = PairedCounts(3_800, 12, 10, 178).interval()
    assert -0.0035 < low < -0.0015 and 0.0015 < high < 0.0035


def test_two_equal_pairs_are_no_correlation_yet() -> None:
    """The correction for continuity takes all of it away: what is left is square-and-add of Wilson's intervals."""
    low, high = wilson(1, 2)
    width = math.hypot(0.5 - low, high - 0.5)
    assert PairedCounts(1, 0, 0, 1).interval() == pytest.approx((-width, width), rel=1e-12)


def test_impossible_counts_are_refused() -> None:
    for counts in ((0, 0, 0, 0), (1, -1, 0, 0)):
        with pytest.raises(ValueError, match="one of them positive"):
            PairedCounts(*counts)
    for right, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="0 <= right <= n"):
            wilson(right, n)
