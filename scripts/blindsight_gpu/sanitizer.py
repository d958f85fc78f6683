"""Part `sanitizer`: out-of-bounds accesses and races of small launches, by the tool that comes with CUDA.

`python -m blindsight_gpu.sanitizer KERNEL` is what the tool watches. The checks run side by side, for most of their
time is the host's; what they say is in `gpu-sanitizer.log`, one after another.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from blindsight_gpu.bounds import Attend, draw, pallas
from blindsight_gpu.measure import Place
from blindsight_gpu.processes import Logged
from blindsight_gpu.prompts import TEMPLATE, Shape, make_layout
from blindsight_gpu.results import Results, Row
from blindsight_kernels.triton_prefill import triton_attention
from shared_profiles import Category

_KERNELS: dict[str, Attend] = {"Triton": partial(triton_attention, max_keys=256), "Pallas": pallas}
_FOUND = 99  # the exit status that the tool is told to give where it found something


def run(results: Results, place: Place) -> None:
    """Every check of every kernel; one row that says why where there is no tool."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if place.dry_run or not Path(tool).exists():
        why = "a dry run" if place.dry_run else f"compute-sanitizer is neither on PATH nor at {tool}"
        results.run({"compute-sanitizer": lambda: {"note": f"not run: {why}"}})
        return
    log = results.path.with_suffix(".log")
    log.unlink(missing_ok=True)
    checks = [(check, kernel) for check in ("memcheck", "racecheck") for kernel in _KERNELS]
    begun = {
        f"{check}: {kernel}": (check, watch(tool, check, kernel, part), part)
        for check, kernel in checks
        if results.get(f"{check}: {kernel}") is None
        for part in [log.with_name(f"sanitizer-{check}-{kernel}.tmp")]
    }
    results.run({case: partial(_said, *one, log, results) for case, one in begun.items()})
    for _, running, _ in begun.values():
        running.wait(results.deadline)  # ends those for which no time was left


def watch(tool: str, check: str, kernel: str, log: Path) -> Logged:
    """Begins one check."""
    log.unlink(missing_ok=True)
    # Frameworks ask the driver for what it may refuse, and go on: such calls are no finding about a kernel.
    command = [tool, "--tool", check, "--error-exitcode", str(_FOUND)]
    command += ["--report-api-errors", "no"] * (check == "memcheck")
    # Without the frameworks' caches every array is an allocation, and reads past its end are seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    return Logged([*command, sys.executable, "-m", __name__, kernel], log, environment)


def _said(check: str, running: Logged, part: Path, log: Path, results: Results) -> Row:
    """What one check says, once it ends; a `failure` where it found something or did not end."""
    status = running.wait(results.deadline)
    text = part.read_text(encoding="utf-8", errors="replace")
    part.unlink()
    with log.open("a", encoding="utf-8") as whole:
        whole.write(f"== {part.stem}: exit status {status}\n{text}\n")
    said = text.strip().splitlines()
    if status is None:
        return {"failure": f"{check} did not end in its part's time: {said[-3:]}"[:500]}
    if status:
        what = "found something" if status == _FOUND else "did not run"
        return {"failure": f"{check} {what}: {said[-12:]}"[:500]}
    return {check: next((line for line in reversed(said) if "SUMMARY" in line), "said nothing")}


if __name__ == "__main__":
    small = Shape("small", 4, 2, 64, 300, False)
    tensors = draw(small, 1000, Place(dry_run=False))
    _KERNELS[sys.argv[1]](*tensors, [make_layout(small, 1000)], list(Category), TEMPLATE, scale=0.125)
    torch.cuda.synchronize()
