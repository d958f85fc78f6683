"""The budget: one number, the KL divergence of the next token that sparsity may cost, chooses all categories.

    Summary ──► Path ──► bisect on the KL measured on held-out prompts ──► Profile: categories and the measured curve

The path only says in which order heads are made cheaper; how far to go along it is measured, never estimated. Every
measured point stays in the profile, so another budget can be served from it without the model. The budget holds for
prompts of few images and of many: what counts is the worst group (`measured`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shared_profiles._values import is_integer, is_number, rounded
from shared_profiles.categories import Category
from shared_profiles.classifier import Thresholds, check_quantile, classify
from shared_profiles.measured import Measure
from shared_profiles.path import check_split, kept_pairs, pairs_of, path_of
from shared_profiles.profile import CurvePoint, Profile
from shared_profiles.profile_parts import heads_of
from shared_profiles.summary import RANKINGS, Summary

EVALUATIONS = 12
"""Choices that a search measures at most."""


@dataclass(frozen=True)
class Budget:
    """What sparsity may cost.

    Attributes:
        kl: KL divergence from the dense model of the next-token distribution at the answer, in nats: the mean over
            prompts with about equally many images, in whichever such group it is worst.
        ranking: one of `RANKINGS`: what orders the heads.
        processes: over how many processes or devices the model that is served splits its heads (tensor parallelism). A
            layer takes as long as the busiest of them, so they are given equally much to do.

    Raises:
        ValueError: the divergence is not a finite number of at least 0, there is no such ranking, or not one process.
    """

    kl: float = 0.01
    ranking: str = "gradient"
    processes: int = 1

    def __post_init__(self) -> None:
        if not is_number(self.kl) or not math.isfinite(self.kl) or self.kl < 0:
            raise ValueError(f"the budget must be a finite number of nats, at least 0. Got {self.kl!r}. Try 0.01.")
        object.__setattr__(self, "kl", rounded(self.kl))
        if self.ranking not in RANKINGS:
            raise ValueError(f"the ranking must be one of {', '.join(RANKINGS)}. Got {self.ranking!r}.")
        if not is_integer(self.processes, 1):
            raise ValueError(f"processes must be an integer of at least 1. Got {self.processes!r}.")


def budget_of(budget: Budget | float | None, thresholds: Thresholds | None, n_heads: int) -> Budget | None:
    """The budget that the options of a `calibrate` of `n_heads` heads a layer mean; None to choose by thresholds.

    Raises:
        ValueError: both are given, the budget cannot be, or statistics do not keep the thresholds' quantile.
    """
    if budget is not None and thresholds is not None:
        raise ValueError("categories must be chosen by a budget or by thresholds. Got both. Leave one out.")
    if thresholds is not None:
        check_quantile(thresholds)
        return None
    found = budget if isinstance(budget, Budget) else Budget() if budget is None else Budget(budget)
    check_split(n_heads, found.processes)
    return found


def rankings_for(budget: Budget | None) -> tuple[str, ...]:
    """The harm to measure for a budget: whoever takes the gradient gets the ranking without one beside it."""
    if budget is None or budget.ranking == "error":
        return ()
    return ("gradient", "residual") if budget.ranking == "gradient" else ("residual",)


def tune(profile: Profile, budget: Budget, measure: Measure, *, held_out: str | None = None) -> Profile:
    """The cheapest choice on the path of a profile's statistics whose measured divergence is within the budget.

    The last step of the path is measured first, then the step halfway between the dearest one known to pass and the
    cheapest one known to fail, at most `EVALUATIONS` in all. The chosen point itself has always been measured, unless
    it is all-Dense, which differs from the dense model in nothing. Where measured divergence rises along the path and
    the path has at most 2,047 moves, no other point of the path within the budget computes less.

    Args:
        profile: a profile with statistics; its categories, choice and curve are replaced.
        budget: what is allowed.
        measure: runs the held-out prompts.
        held_out: hash of the held-out prompts, kept in `choice`.

    Returns:
        The profile. `choice` holds the budget, the ranking, the chosen point's divergence and `"reached"`: false if
        no head could be made sparse within the budget, so that all are Dense.

    Raises:
        ValueError: the profile has no statistics or not this ranking, its heads cannot be split over so many processes,
            or nothing can be measured.
    """
    path = path_of(_statistics_of(profile), budget.ranking, budget.processes)
    points: dict[int, CurvePoint] = {}

    def evaluate(step: int) -> bool:
        points[step] = _point_of(profile, path.categories(step), measure)
        return points[step].kl <= budget.kl

    passes, fails, next_step = 0, len(path) + 1, len(path)
    while fails - passes > 1 and len(points) < EVALUATIONS:
        if evaluate(next_step):
            passes = next_step
        else:
            fails = next_step
        next_step = (passes + fails) // 2
    n_prompts = next((point.n_prompts for point in points.values()), None)
    dense = path.categories(0)
    points[0] = CurvePoint(1.0, 0.0, agreement=1.0, n_prompts=n_prompts, heads=heads_of(dense))
    curve = tuple(points[step] for step in sorted(points))
    sinks = profile.choice.get("sinks")  # how the template was learned, which stays
    split = _split(profile, path.categories(passes), budget.processes)
    chosen = _chosen(points[passes], budget.kl, ranking=budget.ranking, held_out=held_out, sinks=sinks, **split)
    return replace(profile, **chosen, curve=curve)


def retune(profile: Profile, budget: float) -> Profile:
    """The same from a profile's stored curve: its cheapest measured point within another budget. Nothing is measured.

    What is cheapest is judged for as many processes as the profile was made for.

    Raises:
        ValueError: the budget is no finite number of at least 0, or the curve has no point whose categories are known.
    """
    allowed = Budget(budget).kl
    known = [point for point in profile.curve if point.heads is not None]
    if not known:
        raise ValueError(
            "a profile must have a measured curve to be retuned to a budget without the model. Got none: it was not "
            "made with a budget. Measure one: blindsight profile retune --budget X --verify CHECKPOINT PROMPTS."
        )
    within = [point for point in known if point.kl <= allowed]
    if not within:
        raise ValueError(
            f"the curve must have a point within the budget of {allowed:g} nats. Its points go from "
            f"{min(point.kl for point in known):g} on. Allow more, or measure again with --verify."
        )
    processes = processes_of(profile)

    def cost(point: CurvePoint) -> tuple[float, float]:
        assert point.categories is not None
        return _split(profile, point.categories, processes).get("busiest", point.kept), point.kl

    chosen = min(within, key=cost)
    assert chosen.categories is not None
    kept = {key: profile.choice[key] for key in ("ranking", "held_out", "sinks") if key in profile.choice}
    return replace(profile, **_chosen(chosen, allowed, **kept, **_split(profile, chosen.categories, processes)))


def retune_by_thresholds(profile: Profile, thresholds: Thresholds) -> Profile:
    """The profile with the categories that thresholds on retained mass give; its curve stays, and says what it is of.

    So does the number of processes, by which a later budget chooses.

    Raises:
        ValueError: it has no statistics, or not the quantile; or the heads cannot be split over its processes.
    """
    categories = classify(_statistics_of(profile), thresholds)
    kept = {key: profile.choice[key] for key in ("held_out", "sinks") if key in profile.choice}
    split = _split(profile, categories, processes_of(profile))
    return replace(profile, categories=categories, choice=thresholds.to_choice() | kept | split)


def verify(profile: Profile, measure: Measure, *, held_out: str) -> Profile:
    """Measures a profile's own categories; the point joins the curve, in place of one of the same categories.

    A curve that was measured on other prompts, or on nobody knows which, cannot be compared with it and goes.

    Args:
        profile: a profile with statistics.
        measure: runs the held-out prompts.
        held_out: hash of these, kept in `choice`.

    Raises:
        ValueError: the profile has no statistics, or nothing can be measured.
    """
    point = _point_of(profile, profile.categories, measure)
    same = profile.choice.get("held_out") == held_out
    others = [other for other in profile.curve if other.heads != point.heads] if same else []
    curve = tuple(sorted((*others, point), key=lambda p: (-p.kept, p.kl)))
    return replace(profile, curve=curve, choice={**profile.choice, "held_out": held_out})


def chosen_point(profile: Profile) -> CurvePoint | None:
    """The measured point of the curve whose categories the profile has; None if these were not measured."""
    heads = heads_of(profile.categories)
    return next((point for point in profile.curve if point.heads == heads), None)


def processes_of(profile: Profile) -> int:
    """Over how many processes a profile's budget was told that the heads are split.

    Raises:
        ValueError: it says what cannot be.
    """
    processes = Budget(processes=profile.choice.get("processes", 1)).processes
    check_split(profile.fingerprint.n_heads, processes)
    return processes


def _split(profile: Profile, categories: np.ndarray, processes: int) -> dict[str, Any]:
    """What `choice` says of processes: how many, and the share of its pairs that the busiest computes."""
    if processes == 1:
        return {}
    kept = kept_pairs(categories, pairs_of(_statistics_of(profile)), processes)
    return {"processes": processes, "busiest": rounded(kept)}


def _point_of(profile: Profile, categories: np.ndarray, measure: Measure) -> CurvePoint:
    """One measured point.

    Raises:
        ValueError: nothing was measured, or the divergence is not a number.
    """
    measured = measure(categories)
    kl, n_images = measured.worst() if len(measured.kl) else (math.nan, None)
    if not math.isfinite(kl):
        raise ValueError(
            f"the divergence on held-out prompts must be a finite number. Got {kl} over {len(measured.kl)} prompts. "
            "Are the model's weights in order, and is its dtype wide enough?"
        )
    return CurvePoint(
        kept=kept_pairs(categories, pairs_of(_statistics_of(profile))),
        kl=max(kl, 0.0),
        agreement=float(measured.agree.mean()),
        n_prompts=len(measured.kl),
        n_images=n_images,
        heads=heads_of(categories),
    )


def _statistics_of(profile: Profile) -> Summary:
    """A profile's statistics.

    Raises:
        ValueError: it has none.
    """
    if profile.summary is None:
        raise ValueError("the profile must hold statistics to choose from. Got one made by hand. Run calibrate.")
    return profile.summary


def _chosen(point: CurvePoint, allowed: float, **more: Any) -> dict[str, Any]:
    """The fields of a profile that takes a measured point."""
    assert point.categories is not None
    choice = {
        "method": "budget",
        "budget": allowed,
        "kl": point.kl,
        "reached": bool((point.categories != Category.DENSE).any()),
        "held_out_prompts": point.n_prompts,
        **{key: value for key, value in more.items() if value is not None},
    }
    return {"categories": point.categories, "choice": choice}
