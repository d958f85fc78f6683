"""Turns `ReportData` into one HTML file that needs nothing else: style, script and pictures are inside.

The page's content security policy forbids any outside resource and any script but the page's own, so that text taken
from a data set can neither load nor run anything, even past the template's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from blindsight_cli.output import span
from blindsight_cli.report import charts, curve, figures, heads
from blindsight_cli.report.data import AccuracyRow, KindAccuracy, ReportData, TimingRow
from shared_profiles._atomic import write_atomically

_SEES = {
    "DENSE": "everything before it",
    "INTRA_IMAGE_SINK": "its own image, text, and the sinks of every image",
    "INTRA_IMAGE": "its own image, and text",
    "SINK": "text, the sinks of every image, and a local block of its own image",
}
_FILTERS = ("count", "flops", "nats", "parameters", "percent", "points", "ratio", "seconds", "two")


def render(data: ReportData) -> str:
    """The report as the text of one HTML file; the same data always give the same text."""
    script = asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filters = {name: getattr(figures, name) for name in _FILTERS} | {"span": span}
    return template(asset("template.html"), filters).render(
        data=data,
        style=Markup(asset("style.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        labels=heads.LABELS,
        categories=list(_categories(data)),
        n_sparse=sum(name != "DENSE" for row in data.categories for name in row),
        n_all=data.model.n_layers * data.model.n_heads,
        margin=figures.margin,
        headline_accuracy=max(data.accuracy, key=lambda row: row.n_images, default=None),
        headline_timing=_longest(data.timings.rows) if data.timings else None,
        kinds=_kinds(data.accuracy),
        head_rows=_head_rows(data),
        charts=charts,
        curve=curve,
        heads=heads,
    )


def write_report(data: ReportData, path: str | os.PathLike[str]) -> None:
    """Renders the report into a file, whole or not at all.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full.
    """
    write_atomically(path, render(data).encode())


def template(text: str, filters: Mapping[str, Callable[..., str]]) -> jinja2.Template:
    """A page's template: what is put in is escaped, and what is missing is an error."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    return environment.from_string(text)


def asset(name: str, package: str = "report") -> str:
    """The text of a file of the report, or of another page: its style, script or a template."""
    return resources.files(f"blindsight_cli.{package}").joinpath(name).read_text(encoding="utf-8")


def _categories(data: ReportData) -> Iterator[dict[str, Any]]:
    """What the legend says of each category: its name, label, meaning, number of heads, and statistics if any."""
    counts = Counter(name for row in data.categories for name in row)
    for name in heads.ORDER:
        statistics = (data.statistics or {}).get(name)
        yield {"name": name, "sees": _SEES[name], "heads": counts[name], "statistics": statistics}


def _longest(rows: tuple[TimingRow, ...]) -> TimingRow | None:
    """The measurement with the most tokens, the first of several."""
    return max(rows, key=lambda row: row.n_tokens, default=None)


def _kinds(rows: tuple[AccuracyRow, ...]) -> dict[str, list[KindAccuracy | None]]:
    """Per kind of question its accuracies, one for every accuracy row."""
    names = dict.fromkeys(kind.kind for row in rows for kind in row.by_kind)
    return {name: [next((k for k in row.by_kind if k.kind == name), None) for row in rows] for name in names}


def _head_rows(data: ReportData) -> Iterator[tuple[int, int, str, list[str]]]:
    """Layer, head, category label and the written statistics of every head, category by category."""
    tables = [data.statistics[name] for name in heads.ORDER if data.statistics and name in data.statistics]
    for layer, row in enumerate(data.categories):
        for head, name in enumerate(row):
            values = [
                figures.two(matrix[layer][head])
                for table in tables
                for matrix in (table.mass_mean, table.mass_q05, table.mass_q50, table.mass_q95, table.error_mean)
            ]
            yield layer, head, heads.LABELS[name], values
