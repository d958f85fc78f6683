"""The page of an analysis: one HTML file that loads nothing and runs no script, in the report's own style."""

from __future__ import annotations

import os
from typing import Any

from markupsafe import Markup

from blindsight_cli import report
from blindsight_cli.analysis import pictures
from blindsight_cli.analysis.measure import Analysis, HeadMap
from blindsight_cli.report import figures, heads
from blindsight_cli.report.render import asset, template
from shared_profiles import Category
from shared_profiles._atomic import write_atomically

_FILTERS = ("count", "nats", "parameters", "percent", "points", "two")


def render(analysis: Analysis, model: report.ModelInfo, prompts: str) -> str:
    """The page as the text of one HTML file; the same input always gives the same text.

    Args:
        analysis: what was measured.
        model: the model.
        prompts: what it was measured on, in a few words.
    """
    filters = {name: getattr(figures, name) for name in _FILTERS}
    return template(asset("page.html", "analysis"), filters).render(
        analysis=analysis,
        model=model,
        prompts=prompts,
        style=Markup(asset("style.css") + asset("page.css", "analysis")),
        shares=[pictures.parts(mass).mean(0).tolist() for mass in (analysis.mass, analysis.ablated)],
        strongest=strongest(analysis),
        categories=_categories(analysis, model),
        layers=_layers(analysis),
        category_of=lambda head: head.category.name,
        labels=heads.LABELS,
        heads=heads,
        pictures=pictures,
    )


def write_page(analysis: Analysis, model: report.ModelInfo, prompts: str, path: str | os.PathLike[str]) -> None:
    """Renders the page into a file, whole or not at all.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full.
    """
    write_atomically(path, render(analysis, model, prompts).encode())


def strongest(analysis: Analysis, most: int = 6) -> list[dict[str, Any]]:
    """The offsets with the greatest strength in any layer, and what becomes of them without delimiters."""
    reach = analysis.mass.reach
    with_, without = (pictures.layer_strength(mass) for mass in (analysis.mass, analysis.ablated))
    bins = sorted((b for b in range(2 * reach + 1) if b != reach), key=lambda b: -with_[:, b].max())[:most]
    return [
        {
            "offset": pictures.offset_label(b, reach),
            "layer": int(with_[:, b].argmax()),
            "strength": float(with_[:, b].max()),
            "without": float(without[with_[:, b].argmax(), b]),
            "share": float(analysis.mass.others[..., b].mean()),
            "is_sink": b in analysis.template.from_start or 2 * reach + 1 - b in analysis.template.from_end,
        }
        for b in bins
    ]


def _categories(analysis: Analysis, model: report.ModelInfo) -> report.ReportData | None:
    """The categories as the report's own pictures want them."""
    if analysis.categories is None:
        return None
    sinks = analysis.template
    return report.ReportData(
        model,
        tuple(tuple(Category(int(c)).name for c in layer) for layer in analysis.categories),
        report.TemplateInfo(sinks.from_start, sinks.from_end, sinks.local_block),
    )


def _layers(analysis: Analysis) -> dict[int, list[HeadMap]]:
    """The drawn heads by layer."""
    layers: dict[int, list[HeadMap]] = {}
    for head in analysis.maps:
        layers.setdefault(head.layer, []).append(head)
    return layers
