"""Part `model`: time to first token of whole models, dense and sparse, the vision tower apart and included.

Dense is the same model unpatched, transformers' SDPA with cuDNN first. Sparse is `torch_blindsight.patch` with the
default kernel and a profile of 30% `DENSE` heads, the rest `INTRA_IMAGE_SINK`. The plan is made anew in every run.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from blindsight_gpu.measure import Place, free, peak_gib, seconds_per_call
from blindsight_gpu.models import GRID, TOY_GRID, make_model, make_pixels, make_prompt, without_tower
from blindsight_gpu.prompts import TEMPLATE, lengths, mixed
from blindsight_gpu.results import Results, Row
from shared_profiles.profile import Profile
from torch_blindsight import fingerprint, patch

DENSE_SHARE = 0.3
_TOWER_IMAGES = 4  # the tower's time is per image, and linear in them
_ONCE = 5.0  # seconds of a forward from which one run must do


def run(results: Results, place: Place) -> None:
    """Measures the 7B shape, then 3B; short prompts first."""
    for size in ["toy"] if place.dry_run else ["7B", "3B"]:
        cases = [f"Qwen2.5-VL-{size}: {name}" for name in lengths(place)]
        if all(results.get(case) for case in cases):
            continue
        free(place)
        model = make_model(size, place)
        grid = TOY_GRID if place.dry_run else GRID
        tower = results.measure(f"Qwen2.5-VL-{size}: vision tower", partial(_tower, model, grid, place))
        for case, n_tokens in zip(cases, lengths(place).values(), strict=True):
            free(place)
            results.measure(case, partial(_language, model, n_tokens, grid, place, tower))
        del model


def _tower(model: Any, grid: int, place: Place) -> Row:
    """Seconds of the vision tower per image."""
    n = 1 if place.dry_run else _TOWER_IMAGES
    pixels = make_pixels(n, grid, place)
    thw = torch.tensor([[1, grid, grid]] * n, device=place.device)
    seconds = seconds_per_call(lambda turn: model.model.visual(pixels, grid_thw=thw), place)
    return {"images": n, "image_tokens": (grid // 2) ** 2, "seconds_per_image": seconds / n}


def make_profile(model: Any, dense_share: float) -> Profile:
    """A profile with the same mix of categories in every layer."""
    print_ = fingerprint(model)
    categories = np.array([mixed(print_.n_heads, dense_share)] * print_.n_layers, dtype=np.int8)
    return Profile(categories, TEMPLATE, print_, None, {"method": "manual", "dense_share": dense_share})


def _language(model: Any, n_tokens: int, grid: int, place: Place, tower: Row | None) -> Row:
    """One prompt, dense and sparse, without the tower; with it by adding its time per image."""
    prompt = make_prompt(n_tokens, grid, place)
    n_images = len(prompt["image_grid_thw"])

    def forward(turn: int = 0) -> None:
        model(**prompt, use_cache=False, logits_to_keep=1)

    times: dict[str, float] = {}
    peaks: dict[str, float | None] = {}
    report: dict[str, int] = {}
    with without_tower(model, place), _vendor(place):
        for side in ("dense", "sparse"):
            profile = make_profile(model, DENSE_SHARE)
            with (
                patch(model, profile, impl="triton", break_even=False) if side == "sparse" else nullcontext() as handle
            ):
                peaks[side] = peak_gib(forward, place)  # the warm-up too
                first = seconds_per_call(forward, place, once=True)
                times[side] = first if first > _ONCE or place.dry_run else seconds_per_call(forward, place)
                report = handle.report()["forwards"] if handle is not None else {}
    seen = n_images * tower["seconds_per_image"] if tower else None
    row: Row = {
        "tokens": n_tokens,
        "images": n_images,
        "dense_heads": DENSE_SHARE,
        "dense_s": times["dense"],
        "sparse_s": times["sparse"],
        "speed_up": times["dense"] / times["sparse"],
        "denominator": "the same model unpatched, SDPA with cuDNN first",
        "dense_peak_gib": peaks["dense"],
        "sparse_peak_gib": peaks["sparse"],
        "forwards": report,
    }
    if seen is not None:
        row |= {"tower_s": seen, "ttft_speed_up": (times["dense"] + seen) / (times["sparse"] + seen)}
    return row


def _vendor(place: Place) -> Any:
    """Torch's kernels by preference: cuDNN, flash, and what is left for small calls."""
    if place.dry_run:
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
