"""Part `attention_more`: the rows of part `attention` for the other shape, and for one more length of the first."""

from __future__ import annotations

from blindsight_gpu.attention import measure
from blindsight_gpu.measure import Place
from blindsight_gpu.prompts import ANOTHER, lengths, shapes
from blindsight_gpu.results import Results


def run(results: Results, place: Place) -> None:
    """Measures the other shape, 100K tokens first."""
    first, other = shapes(place)
    found = lengths(place)
    order = list(found) if place.dry_run else ["100K", "300K", "36K"]
    prompts = [(other, name, found[name]) for name in order]
    measure(results, place, prompts if place.dry_run else [*prompts, *((first, *one) for one in ANOTHER.items())])
