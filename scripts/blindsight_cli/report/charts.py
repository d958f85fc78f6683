"""The FLOPs bars and the mask pictures: both split query-key pairs into own image, other images, and text.

Pictures are plain SVG paths in the page's own colours, so that they follow its light or dark appearance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from markupsafe import Markup

from blindsight_cli.report.data import FlopsPoint, MaskExample
from blindsight_cli.report.figures import flops_unit, percent
from blindsight_cli.report.heads import LABELS
from blindsight_cli.report.svg import element, number, picture, text

PARTS = ("text", "intra", "inter")
PART_LABELS = {
    "text": "text (as query or as key)",
    "intra": "image token to its own image",
    "inter": "image token to another image",
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 500.0, 300.0, 44.0, 4.0, 30.0, 46.0


def flops_bars(points: tuple[FlopsPoint, ...], head_dim: int) -> Markup:
    """Attention FLOPs over the number of images, `4 * head_dim` for every query-key pair: dense beside kept."""
    scale = 4.0 * head_dim
    top, step = _ticks(scale * max(point.dense_total for point in points))
    unit, name = flops_unit(top)
    axis = [(i * step, f"{i * step / unit:g}") for i in range(round(top / step) + 1)]
    title = "Attention FLOPs of dense attention and of this profile, by number of images"
    return _bars(points, title, f"attention of one prompt ({name})", axis, lambda point: scale / top)


def share_bars(points: tuple[FlopsPoint, ...]) -> Markup:
    """The same bars, each prompt's dense attention being 100%."""
    axis = [(share, f"{100 * share:.0f}%") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    title = "Share of dense attention's FLOPs that this profile keeps, by number of images"
    return _bars(points, title, "share of dense attention", axis, lambda point: 1 / point.dense_total)


def _bars(
    points: tuple[FlopsPoint, ...],
    title: str,
    axis_title: str,
    axis: list[tuple[float, str]],
    scale: Callable[[FlopsPoint], float],
) -> Markup:
    """Two stacked bars per point, pale for dense and full for kept; `scale` maps pairs to a share of the axis."""
    height = _HEIGHT - _TOP - _BOTTOM
    floor = _HEIGHT - _BOTTOM
    children = [text(0, 8, axis_title, "axis", "start")]
    for value, label in axis:
        y = floor - height * value / axis[-1][0]
        children.append(
            element("path", d=f"M{_LEFT} {number(y)}H{_WIDTH - _RIGHT}", class_="rule" if value else "base")
        )
        children.append(text(_LEFT - 8, y, label, "tick", "end"))
    slot = (_WIDTH - _LEFT - _RIGHT) / len(points)
    bar = min(30.0, 0.4 * slot)
    skip = max(1, round(24 / slot))
    for i, point in enumerate(points):
        middle = _LEFT + (i + 0.5) * slot
        for prefix, x in (("dense", middle - bar - 0.75), ("kept", middle + 0.75)):
            y = floor
            if prefix == "dense":  # hides the rules behind pale bars
                size = height * point.dense_total * scale(point)
                children.append(element("rect", x=x, y=floor - size, width=bar, height=size, class_="blank"))
            for part in PARTS:
                pairs = getattr(point, f"{prefix}_{part}")
                size = height * pairs * scale(point)
                if not size:
                    continue
                y -= size
                whole = point.dense_total
                tip = element(
                    "title",
                    f"{point.n_images} images, {prefix}, {PART_LABELS[part]}: {percent(pairs / whole)} of dense",
                )
                children.append(element("rect", tip, x=x, y=y, width=bar, height=size, class_=f"p-{part} {prefix}"))
        if i % skip == 0:
            children.append(text(middle, floor + 14, str(point.n_images), "tick"))
    children.append(text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "number of images in the prompt", "axis"))
    return picture(_WIDTH, _HEIGHT, title, children, class_="chart cells")


