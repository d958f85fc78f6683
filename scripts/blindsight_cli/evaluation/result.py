"""From samples to the result: what is told, and the document that is written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table

from blindsight_cli.evaluation.samples import Arm, Sample
from blindsight_cli.evaluation.statistics import INTERVAL, PairedCounts, wilson
from blindsight_cli.folders import read_json
from blindsight_cli.output import results
from blindsight_cli.report import figures

FORMAT, VERSION = "blindsight-eval", 1


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of an evaluation.

    Args:
        samples: every item once, by line.

    Returns:
        JSON values. `marks` says in words why figures mean nothing, where they do.
    """
    n = len(samples)
    pairs = Counter((s.dense.right, s.sparse.right) for s in samples)
    counts = PairedCounts(pairs[1, 1], pairs[1, 0], pairs[0, 1], pairs[0, 0])
    dense, sparse = (_arm([getattr(s, name) for s in samples]) for name in ("dense", "sparse"))
    effective = sum(s.sparse.ran == "sparse" and s.sparse.pairs < s.dense.pairs for s in samples)
    divergences = [s.kl for s in samples]
    inter = sum(s.dense.inter for s in samples)
    return {
        "n_items": n,
        "n_multi_image": sum(s.n_images >= 2 for s in samples),
        "n_repeated": n - len({(s.digest, s.expected) for s in samples}),
        "dense": dense,
        "sparse": sparse,
        "difference": {
            "sparse_minus_dense": counts.difference,
            "interval_95": list(counts.interval()),
            "interval": INTERVAL,
            "both_right": counts.both,
            "only_dense_right": counts.only_dense,
            "only_sparse_right": counts.only_sparse,
            "both_wrong": counts.neither,
            "mcnemar_exact_p": counts.p_value(),
        },
        "agreement": sum(_answer(s.dense) == _answer(s.sparse) for s in samples) / n,
        "kl_nats": {"mean": fmean(divergences), "median": median(divergences), "max": max(divergences)},
        "kept_flops": sum(s.sparse.pairs for s in samples) / sum(s.dense.pairs for s in samples),
        "kept_inter_image_flops": sum(s.sparse.inter for s in samples) / inter if inter else None,
        "effective_share": effective / n,
        "ran": dict(Counter(s.sparse.ran for s in samples).most_common()),
        "prefill": _prefill([s.seconds for s in samples if s.seconds]),
        "n_with_calibration_pictures": sum(s.n_seen > 0 for s in samples),
        "data_hash": data_hash(samples),
        "marks": _marks(dense, sparse, effective),
    }


def data_hash(samples: Sequence[Sample]) -> str:
    """The hash of questions, pictures and expected answers, in the order of the file."""
    lines = "\n".join(f"{s.digest} {s.expected}" for s in sorted(samples, key=lambda s: s.line))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def check_unused(path: Path, run: dict[str, Any]) -> None:
    """Demands that a result may be written: there is no file yet, or it is an earlier result of this very run.

    Raises:
        ValueError: there is another file of that name.
    """
    if not path.exists():
        return
    try:
        document = read_json(path.read_text(encoding="utf-8"))
        same = document["format"] == FORMAT and document["run"] == run
    except (ValueError, TypeError, KeyError):
        same = False
    if not same:
        raise ValueError(f"--out must name a new file, or the result of this very run. Got {path}. Name another.")


def print_summary(figures_: dict[str, Any]) -> None:
    """Prints the figures for people."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "dense", "sparse"):
        table.add_column(name, justify="left" if not name else "right")
    arms = figures_["dense"], figures_["sparse"]
    table.add_row("accuracy", *(figures.percent(arm["accuracy"]) for arm in arms))
    table.add_row("95% interval", *(" to ".join(map(figures.percent, arm["interval_95"])) for arm in arms))
    table.add_row("invalid answers", *(figures.count(arm["invalid"]) for arm in arms))
    if timing := figures_["prefill"]:
        table.add_row("prefill, median", *(figures.seconds(timing[f"{name}_seconds"]) for name in ("dense", "sparse")))
    console = results()
    console.print(table)
    difference, kl = figures_["difference"], figures_["kl_nats"]
    low, high = (figures.points(x) for x in difference["interval_95"])
    alone = f"{difference['only_dense_right']} only dense right, {difference['only_sparse_right']} only sparse"
    lines = [
        "",
        f"{figures.count(figures_['n_items'])} items, {figures.count(figures_['n_multi_image'])} with several images",
        f"sparse - dense: {figures.points(difference['sparse_minus_dense'])} points, 95% interval {low} to {high}; "
        f"{alone}; McNemar p = {difference['mcnemar_exact_p']:.2g}",
        f"same answer {figures.percent(figures_['agreement'])}, KL of the first token {figures.nats(kl['mean'])} nats",
        f"attention FLOPs kept {figures.percent(figures_['kept_flops'])}"
        + (
            f", between images {figures.percent(figures_['kept_inter_image_flops'])}"
            if figures_["kept_inter_image_flops"] is not None
            else ""
        ),
        f"sparsity did something on {figures.percent(figures_['effective_share'])} of the items",
    ]
    if timing:
        lines.append(f"prefill dense / sparse: {figures.ratio(timing['ratio'])} (median of {timing['n']} items)")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _arm(arms: Sequence[Arm]) -> dict[str, Any]:
    right = sum(arm.right for arm in arms)
    return {
        "right": right,
        "accuracy": right / len(arms),
        "interval_95": list(wilson(right, len(arms))),
        "invalid": sum(arm.verdict is None for arm in arms),
    }


def _answer(arm: Arm) -> tuple[bool, str]:
    """What is compared for agreement: what the answer was taken for; invalid ones by their text."""
    return arm.verdict is None, arm.text if arm.verdict is None else arm.verdict


def _prefill(timed: Sequence[tuple[float, ...]]) -> dict[str, Any] | None:
    """Medians over the timed items; the ratio is the median of each item's own."""
    if not timed:
        return None
    return {
        "n": len(timed),
        "dense_seconds": median(dense for dense, _ in timed),
        "sparse_seconds": median(sparse for _, sparse in timed),
        "ratio": median(dense / sparse for dense, sparse in timed),
    }


def _marks(dense: dict[str, Any], sparse: dict[str, Any], effective: int) -> list[str]:
    marks = []
    if not effective:
        marks.append("sparsity did nothing on any item: both columns are the dense model")
    for name, arm in (("dense", dense), ("sparse", sparse)):
        if not arm["right"]:
            marks.append(f"{name} gave no right answer ({arm['invalid']} invalid): its accuracy says nothing")
    return marks
