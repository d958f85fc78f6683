"""Timing two ways of doing the same thing in one run, so that a shared machine's moods hit both."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


def time_pair(dense: Callable[[], object], sparse: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, measured in turns after one unmeasured turn.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1. Got {repeats}.")
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for function, times in zip((dense, sparse), seconds, strict=True):
            begun = time.perf_counter()
            function()
            if turn:
                times.append(time.perf_counter() - begun)
    return median(seconds[0]), median(seconds[1])


def describe_cpu() -> tuple[str, int]:
    """The processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return name, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
