"""`calibrate(model, prompts)`: from a data set to a profile, resumable, with no S x S matrix on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from shared_profiles import SinkTemplate
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import Profile
from shared_profiles.provenance import make_profile, prompt_digest
from shared_profiles.statistics import PromptStatistics, Statistics
from torch_blindsight.models import PACKAGES, fingerprint, inspect_model
from torch_blindsight.observe import ObserveMode, Observer
from torch_blindsight.patching import HANDLE, Handle


def calibrate(
    model: nn.Module,
    prompts: Iterable[Mapping[str, Any]],
    *,
    dataset: str = "unnamed",
    template: SinkTemplate | None = None,
    thresholds: Thresholds | None = None,
    state: str | Path | None = None,
    save_every: int = 8,
    progress: bool | None = None,
) -> Profile:
    """Measures a model on prompts and chooses a category for every head.

    Prompts with fewer than two images are skipped: they show nothing. An interrupted run continues where it stopped
    when `state` is given: prompts already measured are recognized by their content.

    Args:
        model: a supported Hugging Face model, not patched.
        prompts: what the model's processor returns, one prompt each: `input_ids [1, N]`, `pixel_values`, ...
        dataset: name of the data, kept in the profile.
        template: sinks and local blocks.
        thresholds: how much a head must retain.
        state: file in which the statistics are kept, written every `save_every` prompts and on interruption.
        save_every: how often.
        progress: show a progress bar on standard error; default: when it is a terminal.

    Returns:
        The profile, with the statistics it was chosen from and their provenance. It is not saved.

    Raises:
        ValueError: no prompt has two images, a prompt is malformed, tokens and model are on different devices, or
            the model is patched.
        OSError: the state cannot be written.
    """
    if getattr(model, HANDLE, None) is not None:
        raise ValueError("the model must not be patched while it is calibrated. Call unpatch() on its handle first.")
    info = inspect_model(model)
    print_ = fingerprint(model, info)
    template, thresholds = template or SinkTemplate(), thresholds or Thresholds()
    statistics = _start(state, info.n_layers, info.n_heads, _origin(print_.digest, template))
    mode = ObserveMode(info, template)
    handle = Handle(model, info, mode)
    handle.install()
    training = [module for module in model.modules() if module.training]
    model.eval()
    unsaved = skipped = 0
    try:
        for prompt in tqdm(
            prompts, desc="calibrating", unit="prompt", disable=None if progress is None else not progress
        ):
            _check_prompt(model, prompt)
            prompt_id = prompt_digest(_arrays(prompt))
            if prompt_id in statistics:
                continue
            record = _measure(model, mode, prompt)
            if record is None:
                skipped += 1
                continue
            statistics.add(prompt_id, record)
            unsaved += 1
            if state is not None and unsaved >= save_every:
                statistics.save(state)
                unsaved = 0
    finally:
        handle.unpatch()
        for module in training:
            module.training = True
        if state is not None and unsaved:
            statistics.save(state)
    if not len(statistics):
        raise ValueError(
            f"calibration needs prompts with at least two images. Got none ({skipped} prompts with fewer). "
            "Pass multi-image prompts like those you serve."
        )
    return make_profile(statistics, thresholds, template, print_, dataset, PACKAGES)


def _start(state: str | Path | None, n_layers: int, n_heads: int, origin: str) -> Statistics:
    """The statistics to go on from: those of the state file, or none yet."""
    fresh = Statistics(n_layers, n_heads, origin=origin)
    if state is None or not Path(state).exists():
        return fresh
    return fresh.merge(Statistics.load(state))  # refuses a state of another model or template


def _origin(digest: str, template: SinkTemplate) -> str:
    """What statistics were measured on: the model, and the template that decides what a category keeps."""
    return f"{digest} {template.from_start} {template.from_end} {template.local_block}"


def _check_prompt(model: nn.Module, prompt: Mapping[str, Any]) -> None:
    """Refuses what is not one prompt on the model's device."""
    ids = prompt.get("input_ids")
    if ids is None or ids.ndim != 2 or len(ids) != 1:
        raise ValueError(
            f"a prompt must be what the processor returns for one prompt, input_ids [1, N]. Got "
            f"{None if ids is None else tuple(ids.shape)}."
        )
    device = next(model.parameters()).device
    wrong = [name for name, value in prompt.items() if isinstance(value, torch.Tensor) and value.device != device]
    if wrong:
        raise ValueError(
            f"prompts must be on the model's device, {device}. Got {', '.join(wrong)} elsewhere: "
            f"call .to({str(device)!r})."
        )


def _arrays(prompt: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The prompt in NumPy."""
    arrays = {}
    for name, x in prompt.items():
        if isinstance(x, torch.Tensor):
            x = (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()  # NumPy has no bfloat16
        arrays[name] = np.asarray(x)
    return arrays


@torch.no_grad()
def _measure(model: nn.Module, mode: ObserveMode, prompt: Mapping[str, Any]) -> PromptStatistics | None:
    """Runs one prompt; None if it has fewer than two images."""
    mode.observer = None
    model(**prompt, use_cache=False, logits_to_keep=1)
    observer: Observer | None = mode.observer
    return None if observer is None else observer.records()[0]
