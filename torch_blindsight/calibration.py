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
from shared_profiles.collection import collect
from shared_profiles.profile import Profile
from shared_profiles.provenance import make_profile
from shared_profiles.statistics import PromptStatistics
from torch_blindsight.implementations import Name, implementation
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
    impl: Name | None = None,
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
        impl: what computes the attention that is measured; as in `patch`.

    Returns:
        The profile, with the statistics it was chosen from and their provenance. It is not saved.

    Raises:
        ValueError: no prompt has two images, a prompt is malformed, tokens and model are on different devices, or
            the model is patched.
        ValueError, NotImplementedError, ImportError: the implementation cannot serve this model.
        OSError: the state cannot be written.
    """
    if getattr(model, HANDLE, None) is not None:
        raise ValueError("the model must not be patched while it is calibrated. Call unpatch() on its handle first.")
    info = inspect_model(model)
    print_ = fingerprint(model, info)
    template, thresholds = template or SinkTemplate(), thresholds or Thresholds()
    chosen = implementation(impl, model, info)
    mode = ObserveMode(info, template, chosen.attend)
    handle = Handle(model, info, mode, chosen)
    handle.install()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        statistics = collect(
            tqdm(prompts, desc="calibrating", unit="prompt", disable=None if progress is None else not progress),
            lambda prompt: _measure(model, mode, prompt),
            lambda prompt: _arrays(model, prompt),
            print_,
            template,
            state=state,
            save_every=save_every,
        )
    finally:
        handle.unpatch()
        for module in training:
            module.training = True
    return make_profile(statistics, thresholds, template, print_, dataset, PACKAGES)


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


def _arrays(model: nn.Module, prompt: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The prompt in NumPy, once checked."""
    _check_prompt(model, prompt)
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
