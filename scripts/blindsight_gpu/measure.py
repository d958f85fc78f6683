"""Time and memory on a GPU, and where parts run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

_WARM_UP, _LEAST, _MOST = 2, 3, 15
_BUDGET = 0.5  # seconds of repeats of one case, once warm
# Seconds of a call from which the warm-up itself is the measurement, and below which it is repeated.
_LONG, _SHORT = 10.0, 2.0


@dataclass(frozen=True)
class Place:
    """Where a part runs: on the GPU at full size, or on the CPU at toy size.

    Attributes:
        dry_run: whether it is the latter.
    """

    dry_run: bool

    @property
    def device(self) -> torch.device:
        """CPU in a dry run."""
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """What the benchmarks compute in."""
        return torch.float32 if self.dry_run else torch.bfloat16

    def wait(self) -> None:
        """Until everything that was launched has ended."""
        if not self.dry_run:
            torch.cuda.synchronize()


def seconds_per_call(call: Callable[[int], object], place: Place, *, once: bool = False) -> float:
    """Median seconds of `call(turn)`, by CUDA events after a warm-up.

    Args:
        call: what to time; it picks another set of inputs for each turn, so that none is still in cache.
        place: the host's clock is used in a dry run.
        once: one call and no warm-up, for calls of many seconds whose kernels have run before.
    """
    if place.dry_run:
        begun = time.perf_counter()
        call(0)
        return time.perf_counter() - begun
    if once:
        return _timed(call, 1)[0]
    estimate = _timed(call, _WARM_UP)[-1]
    return median(_timed(call, int(min(max(_BUDGET / estimate, _LEAST), _MOST))))


def first_seconds(call: Callable[[], object], place: Place) -> float:
    """Seconds of a first call until its kernels have ended: libraries plan, and kernels compile, for a new length."""
    place.wait()
    begun = time.perf_counter()
    call()
    place.wait()
    return time.perf_counter() - begun


def _timed(call: Callable[[int], object], n: int) -> list[float]:
    """Seconds of each of `n` calls, launched one after another without waiting, as the layers of a model are."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for turn in range(n):
        call(turn)
        marks[turn + 1].record()
    torch.cuda.synchronize()
    return [max(a.elapsed_time(b), 1e-3) / 1e3 for a, b in pairwise(marks)]


def peak_gib(call: Callable[[], object], place: Place) -> float | None:
    """Peak GPU memory that torch holds while `call` runs, in GiB, everything allocated before included.

    None in a dry run, which calls nothing.
    """
    if place.dry_run:
        return None
    free(place)
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def peak_and_seconds(call: Callable[..., object], place: Place) -> tuple[float | None, float]:
    """Peak GPU memory of a long call, as `peak_gib`, and its seconds.

    The call that measures the peak warms up; where it takes long, it is the measurement: its kernels should have been
    compiled before, and what else it warms up is next to nothing.
    """
    begun = time.perf_counter()
    peak = peak_gib(call, place)
    seconds = time.perf_counter() - begun
    if seconds < _LONG:
        seconds = seconds_per_call(call, place, once=True)
    if seconds < _SHORT and not place.dry_run:
        seconds = seconds_per_call(call, place)
    return peak, seconds


def free(place: Place) -> None:
    """Gives cached GPU memory back."""
    gc.collect()
    if not place.dry_run:
        torch.cuda.empty_cache()
