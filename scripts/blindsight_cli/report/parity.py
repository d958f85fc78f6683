"""The parity page: how far the two frameworks and their kernels are apart, as one HTML file in the report's style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from blindsight_cli.report import figures
from blindsight_cli.report.render import asset, template

_PARTS = ("plan", "kernel", "model", "bfloat16", "profile")


def render_parity(document: Mapping[str, Any]) -> str:
    """The page as text; the same document always gives the same text.

    Args:
        document: what `scripts/parity_report.py` writes as `parity.json`; parts that were not asked for may be missing.
    """
    return template(asset("parity.html"), {"count": figures.count, "size": size}).render(
        document=document,
        machine=document["machine"],
        style=Markup(asset("style.css")),
        parts=[part for part in _PARTS if part in document],
        largest=largest,
        by_point=by_point,
    )


def size(difference: float) -> str:
    """A difference with two significant digits; what stands for one that is not a number, in words."""
    if difference > 1e300:
        return "not a number"
    return figures.nats(difference) if difference < 1e4 else f"{difference:.1e}"


def largest(pair: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point of a pair of whole-model runs that comes nearest to what is allowed, or passes it."""
    return max(pair["points"], key=lambda point: point["error"] / point["allowed"])


def by_point(run: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """A run's rows: of every point the figures of each pair, in their order."""
    return [list(points) for points in zip(*(pair["points"] for pair in run["pairs"]), strict=True)]
