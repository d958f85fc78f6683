"""Part `calibration`: time and peak memory of measuring one long prompt for a profile that is chosen by thresholds."""

from __future__ import annotations

from functools import partial
from typing import Any

from blindsight_gpu.measure import Place, free, peak_gib, seconds_per_call
from blindsight_gpu.models import Size, make_model, make_prompt, n_images, sizes, without_tower
from blindsight_gpu.results import Results, Row
from shared_profiles import SinkTemplate
from shared_profiles.classifier import Thresholds
from torch_blindsight import calibrate

LENGTHS = {"36K": 36_864, "150K": 150_016}


def run(results: Results, place: Place) -> None:
    """One prompt of each length on the 3B shape."""
    lengths = {"toy": 128} if place.dry_run else LENGTHS
    size = next(size for size in sizes(place) if place.dry_run or "3B" in size.name)
    model = make_model(size, place)
    for name, n_tokens in lengths.items():
        free(place)
        results.measure(f"{size.name}: {name}", partial(_calibrate, model, size, n_tokens, place))


def _calibrate(model: Any, size: Size, n_tokens: int, place: Place) -> Row:
    """Measures the prompt in every layer, head and category; the vision tower is left out."""
    prompt = make_prompt(size, n_tokens, place)

    def once(turn: int = 0) -> None:
        template = SinkTemplate()  # given: learning one reads the prompt once more
        calibrate(model, [prompt], thresholds=Thresholds(), template=template, progress=False, impl="triton")

    with without_tower(model, size, place):
        peak = peak_gib(once, place)  # the warm-up too
        seconds = seconds_per_call(once, place, once=True)
    return {"tokens": n_tokens, "images": n_images(prompt), "seconds": seconds, "peak_gib": peak}
