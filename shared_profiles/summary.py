"""What a profile keeps of its calibration: per head and category, quantiles over the prompts.

Enough to choose categories again with other thresholds, small enough to ship: a model of 28 layers of 28 heads takes
about 1 MB of JSON. Numbers are held to six significant digits from the start, so that a choice made before saving
and one made after loading see the same values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from shared_profiles._values import is_integer, rounded, rounded_array, same_fields
from shared_profiles.categories import SPARSE, Category

MEASURED_RANKINGS = ("gradient", "residual")
"""Estimates of the harm that a category does to a head; `Summary.harm` has those that were measured."""

RANKINGS = (*MEASURED_RANKINGS, "error")
"""What `Summary.harm_of` can give: the square of the output error is always there."""

LEVELS = tuple(i / 20 for i in range(21))
"""Levels of the quantiles that `Statistics.summarize` keeps: 0, 0.05, ..., 1."""


@dataclass(frozen=True, eq=False)
class Summary:
    """Retained mass and output error of every head under each sparse category, over the prompts of a data set.

    L layers, H query heads, Q levels. The quantile at level `q` of N prompts is their ascending value number
    `min(floor(q * N), N - 1)`, counted from 0 and never interpolated: at least the share `1 - q` of the prompts
    reach it. Every prompt counts once, whatever its length.

    Attributes:
        n_prompts: N, how many prompts were measured.
        levels: Q levels in [0, 1], ascending.
        mass: per sparse category `[L, H, Q]` float64: quantiles of the retained softmax mass, in [0, 1].
        mass_mean: per sparse category `[L, H]` float64: its mean over prompts.
        error: per sparse category `[L, H, Q]` float64: quantiles of the relative output error
            `||o_category - o_dense|| / ||o_dense||`, at least 0.
        error_mean: per sparse category `[L, H]` float64: its mean over prompts.
        kept: per sparse category the mean fraction, in [0, 1], of the dense query-key pairs that one head keeps.
        pairs: per category, `DENSE` included, `[L]` float64: the mean number of query-key pairs that one head computes
            in each layer, which differ where windows do.
        harm: per ranking that was measured and per sparse category `[L, H]` float64, at least 0: an estimate of what
            the category does when this head alone is given it, as a mean over prompts in which each counts by the
            square root of its sum over heads and categories, not by the sum: prompts on which the model hesitates
            hold nearly all of it, and a plain mean over 100 prompts would hang on a handful of them. Only ratios
            within one ranking mean something. What is measured of one prompt:
            `"gradient"`: the divergence of the next token in nats, `1/2 (sum over image rows of g . change)^2`, where
            `change = o_category - o_dense` and `g` is the gradient by `o_dense` of a random combination of the logits
            whose covariance is the Fisher information.
            `"residual"`: no gradient: the mean over image rows of `(||W_o change|| / ||x||)^2`, `x` being the residual
            stream that the layer reads.

    Raises:
        ValueError: a category is missing, shapes disagree, or a value is out of its range or not finite.
    """

    n_prompts: int
    levels: tuple[float, ...]
    mass: Mapping[Category, np.ndarray]
    mass_mean: Mapping[Category, np.ndarray]
    error: Mapping[Category, np.ndarray]
    error_mean: Mapping[Category, np.ndarray]
    kept: Mapping[Category, float]
    pairs: Mapping[Category, np.ndarray]
    harm: Mapping[str, Mapping[Category, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_integer(self.n_prompts, 1):
            raise ValueError(f"n_prompts must be a positive integer. Got {self.n_prompts!r}.")
        levels = tuple(rounded(level) for level in self.levels)
        ascending = all(a < b for a, b in itertools.pairwise(levels))
        if not levels or not ascending or not (levels[0] >= 0 and levels[-1] <= 1):
            raise ValueError(f"levels must be one or more ascending numbers in [0, 1]. Got {levels}.")
        object.__setattr__(self, "levels", levels)

        for name in ("mass", "mass_mean", "error", "error_mean", "kept"):
            given = getattr(self, name)
            if set(given) != set(SPARSE):
                wanted = ", ".join(c.name for c in SPARSE)
                raise ValueError(f"{name} must have exactly the categories {wanted}. Got {sorted(map(str, given))}.")
        layers_heads = np.shape(self.mass[Category.SINK])[:2]
        if len(layers_heads) != 2 or 0 in layers_heads:
            raise ValueError(f"mass must have shape (L, H, Q), none zero. Got {np.shape(self.mass[Category.SINK])}.")
        for name, shape, upper in (
            ("mass", (*layers_heads, len(levels)), 1.0),
            ("mass_mean", layers_heads, 1.0),
            ("error", (*layers_heads, len(levels)), np.inf),
            ("error_mean", layers_heads, np.inf),
            ("kept", (), 1.0),
        ):
            given = getattr(self, name)
            checked = {c: _checked(f"{name}[{c.name}]", given[c], shape, upper) for c in SPARSE}
            if name == "kept":
                object.__setattr__(self, name, {c: float(value) for c, value in checked.items()})
            else:
                object.__setattr__(self, name, checked)
        self._check_pairs(layers_heads[0])
        self._check_harm(layers_heads)

    def _check_pairs(self, n_layers: int) -> None:
        if set(self.pairs) != set(Category):
            raise ValueError(f"pairs must have all categories. Got {sorted(map(str, self.pairs))}.")
        pairs = {c: _checked(f"pairs[{c.name}]", self.pairs[c], (n_layers,), np.inf) for c in Category}
        if not pairs[Category.DENSE].all() or any((pairs[c] > pairs[Category.DENSE]).any() for c in SPARSE):
            raise ValueError("pairs[DENSE] must be more than 0 and at least those of every other category.")
        object.__setattr__(self, "pairs", pairs)

    def _check_harm(self, layers_heads: tuple[int, ...]) -> None:
        if unknown := sorted(set(self.harm) - set(MEASURED_RANKINGS)):
            raise ValueError(f"harm may have the rankings {', '.join(MEASURED_RANKINGS)}. Got {', '.join(unknown)}.")
        harm = {}
        for name, table in self.harm.items():
            if set(table) != set(SPARSE):
                wanted = ", ".join(c.name for c in SPARSE)
                raise ValueError(f"harm[{name}] must have exactly the categories {wanted}.")
            harm[name] = {c: _checked(f"harm[{name}][{c.name}]", table[c], layers_heads, np.inf) for c in SPARSE}
        object.__setattr__(self, "harm", harm)

    def harm_of(self, ranking: str) -> np.ndarray:
        """The harm of every head under every category, `[L, H, 4]` float64, 0 for `DENSE`.

        Args:
            ranking: one of `RANKINGS`.

        Raises:
            ValueError: there is no such ranking, or it was not measured.
        """
        if ranking == "error":
            table: Mapping[Category, np.ndarray] = {c: self.error_mean[c] ** 2 for c in SPARSE}
        elif ranking in self.harm:
            table = self.harm[ranking]
        else:
            raise ValueError(
                f"the ranking must be one that was measured: {', '.join((*self.harm, 'error'))}. Got {ranking!r}. "
                "Calibrate with it first, or take one of these."
            )
        return np.stack([np.zeros(self.shape), *(table[c] for c in SPARSE)], axis=-1)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H): layers and query heads."""
        n_layers, n_heads, _ = self.mass[Category.SINK].shape
        return n_layers, n_heads

    def level_index(self, level: float) -> int:
        """Where the quantile of a level stands in the last axis of `mass` and `error`.

        Raises:
            ValueError: the level is not one of `levels`.
        """
        if rounded(level) not in self.levels:
            raise ValueError(f"the quantile must be one of the stored levels {self.levels}. Got {level!r}. Pick one.")
        return self.levels.index(rounded(level))

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other)

    __hash__ = None  # type: ignore[assignment]  # holds arrays


def _checked(name: str, values: np.ndarray | float, shape: tuple[int, ...], upper: float) -> np.ndarray:
    """The values as a rounded read-only array, or a ValueError that says what is wrong and for which head."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}. Got {array.shape}.")
    good = np.isfinite(array) & (array >= 0) & (array <= upper)
    if not good.all():
        at = tuple(np.argwhere(~good)[0])
        wanted = "finite and at least 0" if upper == np.inf else f"in [0, {upper:g}]"
        raise ValueError(f"{name} must be {wanted}. Got {array[at]:g}{_place(at)}.")
    if array.ndim == 3 and (falls := np.diff(array, axis=2) < 0).any():
        at = tuple(np.argwhere(falls)[0])
        after = array[at[0], at[1], at[2] + 1]
        raise ValueError(f"{name} must not fall from one level to the next. Got {array[at]:g}, {after:g}{_place(at)}.")
    return rounded_array(array)


def _place(index: tuple[int, ...]) -> str:
    """` at layer l, head h` for the index of a head's value, ` at layer l` for a layer's, empty for a single number."""
    named = [f"{name} {i}" for name, i in zip(("layer", "head"), index, strict=False)]
    return f" at {', '.join(named)}" if named else ""
