"""Part `model`: time to first token of whole models, dense and sparse, the vision tower apart and included.

Dense is the same model unpatched, transformers' SDPA with cuDNN first. Sparse is `torch_blindsight.patch` with the
default kernel and a profile of 30% `DENSE` heads, the rest `INTRA_IMAGE_SINK`. The plan is made anew in every run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from blindsight_gpu.measure import Place, free, peak_gib, seconds_per_call
from blindsight_gpu.models import Size, encode_images, make_model, make_prompt, n_images, sizes, without_tower
from blindsight_gpu.prompts import TEMPLATE, lengths, make_inputs, make_layout, mixed
from blindsight_gpu.results import Results, Row
from shared_profiles.profile import Profile
from torch_blindsight import fingerprint, patch
from torch_blindsight.mixed import mixed_attention

DENSE_SHARE = 0.3
_TOWER_IMAGES = 4  # the tower's time is per image, and linear in them
_ONCE, _LONG = 5.0, 10.0  # seconds of a forward from which one run after the warm-up must do, and the warm-up itself
# Transformers gives Gemma's dense attention boolean masks of N x N, two of them, which no fast kernel takes: longer
# prompts than this would spend the time of a whole part, or all memory, on the denominator.
_LONGEST_MASKED = 40_000


def run(results: Results, place: Place) -> None:
    """Measures the 7B shape, then 3B, then Gemma; short prompts first."""
    for size in sizes(place):
        cases = [f"{size.name}: {name}" for name in lengths(place)]
        if all(results.get(case) for case in cases) or results.over:
            results.leave_out(cases)
            continue
        free(place)
        model = make_model(size, place)
        tower = results.measure(f"{size.name}: vision tower", partial(_tower, model, size, place))
        for case, n_tokens in zip(cases, lengths(place).values(), strict=True):
            free(place)
            results.measure(case, partial(_language, model, size, n_tokens, place, tower))
        del model


def _tower(model: Any, size: Size, place: Place) -> Row:
    """Seconds of the vision tower per image."""
    n = 1 if place.dry_run else _TOWER_IMAGES
    encode = encode_images(model, size, n, place)
    seconds = seconds_per_call(lambda turn: encode(), place)
    return {"images": n, "image_tokens": size.image_tokens, "seconds_per_image": seconds / n}


def make_profile(model: Any, dense_share: float) -> Profile:
    """A profile with the same mix of categories in every layer."""
    print_ = fingerprint(model)
    categories = np.array([mixed(print_.n_heads, dense_share)] * print_.n_layers, dtype=np.int8)
    return Profile(categories, TEMPLATE, print_, None, {"method": "manual", "dense_share": dense_share})


def _language(model: Any, size: Size, n_tokens: int, place: Place, tower: Row | None) -> Row:
    """One prompt, dense and sparse, without the tower; with it by adding its time per image."""
    prompt = make_prompt(size, n_tokens, place)
    row: Row = {
        "tokens": n_tokens,
        "images": n_images(prompt),
        "dense_heads": DENSE_SHARE,
        "denominator": "the same model unpatched, SDPA with cuDNN first",
    }

    def forward(turn: int = 0) -> None:
        model(**prompt, use_cache=False, logits_to_keep=1)

    with without_tower(model, size, place), _vendor(place):
        with patch(model, make_profile(model, DENSE_SHARE), impl="triton", break_even=False) as handle:
            row |= _side("sparse", forward, place)
            row["forwards"] = handle.report()["forwards"]
        if size.window is not None and n_tokens > _LONGEST_MASKED:
            row["dense_note"] = f"not run: masks of {2 * n_tokens**2 / 2**30:.0f} GiB"
        else:
            row |= _side("dense", forward, place)
    if "sparse_s" in row:
        row["attention_share"] = _attention_seconds(model, size, n_tokens, place) / row["sparse_s"]
        if "dense_s" in row:
            row["speed_up"] = row["dense_s"] / row["sparse_s"]
    if tower:
        seen = row["images"] * tower["seconds_per_image"]
        row["tower_s"] = seen
        if "speed_up" in row:
            row["ttft_speed_up"] = (row["dense_s"] + seen) / (row["sparse_s"] + seen)
    return row


def _side(side: str, forward: Callable[..., None], place: Place) -> Row:
    """Columns of the dense or the sparse side: seconds and peak memory, or why there are none.

    The forward that measures the peak warms up; where it takes long, what it warms up is next to nothing, and it is the
    measurement.
    """
    try:
        begun = time.perf_counter()
        peak = peak_gib(forward, place)
        seconds = time.perf_counter() - begun
        if seconds < _LONG:
            seconds = seconds_per_call(forward, place, once=True)
        if seconds < _ONCE and not place.dry_run:
            seconds = seconds_per_call(forward, place)
    except torch.OutOfMemoryError:
        return {f"{side}_note": "out of GPU memory"}
    return {f"{side}_s": seconds, f"{side}_peak_gib": peak}


def _attention_seconds(model: Any, size: Size, n_tokens: int, place: Place) -> float:
    """Seconds of the sparse attention of all layers, each kind of layer measured alone."""
    free(place)
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * size.layers
    layout, inputs = make_layout(size.shape, n_tokens), make_inputs(size.shape, n_tokens, place, 0)
    categories, seconds = mixed(size.heads, DENSE_SHARE), 0.0
    for kind, n_layers in Counter(kinds).items():
        window = size.window if kind == "sliding_attention" else None

        def attend(turn: int, window: int | None = window) -> None:
            mixed_attention(*inputs, [layout], categories, TEMPLATE, scale=size.dim**-0.5, window=window)

        seconds += n_layers * seconds_per_call(attend, place)
    return seconds


def _vendor(place: Place) -> Any:
    """Torch's kernels by preference: cuDNN, flash, and what is left for small calls."""
    if place.dry_run:
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
