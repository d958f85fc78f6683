"""Attention through `attend`, by Pallas in the simulator, beside the portable one; prints how they differ as JSON.

Run in a process of its own that is ended from outside, because the simulator can hang.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "NPROC": "16"}  # before jax: the simulator's warpgroups wait for one another

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

import simulated
from jax_blindsight.attention import attend
from jax_blindsight.implementations import build_work
from shared_profiles import Layout, SinkTemplate

CASES: dict[str, dict[str, Any]] = {
    "causal": dict(),
    "bidirectional-window": dict(bidirectional=True, window=50),
    "chunk": dict(q_start=70),
}
CATEGORIES, DIM, QUERIES, KEYS = (3, 0, 2, 1), 64, 144, 192


def differences(window: int | None = None, q_start: int = 0, bidirectional: bool = False) -> dict[str, Any]:
    """A row of three images, and one of a single image that runs dense; all categories among the heads."""
    n = 140
    images = np.array([(5, 6, 70, 71), (72, 73, 100, 101), (101, 102, 130, 131)])
    layouts = [Layout(n, 0, n, images, bidirectional), Layout(n, 3, n, images[1:2], bidirectional)]
    rng = np.random.default_rng(0)
    shapes = (2, 4, QUERIES, DIM), (2, 2, KEYS, DIM), (2, 2, KEYS, DIM)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    k, v = (x.at[:, :, n:].set(jnp.nan) for x in (k, v))
    found = {}
    for impl in ("portable", "pallas"):
        options: dict[str, Any] = dict(window=window, q_start=q_start, n_queries=QUERIES, n_keys=KEYS)
        work = build_work(impl, layouts, SinkTemplate(local_block=64), head_dim=DIM, dense=[False, True], **options)
        if impl == "pallas":  # of the tiles without keys one is enough
            used = work.tiles[:, :, [4, 10]].any(axis=(0, 2)).sum()
            work = dataclasses.replace(work, tiles=work.tiles[:, : used + 1])
        interpret = plgpu.InterpretGPUParams() if impl == "pallas" else None
        how = dict(window=window, scale=0.125, bidirectional=bidirectional, interpret=interpret)
        out, lse = attend(q, k, v, work, categories=CATEGORIES, **how)
        found[impl] = np.asarray(out, np.float32), np.asarray(lse)
    (out, lse), (other, other_lse) = found["portable"], found["pallas"]
    real = np.isfinite(lse)
    return {
        "out": float(np.abs(out - other).max()),
        "lse": float(np.abs(lse[real] - other_lse[real]).max()),
        "rows": bool(np.array_equal(real, np.isfinite(other_lse))) and int(real.sum()),
        "largest": float(np.abs(out).max()),
    }


if __name__ == "__main__":
    simulated.speed_up()
    print(json.dumps({case: differences(**options) for case, options in CASES.items()}), flush=True)
    os._exit(0)  # whatever its threads still wait for
