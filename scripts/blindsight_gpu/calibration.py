"""Part `calibration`: time and peak memory of measuring one long prompt for a profile."""

from __future__ import annotations

from functools import partial
from typing import Any

from blindsight_gpu.measure import Place, free, peak_gib, seconds_per_call
from blindsight_gpu.models import GRID, TOY_GRID, make_model, make_prompt, without_tower
from blindsight_gpu.results import Results, Row
from torch_blindsight import calibrate

_LENGTHS = {"36K": 36_864, "150K": 150_016}


def run(results: Results, place: Place) -> None:
    """One prompt of each length on the 3B shape."""
    sizes = {"toy": 128} if place.dry_run else _LENGTHS
    size = "toy" if place.dry_run else "3B"
    model = make_model(size, place)
    for name, n_tokens in sizes.items():
        free(place)
        results.measure(f"Qwen2.5-VL-{size}: {name}", partial(_calibrate, model, n_tokens, place))


def _calibrate(model: Any, n_tokens: int, place: Place) -> Row:
    """Measures the prompt in every layer, head and category; the vision tower is left out."""
    prompt = make_prompt(n_tokens, TOY_GRID if place.dry_run else GRID, place)

    def once(turn: int = 0) -> None:
        calibrate(model, [prompt], progress=False, impl="triton")

    with without_tower(model, place):
        peak = peak_gib(once, place)  # the warm-up too
        seconds = seconds_per_call(once, place, once=True)
    return {"tokens": n_tokens, "images": len(prompt["image_grid_thw"]), "seconds": seconds, "peak_gib": peak}
