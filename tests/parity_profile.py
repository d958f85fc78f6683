"""One data set calibrated in both frameworks: what each measured of every prompt, and the profile it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import jax_blindsight
import torch_blindsight
from parity_subjects import Subject, jax_on
from shared_profiles import SinkTemplate
from shared_profiles.profile import Profile
from tiny_jax import in_numpy
from tiny_models import make_ids, make_inputs

TEMPLATE = SinkTemplate((0, 1), (1, 2), 8)
MEASURED = ("mass", "error")  # arrays of a state that hold measurements; the others must be equal
ABSOLUTE = 2e-6
RELATIVE = {"cpu": 2e-5, "cuda": 1e-4}  # what float32 rounds off a mean of ratios; a GPU's exponentials are quick ones


@dataclass(frozen=True)
class Calibrated:
    """A profile, and all that the state file holds of its prompts."""

    profile: Profile
    records: dict[str, np.ndarray]


def prompts_of(family: str, n: int) -> list[dict[str, torch.Tensor]]:
    """Prompts of two to four images."""
    return [make_inputs(family, [make_ids(2 + i % 3, seed=i)], seed=i) for i in range(n)]


def records(path: Path) -> dict[str, np.ndarray]:
    """Everything in a state, prompt by prompt."""
    with np.load(path) as state:
        return {name: state[name] for name in state.files}


def calibrate_both(
    subject: Subject, prompts: Sequence[Mapping[str, torch.Tensor]], folder: Path, **options: Any
) -> dict[str, Calibrated]:
    """Calibrates by torch and by JAX, with the same options."""
    options = dict(dataset="puzzles", template=TEMPLATE, progress=False) | options
    model, _ = subject.moved
    paths = {name: folder / f"{name}.npz" for name in ("torch", "jax")}
    moved = [{name: x.to(subject.device) for name, x in prompt.items()} for prompt in prompts]
    by_torch = torch_blindsight.calibrate(model, moved, state=paths["torch"], **options)
    with jax_on(subject.device):
        arrays = list(map(in_numpy, prompts))
        by_jax = jax_blindsight.calibrate(subject.params, arrays, state=paths["jax"], impl="portable", **options)
    profiles = {"torch": by_torch, "jax": by_jax}
    return {name: Calibrated(profile, records(paths[name])) for name, profile in profiles.items()}


def largest_gaps(both: Mapping[str, Calibrated]) -> dict[str, tuple[float, float]]:
    """Largest absolute and relative differences of what was measured."""
    gaps = {}
    for name in MEASURED:
        a, b = (both[x].records[name].astype(np.float64) for x in ("jax", "torch"))
        gap = np.abs(a - b)
        gaps[name] = float(gap.max()), float((gap / np.maximum(np.abs(b), ABSOLUTE)).max())
    return gaps
