"""The parts of the comparison of criteria: each takes a study and gives rows of figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from blindsight_cli.smallvlm import evaluate
from blindsight_cli.smallvlm.puzzles import KINDS, Puzzle, make_puzzle
from blindsight_study.measure import Asked, Study
from shared_profiles import SPARSE, Category, SinkTemplate
from shared_profiles.budget import chosen_point
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.path import Path as HeadPath
from shared_profiles.path import kept_pairs, pairs_of
from shared_profiles.summary import Summary

# Of the pairs that the cheapest choice saves, the shares that are asked of every path.
LEFT = (0.5, 0.25, 0.12, 0.06, 0.03)
TYPICAL = 0.06
LOOKING, COMPARING = ("color", "shape", "count"), ("which", "same color", "same shape")
BOOTSTRAPS = 100
FEW, DRAWS = (24, 96), 4  # calibration prompts, as many as a user may have
KNOBS: dict[str, tuple[float, ...]] = {
    "gamma_sink": (0.5, 0.8, 0.99),
    "gamma_intra": (0.5, 0.8, 0.99),
    "gamma_dense": (0.5, 0.7, 0.8, 0.95),
    "alpha_first": (0.5, 0.75),
    "alpha_last": (0.5, 0.75),
    "quantile": (0.0, 0.25),
}
SINKS = {  # offsets from an image's start, and back from its end
    "delimiters": ((0,), (1,)),
    "and the first token": ((0, 1), (1,)),
    "and the last token": ((0,), (1, 2)),
    "and the first and the last token": ((0, 1), (1, 2)),
    "and the first two and the last two": ((0, 1, 2), (1, 2, 3)),
    "and two tokens of the middle": ((0, 6), (1, 8)),
}


def rankings(summary: Summary, n_random: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each criterion's name and harm `[L, H, 4]`."""
    for ranking in ("gradient", "residual", "error"):
        yield ranking, summary.harm_of(ranking)
    lost = np.stack([np.zeros(summary.shape), *(1 - summary.mass_mean[c] for c in SPARSE)], axis=-1)
    yield "mass", lost
    for seed in range(n_random):
        harm = np.random.default_rng(seed).random((*summary.shape, len(Category)))
        harm[..., Category.DENSE] = 0
        yield f"random {seed}", harm


def at_left(path: HeadPath, left: float) -> np.ndarray:
    """The first choice of a path that leaves no more than this share of what its end saves."""
    end = path.kept(path.categories(len(path)))
    return within(path, end + left * (1 - end))


def within(path: HeadPath, kept: float) -> np.ndarray:
    """The first choice of a path that keeps no more than this share of the pairs."""
    return next(c for c in map(path.categories, range(len(path) + 1)) if path.kept(c) <= kept * (1 + 1e-12))


def compare(study: Study, six: Asked, n_random: int) -> list[dict[str, Any]]:
    """Every criterion at every share of pairs."""
    summary, rows = study.statistics.summarize(), []
    for name, harm in rankings(summary, n_random):
        path = HeadPath(harm, pairs_of(summary))
        for left in LEFT:
            rows.append(_told({"criterion": name, "left": left, **study.measure("6", six, at_left(path, left))}))
    return rows


def knobs(study: Study, six: Asked) -> list[dict[str, Any]]:
    """The paper's thresholds: all as they are by default, and one at a time moved."""
    summary, rows = study.statistics.summarize(), []
    moved: list[dict[str, float]] = [{}, *({name: value} for name, values in KNOBS.items() for value in values)]
    for change in moved:
        categories = classify(summary, Thresholds(**change))
        name = ", ".join(f"{key} {value:g}" for key, value in change.items()) or "defaults"
        if categories.any():
            rows.append(_told({"knob": name, **study.measure("6", six, categories)}))
        else:
            rows.append({"knob": name, "dense_heads": categories.size})
    return rows


