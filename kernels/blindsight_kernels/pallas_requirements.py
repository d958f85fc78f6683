"""The parts of jax that the Pallas kernel is made of, or an ImportError that says what to install."""

from __future__ import annotations

_NEEDS = "the Pallas kernel needs jax 0.11.2 or later"
_WITHOUT = "the portable and reference implementations need no Pallas"
try:
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError as error:
    raise ImportError(
        f"{_NEEDS}. It could not be imported: {error}. Install it (pip install 'jax[cuda13]>=0.11.2'), or: {_WITHOUT}."
    ) from error
if jax.__version_info__ < (0, 11, 2):
    raise ImportError(f"{_NEEDS}. Got {jax.__version__}. Upgrade it, or do without: {_WITHOUT}.")

__all__ = ["jax", "jnp", "lax", "pl", "plgpu"]
