"""Part `profile`: what keeps the kernels from their bound, by Nsight Compute, and by what needs no counters without it.

`python -m blindsight_gpu.profile KERNEL` is what `ncu` watches: two launches, of which it profiles the second. All that
it says is in `gpu-profile.log`.
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from blindsight_gpu.bounds import Attend, pallas
from blindsight_gpu.measure import Place, free
from blindsight_gpu.processes import Logged
from blindsight_gpu.prompts import LENGTHS, QWEN, TEMPLATE, Shape, make_inputs, make_layout
from blindsight_gpu.results import Results, Row
from blindsight_kernels import pallas_compile, triton_compile
from blindsight_kernels.triton_prefill import triton_attention
from shared_profiles import Category

_KERNELS: dict[str, tuple[Attend, Category, str]] = {
    "Triton, Intra-Image+Sink": (triton_attention, Category.INTRA_IMAGE_SINK, "^prefill_kernel"),
    "Triton, Dense": (triton_attention, Category.DENSE, "^prefill_kernel"),
    "Pallas, Intra-Image+Sink": (pallas, Category.INTRA_IMAGE_SINK, "blindsight_prefill"),
}
_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
_KEPT = (
    *("Duration", "SM Frequency", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput"),
    *("L2 Cache Throughput", "L2 Hit Rate", "L1/TEX Hit Rate", "Mem Pipes Busy", "Achieved Occupancy"),
    *("Theoretical Occupancy", "Registers Per Thread", "Warp Cycles Per Issued Instruction"),
)
_TOY = Shape("toy", 2, 1, 16, 24, False)
_MOST = 60  # seconds of one kernel under the tool


def run(results: Results, place: Place) -> None:
    """One row a kernel."""
    results.path.with_suffix(".log").unlink(missing_ok=True)
    tool = None if place.dry_run else shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    names = [name for name in _KERNELS if not place.dry_run or "Triton" in name]
    results.run({name: partial(_row, name, tool, results, place) for name in names})


def _row(name: str, tool: str | None, results: Results, place: Place) -> Row:
    """What `ncu` counts; where it cannot, why, and what is known without counters."""
    if tool is None or not Path(tool).exists():
        why = "a dry run" if tool is None else f"ncu is neither on PATH nor at {tool}"
        return {"ncu_note": f"not run: {why}"} | _without_counters(name, place)
    log = results.path.with_suffix(".log")
    before = log.stat().st_size if log.exists() else 0
    # Clocks are left alone, as everywhere here.
    command = [
        tool,
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "details",
        "--launch-skip",
        "1",
        "--launch-count",
        "1",
    ]
    command += ["--kernel-name", f"regex:{_KERNELS[name][2]}"]
    command += [argument for section in _SECTIONS for argument in ("--section", section)]
    running = Logged([*command, sys.executable, "-m", "blindsight_gpu.profile", name], log, os.environ)
    status = running.wait(min(results.deadline, time.monotonic() + _MOST))
    said = log.read_bytes()[before:].decode(errors="replace")
    if status == 0 and (metrics := read_metrics(said)):
        return {"metrics": metrics}
    why = "ERR_NVGPUCTRPERM: no permission to read counters" if "ERR_NVGPUCTRPERM" in said else said.strip()[-300:]
    return {"ncu_note": f"ncu ended with {status}: {why}"} | _without_counters(name, place)


def read_metrics(said: str) -> dict[str, str]:
    """The metrics that are kept, by name and unit, from what `ncu --csv --page details` writes."""
    lines = [line for line in said.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["Metric Name"] in _KEPT]
    return {f"{row['Metric Name']} ({row['Metric Unit']})": row["Metric Value"] for row in rows}


def _without_counters(name: str, place: Place) -> Row:
    """Microseconds of each kernel of a launch, by torch's profiler, and what ours uses, by the committed tables."""
    free(place)
    launch = _launcher(name, place)
    launch()
    with torch.profiler.profile(acc_events=True) as seen:
        launch()
        place.wait()
    spent = {
        event.key[:80]: event.self_cpu_time_total if place.dry_run else event.self_device_time_total
        for event in seen.key_averages()
        if place.dry_run or event.device_type is DeviceType.CUDA
    }
    longest = sorted(spent, key=lambda key: -spent[key])[:5]
    uses: Any = triton_compile.read_table()[triton_compile.name_of(90, QWEN.dim, "bf16")]
    if "Pallas" in name:
        uses = pallas_compile.read_table()[pallas_compile.name_of(QWEN.dim, "bfloat16")]
    return {"kernels_us": {key: spent[key] for key in longest}, "uses": asdict(uses)}


def _launcher(name: str, place: Place) -> Callable[[], object]:
    """A launch of Qwen's layer at 100K tokens."""
    attend, category, _ = _KERNELS[name]
    shape, n_tokens = (_TOY, 128) if place.dry_run else (QWEN, LENGTHS["100K"])
    inputs, layout = make_inputs(shape, n_tokens, place, 0), make_layout(shape, n_tokens)
    return partial(attend, *inputs, [layout], [category] * shape.heads, TEMPLATE, scale=shape.dim**-0.5)


if __name__ == "__main__":
    watched = _launcher(sys.argv[1], Place(dry_run=False))
    for _ in range(2):
        watched()
    torch.cuda.synchronize()
