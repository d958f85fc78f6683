"""Pictures with one cell per attention head: the category map, the heat maps, and the counts per layer.

Layers run down, query heads across; a gap separates the query heads of one key/value head from the next. A head's
category is told twice, by colour and by the mark in its cell, so that the map reads without colours:

    (no mark)  DENSE      ( - )  INTRA_IMAGE      ( • )  SINK      ( • over - )  INTRA_IMAGE_SINK
"""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from blindsight_cli.report.data import CategoryStatistics, ReportData
from blindsight_cli.report.figures import count, two
from blindsight_cli.report.svg import element, number, picture, text

ORDER = ("DENSE", "INTRA_IMAGE_SINK", "INTRA_IMAGE", "SINK")
LABELS = {
    "DENSE": "dense",
    "INTRA_IMAGE_SINK": "intra-image + sink",
    "INTRA_IMAGE": "intra-image",
    "SINK": "sink",
}
_LEFT, _TOP, _GAP = 46.0, 44.0, 1.5


class Grid:
    """Where the cells of an L x H picture lie, in CSS pixels.

    Args:
        n_layers, n_heads, n_kv_heads: the model's.
        width: room for the cells; they are at most 34 pixels wide and never narrower than 6.
    """

    def __init__(self, n_layers: int, n_heads: int, n_kv_heads: int, width: float) -> None:
        self.n_layers, self.n_heads = n_layers, n_heads
        self.group = n_heads // n_kv_heads
        self.gap = 0.0 if self.group == 1 or n_kv_heads == 1 else 5.0
        free = width - self.gap * (n_kv_heads - 1)
        self.cell_width = min(34.0, max(6.0, free / n_heads))
        self.cell_height = min(self.cell_width, max(12.0, 760 / n_layers))
        self.width = _LEFT + self.x(n_heads - 1) - _LEFT + self.cell_width + 2
        self.height = _TOP + n_layers * self.cell_height + 2

    def x(self, head: int) -> float:
        """Left edge of a head's column."""
        return _LEFT + head * self.cell_width + (head // self.group) * self.gap

    def y(self, layer: int) -> float:
        """Upper edge of a layer's row."""
        return _TOP + layer * self.cell_height

    def cell(self, layer: int, head: int, title: str, **attributes: object) -> Markup:
        """One head's rectangle with its tooltip; `data-at` lets the script find it."""
        return element(
            "rect",
            element("title", title),
            x=self.x(head) + _GAP / 2,
            y=self.y(layer) + _GAP / 2,
            width=self.cell_width - _GAP,
            height=self.cell_height - _GAP,
            rx=min(2.0, self.cell_width / 8),
            data_at=f"{layer}.{head}",
            **attributes,
        )

    def layer_labels(self) -> Iterator[Markup]:
        """The axis on the left, thinned out where rows are low."""
        step = 1 if self.cell_height >= 13 else 2
        middle = _TOP + self.n_layers * self.cell_height / 2
        yield element(
            "text", "layer", transform=f"translate(9 {number(middle)}) rotate(-90)", text_anchor="middle", class_="axis"
        )
        for layer in range(0, self.n_layers, step):
            yield text(_LEFT - 8, self.y(layer) + self.cell_height / 2, str(layer), "tick", "end")

    def head_labels(self) -> Iterator[Markup]:
        """The axis on top, thinned out where columns are narrow."""
        step = next(step for step in (1, 2, 4, 8, 16) if step * self.cell_width >= 18 or step == 16)
        yield text((self.x(0) + self.width) / 2, 9, "query head", "axis")
        for head in range(0, self.n_heads, step):
            yield text(self.x(head) + self.cell_width / 2, _TOP - 11, str(head), "tick")


def category_map(data: ReportData) -> Markup:
    """The category of every head, one `rect.head.c-<CATEGORY>` each."""
    grid = Grid(data.model.n_layers, data.model.n_heads, data.model.n_kv_heads, 640)
    children = [*grid.layer_labels(), *grid.head_labels()]
    strokes: dict[str, list[str]] = {name: [] for name in ORDER}
    for layer, row in enumerate(data.categories):
        for head, name in enumerate(row):
            children.append(grid.cell(layer, head, _describe(data, layer, head), class_=f"head c-{name}"))
            strokes[name].append(_mark(name, grid.x(head), grid.y(layer), grid.cell_width, grid.cell_height))
    children += [element("path", d="".join(d), class_=f"mark m-{name}") for name, d in strokes.items() if any(d)]
    title = f"Category of each of {data.model.n_layers} × {data.model.n_heads} attention heads"
    return picture(
        grid.width, grid.height, title, children, class_="cells map wide" if grid.width > 560 else "cells map"
    )


def swatch(name: str) -> Markup:
    """The legend's sample of one category."""
    mark = element("path", d=_mark(name, 0, 0, 20, 20), class_=f"mark m-{name}")
    return picture(
        20,
        20,
        LABELS[name],
        [element("rect", x=1, y=1, width=18, height=18, rx=2, class_=f"c-{name}"), mark],
        class_="swatch",
    )


def layer_counts(data: ReportData) -> Markup:
    """How many heads of each category every layer has: numbers with bars, rows aligned with the category map."""
    grid = Grid(data.model.n_layers, data.model.n_heads, data.model.n_kv_heads, 640)
    column, digits, bar = 76.0, 26.0, 40.0  # a column holds a number and a bar
    bottom = grid.y(data.model.n_layers)
    height = grid.cell_height - _GAP
    children = [
        *grid.layer_labels(),
        text(_LEFT + 12, 9, "heads of each category", "axis", "start"),
        text(_LEFT - 8, bottom + 14, "all", "tick", "end"),
    ]
    for i, name in enumerate(ORDER):
        x = _LEFT + i * column
        children.append(element("rect", x=x + 12.0, y=_TOP - 19, width=14, height=14, rx=2, class_=f"c-{name}"))
        children.append(element("path", d=_mark(name, x + 11, _TOP - 20, 16, 16), class_=f"mark m-{name}"))
        counts = [row.count(name) for row in data.categories]
        for layer, n in enumerate(counts):
            y = grid.y(layer)
            class_ = "number" if n else "number none"
            children.append(text(x + digits, y + grid.cell_height / 2, str(n), class_, "end"))
            if n:
                at = {"x": x + digits + 5, "y": y + _GAP / 2, "width": bar * n / data.model.n_heads, "height": height}
                children.append(element("rect", class_=f"c-{name}", **at))
        children.append(text(x + digits, bottom + 14, count(sum(counts)), "number all", "end"))
    title = "Number of heads of each category in every layer"
    return picture(_LEFT + 4 * column, bottom + 26, title, children, class_="counts")


def mass_map(data: ReportData, category: str, statistics: CategoryStatistics) -> Markup:
    """The mean retained mass of one category on every head; heads that were given it are framed."""
    grid = Grid(data.model.n_layers, data.model.n_heads, data.model.n_kv_heads, 290)
    children = [*grid.layer_labels(), *grid.head_labels()]
    for layer in range(data.model.n_layers):
        for head in range(data.model.n_heads):
            mass = statistics.mass_mean[layer][head]
            low, high = statistics.mass_q05[layer][head], statistics.mass_q95[layer][head]
            title = (
                f"layer {layer}, head {head}, as {LABELS[category]}\n"
                f"retained mass {two(mass)} (5% to 95% of prompts: {two(low)} to {two(high)})\n"
                f"output error {two(statistics.error_mean[layer][head])}"
            )
            chosen = " chosen" if data.categories[layer][head] == category else ""
            children.append(grid.cell(layer, head, title, class_=f"heat{chosen}", fill_opacity=min(mass, 1.0)))
    title = f"Mean retained mass of every head as {LABELS[category]}"
    return picture(grid.width, grid.height, title, children, class_="cells")


def _describe(data: ReportData, layer: int, head: int) -> str:
    lines = [f"layer {layer}, head {head}: {LABELS[data.categories[layer][head]]}"]
    for name in ORDER[1:]:
        if statistics := (data.statistics or {}).get(name):
            mass, error = statistics.mass_mean[layer][head], statistics.error_mean[layer][head]
            lines.append(f"{LABELS[name]}: retained mass {two(mass)}, output error {two(error)}")
    return "\n".join(lines)


def _mark(name: str, x: float, y: float, width: float, height: float) -> str:
    """Path data of a category's mark in a cell: a bar for the own image, a dot for sinks."""
    unit = min(width, height)
    cx, cy = x + width / 2, y + height / 2
    both = 0.15 * unit if name == "INTRA_IMAGE_SINK" else 0.0
    path = ""
    if name.startswith("INTRA_IMAGE"):
        half, thick = 0.26 * unit, 0.11 * unit
        wide, high = number(2 * half), number(thick)
        path += f"M{number(cx - half)} {number(cy + both - thick / 2)}h{wide}v{high}h-{wide}z"
    if name.endswith("SINK"):
        r, across = number(0.11 * unit), number(0.22 * unit)
        path += f"M{number(cx - 0.11 * unit)} {number(cy - both)}a{r} {r} 0 0 1 {across} 0a{r} {r} 0 0 1 -{across} 0z"
    return path
