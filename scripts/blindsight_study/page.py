"""Tables in Markdown and the columns that studies share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from blindsight_cli.evaluation.statistics import PairedCounts


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table, its columns to the right; one that says so where there are no rows."""
    lines = [head, ["---:"] * len(head), *rows] if rows else [["not measured"], ["---"]]
    return ["| " + " | ".join(map(str, row)) + " |" for row in lines]


def points(counts: PairedCounts) -> str:
    """Accuracy, sparse minus dense, in points, with its 95% interval."""
    low, high = counts.interval()
    return f"{100 * counts.difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def paired(dense: np.ndarray, sparse: np.ndarray) -> PairedCounts:
    """Counts of two answers to the same questions: `[N]` bool each, True where they are right."""
    ways = ((dense & sparse), (dense & ~sparse), (~dense & sparse), (~dense & ~sparse))
    return PairedCounts(*(int(way.sum()) for way in ways))
