"""Choosing a category for every head from the statistics of a calibration.

`classify` is the paper's way (arXiv 2507.09071): the cheapest category whose retained mass passes a threshold. It
asks how much mass a head keeps, which is not the same as whether anything downstream misses the rest; the other way
answers that. It is given one number, the allowed KL divergence of the next-token distribution, and searches with
the model at hand: `choice["method"] == "budget"`, beside this module's `"thresholds"`. Both give the same thing,
an `[L, H]` array of categories for a `Profile`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shared_profiles._values import is_number, rounded
from shared_profiles.categories import SPARSE, Category
from shared_profiles.summary import LEVELS, Summary


@dataclass(frozen=True)
class Thresholds:
    """How much softmax mass a head must retain to be given a sparse category.

    Layer `l` of `L` scales every gamma by `alpha_l = alpha_first + (alpha_last - alpha_first) * l / (L - 1)`: fixed
    when both are equal, else linear in depth. A scaled gamma above 1 counts as 1. All values are held to six
    significant digits, as a profile stores them.

    Attributes:
        gamma_sink: mass that `SINK` must retain, in [0, 1].
        gamma_intra: mass that `INTRA_IMAGE` must retain, in [0, 1].
        gamma_dense: mass that `INTRA_IMAGE_SINK`, the richest sparse category, must retain, in [0, 1]; a head that
            does not is left `DENSE`, whatever the other two retain.
        alpha_first: scale of the gammas in the first layer, at least 0.
        alpha_last: scale in the last layer, at least 0.
        quantile: which quantile over the prompts must pass, one of the summary's levels. 0.5 is the paper's majority:
            at least half of the prompts pass. Smaller is stricter; 0 means every prompt.

    Raises:
        ValueError: a value is out of its range.
    """

    gamma_sink: float = 0.95
    gamma_intra: float = 0.95
    gamma_dense: float = 0.9
    alpha_first: float = 1.0
    alpha_last: float = 1.0
    quantile: float = 0.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            upper = math.inf if name.startswith("alpha") else 1.0
            if not is_number(value) or not math.isfinite(value) or not 0 <= value <= upper:
                wanted = "finite and at least 0" if upper == math.inf else "in [0, 1]"
                raise ValueError(f"{name} must be a number {wanted}. Got {value!r}. Pick another.")
            object.__setattr__(self, name, rounded(value))

    def to_choice(self) -> dict[str, Any]:
        """The `choice` of a profile whose categories these thresholds gave."""
        return {"method": "thresholds", **asdict(self)}


def check_quantile(thresholds: Thresholds, called: str = "the quantile") -> None:
    """Refuses, before anything is measured, a quantile that no statistics keep.

    Raises:
        ValueError: it is none of `LEVELS`; the message calls it as asked.
    """
    if thresholds.quantile not in LEVELS:
        raise ValueError(f"{called} must be a multiple of 0.05 in [0, 1]. Got {thresholds.quantile}.")


def classify(summary: Summary, thresholds: Thresholds) -> np.ndarray:
    """The cheapest passing category of every head.

    A category passes for a head when the chosen quantile of its retained mass reaches the scaled gamma. Of those that
    pass, the head gets the one with the smallest `summary.kept`; between equals, the later in `SPARSE`, which sees
    more. Raising a gamma never makes a head cheaper.

    Args:
        summary: statistics of L layers and H query heads.
        thresholds: what must be retained.

    Returns:
        `[L, H]` int8, values of `Category`.

    Raises:
        ValueError: `thresholds.quantile` is not a level of the summary.
    """
    at = summary.level_index(thresholds.quantile)
    alpha = np.linspace(thresholds.alpha_first, thresholds.alpha_last, summary.shape[0])[:, None]  # [L, 1]

    def passes(category: Category, gamma: float) -> np.ndarray:
        return summary.mass[category][:, :, at] >= np.minimum(alpha * gamma, 1.0)  # [L, H]

    sparse = passes(Category.INTRA_IMAGE_SINK, thresholds.gamma_dense)
    passing = {
        Category.SINK: sparse & passes(Category.SINK, thresholds.gamma_sink),
        Category.INTRA_IMAGE: sparse & passes(Category.INTRA_IMAGE, thresholds.gamma_intra),
        Category.INTRA_IMAGE_SINK: sparse,
    }
    chosen = np.full(summary.shape, Category.DENSE, dtype=np.int8)
    dearest_first = sorted(SPARSE, key=summary.kept.__getitem__, reverse=True)  # stable: of equals, the later is last
    for category in dearest_first:
        chosen[passing[category]] = category
    return chosen
