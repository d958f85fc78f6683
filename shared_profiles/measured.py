"""What one choice of categories did to the next token of held-out prompts, and on which of them it did worst.

A mean over all prompts would hide what happens to those of many images: the fewer images, the less a sparse head
misses. So the prompts are grouped by their number of images, and the worst group's mean is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SMALLEST_GROUP = 8
"""Prompts that make a group: means over fewer say little."""
MOST_GROUPS = 10
"""The worst of many groups would be one of bad luck."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What one choice of categories did to N held-out prompts.

    Attributes:
        kl: `[N]` float64, KL divergence of the next token from the dense model's, in nats; rounding may take it a
            little below 0.
        agree: `[N]` bool, whether the likeliest next token is the dense model's.
        n_images: `[N]` int64, how many images each prompt has.
    """

    kl: np.ndarray
    agree: np.ndarray
    n_images: np.ndarray

    def worst(self) -> tuple[float, tuple[int, int]]:
        """The largest mean divergence of a group, in nats, and that group; N must be at least 1."""
        found = groups(self.n_images)
        means = [self.kl[(self.n_images >= least) & (self.n_images <= most)].mean() for least, most in found]
        at = int(np.argmax(means))  # a NaN is the worst of all
        return float(means[at]), found[at]


type Measure = Callable[[np.ndarray], Measured]
"""Runs the held-out prompts with categories `[L, H]`."""


def groups(n_images: np.ndarray) -> list[tuple[int, int]]:
    """Prompts with neighbouring numbers of images, by the fewest and the most, from the most images down.

    Prompts with equally many images are always together. A group takes in ever smaller numbers until it has
    `SMALLEST_GROUP` prompts and one in `MOST_GROUPS` of all; what is left in the end and too few joins the last one.

    Args:
        n_images: `[N]` integers.
    """
    found: list[tuple[int, int]] = []
    most, size = 0, 0
    numbers, counts = np.unique(n_images, return_counts=True)
    for number, count in zip(numbers[::-1].tolist(), counts[::-1].tolist(), strict=True):
        most, size = (number if size == 0 else most), size + count
        if size >= SMALLEST_GROUP and size * MOST_GROUPS >= len(n_images):
            found.append((number, most))
            size = 0
    if size:
        _, most = found.pop() if found else (0, most)
        found.append((int(numbers[0]), most))
    return found


def require_numbers(log_probs: np.ndarray) -> None:
    """Refuses what a dense model answers where it is no distribution.

    Raises:
        ValueError: a log-probability is NaN.
    """
    if np.isnan(log_probs).any():
        raise ValueError(
            "the model must answer with numbers. Got NaN or inf in the logits of the next token. Are prompt and "
            "weights in order, and is their dtype wide enough?"
        )


def divergence(dense: np.ndarray, sparse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What separates two models' next tokens: `Measured.kl` and `Measured.agree`.

    Args:
        dense, sparse: `[..., V]` log-probabilities.

    Returns:
        Nats and bools, each of shape `[...]`; nats are not finite where a model gave no such probabilities.
    """
    p = np.asarray(dense, dtype=np.float64)
    q = np.asarray(sparse, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0 * (-inf - -inf): an impossible token
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
    return terms.sum(axis=-1), p.argmax(axis=-1) == q.argmax(axis=-1)


def divergence_of_one(dense: np.ndarray, sparse: np.ndarray) -> float:
    """The divergence of one next token in nats, at least 0.

    Args:
        dense, sparse: `[V]` log-probabilities.

    Raises:
        ValueError: it is not finite.
    """
    kl = float(divergence(dense, sparse)[0])
    if not math.isfinite(kl):
        raise ValueError(
            f"the model must give finite probabilities. Got a divergence of {kl} nats between two next tokens. Are its "
            "weights in order, and is its dtype wide enough? Try float32."
        )
    return max(kl, 0.0)  # rounding may take it a little below
