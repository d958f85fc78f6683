"""Runs the Triton kernel interpreted, in a process of its own.

TRITON_INTERPRET counts when Triton is first imported and then holds for the whole process. So the tests run as usual,
and only their calls of the kernel go to a worker that is started with it; nothing leaks into other tests.

The interpreter looks through all of triton.language at every call of every device function, and works out for every
integer operation whether it overflows, to assert it in debug mode alone. Here it does either only where it counts.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Attend = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def worker() -> Iterator[Callable[..., Any]]:
    """Yields `call(function, *args)`, which runs a module's function where Triton is interpreted."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpret) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@contextmanager
def interpreted() -> Iterator[Attend]:
    """Yields `triton_attention` for CPU tensors; its outputs are filled with NaN before the kernel runs."""
    with worker() as call:

        def attend(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            dtype = str(q.dtype).removeprefix("torch.")
            out, lse = call(_attend, dtype, [x.float().numpy() for x in (q, k, v)], args, kwargs)
            return torch.from_numpy(out).to(q.dtype), torch.from_numpy(lse)

        yield attend


@contextmanager
def native() -> Iterator[Attend]:
    """Yields `triton_attention` on the GPU for CPU tensors; outputs filled with NaN likewise."""
    from blindsight_kernels.triton_prefill import triton_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        with nan_filled():
            out, lse = triton_attention(*(x.cuda() for x in (q, k, v)), *args, **kwargs)
        return out.cpu(), lse.cpu()

    yield attend


@contextmanager
def nan_filled() -> Iterator[None]:
    """Makes torch fill every tensor it allocates with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def interpret() -> None:
    """Prepares a worker, before it imports Triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    speed_up()


def speed_up() -> None:
    """Makes the interpreter of this process prepare triton.language once a launch, and check no overflow unseen."""
    from triton.runtime import interpreter

    patch_lang, prepared = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        """Prepares what the function's module knows as triton.language; undone at the end of the launch, the first."""
        if id(function.__globals__) in prepared:
            return None
        scope = patch_lang(function)
        if not prepared:
            restore = scope.restore
            scope.restore = lambda: (prepared.clear(), restore())
        prepared.add(id(function.__globals__))
        return scope

    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def _attend(dtype: str, arrays: list[np.ndarray], args: tuple, kwargs: dict) -> tuple[np.ndarray, np.ndarray]:
    from blindsight_kernels.triton_prefill import triton_attention

    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays)
    with nan_filled():
        out, lse = triton_attention(q, k, v, *args, **kwargs)
    return out.float().numpy(), lse.numpy()
