"""Part `sanitizer`: out-of-bounds accesses and races of small launches, by the tool that comes with CUDA.

`python -m blindsight_gpu.sanitizer KERNEL` is what the tool watches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from blindsight_gpu.bounds import Attend, draw, pallas
from blindsight_gpu.measure import Place
from blindsight_gpu.prompts import TEMPLATE, Shape, make_layout
from blindsight_gpu.results import Results, Row
from blindsight_kernels.triton_prefill import triton_attention
from shared_profiles import Category

_KERNELS: dict[str, Attend] = {"Triton": partial(triton_attention, max_keys=256), "Pallas": pallas}
_FOUND = 99  # the exit status that the tool is told to give where it found something
_MOST = 60  # seconds of one check


def run(results: Results, place: Place) -> None:
    """Every check of every kernel; one row that says why where there is no tool."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if place.dry_run or not Path(tool).exists():
        why = "a dry run" if place.dry_run else f"compute-sanitizer is neither on PATH nor at {tool}"
        results.measure("compute-sanitizer", lambda: {"note": f"not run: {why}"})
        return
    for check in ("memcheck", "racecheck"):
        for kernel in _KERNELS:
            results.measure(f"{check}: {kernel}", partial(_watch, tool, check, kernel, results))


def _watch(tool: str, check: str, kernel: str, results: Results) -> Row:
    """What one check says.

    Raises:
        RuntimeError: it found something, or did not end.
    """
    left = min(max(results.deadline - time.monotonic(), 10), _MOST)
    command = [tool, "--tool", check, "--error-exitcode", str(_FOUND), sys.executable, "-m", __name__, kernel]
    # Without the frameworks' caches every array is an allocation, and reads past its end are seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{check} did not end in {left:.0f} s") from None
    said = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        what = "found something" if done.returncode == _FOUND else "did not run"
        raise RuntimeError(f"{check} {what}: {said[-12:]}")
    return {check: next((line for line in reversed(said) if "SUMMARY" in line), "said nothing")}


if __name__ == "__main__":
    small = Shape("small", 4, 2, 64, 300, False)
    tensors = draw(small, 1000, Place(dry_run=False))
    _KERNELS[sys.argv[1]](*tensors, [make_layout(small, 1000)], list(Category), TEMPLATE, scale=0.125)
    torch.cuda.synchronize()
