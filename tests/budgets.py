"""Made-up statistics and divergences for tests of the budget search."""

from __future__ import annotations

import numpy as np

from profile_strategies import fingerprint, summary_of
from shared_profiles.budget import Budget, tune
from shared_profiles.categories import SPARSE, Category
from shared_profiles.measured import Measured
from shared_profiles.profile import Profile
from shared_profiles.profile_parts import heads_of
from shared_profiles.summary import Summary
from shared_profiles.template import SinkTemplate


def made_from(harm: np.ndarray, pairs: np.ndarray) -> Profile:
    """A profile whose statistics rank by this harm."""
    n_layers, n_heads = harm.shape[:2]
    summary = summary_of(np.random.default_rng(0), n_layers, n_heads, (0.5,))
    fields = {name: getattr(summary, name) for name in Summary.__dataclass_fields__}
    fields |= {
        "pairs": dict(zip(Category, pairs, strict=True)),
        "harm": {"gradient": {c: harm[..., c] for c in SPARSE}},
    }
    print_ = fingerprint(n_layers, n_heads)
    nothing = np.zeros((n_layers, n_heads), dtype=np.int8)
    return Profile(nothing, SinkTemplate(), print_, Summary(**fields), {"method": "manual"})


def total(table: np.ndarray, categories: np.ndarray) -> float:
    """The sum over heads of a table `[L, H, 4]`."""
    return float(np.take_along_axis(table, categories[..., None].astype(int), axis=-1).sum())


class Model:
    """Measures a made-up divergence, and remembers what was asked."""

    def __init__(self, kl, n: int = 3) -> None:
        self.kl, self.n, self.asked = kl, n, []

    def __call__(self, categories: np.ndarray) -> Measured:
        self.asked.append(heads_of(categories))
        value = self.kl(categories)
        spread = np.linspace(0.5, 1.5, self.n)  # prompts differ; the mean counts
        return Measured(value * spread, np.ones(self.n, dtype=bool), np.full(self.n, 2))


def tuned_profile() -> Profile:
    """A profile chosen by a budget of 2 nats, with its curve."""
    rng = np.random.default_rng(5)
    harm = rng.random((3, 4, 4))
    harm[..., 0] = 0
    profile = made_from(harm, np.repeat([[90.0], [10.0], [20.0], [30.0]], 3, axis=1))
    stored = profile.summary.harm_of("gradient")
    return tune(profile, Budget(2.0), Model(lambda categories: total(stored, categories)), held_out="sha256:aa")
