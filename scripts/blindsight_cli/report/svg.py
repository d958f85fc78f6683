"""A few lines that write SVG elements as safe markup: attributes and text are always escaped."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """One element; text children are escaped, `Markup` ones are not.

    Args:
        tag: the element's name.
        children: text or markup.
        attributes: `_` in a name stands for `-`, a trailing one is dropped (`class_`); numbers are written short.
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        text = number(value) if isinstance(value, float) else value
        parts.append(f' {name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    inside = "".join(escape(child) for child in children)
    parts.append(f">{inside}</{tag}>" if inside else "/>")
    return Markup("".join(parts))


def picture(width: float, height: float, title: str, children: Iterable[str], **attributes: object) -> Markup:
    """A whole `<svg>` with an accessible name, `width` by `height` CSS pixels at its natural size.

    The name is an `aria-label`: a `<title>` child would pop up over every cell that has none of its own.
    """
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=float(width),
        height=float(height),
        role="img",
        aria_label=title,
        **attributes,
    )


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "middle") -> Markup:
    """A label; `y` is its middle."""
    return element(
        "text", content, x=float(x), y=float(y), text_anchor=anchor, dominant_baseline="central", class_=class_
    )


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
