"""The pictures of an analysis: attention maps as small PNGs, sink strength by offset, and where the mass goes."""

from __future__ import annotations

import base64
import io

import numpy as np
from markupsafe import Markup
from PIL import Image

from blindsight_cli.analysis.measure import HeadMap
from blindsight_cli.report.figures import percent
from blindsight_cli.report.svg import element, number, picture, text
from shared_profiles import Layout
from shared_profiles.sink_statistics import SinkMass

PIXELS = 256  # the longest side of a map in its file; longer prompts are pooled
RULER = 4  # pixels of the strip along a map's edges

# Parts of a row's attention, in the order they are stacked.
PARTS = {"own": "own image", "text": "text", "delimiter": "delimiters of other images", "inter": "their other tokens"}

_WHITE = np.array([255, 255, 255])
_KEPT, _DROPPED = np.array([11, 58, 103]), np.array([200, 70, 0])  # at full weight
_KEPT_GROUND, _DROPPED_GROUND = np.array([226, 236, 245]), np.array([252, 236, 222])  # at none
_RULERS = {"text": (220, 223, 227), "image": (91, 98, 108), "delimiter": (201, 130, 0)}

_LEFT, _TOP = 46.0, 40.0


def map_png(head: HeadMap, layout: Layout) -> str:
    """One head's attention as a base64 PNG: blue where its category keeps a pair, orange where it drops one.

    Darker is more weight, relative to the largest of the row's and on a square-root scale; pairs that the model never
    computes are white. A strip along the top and the left tells text, images and delimiters apart.
    """
    exists = np.tri(layout.n_tokens, dtype=bool) | (head.weights > 0)
    shade = np.sqrt(head.weights / np.maximum(head.weights.max(-1, keepdims=True), 1e-12))
    n, factor = layout.n_tokens, -(-layout.n_tokens // PIXELS)
    size = -(-n // factor)
    pad = size * factor - n

    def pool(values: np.ndarray) -> np.ndarray:
        return np.pad(values, ((0, pad), (0, pad))).reshape(size, factor, size, factor).max((1, 3))

    strongest_kept, strongest = pool(np.where(head.kept, shade, -1.0)), pool(np.where(exists, shade, -1.0))
    kept = (strongest_kept >= strongest)[..., None]
    full, ground = np.where(kept, _KEPT, _DROPPED), np.where(kept, _KEPT_GROUND, _DROPPED_GROUND)
    colors = ground + (full - ground) * np.clip(strongest, 0, 1)[..., None]
    colors = np.where((strongest < 0)[..., None], _WHITE, colors)
    canvas = np.full((size + RULER, size + RULER, 3), 255.0)
    canvas[RULER:, RULER:] = colors
    ruler = _ruler(layout)[::factor]
    canvas[: RULER - 1, RULER:], canvas[RULER:, : RULER - 1] = ruler[None], ruler[:, None]
    buffer = io.BytesIO()
    Image.fromarray(canvas.round().astype(np.uint8)).quantize(64).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _ruler(layout: Layout) -> np.ndarray:
    """The colour of every token's kind, `[N, 3]`."""
    colors = np.tile(np.array(_RULERS["text"]), (layout.n_tokens, 1))
    for begin, first, last, end in layout.images.tolist():
        colors[begin:end], colors[first:last] = _RULERS["delimiter"], _RULERS["image"]
    return colors


def offset_label(bin_: int, reach: int) -> str:
    """How a bin is called: `+0` is the start delimiter, `-1` the end delimiter."""
    if bin_ == reach:
        return "middle"
    return f"+{bin_}" if bin_ < reach else f"\N{MINUS SIGN}{2 * reach + 1 - bin_}"


def strength_map(mass: SinkMass, title: str) -> Markup:
    """Sink strength by layer and offset: mass of a token there over that of an average token of other images.

    Heads count by the mass they give to other images. White is an average token or less, full colour 16 times that.
    """
    cell, height = 30.0, 22.0
    n_bins, reach = mass.others.shape[-1], mass.reach
    strengths = layer_strength(mass)
    x = [_LEFT + b * cell + (14.0 if b >= reach else 0.0) + (14.0 if b > reach else 0.0) for b in range(n_bins)]
    children = [
        text((x[0] + x[reach - 1] + cell) / 2, 8, "from the start", "axis"),
        text((x[reach + 1] + x[-1] + cell) / 2, 8, "from the end", "axis"),
    ]
    children += [text(x[b] + cell / 2, _TOP - 12, offset_label(b, reach), "tick") for b in range(n_bins)]
    for layer, row in enumerate(strengths):
        y = _TOP + layer * height
        children.append(text(_LEFT - 8, y + height / 2, str(layer), "tick", "end"))
        for b, value in enumerate(row):
            share = mass.others[layer, :, b].mean()
            tip = f"layer {layer}, offset {offset_label(b, reach)}\n{value:.2f} times an average token\n"
            tip += f"{percent(float(share))} of a row\N{RIGHT SINGLE QUOTATION MARK}s attention"
            children.append(
                element(
                    "rect",
                    element("title", tip),
                    x=x[b] + 0.75,
                    y=y + 0.75,
                    width=cell - 1.5,
                    height=height - 1.5,
                    class_="heat",
                    fill_opacity=float(np.clip(np.log2(max(value, 1e-9)) / 4, 0, 1)),
                )
            )
    return picture(x[-1] + cell + 2, _TOP + len(strengths) * height + 2, title, children, class_="cells")


def layer_strength(mass: SinkMass) -> np.ndarray:
    """`SinkMass.strength` of each layer's heads together, `[L, 2 * reach + 1]`."""
    own, text_, others = (x.mean(1, keepdims=True) for x in (mass.own, mass.text, mass.others))
    together = SinkMass(own, text_, others, mass.pairs)
    strength: np.ndarray = together.strength[:, 0]
    return strength


def parts(mass: SinkMass) -> np.ndarray:
    """Mass on each of `PARTS`, mean over the heads of each layer: `[L, 4]`."""
    delimiters = mass.others[..., 0] + mass.others[..., -1]
    rest = mass.others.sum(-1) - delimiters
    return np.stack([x.mean(1) for x in (mass.own, mass.text, delimiters, rest)], axis=-1)


def mass_bars(mass: SinkMass, ablated: SinkMass) -> Markup:
    """Two stacked bars per layer: where image rows look, with delimiters and (pale) without."""
    width, height, left, top, floor = 500.0, 280.0, 44.0, 24.0, 240.0
    both = parts(mass), parts(ablated)
    slot = (width - left) / len(both[0])
    bar = min(28.0, 0.4 * slot)
    children = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = floor - (floor - top) * share
        children.append(element("path", d=f"M{left} {number(y)}H{width}", class_="rule" if share else "base"))
        children.append(text(left - 8, y, f"{100 * share:.0f}%", "tick", "end"))
    for layer in range(len(both[0])):
        middle = left + (layer + 0.5) * slot
        for way, x in ((0, middle - bar - 0.75), (1, middle + 0.75)):
            y = floor
            children.append(element("rect", x=x, y=top, width=bar, height=floor - top, class_="blank"))
            for (name, label), share in zip(PARTS.items(), both[way][layer], strict=True):
                size = (floor - top) * float(share)
                y -= size
                tip = f"layer {layer}, {('with', 'without')[way]} delimiters\n{label}: {percent(float(share))}"
                class_ = f"a-{name}{' dense' if way else ''}"
                children.append(element("rect", element("title", tip), x=x, y=y, width=bar, height=size, class_=class_))
        if layer % max(1, round(20 / slot)) == 0:
            children.append(text(middle, floor + 14, str(layer), "tick"))
    children.append(text((left + width) / 2, height - 8, "layer", "axis"))
    return picture(width, height, "Where image rows look, by layer", children, class_="chart cells")