def _ticks(largest: float) -> tuple[float, float]:
    """Upper end and step of an axis from 0 with three to six round steps."""
    power = 10.0 ** (len(f"{largest:.0f}") - 1)
    step = next(power * factor for factor in (0.2, 0.25, 0.5, 1, 2, 5) if largest <= 5 * power * factor)
    return step * -(-largest // step), step


def mask_picture(example: MaskExample, category: str) -> Markup:
    """One category's mask: queries down, keys across, the prompt's segments on both rulers."""
    n = example.n_tokens
    unit = max(2, 460 // n)
    ruler, gap, left, top = 14, 3, 20, 20
    x0, y0 = left + ruler + gap, top + ruler + gap
    size = n * unit
    owners = _owners(example)
    kinds = [segment.kind for segment in example.segments for _ in range(segment.length)]
    paths: dict[str, list[str]] = {part: [] for part in PARTS}
    for q, row in enumerate(example.masks[category]):
        parts = [_part(kinds, owners, q, k) if seen == "1" else "" for k, seen in enumerate(row)]
        k = 0
        for part, run in groupby(parts):
            length = len(list(run))
            if part:
                paths[part].append(f"M{k * unit} {q * unit}h{length * unit}v{unit}h-{length * unit}z")
            k += length
    children = [
        element("rect", x=x0, y=y0, width=size, height=size, class_="ground"),
        *(
            element("path", d="".join(d), class_=f"p-{part}", transform=f"translate({x0} {y0})")
            for part, d in paths.items()
            if d
        ),
        *_rulers(example, owners, unit, ruler, (left, top), (x0, y0)),
        text(x0 + size / 2, 8, "key →", "axis"),
        element(
            "text",
            "← query",
            transform=f"translate(9 {number(y0 + size / 2)}) rotate(-90)",
            text_anchor="middle",
            class_="axis",
        ),
    ]
    title = f"Which keys each query sees under {LABELS[category]}"
    return picture(x0 + size + 1, y0 + size + 1, title, children, class_="mask")


def mask_share(example: MaskExample, category: str) -> float:
    """Share of dense pairs that a category keeps on the example; without a DENSE picture, of the causal pairs."""
    n = example.n_tokens
    dense = sum(row.count("1") for row in example.masks.get("DENSE", ())) or n * (n + 1) // 2
    return sum(row.count("1") for row in example.masks[category]) / dense


def _rulers(
    example: MaskExample, owners: list[int], unit: int, ruler: int, corner: tuple[int, int], origin: tuple[int, int]
) -> Iterator[Markup]:
    """The segments along both axes, numbered where there is room, and a hairline through the picture at image edges."""
    size = example.n_tokens * unit
    at = 0
    for segment in example.segments:
        start, length = at * unit, segment.length * unit
        x, y = origin[0] + start, origin[1] + start
        yield element("rect", x=x, y=corner[1], width=length, height=ruler, class_=f"s-{segment.kind}")
        yield element("rect", x=corner[0], y=y, width=ruler, height=length, class_=f"s-{segment.kind}")
        if segment.kind == "image":
            for edge in (start, start + length):
                d = f"M{origin[0] + edge} {origin[1]}v{size}M{origin[0]} {origin[1] + edge}h{size}"
                yield element("path", d=d, class_="edge")
        label = str(owners[at] + 1) if segment.kind == "image" else "text"
        if segment.kind != "delimiter" and length >= 9 * len(label):
            yield text(x + length / 2, corner[1] + ruler / 2, label, f"on-{segment.kind}")
            turned = f"translate({number(corner[0] + ruler / 2)} {number(y + length / 2)}) rotate(-90)"
            yield element(
                "text",
                label,
                transform=turned,
                text_anchor="middle",
                dominant_baseline="central",
                class_=f"on-{segment.kind}",
            )
        at += segment.length


def _owners(example: MaskExample) -> list[int]:
    """For every token the number of its image, -1 for text; a delimiter belongs to the image it touches."""
    owners: list[int] = []
    image = -1
    for i, segment in enumerate(example.segments):
        following = example.segments[i + 1].kind if i + 1 < len(example.segments) else ""
        opens = segment.kind == "delimiter" and following == "image"
        if opens or (segment.kind == "image" and (i == 0 or example.segments[i - 1].kind != "delimiter")):
            image += 1
        owners += [-1 if segment.kind == "text" else image] * segment.length
    return owners


def _part(kinds: list[str], owners: list[int], query: int, key: int) -> str:
    """Whether a pair is text, intra or inter. Delimiters are text as queries, part of their image as keys."""
    if kinds[query] != "image" or kinds[key] == "text":
        return "text"
    return "intra" if owners[query] == owners[key] else "inter"
