"""The speed/accuracy curve: every point that a calibration's budget search measured, and the one that it chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from blindsight_cli.output import span
from blindsight_cli.report.codec import Record, at_least, within
from blindsight_cli.report.figures import nats, percent
from blindsight_cli.report.svg import element, number, picture, text

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760.0, 320.0, 64.0, 14.0, 26.0, 46.0


@dataclass(frozen=True)
class CurveRow(Record):
    """One measured choice of categories.

    Attributes:
        kept: share of dense attention's query-key pairs that the whole model computes, in [0, 1].
        kl: KL(dense || sparse) of the next token, in nats: a mean over the held-out prompts where it is worst.
        agreement: share of all held-out prompts whose likeliest next token is the dense model's.
        accuracy: share of right answers.
        n_prompts: how many held-out prompts there were.
        n_images: the fewest and the most images of those where the divergence is worst.
        chosen: whether this is the profile.
    """

    kept: float
    kl: float
    agreement: float | None
    accuracy: float | None
    n_prompts: int | None
    n_images: tuple[int, ...] | None
    chosen: bool

    def _validate(self) -> None:
        within("kept", self.kept, 0.0, 1.0)
        at_least("kl", self.kl, 0.0)
        for name in ("agreement", "accuracy"):
            if (value := getattr(self, name)) is not None:
                within(name, value, 0.0, 1.0)
        if self.n_prompts is not None:
            at_least("n_prompts", self.n_prompts, 1)


def curve_picture(rows: Sequence[CurveRow], budget: float | None) -> Markup:
    """Divergence, in powers of ten, over the pairs kept; what is 0 lies on the floor, below a gap."""
    positive = [row.kl for row in rows if row.kl > 0] + ([budget] if budget else [])
    low = math.floor(math.log10(min(positive, default=1e-3)))
    high = max(math.ceil(math.log10(max(positive, default=1e-3))), low + 1)
    floor, top = _HEIGHT - _BOTTOM, _TOP
    bottom = floor - 22  # where the axis of powers ends

    def at_x(kept: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * kept

    def at_y(kl: float) -> float:
        return floor if kl <= 0 else bottom - (bottom - top) * (math.log10(kl) - low) / (high - low)

    right = _WIDTH - _RIGHT
    children = [text(0, 8, "KL divergence of the next token (nats)", "axis", "start")]
    for power in range(low, high + 1):
        y = at_y(10.0**power)
        children += [_line(y, "rule"), text(_LEFT - 8, y, nats(10.0**power), "tick", "end")]
    children += [_line(floor, "base"), text(_LEFT - 8, floor, "0", "tick", "end")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        children.append(text(at_x(share), floor + 14, f"{share:.0%}", "tick"))
    children.append(text((_LEFT + right) / 2, _HEIGHT - 8, "query-key pairs kept, all layers and heads", "axis"))
    if budget:
        children += [_line(at_y(budget), "budget"), text(right, at_y(budget) - 9, f"budget {nats(budget)}", "", "end")]
    ordered = sorted(rows, key=lambda row: row.kept)
    points = "L".join(f"{number(at_x(row.kept))} {number(at_y(row.kl))}" for row in ordered)
    children.append(element("path", d=f"M{points}", class_="curve"))
    for row in ordered:
        half = 6.5 if row.chosen else 4.0
        tip = element("title", _tip(row))
        x, y = at_x(row.kept) - half, at_y(row.kl) - half
        children.append(
            element(
                "rect", tip, x=x, y=y, width=2 * half, height=2 * half, rx=half, class_=f"point{' chosen' * row.chosen}"
            )
        )
    title = "Divergence from the dense model over the share of query-key pairs kept"
    return picture(_WIDTH, _HEIGHT, title, children, class_="chart cells wide")


def _line(y: float, class_: str) -> Markup:
    return element("path", d=f"M{number(_LEFT)} {number(y)}H{number(_WIDTH - _RIGHT)}", class_=class_)


def _tip(row: CurveRow) -> str:
    lines = ["chosen" if row.chosen else "measured", f"{percent(row.kept)} of the pairs kept"]
    lines.append(f"KL {nats(row.kl)} nats" + (f", prompts of {span(row.n_images)} images" if row.n_images else ""))
    if row.agreement is not None:
        lines.append(f"{percent(row.agreement)} of the next tokens the same")
    return "\n".join(lines)
