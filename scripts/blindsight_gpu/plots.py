"""The two plots of the README, drawn from result files: speed-up against length, useful TFLOP/s against the bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from blindsight_gpu.results import Row, good_rows

SPEED_UP, RATE = "gpu-speed-up.svg", "gpu-tflops.svg"
_PROFILES = ("all Intra-Image", "all Intra-Image+Sink", "all Sink", "30% Dense, rest Intra-Image+Sink")
_KERNELS = {"attention": ("Triton", "-"), "attention_more": ("Triton", "-"), "pallas": ("Pallas", "--")}
Lines = dict[tuple[tuple[str, str], str], list[tuple[int, float]]]  # points by kernel, its style, and name


def draw(documents: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draws what the parts in `_KERNELS` hold. Returns the files; none without measured rows.

    Args:
        documents: measured results by part, not of a dry run.
        folder: of the SVG files.
    """
    rows = {part: good_rows(documents[part]) for part in _KERNELS if part in documents}
    shapes = sorted({row["shape"] for found in rows.values() for row in found if "speed_up" in row}, reverse=True)
    if not shapes:
        return []
    speed_up = _plot(folder / SPEED_UP, rows, shapes, "speed-up over dense attention", lambda row: row.get("speed_up"))
    rate = _plot(folder / RATE, rows, shapes, "useful TFLOP/s", lambda row: row.get("useful_tflops"))
    return [speed_up, rate]


def _plot(
    path: Path,
    rows: dict[str, list[Row]],
    shapes: list[str],
    label: str,
    value: Callable[[Row], float | None],
) -> Path:
    """One picture with a panel for each shape, a line for each profile and kernel."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": path.name, "font.size": 9}):
        figure, panels = plt.subplots(1, len(shapes), figsize=(5.2 * len(shapes), 3.8), squeeze=False)
        for panel, shape in zip(panels[0], shapes, strict=True):
            for ((kernel, style), name), points in _lines(rows, shape, value).items():
                color = f"C{_PROFILES.index(name)}" if name in _PROFILES else "0.4"
                lengths, values = zip(*sorted(points), strict=True)
                said = f"{kernel}: {name}" if name in _PROFILES else name
                panel.plot(lengths, values, style, color=color, marker=".", label=said)
            panel.set(title=shape, xlabel="prompt tokens", ylabel=label, xscale="log")
            ticks = sorted({row["tokens"] for found in rows.values() for row in found if row["shape"] == shape})
            panel.set_xticks(ticks, [f"{tick / 1024:.0f}K" for tick in ticks], minor=False)
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path


def _lines(rows: dict[str, list[Row]], shape: str, value: Callable[[Row], float | None]) -> Lines:
    """Points of the profiles shown, and of the dense kernels: their rate on all pairs bounds every sparse one."""
    lines: Lines = {}
    for part, found in rows.items():
        for row in found:
            y = value(row)
            if row["shape"] != shape or y is None:
                continue
            if row.get("profile") in _PROFILES:
                lines.setdefault((_KERNELS[part], row["profile"]), []).append((row["tokens"], y))
            elif "kernel" in row:
                lines.setdefault((_KERNELS[part], f"the bound: {row['kernel']}, dense"), []).append((row["tokens"], y))
    return lines
