"""Timing two ways of doing the same thing in one run, so that a shared machine's moods hit both."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median


def time_pair(dense: Callable[[], object], sparse: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, measured in turns after one unmeasured turn.

    Raises:
        ValueError: fewer than one repeat.
    """
    return median_pair(partial(_seconds, dense), partial(_seconds, sparse), repeats)


def median_pair(dense: Callable[[], float], sparse: Callable[[], float], repeats: int) -> tuple[float, float]:
    """As `time_pair`, of functions that measure themselves and return seconds."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1. Got {repeats}.")
    turns = [(dense(), sparse()) for _ in range(repeats + 1)][1:]
    return median(turn[0] for turn in turns), median(turn[1] for turn in turns)


def _seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


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
