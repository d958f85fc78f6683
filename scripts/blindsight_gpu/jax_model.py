"""Part `jax_model`: time to first token of the same whole models in JAX, dense and sparse, and calibrating one prompt.

`jax_blindsight.sparse_prefill` with random image features in the place of the vision tower's, as in part `model`; the
KV cache, which torch leaves out there, is returned. Every row is one side of one length, compiled on its own: what is
left out for want of time costs no other row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import ml_dtypes
import numpy as np
import torch

import jax_blindsight.prefill
from blindsight_gpu.calibration import GRADIENT, LENGTHS
from blindsight_gpu.in_jax import peak_gib, shared
from blindsight_gpu.measure import Place, free
from blindsight_gpu.model import DENSE_SHARE
from blindsight_gpu.models import Size, make_config, make_prompt, n_images, sizes
from blindsight_gpu.prompts import TEMPLATE, lengths, mixed
from blindsight_gpu.results import Results, Row
from jax_blindsight import Params, sparse_prefill
from jax_blindsight.buckets import bucket
from jax_blindsight.calibration import measure
from jax_blindsight.config import ModelConfig
from jax_blindsight.model import abstract_weights
from shared_profiles.budget import Budget, rankings_for
from shared_profiles.profile import Profile
from shared_profiles.profile_parts import Fingerprint

_ONCE = 5.0  # seconds of a prefill from which one run must do
# Gemma's cache at 300K tokens takes 118 GB, and with it nothing fits.
_MOST_CACHE = 70 << 30


def run(results: Results, place: Place) -> None:
    """Measures the 7B shape, then 3B and its calibration, then Gemma; short prompts first."""
    for size in sizes(place):
        cases = {
            f"{size.name}: {name}, {side}": n for name, n in lengths(place).items() for side in ("sparse", "dense")
        }
        calibrations = {}
        if size.name in ("Qwen2.5-VL-3B", "toy Qwen2.5-VL"):
            found, gradient = ({"toy": 128}, "toy") if place.dry_run else (LENGTHS, GRADIENT)
            calibrations = {f"{size.name}: {name}, calibration": n for name, n in found.items()}
            calibrations[f"{size.name}: {gradient}, gradient"] = found[gradient]
        everything = [*cases, *calibrations]
        if all(results.get(case) for case in everything) or results.over:
            results.leave_out(everything)
            continue
        free(place)
        params = make_params(size, place)
        for case, n_tokens in cases.items():
            results.measure(case, partial(_prefill, params, size, n_tokens, case.endswith("dense"), place))
        for case, n_tokens in calibrations.items():
            budget = Budget() if case.endswith("gradient") else None
            results.measure(case, partial(_calibrate, params, size, n_tokens, budget, place))
        del params
        jax.clear_caches()


def make_params(size: Size, place: Place) -> Params:
    """A random model, its weights drawn by torch on the device and shared, with part `model`'s profile."""
    settings = make_config(size)
    config = ModelConfig.from_hf(settings)
    generator = torch.Generator(place.device).manual_seed(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = torch.empty(leaf.shape, dtype=place.dtype, device=place.device)
        is_scale = getattr(path[-1], "key", None) == "scale"
        return shared(x.normal_(float(is_scale), 0.02, generator=generator))

    weights = jax.tree_util.tree_map_with_path(draw, abstract_weights(config, np.float32))
    print_ = Fingerprint(
        settings.model_type, size.layers, size.heads, size.kv_heads, size.dim, "sha256:" + 64 * "0"
    )  # of no checkpoint
    categories = np.array([mixed(size.heads, DENSE_SHARE)] * size.layers, dtype=np.int8)
    profile = Profile(categories, TEMPLATE, print_, None, {"method": "manual", "dense_share": DENSE_SHARE})
    return Params(weights, config, profile, print_, settings.to_json_string())


def make_inputs(size: Size, n_tokens: int) -> tuple[dict[str, np.ndarray], int]:
    """The prompt of part `model` in NumPy, with pixels that take no memory, and how many images it has."""
    prompt = make_prompt(size, n_tokens, Place(dry_run=True))
    n = n_images(prompt)
    arrays = {name: x.numpy() for name, x in prompt.items()}
    shape = (n, 3, size.image, size.image) if size.window is not None else (n * size.image**2, 3 * 2 * 14 * 14)
    arrays["pixel_values"] = np.broadcast_to(np.zeros((), ml_dtypes.bfloat16), shape)
    return arrays, n


@contextmanager
def without_tower(size: Size, n: int, place: Place) -> Iterator[None]:
    """Gives random features for `n` images instead of running the vision tower on them."""
    drawn = torch.randn(n * size.image_tokens, size.hidden, dtype=place.dtype, device=place.device)
    features = shared(drawn)

    with (
        patch.object(jax_blindsight.prefill, "prepare_vision", lambda *_, **__: None),
        patch.object(jax_blindsight.prefill, "_encode", lambda *_, **__: features),
    ):
        yield


def _prefill(params: Params, size: Size, n_tokens: int, dense: bool, place: Place) -> Row:
    """Seconds of one prompt's prefill, of the host's part, and of the first call, which compiles."""
    cache = 2 * size.layers * size.kv_heads * n_tokens * size.dim * place.dtype.itemsize
    if cache > _MOST_CACHE:
        return {"tokens": n_tokens, "note": f"not run: its KV cache takes {cache / 2**30:.0f} GiB"}
    free(place)
    inputs, n = make_inputs(size, n_tokens)
    done: Any = None

    def once() -> float:
        nonlocal done
        done = None  # its cache is given back
        begun = time.perf_counter()
        done = sparse_prefill(params, inputs, capacity=n_tokens, dense=dense)
        jax.block_until_ready(done.logits)
        return time.perf_counter() - begun

    with without_tower(size, n, place):
        first, seconds = _timed(once, place)
    return {
        "tokens": n_tokens,
        "images": n,
        "dense_heads": 1.0 if dense else DENSE_SHARE,
        "bucket": bucket(n_tokens),
        "how": done.how,
        "impl": done.impl,
        "seconds": seconds,
        "compile_s": max(first - seconds, 0.0),
        "peak_gib": peak_gib(place),
    }


def _calibrate(params: Params, size: Size, n_tokens: int, budget: Budget | None, place: Place) -> Row:
    """Seconds of measuring one prompt in every layer, head and category: `calibrate` without reading 1 GB of pixels.

    For a budget by a backward pass, too, as by default.
    """
    free(place)
    inputs, n = make_inputs(size, n_tokens)

    def once() -> float:
        begun = time.perf_counter()
        measure(params, inputs, TEMPLATE, rankings=rankings_for(budget))
        return time.perf_counter() - begun

    with without_tower(size, n, place):
        first, seconds = _timed(once, place)
    return {
        "tokens": n_tokens,
        "images": n,
        "seconds": seconds,
        "compile_s": first - seconds,
        "peak_gib": peak_gib(place),
    }


def _timed(once: Callable[[], float], place: Place) -> tuple[float, float]:
    """Seconds of the first call, and the median of later ones: three, or one where that takes long."""
    first, second = once(), once()
    if place.dry_run or second > _ONCE:
        return first, second
    return first, float(np.median([second, once(), once()]))
