"""The random vector of the gradient's ranking: its covariance is the Fisher information; rounding does not move it."""

from __future__ import annotations

import numpy as np
import pytest

from shared_profiles.fisher import fisher_vector, magnified, prompt_seed


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def fisher_of(p):
    return np.diag(p) - p[:, None] * p


@pytest.mark.parametrize(("n_tokens", "n"), [(5, 20_000), (40, 2_500)], ids=["all-rotated", "some-rotated"])
def test_the_covariance_is_the_fisher_information(n_tokens, n):
    logits = 2 * np.random.default_rng(0).standard_normal(n_tokens)
    want = fisher_of(softmax(logits))
    vectors = fisher_vector(np.broadcast_to(logits, (n, n_tokens)), seed=1).astype(np.float64)
    np.testing.assert_allclose(vectors.T @ vectors / n, want, rtol=0, atol=3 * np.sqrt(want.max() ** 2 / n))
    np.testing.assert_allclose(vectors.sum(axis=1), 0, rtol=0, atol=1e-6)


def test_two_tokens_leave_nothing_to_chance():
    logits = np.array([[0.3, -1.2, -60.0]])
    want = fisher_of(softmax(logits[0]))
    for seed in range(4):
        (vector,) = fisher_vector(logits, seed)
        np.testing.assert_allclose(vector[:, None] * vector, want, rtol=0, atol=1e-6)


def test_nearly_equal_logits_give_nearly_equal_vectors():
    """Frameworks differ by rounding, which decides the signs and the order of eigenvectors, and of equal tokens."""
    rng = np.random.default_rng(2)
    for seed in range(20):
        logits = 3 * rng.standard_normal((1, 200))
        order = rng.permutation(200)
        logits[0, order[:2]] = logits.max() + 1  # two tokens alike
        other = fisher_vector(logits + 1e-7 * rng.standard_normal(logits.shape), seed)
        vector = fisher_vector(logits, seed)
        np.testing.assert_allclose(other, vector, rtol=0, atol=1e-3 * np.abs(vector).max())
        assert np.abs(vector - fisher_vector(logits, seed + 100)).max() > 0.1 * np.abs(vector).max()


def test_a_small_vector_is_magnified_exactly():
    vector = fisher_vector(np.array([[40.0, 1.0, 0.0, -3.0]]), 0)
    assert np.abs(vector).max() < 1e-7
    large, unit = magnified(vector)
    assert 32 <= np.abs(large).max() < 64
    np.testing.assert_array_equal(large * np.float32(unit), vector)
    nothing, unit = magnified(np.zeros((1, 4), np.float32))
    assert not nothing.any() and unit == 1


def test_the_seed_is_of_the_tokens_alone():
    ids = np.array([[1, 5, 90]])
    assert prompt_seed(ids) == prompt_seed(ids.astype(np.int32)) == prompt_seed(ids.astype(">i8"))
    assert prompt_seed(ids) != prompt_seed(ids[:, ::-1])


def test_what_is_no_number_is_refused():
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"logits of the next token must be numbers\. Got NaN or inf"):
            fisher_vector(np.array([[0.0, wrong]]), 0)
