"""Part `model`: time to first token of whole models, dense and sparse, the vision tower apart and included.

Dense is the same model unpatched, transformers' SDPA with cuDNN first. Sparse is `torch_blindsight.patch` with the
default kernel and a profile of 30% `DENSE` heads, the rest `INTRA_IMAGE_SINK`. The plan is made anew in every run, as
for a prompt never seen before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from blindsight_gpu.attention import costs_beside
from blindsight_gpu.measure import Place, free, peak_and_seconds, seconds_per_call
from blindsight_gpu.models import (
    Size,
    encode_images,
    make_model,
    make_prompt,
    n_image_tokens,
    n_images,
    sizes,
    without_tower,
)
from blindsight_gpu.prompts import TEMPLATE, lengths, make_inputs, make_layout, mixed
from blindsight_gpu.results import Cases, Results, Row, note_of
from shared_profiles.plan import build_plan
from shared_profiles.profile import Profile
from torch_blindsight import fingerprint, patch
from torch_blindsight.attention import MOST_MASKED_PAIRS
from torch_blindsight.mixed import mixed_attention

DENSE_SHARE = 0.3
_TOWER_IMAGES = 4  # the tower's time is per image, and linear in them


def run(results: Results, place: Place) -> None:
    """Measures the 7B shape, then Gemma, then 3B, the longest prompt first; last what may take all the time left."""
    found = lengths(place)
    order = [(size, name) for size in sizes(place) for name in found]
    if not place.dry_run:
        large, small, gemma = sizes(place)
        order = [(large, name) for name in found] + [(gemma, "36K"), (gemma, "300K")]
        order += [(small, name) for name in found] + [(gemma, "100K")]
    cases: Cases = {}
    for size, name in order:
        cases.setdefault(_tower_case(size), partial(_tower, size, place))
        cases[f"{size.name}: {name}"] = partial(_language, results, size, found[name], place)
    results.run(cases)


def _tower_case(size: Size) -> str:
    return f"{size.name}: vision tower"


@lru_cache(maxsize=1)
def _model(size: Size, place: Place) -> Any:
    """The model of the rows being measured, made in the first of them."""
    free(place)
    return make_model(size, place)


def _tower(size: Size, place: Place) -> Row:
    """Seconds of the vision tower per image."""
    model = _model(size, place)
    n = 1 if place.dry_run else _TOWER_IMAGES
    encode = encode_images(model, size, n, place)
    seconds = seconds_per_call(lambda turn: encode(), place)
    return {"images": n, "image_tokens": size.image_tokens, "seconds_per_image": seconds / n}


def make_profile(model: Any, dense_share: float) -> Profile:
    """A profile with the same mix of categories in every layer."""
    print_ = fingerprint(model)
    categories = np.array([mixed(print_.n_heads, dense_share)] * print_.n_layers, dtype=np.int8)
    return Profile(categories, TEMPLATE, print_, None, {"method": "manual", "dense_share": dense_share})


def _language(results: Results, size: Size, n_tokens: int, place: Place) -> Row:
    """One prompt, dense and sparse, without the tower; with it by adding its time per image."""
    free(place)
    model, tower = _model(size, place), results.good(_tower_case(size))
    prompt = make_prompt(size, n_tokens, place)
    row: Row = {
        "tokens": n_tokens,
        "images": n_images(prompt),
        "dense_heads": DENSE_SHARE,
        "denominator": "the same model unpatched, SDPA with cuDNN first",
    }
    # First, for it compiles what the sparse forward runs, and of a long one the first run is what is measured.
    alone = _alone(model, size, n_tokens, place)

    def forward(turn: int = 0) -> None:
        build_plan.cache_clear()
        model(**prompt, use_cache=False, logits_to_keep=1)

    with without_tower(model, size, place), _vendor(place):
        with patch(model, make_profile(model, DENSE_SHARE), impl="triton", break_even=False) as handle:
            row |= _side("sparse", forward, place)
            row["forwards"] = handle.report()["forwards"]
        # Transformers gives Gemma's dense attention masks of N x N.
        if size.window is not None and n_tokens**2 > MOST_MASKED_PAIRS:
            row["dense_note"] = "not run: torch computes it wrongly (pytorch issue 187227)"
        else:
            row |= _side("dense", forward, place)
    if "sparse_s" in row:
        row |= {f"{name}_share": seconds / row["sparse_s"] for name, seconds in alone.items()}
        if "dense_s" in row:
            row["speed_up"] = row["dense_s"] / row["sparse_s"]
    if tower:
        seen = n_image_tokens(prompt) / size.image_tokens * tower["seconds_per_image"]
        row["tower_s"] = seen
        if "speed_up" in row:
            row["ttft_speed_up"] = (row["dense_s"] + seen) / (row["sparse_s"] + seen)
    return row


def _side(side: str, forward: Callable[..., None], place: Place) -> Row:
    """Columns of the dense or the sparse side: seconds and peak memory, or why there are none."""
    try:
        peak, seconds = peak_and_seconds(forward, place)
    except torch.OutOfMemoryError:
        return {f"{side}_note": "out of GPU memory"}
    except Exception as error:
        if side == "sparse":
            raise
        return {f"{side}_note": note_of(error)}  # a peer that breaks: our own figures stay
    return {f"{side}_s": seconds, f"{side}_peak_gib": peak}


def _alone(model: Any, size: Size, n_tokens: int, place: Place) -> dict[str, float]:
    """Seconds of a sparse forward's attention in all layers, each kind measured alone, and of what it costs beside.

    Beside: one plan and work list, and in every layer packing and the host's part of a launch, which the device need
    not wait for.
    """
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
    costs = costs_beside(size.shape, layout, [inputs], place)
    beside = costs["plan_ms"] + costs["work_ms"] + size.layers * (costs["pack_ms"] + costs["launch_ms"])
    return {"attention": seconds, "beside": beside / 1e3}


def _vendor(place: Place) -> Any:
    """Torch's kernels by preference: cuDNN, flash, and what is left for small calls."""
    if place.dry_run:
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
