"""JAX's settings as the programs of this package expect them, whatever the caller has on for programs of his own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import jax


def with_own_settings[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function, run where shapes and dtypes broadcast, NumPy arrays may go to devices, and no mesh is set.

    All of this is what JAX does by default. Rows of padding have log-sum-exps of `-inf`, which is no mistake. The mesh
    of a model is that of its `Params`, passed on by name.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
            jax.transfer_guard("allow"),
            jax.debug_infs(False),
            jax.set_mesh(None),
        ):
            return function(*args, **kwargs)

    return run
