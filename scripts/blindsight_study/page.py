"""Tables in Markdown and the columns that studies share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table, its columns to the right; one that says so where there are no rows."""
    lines = [head, ["---:"] * len(head), *rows] if rows else [["not measured"], ["---"]]
    return ["| " + " | ".join(map(str, row)) + " |" for row in lines]


def points(row: dict[str, Any]) -> str:
    """Accuracy, sparse minus dense, with its 95% interval, in points."""
    return f"{100 * row['difference']:+.2f} ± {100 * row['margin']:.2f}"


def paired(right: Any, dense: Any) -> dict[str, Any]:
    """What two answers to the same questions differ in: `right`, `dense` are `[N]` bool, True where they are right.

    The interval is the normal approximation, 1.96 standard errors of the mean paired difference.
    """
    difference = right.astype(int) - dense.astype(int)
    return {
        "dense": float(dense.mean()),
        "sparse": float(right.mean()),
        "difference": float(difference.mean()),
        "margin": float(1.96 * difference.std() / len(difference) ** 0.5),
        "lost": int((difference < 0).sum()),
        "won": int((difference > 0).sum()),
        "questions": len(difference),
    }
