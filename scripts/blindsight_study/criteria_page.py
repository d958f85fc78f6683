"""The comparison of criteria as a page and a plot, for all models that were studied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blindsight_cli.evaluation.statistics import INTERVAL, PairedCounts
from blindsight_study.page import points, table
from shared_profiles._atomic import write_atomically


def read_studies(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder by the model's name, a second seed after the first."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stem)
    return {file.stem: json.loads(file.read_text()) for file in files}


def write_page(studies: Mapping[str, dict[str, Any]], path: Path, plot: str) -> None:
    """Writes the tables in Markdown; `plot` is where the plot lies from there."""
    lines = [
        "# Criteria compared",
        "",
        f"Made by `scripts/compare_criteria.py`. 95% intervals: {INTERVAL}.",
    ]
    lines += ["", f"![Divergence and accuracy over the pairs kept]({plot})"]
    for name, study in studies.items():
        lines += ["", f"# {name}", "", study["about"], *_criteria(study), *_target(study), *_stability(study)]
        lines += [*_transfer(study), *_knobs(study), *_sinks(study)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _criteria(study: dict[str, Any]) -> list[str]:
    rows = [
        (r["criterion"], *_shares(r), r["dense_heads"], f"{r['kl']:.5f}", points(_answers(r)), f"{r['agreement']:.2%}")
        for r in study.get("criteria", ())
    ]
    head = (
        "criterion",
        "pairs kept",
        "inter-image kept",
        "dense heads",
        "KL (nats)",
        "accuracy: points",
        "same answer",
    )
    return ["", "## Pairs kept against divergence and accuracy", "", *table(head, rows)]


def _target(study: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"{r['held_out']['kl']:.5f}",
            *_shares(r),
            f"{r['kl']:.5f}",
            f"{_answers(r).dense_right / _answers(r).n:.2%}",
            points(_answers(r)),
            f"{_answers(r).only_dense} / {_answers(r).only_sparse} of {_answers(r).n:,}",
        )
        for r in study.get("target", ())
    ]
    head = ("held-out KL", "pairs kept", "inter-image kept", "KL (nats)", "dense", "accuracy: points", "lost / won of")
    return ["", "## The budget's own choice, six images", "", *table(head, rows)]


def _stability(study: dict[str, Any]) -> list[str]:
    stable = study.get("stability")
    if stable is None:
        return []
    drawn = "; ".join(
        f"{n} prompts drawn with replacement: {x['heads_the_same']:.1%} on average, {x['least']:.1%} at least"
        for n, x in stable["bootstrap"].items()
    )
    halves = " and ".join(f"{x['kl']:.5f}" for x in stable["halves"])
    few = "; ".join(
        f"{n} prompts, {len(draws)} draws: {np.mean([x['kl'] for x in draws]):.5f} nats on average, "
        f"{max(x['kl'] for x in draws):.5f} at most"
        for n, draws in stable["few"].items()
    )
    return [
        "",
        "## Stability",
        "",
        f"At {stable['kept']:.1%} of the pairs, heads that get the category that all prompts give them: {drawn}. Two "
        f"disjoint halves agree on {stable['halves_the_same']:.1%} of the heads; their KL is {halves} nats, that of "
        f"all prompts {stable['whole']['kl']:.5f}. From fewer: {few}.",
    ]


def _transfer(study: dict[str, Any]) -> list[str]:
    rows = [
        (
            r["from"],
            r["prompts"],
            r["on"],
            f"{r['kl']:.5f}",
            f"{_answers(r).dense_right / _answers(r).n:.1%}",
            points(_answers(r)),
        )
        for r in study.get("transfer", ())
    ]
    head = ("calibrated on", "prompts", "asked", "KL (nats)", "dense", "accuracy: points")
    return ["", "## Transfer", "", *table(head, rows)]


def _knobs(study: dict[str, Any]) -> list[str]:
    rows = [
        (r["knob"], *_shares(r), r["dense_heads"], f"{r['kl']:.5f}", points(_answers(r)))
        if "kl" in r
        else (r["knob"], "100%", "100%", r["dense_heads"], "0", "0")
        for r in study.get("knobs", ())
    ]
    head = ("thresholds", "pairs kept", "inter-image kept", "dense heads", "KL (nats)", "accuracy: points")
    return ["", "## The thresholds, one moved at a time", "", *table(head, rows)]


def _sinks(study: dict[str, Any]) -> list[str]:
    rows = [
        (r["sinks"], *_shares(r), f"{r['kl']:.5f}", points(_answers(r)), f"{r['agreement']:.2%}")
        for r in study.get("sinks", ())
    ]
    head = ("sinks", "pairs kept", "inter-image kept", "KL (nats)", "accuracy: points", "same answer")
    return ["", "## The sinks, all heads Intra-Image+Sink", "", *table(head, rows)]


def _answers(row: dict[str, Any]) -> PairedCounts:
    return PairedCounts(**row["answers"])


def _shares(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['kept']:.1%}", f"{row['inter_kept']:.1%}"


def draw(studies: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Divergence and accuracy over the pairs kept, a row per model, a line per criterion."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "criteria"
    from matplotlib import pyplot

    some = {name: study["criteria"] for name, study in studies.items() if study.get("criteria")}
    if not some:
        return
    figure, grid = pyplot.subplots(
        len(some), 2, figsize=(10, 3.2 * len(some)), constrained_layout=True, squeeze=False, sharex=True
    )
    for axes, (name, rows) in zip(grid, some.items(), strict=True):
        _lines(axes, rows)
        axes[0].set_yscale("log")
        axes[0].set_ylabel("KL of the next token (nats)")
        axes[1].set_ylabel("accuracy, sparse minus dense (points)")
        axes[0].set_title(name, loc="left", fontsize=10)
        for axis in axes:
            axis.grid(alpha=0.3)
    for axis in grid[-1]:
        axis.set_xlabel("inter-image query-key pairs kept (%)")
    grid[0, 0].legend()
    figure.savefig(path, metadata={"Date": None})


def _lines(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["criterion"] for row in rows):
        mine = [row for row in rows if row["criterion"] == name]
        random = name.startswith("random")
        style: dict[str, Any] = dict(color="#999999", linewidth=0.8) if random else dict(linewidth=1.6)
        label = None if random and name != "random 0" else name.removesuffix(" 0")
        x = [100 * row["inter_kept"] for row in mine]
        for axis, y in zip(axes, ([r["kl"] for r in mine], [100 * _answers(r).difference for r in mine]), strict=True):
            axis.plot(x, y, "o-", ms=3, label=label, **style)
