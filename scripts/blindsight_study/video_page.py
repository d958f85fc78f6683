"""The study of videos as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blindsight_cli.evaluation.statistics import PairedCounts
from blindsight_cli.smallvlm.puzzles import KINDS
from blindsight_study.page import points, table
from shared_profiles import SPARSE, Category
from shared_profiles._atomic import write_atomically

_FORMS = """\
| form | the prompt |
| --- | --- |
| pictures | `1 <start> . . . <end> 2 <start> . . . <end> question`, as the model was trained |
| films | the same, every picture a video of its own: delimiters and a text per frame, as Qwen3-VL writes videos |
| unnumbered | `<start> . . . <end> <start> . . . <end> question`: delimiters per frame, no text |
| film | `<start> . . . . . . <end> question`: one video, as Qwen2-VL and Qwen2.5-VL write it |"""


def write_page(results: dict[str, Any], path: Path) -> None:
    """Writes the tables in Markdown."""
    lines = [
        "# Videos: frames as images",
        "",
        f"{results['about']} Made by `scripts/video_study.py`. The model was trained on numbered pictures alone and "
        "never saw a video: read differences between forms as what a missing delimiter or number does to a model that "
        "relies on them, not as what a video model would do.",
        "",
        _FORMS,
    ]
    lines += ["", "## What the dense model answers", "", *_answers(results["answers"])]
    lines += ["", "## Where image rows look", "", *_looks(results["looks"])]
    lines += ["", "## What every category keeps, all heads alike", "", *_kept(results["categories"]["rows"])]
    lines += ["", "## Heads by thresholds", "", *_thresholds(results["categories"])]
    lines += ["", f"## Profiles by a budget of {results['budget']:g} nats, across forms", ""]
    lines += _profiles(results["profiles"])
    lines += ["", "## Pairs kept of a long video", "", *_long(results["long_video"])]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _answers(rows: list[dict[str, Any]]) -> list[str]:
    head = ("form", "tokens", "right", *KINDS, "largest difference to pictures (nats)")
    cells = [
        (
            r["form"],
            r["tokens"],
            f"{r['right']:.1%}",
            *(f"{r['kinds'][kind]:.0%}" for kind in KINDS),
            f"{r['from_pictures']:.2g}",
        )
        for r in rows[:-1]
    ]
    return [*table(head, cells), "", f"{rows[-1]['form'].capitalize()} is right in {rows[-1]['right']:.1%}."]


def _looks(rows: list[dict[str, Any]]) -> list[str]:
    names = tuple(rows[0]["others"])
    head = ("form", "own", "text", *(f"others' {name}" for name in names))

    def cell(row: dict[str, Any], name: str) -> str:
        return f"{row['others'][name]:.1%} ({row['per_token'][name]:.2f}x)" if row["others"][name] else "none"

    cells = [(r["form"], f"{r['own']:.1%}", f"{r['text']:.1%}", *(cell(r, name) for name in names)) for r in rows]
    note = "Means over heads and prompts; in brackets per token, over an average token of other pictures."
    return [*table(head, cells), "", note]


def _kept(rows: list[dict[str, Any]]) -> list[str]:
    head = ("form", "sinks", "category", "mass retained", "pairs kept", "KL (nats)")
    cells = [
        (r["form"], r["sinks"], r["category"], f"{r['mass']:.3f}", f"{r['kept']:.1%}", f"{r['kl']:.4f}") for r in rows
    ]
    return table(head, cells)


def _thresholds(found: dict[str, Any]) -> list[str]:
    head = ("gammas", "sinks", "form", *(c.name for c in Category), "as in pictures")
    cells = [
        (r["gammas"], r["sinks"], r["form"], *(r["heads"][c.name] for c in Category), f"{r['same']:.0%}")
        for r in found["thresholds"]
    ]
    alike = ", ".join(f"{form} {value:.2f}" for form, value in found["alike"].items() if form != "pictures")
    note = f"Correlation over heads of the mass that INTRA_IMAGE_SINK retains with that in pictures: {alike}."
    return [*table(head, cells), "", note]


def _profiles(rows: list[dict[str, Any]]) -> list[str]:
    head = ("profile of", "sparse heads", "heads as of pictures", "asked in", "pairs kept", "KL (nats)", "dense")
    cells = []
    for r in rows:
        counts = PairedCounts(**r["answers"])
        dense = f"{counts.dense_right / counts.n:.1%}"
        cells.append(
            (
                *(r["profile"], r["sparse_heads"], f"{r['same']:.0%}", r["form"], f"{r['kept']:.1%}"),
                *(f"{r['kl']:.5f}", dense, points(counts), f"{r['agreement']:.1%}"),
            )
        )
    return table((*head, "accuracy: points", "same answer"), cells)


def _long(rows: list[dict[str, Any]]) -> list[str]:
    head = ("form", "frame groups", "tokens", *(c.name for c in SPARSE))
    cells = [(r["form"], r["frames"], r["tokens"], *(f"{r['kept'][c.name]:.2%}" for c in SPARSE)) for r in rows]
    return table(head, cells)
