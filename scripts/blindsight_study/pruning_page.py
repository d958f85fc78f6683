"""The study of token pruning as a page and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blindsight_cli.evaluation.statistics import PairedCounts
from blindsight_study.page import points, table
from blindsight_study.pruning import PRUNERS, SHARES
from shared_profiles._atomic import write_atomically


def rows(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured points, dense and sparse side by side."""
    found = []
    for name in ("whole", *PRUNERS):
        for share in SHARES if name in PRUNERS else (1,):
            dense, sparse = (measured.get(f"{name} {share} {way}") for way in ("dense", "sparse"))
            if dense and sparse:
                found.append({"name": name, "share": share, "dense": dense, "sparse": sparse})
    return found


def compared(one: dict[str, Any], other: dict[str, Any]) -> PairedCounts:
    """The second point's answers beside the first's."""
    pairs = list(zip(one["right"], other["right"], strict=True))
    return PairedCounts(*(pairs.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0"))))


def write_page(results: dict[str, Any], path: Path, plot: str) -> None:
    """The table in Markdown."""
    about, measured = results["about"], results["points"]
    whole = measured["whole 1 dense"]

    def accuracy(point: dict[str, Any]) -> str:
        return f"{point['right'].count('1') / len(point['right']):.2%}"

    lines = [
        "# Token pruning and sparse heads together",
        "",
        f"`{about['model']}`, heads: {about['heads']} by its profile; {about['questions']} questions about six images. "
        "Pairs are query-key pairs of all layers and heads, in percent of the whole prompt with all heads dense. "
        "Differences are in points, with 95% intervals of paired differences. Made by `scripts/pruning_curve.py`.",
        "",
    ]
    head = ("pruner", "image tokens", "pairs, dense", "sparse", "accuracy, dense", "sparse")
    lines += table(
        (*head, "sparse minus dense, same tokens", "sparse minus whole and dense"),
        [
            (
                "whole prompt" if row["name"] == "whole" else row["name"],
                f"{row['sparse']['image_tokens']:.1%}",
                *(f"{row[way]['pairs']:.1%}" for way in ("dense", "sparse")),
                *(accuracy(row[way]) for way in ("dense", "sparse")),
                points(compared(row["dense"], row["sparse"])),
                points(compared(whole, row["sparse"])),
            )
            for row in rows(measured)
        ],
    )
    lines += ["", f"![curve]({plot})"]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over pairs, a line per pruner with all heads dense and with the profile's."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pruning"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), constrained_layout=True)
    found = rows(results["points"])
    for name, color in zip(PRUNERS, ("C0", "C1", "C2"), strict=True):
        for way, line in (("dense", "o--"), ("sparse", "o-")):
            mine = [row[way] for row in found if row["name"] in ("whole", name)]
            y = [100 * point["right"].count("1") / len(point["right"]) for point in mine]
            label = f"{name}, {'all heads dense' if way == 'dense' else 'sparse heads'}"
            axis.plot([100 * point["pairs"] for point in mine], y, line, ms=3, color=color, linewidth=1.6, label=label)
    axis.set_xscale("log")
    ticks = (10, 20, 30, 50, 70, 100)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("query-key pairs kept (%)")
    axis.set_ylabel("accuracy (%)")
    figure.legend(loc="outside right upper")
    axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
