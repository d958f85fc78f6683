"""Random statistics, summaries and profiles for the property tests, and fixed ones for the others."""

from __future__ import annotations

import string

import numpy as np
from hypothesis import strategies as st

from shared_profiles.categories import SPARSE, Category
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.profile import METHODS, CurvePoint, Fingerprint, Profile, Provenance
from shared_profiles.statistics import PromptStatistics
from shared_profiles.summary import MEASURED_RANKINGS, Summary
from shared_profiles.template import SinkTemplate
from strategies import templates

fractions = st.floats(0, 1)
names = st.text(string.ascii_letters + 'é"\\\n\u2028🙂', min_size=1, max_size=8)


def fingerprint(n_layers: int = 2, n_heads: int = 3, **changes: object) -> Fingerprint:
    """A fingerprint of the given shape."""
    fields = dict(family="qwen2_5_vl", n_kv_heads=1, head_dim=16, digest="sha256:" + "5e" * 32)
    return Fingerprint(**{**fields, "n_layers": n_layers, "n_heads": n_heads, **changes})


def summary_of(rng: np.random.Generator, n_layers: int, n_heads: int, levels: tuple[float, ...]) -> Summary:
    """A valid summary of random numbers, as unrelated to one another as the format allows."""

    def table(shape: tuple[int, ...], scale: float) -> dict[Category, np.ndarray]:
        return {c: np.sort(rng.random(shape), axis=-1) * scale for c in SPARSE}

    heads = (n_layers, n_heads)
    return Summary(
        n_prompts=int(rng.integers(1, 99)),
        levels=levels,
        mass=table((*heads, len(levels)), 1.0),
        mass_mean=table(heads, 1.0),
        error=table((*heads, len(levels)), 3.0),
        error_mean=table(heads, 3.0),
        kept={c: float(rng.choice([0.0, 0.1, rng.random(), 1.0])) for c in SPARSE},  # ties included
        pairs={c: 1e4 * (rng.random(n_layers) if c else np.ones(n_layers)) for c in Category},
        harm={name: table(heads, 0.01) for name in MEASURED_RANKINGS if rng.random() < 0.5},
    )


@st.composite
def summaries(draw, n_layers: int | None = None, n_heads: int | None = None) -> Summary:
    """Random summaries, levels 0.5 always among them."""
    n_layers, n_heads = n_layers or draw(st.integers(1, 4)), n_heads or draw(st.integers(1, 4))
    levels = draw(st.sampled_from([(0.5,), (0.0, 0.5, 1.0), (0.123457, 0.5), tuple(i / 20 for i in range(21))]))
    return summary_of(np.random.default_rng(draw(st.integers(0, 2**32))), n_layers, n_heads, levels)


@st.composite
def records(draw, n_layers: int, n_heads: int, rankings: tuple[str, ...] = ()) -> PromptStatistics:
    """Random statistics of one prompt."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_rows = draw(st.integers(1, 10**6))
    shape = (3, n_layers, n_heads)
    mass = rng.random(shape) * draw(st.sampled_from([0.0, 0.5, 1.0, 1.0009]))
    return PromptStatistics(
        n_tokens=n_rows + draw(st.integers(0, 9)),
        n_images=draw(st.integers(2, 99)),
        n_rows=n_rows,
        mass=mass,
        error=rng.random(shape) * 4,
        pairs=np.concatenate([np.full((1, n_layers), 10**9), rng.integers(1, 10**9, (3, n_layers))]),
        harm={name: rng.random(shape) for name in rankings},
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(-1e300, 1e300) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
provenances = st.builds(
    Provenance,
    dataset=names,
    dataset_hash=names,
    n_prompts=st.integers(1, 2**53 - 1),
    n_tokens=st.integers(1, 2**53 - 1),
    created=st.sampled_from(["2026-11-21T03:40:49Z", "2024-02-29T23:59:59.123456+00:00"]),
    versions=st.dictionaries(names, names, max_size=3),
)


def curve_points(n_layers: int, n_heads: int) -> st.SearchStrategy[CurvePoint]:
    """Random points; what need not be known may be missing."""
    heads = st.lists(st.text("DSIB", min_size=n_heads, max_size=n_heads), min_size=n_layers, max_size=n_layers)
    return st.builds(
        CurvePoint,
        kept=fractions,
        kl=st.floats(0, 1e30),
        accuracy=st.none() | fractions,
        agreement=st.none() | fractions,
        n_prompts=st.none() | st.integers(1, 2**53 - 1),
        heads=st.none() | heads.map(tuple),
        n_images=st.none() | st.lists(st.integers(2, 9), min_size=2, max_size=2).map(sorted).map(tuple),
    )


@st.composite
def profiles(draw) -> Profile:
    """Random profiles: every optional part there or not."""
    n_layers, n_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Profile(
        categories=rng.integers(0, 4, (n_layers, n_heads)),
        template=draw(templates),
        fingerprint=fingerprint(n_layers, n_heads, family=draw(names)),
        summary=draw(st.none() | summaries(n_layers, n_heads)),
        choice={**draw(st.dictionaries(names, json_values, max_size=3)), "method": draw(st.sampled_from(METHODS))},
        provenance=draw(st.none() | provenances),
        curve=draw(st.lists(curve_points(n_layers, n_heads), max_size=3)),
    )


def plain_profile() -> Profile:
    """One fixed profile with every part there."""
    summary = summary_of(np.random.default_rng(7), 2, 3, (0.0, 0.5, 1.0))
    thresholds = Thresholds(gamma_sink=0.5, gamma_intra=0.4, gamma_dense=0.3)
    return Profile(
        categories=classify(summary, thresholds),
        template=SinkTemplate(),
        fingerprint=fingerprint(),
        summary=summary,
        choice=thresholds.to_choice(),
        provenance=Provenance("puzzles", "sha256:" + "d4" * 32, 40, 9000, "2026-11-21T03:40:49Z", {"torch": "2.11.0"}),
        curve=(CurvePoint(0.4, 0.002, 0.9, 0.95, 16, ("DSI", "BBD"), (5, 6)), CurvePoint(0.6, 0.001)),
    )
