"""Part `calibration`: time and peak memory of measuring one long prompt, for thresholds and for a budget.

For a budget, the default, a backward pass through dense attention ranks the heads: only of the shorter prompt here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from blindsight_gpu.measure import Place, free, peak_gib, seconds_per_call
from blindsight_gpu.models import Size, make_model, make_prompt, n_images, sizes, without_tower
from blindsight_gpu.results import Results, Row
from shared_profiles import SinkTemplate
from shared_profiles.budget import Budget, rankings_for
from torch_blindsight.calibration import measuring
from torch_blindsight.implementations import implementation
from torch_blindsight.models import inspect_model

LENGTHS = {"36K": 36_864, "150K": 150_016}
GRADIENT = "36K"


def run(results: Results, place: Place) -> None:
    """One prompt of each length on the 3B shape."""
    lengths, gradient = ({"toy": 128}, "toy") if place.dry_run else (LENGTHS, GRADIENT)
    size = next(size for size in sizes(place) if place.dry_run or "3B" in size.name)
    model = make_model(size, place)
    for name, n_tokens in lengths.items():
        free(place)
        results.measure(f"{size.name}: {name}", partial(_calibrate, model, size, n_tokens, None, place))
        if name == gradient:
            case = f"{size.name}: {name}, by the gradient"
            results.measure(case, partial(_calibrate, model, size, n_tokens, Budget(), place))


def _calibrate(model: Any, size: Size, n_tokens: int, budget: Budget | None, place: Place) -> Row:
    """Measures the prompt in every layer, head and category; the vision tower is left out."""
    prompt, info = make_prompt(size, n_tokens, place), inspect_model(model)
    chosen = implementation("triton", model, info)

    with (
        without_tower(model, size, place),
        measuring(model, info, chosen, SinkTemplate(), rankings_for(budget)) as measure,
    ):

        def once(turn: int = 0) -> None:
            measure(prompt)

        peak = peak_gib(once, place)  # the warm-up too
        seconds = seconds_per_call(once, place, once=True)
    return {"tokens": n_tokens, "images": n_images(prompt), "seconds": seconds, "peak_gib": peak}
