"""Runs the Pallas kernel in the simulator of Mosaic GPU, in a process of its own and against the clock; or natively.

A kernel that forgets an arrive hangs, so the caller waits for a stated time and then ends the process. The simulator
runs warpgroups as threads that wait for one another: XLA needs more threads than a small machine has cores. It also
compiles a block's program anew for every thread of every block, and makes JAX arrays of what the program reports to it
at every step; here programs are compiled once, and what they report stays in NumPy.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SECONDS = 150  # for one call, on a busy machine
Simulate = Callable[..., tuple[np.ndarray, np.ndarray, bool]]


@contextmanager
def simulator(seconds: int = SECONDS) -> Iterator[Simulate]:
    """Yields `simulate(q, k, v, layouts, categories, template, ...)`, the kernel's outputs and whether it raced.

    Arrays are NumPy, float32 and rounded to `dtype` inside; outputs come back in float32. `max_keys` is that of
    `build_plan`. Races are looked for unless `races=False`, which is twice as fast. `planted` is a pair of texts: the
    kernel's source runs with the first replaced by the second. What the simulator refuses is raised as RuntimeError.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare)

    def simulate(*args, **kwargs) -> tuple[np.ndarray, np.ndarray, bool]:
        try:
            return pool.submit(_simulate, args, kwargs).result(seconds)
        except OutOfTime:
            for process in list(pool._processes.values()):
                process.kill()
            raise TimeoutError(f"the simulated kernel must end. Got nothing after {seconds} s: it hangs.") from None

    try:
        yield simulate
    finally:
        for process in list((pool._processes or {}).values()):  # its threads may hang after a refusal
            process.kill()
        pool.shutdown(cancel_futures=True)


@contextmanager
def native() -> Iterator[Simulate]:
    """Yields the same on the GPU: nothing races or hangs, and `races` and `planted` mean nothing."""

    def attend(*args, **kwargs) -> tuple[np.ndarray, np.ndarray, bool]:
        return *_attend(args, kwargs, None), False

    yield attend


def _prepare() -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    speed_up()


def speed_up() -> None:
    """Makes the simulator of this process compile each block's program once, and leave what it reports in NumPy."""
    import jax
    from jax._src import callback as callbacks
    from jax._src.pallas.mosaic.interpret import thread_map

    compiled: dict = {}
    lock = threading.Lock()

    def run_once_compiled(jaxpr, consts, *args) -> None:
        with lock:
            if jaxpr not in compiled:
                traced = jax.jit(thread_map._run, static_argnums=(0,)).trace(jaxpr, consts, *args)
                compiled[jaxpr] = traced.lower().compile()
        compiled[jaxpr](consts, *args)

    def in_numpy(*args, callback, **_) -> list[np.ndarray]:
        """The callback of copies: XLA lends it its own memory. Positions and tokens are scalars, wanted as integers."""
        args = (x.item() if x.shape == () and x.dtype.kind in "iu" else np.array(x) for x in args)
        return [np.asarray(x) for x in callback(*args)]

    thread_map._run_jaxpr = run_once_compiled
    callbacks.io_callback_impl = in_numpy


def _simulate(args: tuple, kwargs: dict) -> tuple[np.ndarray, np.ndarray, bool]:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as state
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from blindsight_kernels import pallas_prefill

    planted, races = kwargs.pop("planted", None), kwargs.pop("races", True)
    state.reset_gpu_interpret_mode_state()
    kernel = pallas_prefill.prefill_kernel
    try:
        if planted:
            pallas_prefill.prefill_kernel = _with_bug(*planted)
            pallas_prefill._attention.clear_cache()
        out, lse = _attend(args, kwargs, plgpu.InterpretGPUParams(detect_races=races))
    except Exception as error:  # XLA's errors do not travel between processes
        raise RuntimeError(str(error)[-2000:]) from None
    finally:
        if planted:
            pallas_prefill.prefill_kernel = kernel
            pallas_prefill._attention.clear_cache()
    return out, lse, races and bool(state.get_races().races_found)


def _attend(args: tuple, kwargs: dict, interpret) -> tuple[np.ndarray, np.ndarray]:
    import jax.numpy as jnp

    from blindsight_kernels.pallas_configurations import configuration
    from blindsight_kernels.pallas_prefill import pallas_attention
    from blindsight_kernels.pallas_work import build_pallas_work
    from shared_profiles.plan import build_plan

    q, k, v, layouts, categories, template = args
    options: dict = dict(dtype="bfloat16", window=None, q_start=0, max_keys=None, tiles=None, kv_heads=None) | kwargs
    q, k, v = (jnp.asarray(x, options["dtype"]) for x in (q, k, v))
    where = {name: options[name] for name in ("window", "q_start", "max_keys")}
    plans = tuple(build_plan(x, template, tile_rows=min(128, template.local_block), **where) for x in layouts)
    tiles = options["tiles"] or configuration(q.shape[3])
    work = build_pallas_work(plans, tiles.block_k, n_queries=q.shape[2], n_keys=k.shape[2])
    used = work.tiles[:, :, [4, 10]].any(axis=(0, 2)).sum()  # of the unused tiles one is enough
    work = dataclasses.replace(work, tiles=work.tiles[:, : used + 1])
    categories = np.asarray(categories, np.int32)
    out, lse = pallas_attention(
        q,
        k,
        v,
        work,
        categories,
        scale=q.shape[3] ** -0.5,
        kv_heads=options["kv_heads"],
        tiles=tiles,
        interpret=interpret,
    )
    return np.asarray(out.astype(jnp.float32)), np.asarray(lse)


def _with_bug(before: str, after: str) -> Callable:
    """The kernel compiled from its own source with one text replaced."""
    from blindsight_kernels import pallas_kernel

    source = Path(pallas_kernel.__file__).read_text(encoding="utf-8")
    assert source.count(before) == 1, f"{before!r} must stand in the kernel's source once"
    module = types.ModuleType("pallas_kernel_with_bug")
    sys.modules[module.__name__] = module
    exec(compile(source.replace(before, after), pallas_kernel.__file__, "exec"), module.__dict__)
    return module.prefill_kernel
