"""Sparse prefill for vision-language models in JAX: `load` a checkpoint, `sparse_prefill` a prompt, `generate`."""

from jax_blindsight.cache import Cache
from jax_blindsight.calibration import calibrate
from jax_blindsight.generation import decode_step, generate, write
from jax_blindsight.params import Params, load, save
from jax_blindsight.prefill import Prefilled, sparse_prefill
from jax_blindsight.sharding import make_mesh

__all__ = [
    "Cache",
    "Params",
    "Prefilled",
    "calibrate",
    "decode_step",
    "generate",
    "load",
    "make_mesh",
    "save",
    "sparse_prefill",
    "write",
]
