"""Arrays shared between torch and JAX, and time as JAX sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import torch
from torch import Tensor

from blindsight_gpu.measure import Place

_BURST, _MOST, _REPEATS = 0.05, 100, 5  # seconds and launches of a burst, and bursts


def shared(x: Tensor) -> jax.Array:
    """A tensor's memory as a JAX array, which must be written to no more; on a CPU it may be a copy."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return jax.dlpack.from_dlpack(x.detach().contiguous())


def seconds_per_jax_call(call: Callable[[int], Any], place: Place, *, once: bool = False) -> float:
    """Median seconds of `call(turn)` in bursts that are launched without waiting, as the layers of a model are.

    Args:
        call: what to time, compiled; it picks another set of inputs for each turn, so that none is still in cache.
        place: one call in a dry run.
        once: one call and no warm-up.
    """
    if place.dry_run or once:
        return _burst(call, 1)
    _burst(call, 2)
    n = int(min(max(_BURST / _burst(call, 1), 1), _MOST))
    return median(_burst(call, n) for _ in range(_REPEATS))


def _burst(call: Callable[[int], Any], n: int) -> float:
    begun = time.perf_counter()
    for turn in range(n):
        out = call(turn)
    jax.block_until_ready(out)  # launches of one device end in order
    return (time.perf_counter() - begun) / n


def compile_for(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """The function compiled for such arguments, and the seconds that tracing, lowering and compiling took."""
    begun = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - begun


def peak_gib(place: Place) -> float | None:
    """Peak GPU memory of JAX since the process began, which its one row explains, and what torch holds now, in GiB.

    None in a dry run.
    """
    if place.dry_run:
        return None
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"] + torch.cuda.memory_allocated()
    return round(peak / 2**30, 2)
