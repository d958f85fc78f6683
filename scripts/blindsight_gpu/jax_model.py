"""Part `jax_model`: prefill of the same language models in JAX, dense and sparse, and calibrating one prompt.

`jax_blindsight.sparse_prefill` with random image features in the place of the vision tower's, as in part `model`; the
KV cache, which torch leaves out there, is returned. Every row is one side of one length in a process of its own, for
JAX counts its peak memory since the process began.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import ml_dtypes
import numpy as np
import torch

import jax_blindsight.prefill
from blindsight_gpu import calibration
from blindsight_gpu.in_jax import peak_gib, seconds_per_jax_call, shared
from blindsight_gpu.measure import Place, free
from blindsight_gpu.model import DENSE_SHARE
from blindsight_gpu.models import Size, make_config, make_prompt, n_image_tokens, n_images, sizes
from blindsight_gpu.pallas import Inputs
from blindsight_gpu.prompts import TEMPLATE, lengths, mixed
from blindsight_gpu.results import Cases, Results, Row, note_of
from jax_blindsight import Params, sparse_prefill
from jax_blindsight.buckets import bucket
from jax_blindsight.calibration import measure
from jax_blindsight.config import ModelConfig
from jax_blindsight.model import abstract_weights
from jax_blindsight.vision_inputs import feature_places
from shared_profiles.budget import Budget, rankings_for
from shared_profiles.profile import Profile
from shared_profiles.profile_parts import Fingerprint

_ONCE = 5.0  # seconds of a prefill from which one run must do
# Gemma's cache at 300K tokens takes 118 GB, and with it nothing fits.
_MOST_CACHE = 70 << 30


def run(results: Results, place: Place) -> None:
    """Measures the first model at the lengths of the targets, then the second's calibration, then the rest."""
    found, models = lengths(place), sizes(place)
    first = list(found) if place.dry_run else ["36K", "300K"]
    calibrated = next(size for size in models if place.dry_run or "3B" in size.name)
    cases: Cases = {}

    def prefills(size: Size, names: Iterable[str]) -> None:
        for name in names:
            for side in ("sparse", "dense"):
                case = f"{size.name}: {name}, {side}"
                cases.setdefault(case, partial(_prefill, size, found[name], side == "dense", place))

    prefills(models[0], first)
    for name, one in calibration.cases(place).items():
        length, _, how = name.partition(", ")
        case = f"{calibrated.name}: {length}, {'gradient' if how else 'calibration'}"
        cases[case] = partial(_calibrate, calibrated, *one, place)
    for size in models:
        prefills(size, reversed(found))
    results.run(cases)


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


def make_inputs(size: Size, n_tokens: int) -> tuple[dict[str, np.ndarray], int, int]:
    """The prompt of part `model` in NumPy, with pixels that take no memory; its images, and all their tokens."""
    prompt = make_prompt(size, n_tokens, Place(dry_run=True))
    n = n_images(prompt)
    arrays = {name: x.numpy() for name, x in prompt.items()}
    patches = 4 * n_image_tokens(prompt)
    shape = (n, 3, size.image, size.image) if size.window is not None else (patches, 3 * 2 * 14 * 14)
    arrays["pixel_values"] = np.broadcast_to(np.zeros((), ml_dtypes.bfloat16), shape)
    return arrays, n, n_image_tokens(prompt)


@contextmanager
def without_tower(size: Size, n: int, place: Place) -> Iterator[None]:
    """Gives random features for `n` image tokens instead of running the vision tower."""
    drawn = torch.randn(n, size.hidden, dtype=place.dtype, device=place.device)
    features = shared(drawn)

    def without_pixels(config: ModelConfig, inputs: dict[str, np.ndarray]) -> tuple[None, np.ndarray]:
        return None, feature_places(config, inputs["input_ids"], n, 0)

    with (
        patch.object(jax_blindsight.prefill, "prepare_vision", without_pixels),
        patch.object(jax_blindsight.prefill, "encode_images", lambda *_, **__: features),
    ):
        yield


def _prefill(size: Size, n_tokens: int, dense: bool, place: Place) -> Row:
    """Seconds of one prompt's prefill, of the host's part, and of the first call, which compiles."""
    cache = 2 * size.layers * size.kv_heads * n_tokens * size.dim * place.dtype.itemsize
    if cache > _MOST_CACHE:
        return {"tokens": n_tokens, "note": f"not run: its KV cache takes {cache / 2**30:.0f} GiB"}
    free(place)
    params = make_params(size, place)
    inputs, n, n_drawn = make_inputs(size, n_tokens)
    done: Any = None

    def once() -> float:
        nonlocal done
        done = None  # its cache is given back
        begun = time.perf_counter()
        done = sparse_prefill(params, inputs, capacity=n_tokens, dense=dense, break_even=False)
        jax.block_until_ready(done.logits)
        return time.perf_counter() - begun

    with without_tower(size, n_drawn, place):
        first, seconds = _timed(once, place)
    row = {
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
    done = None
    if not dense and size.window is None:  # all layers are alike
        try:
            call, _ = Inputs(size.shape, n_tokens, place).mixed(mixed(size.heads, DENSE_SHARE))
            row["attention_share"] = size.layers * seconds_per_jax_call(call, place) / seconds
        except Exception as error:  # kept in the row: the prefill's own figures stay
            row["attention_note"] = note_of(error)
    return row


def _calibrate(size: Size, n_tokens: int, budget: Budget | None, place: Place) -> Row:
    """Seconds of measuring one prompt in every layer, head and category: `calibrate` without reading 1 GB of pixels.

    For a budget by a backward pass, too, as by default.
    """
    free(place)
    params = make_params(size, place)
    inputs, n, n_drawn = make_inputs(size, n_tokens)

    def once() -> float:
        begun = time.perf_counter()
        measure(params, inputs, TEMPLATE, rankings=rankings_for(budget))
        return time.perf_counter() - begun

    with without_tower(size, n_drawn, place):
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
