"""What a report takes out of a profile: the statistics, the measured curve, and how the choice was made."""

from __future__ import annotations

from dataclasses import fields

from blindsight_cli.evaluation.statistics import least_agreement
from blindsight_cli.report.codec import conform
from blindsight_cli.report.curve import CurveRow
from blindsight_cli.report.data import CategoryStatistics
from blindsight_cli.report.figures import nats, percent
from shared_profiles.budget import chosen_point
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import Profile
from shared_profiles.summary import Summary

_THRESHOLDS = [field.name for field in fields(Thresholds)]
_RANKED = {
    "gradient": "by what a change of each head does to the next token, from one backward pass a prompt",
    "residual": "by how far a change of each head moves the residual stream",
    "error": "by the square of the relative output error of each",
}


def curve_from_profile(profile: Profile) -> tuple[CurveRow, ...]:
    """Every measured point of a profile, the chosen one marked."""
    chosen = chosen_point(profile)
    return tuple(
        CurveRow(p.kept, p.kl, p.agreement, p.accuracy, p.n_prompts, p.n_images, chosen=p is chosen)
        for p in profile.curve
    )


def budget_of(profile: Profile) -> float | None:
    """The budget that a profile was chosen by, in nats; None if it was not."""
    return float(profile.choice["budget"]) if profile.choice["method"] == "budget" else None


def chosen_by(profile: Profile) -> str:
    """A sentence on how a profile's categories were chosen."""
    choice = profile.choice
    if choice["method"] == "budget":
        if not choice["reached"]:
            return f"No head can be sparse within the budget of {nats(choice['budget'])} nats: all are Dense."
        ranked = _RANKED.get(str(choice.get("ranking")), "")
        point = chosen_point(profile)
        told = ""
        if point is not None and point.agreement is not None and point.n_prompts is not None:
            low = least_agreement(point.agreement, point.n_prompts)
            told = (
                f" Of them, {percent(point.agreement)} keep their next token (95% interval: at least {percent(low)})."
            )
        return (
            f"Heads were made sparse, in an order {ranked}, for as long as the next token of "
            f"{choice['held_out_prompts']} held-out prompts, those of few images and those of many, stayed within a "
            f"budget of {nats(choice['budget'])} nats.{told}"
        )
    if choice["method"] == "thresholds":
        values = ", ".join(f"{key} {value}" for key, value in choice.items() if key in _THRESHOLDS)
        return f"Categories were chosen by thresholds on retained mass: {values}."
    return "Categories were set by hand."


def statistics_from_summary(summary: Summary) -> dict[str, CategoryStatistics]:
    """Takes the report's statistics out of a profile's summary.

    Raises:
        ValueError: the summary's quantile levels lack 5%, 50% or 95%.
    """
    q05, q50, q95 = (summary.level_index(level) for level in (0.05, 0.5, 0.95))
    table = {
        category.name: {
            "mass_mean": summary.mass_mean[category],
            "mass_q05": mass[..., q05],
            "mass_q50": mass[..., q50],
            "mass_q95": mass[..., q95],
            "error_mean": summary.error_mean[category],
            "kept": summary.kept[category],
        }
        for category, mass in summary.mass.items()
    }
    statistics: dict[str, CategoryStatistics] = conform(dict[str, CategoryStatistics], table, "statistics")
    return statistics
