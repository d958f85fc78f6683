"""Part `calibration`: time and peak memory of measuring one long prompt, for thresholds and for a budget.

For a budget, the default, a backward pass through dense attention ranks the heads: only of the shorter prompt here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from blindsight_gpu.measure import Place, free, peak_and_seconds
from blindsight_gpu.models import Size, make_model, make_prompt, n_images, sizes, without_tower
from blindsight_gpu.prompts import ANOTHER, LENGTHS
from blindsight_gpu.results import Results, Row
from shared_profiles import SinkTemplate
from shared_profiles.budget import Budget, rankings_for
from torch_blindsight.calibration import measuring
from torch_blindsight.implementations import implementation
from torch_blindsight.models import inspect_model

# By case: tokens, and the budget.
CASES: dict[str, tuple[int, Budget | None]] = {
    "36K": (LENGTHS["36K"], None),
    "36K, by the gradient": (LENGTHS["36K"], Budget()),
    "144K": (ANOTHER["144K"], None),
}
_SHORT = 8192
_TOY_CASES: dict[str, tuple[int, Budget | None]] = {"toy": (128, None), "toy, by the gradient": (128, Budget())}


def cases(place: Place) -> dict[str, tuple[int, Budget | None]]:
    """What to measure, for torch and JAX alike."""
    return _TOY_CASES if place.dry_run else CASES


def run(results: Results, place: Place) -> None:
    """One prompt of each length on the 3B shape."""
    size = next(size for size in sizes(place) if place.dry_run or "3B" in size.name)
    model = cache(lambda: make_model(size, place))
    results.run({f"{size.name}: {name}": partial(_calibrate, model, size, *one, place) for name, one in
        cases(place).items()})  # fmt: skip


def _calibrate(make: Callable[[], Any], size: Size, n_tokens: int, budget: Budget | None, place: Place) -> Row:
    """Measures the prompt in every layer, head and category; the vision tower is left out."""
    free(place)
    model = make()
    prompt, info = make_prompt(size, n_tokens, place), inspect_model(model)
    chosen = implementation("triton", model, info)

    with (
        without_tower(model, size, place),
        measuring(model, info, chosen, SinkTemplate(), rankings_for(budget)) as measure,
    ):

        def once(turn: int = 0) -> None:
            measure(prompt)

        if not place.dry_run:  # compiles, for of a long prompt the first run is what is measured
            measure(make_prompt(size, _SHORT, place))
        peak, seconds = peak_and_seconds(once, place)
    return {"tokens": n_tokens, "images": n_images(prompt), "seconds": seconds, "peak_gib": peak}