def sinks(study: Study, six: Asked) -> list[dict[str, Any]]:
    """What the template is worth where it matters most: every head `INTRA_IMAGE_SINK`, with ever other sinks."""
    everywhere = np.full_like(study.profile.categories, Category.INTRA_IMAGE_SINK)
    return [
        _told({"sinks": name, **study.measure("6", six, everywhere, SinkTemplate(*offsets))})
        for name, offsets in SINKS.items()
    ]


def stability(study: Study, six: Asked) -> dict[str, Any]:
    """How far the gradient's choice depends on which prompts were drawn, and how many, at the chosen share of pairs."""
    ids, rng = list(study.statistics.prompt_ids), np.random.default_rng(0)
    pairs = pairs_of(study.statistics.summarize())
    share = kept_pairs(study.profile.categories, pairs)

    def choose(some: Sequence[str]) -> np.ndarray:
        return within(HeadPath(study.subset(some).harm_of("gradient"), pairs), share)

    whole, found = choose(ids), {}
    for n in (len(ids) // 16, len(ids) // 4, len(ids)):
        draws = [choose(rng.choice(ids, n).tolist()) for _ in range(BOOTSTRAPS)]
        same = [float((draw == whole).mean()) for draw in draws]
        found[str(n)] = {"heads_the_same": float(np.mean(same)), "least": float(np.min(same))}
    shuffled = rng.permutation(ids).tolist()
    halves = [choose(shuffled[: len(ids) // 2]), choose(shuffled[len(ids) // 2 :])]
    few = {
        str(n): [study.measure("6", six, choose(rng.choice(ids, n, replace=False).tolist())) for _ in range(DRAWS)]
        for n in FEW
        if n < len(ids)
    }
    return {
        "kept": share,
        "bootstrap": found,
        "few": few,
        "halves_the_same": float((halves[0] == halves[1]).mean()),
        "halves": [study.measure("6", six, half) for half in halves],
        "whole": study.measure("6", six, whole),
    }


def transfer(study: Study, n_questions: int) -> list[dict[str, Any]]:
    """The gradient's choice from one sort of prompts, measured on another, at the same share of pairs."""

    def puzzles(n_images: int, kinds: Sequence[str]) -> list[Puzzle]:
        first = evaluate.EVALUATION_SEEDS + 500_000
        return [make_puzzle(n_images, first + i, kinds[i % len(kinds)]) for i in range(n_questions)]

    sources = {
        "all": lambda puzzle: True,
        "color, shape, count": lambda puzzle: puzzle.question.kind in LOOKING,
        "which, same": lambda puzzle: puzzle.question.kind in COMPARING,
        "2-3 images": lambda puzzle: len(puzzle.images) <= 3,
        "5-6 images": lambda puzzle: len(puzzle.images) >= 5,
    }
    targets = {
        "6 images: color, shape, count": study.ask(puzzles(6, LOOKING)),
        "6 images: which, same": study.ask(puzzles(6, COMPARING)),
        "2 images": study.ask(puzzles(2, KINDS)),
        "9 images, never seen": study.ask(puzzles(9, KINDS)),
    }
    if "shortest_edge" in study.processor.image_processor.size:  # others make every picture the same size
        targets["6 images of 4x the tokens, never seen"] = study.ask(puzzles(6, KINDS), side=128)
    pairs, rows = pairs_of(study.statistics.summarize()), []
    for source, wanted in sources.items():
        summary = study.subset(study.chosen(wanted))
        categories = at_left(HeadPath(summary.harm_of("gradient"), pairs), TYPICAL)
        for target, asked in targets.items():
            row = study.measure(target, asked, categories)
            rows.append(_told({"from": source, "on": target, "prompts": summary.n_prompts, **row}))
    return rows


def target(study: Study, n_questions: int) -> list[dict[str, Any]]:
    """The profile's own choice on many questions about six images."""
    asked = study.ask(evaluate.make_puzzles(6, n_questions, evaluate.EVALUATION_SEEDS))
    point = chosen_point(study.profile)
    assert point is not None
    row = study.measure("6", asked, study.profile.categories)
    return [_told({"held_out": asdict(replace(point, heads=None)), **row})]


def _told(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), flush=True)
    return row
