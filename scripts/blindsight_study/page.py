"""Tables in Markdown and the columns that studies share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from blindsight_cli.evaluation.statistics import PairedCounts
from shared_profiles.measured import divergence


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table, its columns to the right; one that says so where there are no rows."""
    lines = [head, ["---:"] * len(head), *rows] if rows else [["not measured"], ["---"]]
    return ["| " + " | ".join(map(str, row)) + " |" for row in lines]


def points(counts: PairedCounts) -> str:
    """Accuracy, sparse minus dense, in points, with its 95% interval."""
    low, high = counts.interval()
    return f"{100 * counts.difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def effect(dense: np.ndarray, sparse: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """What sparse heads do to the answers to N questions.

    Args:
        dense: `[N, V]` log-probabilities of the dense model.
        sparse: the same of the sparse one.
        expected: `[N]` token ids.

    Returns:
        `kl`, nats, a mean; `agreement`, a share; `answers`, the fields of `PairedCounts`.
    """
    said, instead = dense.argmax(-1), sparse.argmax(-1)
    kl, agree = divergence(dense, sparse)
    was, is_ = said == expected, instead == expected
    counts = PairedCounts(*(int(way.sum()) for way in (was & is_, was & ~is_, ~was & is_, ~was & ~is_)))
    return {
        "kl": max(float(kl.mean()), 0.0),
        "agreement": float(agree.mean()),
        "answers": asdict(counts),
    }
