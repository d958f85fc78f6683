"""`calibrate(model, prompts)`: from a data set to a profile, resumable, with no S x S matrix on the way.

Under `torchrun`, or in any process group, every process calls it with the same arguments. Each measures its share of
the prompts; the statistics are, bit for bit, those of one process with as many threads, and so is the profile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from shared_profiles import SinkTemplate
from shared_profiles.budget import Budget, budget_of, rankings_for, tune
from shared_profiles.classifier import Thresholds
from shared_profiles.collection import Collector, check_dataset, check_local_block, of_prompt
from shared_profiles.profile import Profile
from shared_profiles.provenance import dataset_hash, make_profile, make_provenance, prompt_digest
from shared_profiles.sink_statistics import REACH, SinkMass
from shared_profiles.split import HELD_OUT, Given, Split, require_held_out
from shared_profiles.state_files import one_writer
from shared_profiles.statistics import PromptStatistics
from torch_blindsight.gradient import GradientMode, measure_with_gradient
from torch_blindsight.handle import HANDLE, Handle
from torch_blindsight.held_out import HeldOut, moved
from torch_blindsight.implementations import Implementation, Name, implementation
from torch_blindsight.models import PACKAGES, ModelInfo, evaluating, fingerprint, inspect_model
from torch_blindsight.observe import ObserveMode, Observer
from torch_blindsight.processes import joined_processes
from torch_blindsight.prompts import Dense, read_layouts
from torch_blindsight.residual import ResidualStream
from torch_blindsight.sinks import SinkMode, observing, read_sinks


def calibrate(
    model: nn.Module,
    prompts: Iterable[Mapping[str, Any]],
    *,
    dataset: str = "unnamed",
    template: SinkTemplate | None = None,
    budget: Budget | float | None = None,
    thresholds: Thresholds | None = None,
    held_out: float | Iterable[Mapping[str, Any]] = HELD_OUT,
    local_block: int | None = None,
    state: str | Path | None = None,
    merge: Iterable[str | Path] = (),
    save_every: int = 8,
    progress: bool | None = None,
    impl: Name | None = None,
) -> Profile:
    """Measures a model on prompts and chooses a category for every head.

    By a budget, the default, some prompts are held out; the heads are ranked on the others and made sparse for as long
    as the next token of the held-out prompts stays within the budget (`shared_profiles.budget`). By thresholds all
    prompts are calibrated on, and nothing is held out.

    Prompts with fewer than two images are skipped: they show nothing. An interrupted run continues where it stopped
    when `state` is given: prompts already measured are recognized by their content. So are those of other machines'
    states, which `merge` names.

    In a process group every process reads all prompts and measures its share; all return the same profile. The group's
    own backend is not used, and a process that fails takes the others with it.

    Args:
        model: a supported Hugging Face model, not patched.
        prompts: what the model's processor returns, one prompt each: `input_ids [1, N]`, `pixel_values`, ...
        dataset: name of the data, kept in the profile.
        template: sinks and local blocks. Default: that of the statistics in `state` and `merge`; where there are none
            yet, sinks are learned from the first 8 prompts (`shared_profiles.sink_statistics`).
        budget: allowed KL divergence of the next token in nats, or a `Budget`: that, and what ranks the heads
            (`"gradient"`, one backward pass a prompt; `"residual"`, for models too large for one; `"error"`), and over
            how many processes the model is split where it is served. Default: `Budget()`, unless thresholds are given.
        thresholds: how much a head must retain, to choose by that instead.
        held_out: the share of prompts that a budget is measured on, chosen by their content; or these prompts. They
            stay in the CPU's memory until the end.
        local_block: width of the local blocks of a template that is not given, a multiple of 8. Default: 128.
        state: file in which the statistics are kept, written every `save_every` prompts and on interruption, by one
            run at a time; see `shared_profiles.state_files` for what several processes write.
        merge: further such files, whose statistics count, too; of the same model, template and rankings.
        save_every: how often.
        progress: show a progress bar on standard error; default: when it is a terminal.
        impl: what computes the attention that is measured; as in `patch`.

    Returns:
        The profile, with the statistics it was chosen from, their provenance and, by a budget, every measured point.
        It is not saved. Where no head can be sparse within the budget all are Dense, and `choice["reached"]` is false.

    Raises:
        ValueError: no prompt has two images, or none of the held-out ones; a prompt is malformed, cut or masked so that
            it could not run sparse, or held out and calibrated on; tokens and model are on different devices; the model
            is patched, or has weights made in inference mode and a ranking by the gradient; budget and thresholds; a
            quantile or a dataset's name that cannot be; template and local_block; a state is of another model, template
            or rankings, or another run writes it; the processes of a group were given different prompts.
        ValueError, NotImplementedError, ImportError: the implementation cannot serve this model; it is tensor-parallel.
        OSError: a state cannot be read or written.
    """
    if getattr(model, HANDLE, None) is not None:
        raise ValueError("the model must not be patched while it is calibrated. Call unpatch() on its handle first.")
    info = inspect_model(model)
    limit = budget_of(budget, thresholds, info.n_heads)
    check_local_block(template, local_block)
    check_dataset(dataset)
    info.require_all_heads("calibration")
    if "gradient" in rankings_for(limit) and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "ranking by the gradient needs weights that were made outside of torch.inference_mode(). Got some of "
            "inside. Load the model before you enter it."
        )
    print_ = fingerprint(model, info)
    chosen = implementation(impl, model, info)
    split: Split[Mapping[str, Any]] | None = None
    if limit is not None:
        split = _Aside(held_out) if isinstance(held_out, int | float | np.floating) else _given(model, info, held_out)
    with evaluating(model), joined_processes() as processes, one_writer(state, processes):
        hidden = processes.rank > 0 or (None if progress is None else not progress)
        collector = Collector(
            tqdm(prompts, desc="calibrating", unit="prompt", disable=hidden),
            lambda prompt: _arrays(model, info, prompt)[0],
            print_,
            rankings=rankings_for(limit),
            state=state,
            merge=merge,
            save_every=save_every,
            split=split,
            processes=processes,
        )
        template = template or _template(model, collector, local_block, impl)
        with measuring(model, info, chosen, template, rankings_for(limit)) as measure:
            statistics = collector.collect(measure, template)
        profile = make_profile(statistics, thresholds or Thresholds(), template, print_, dataset, PACKAGES)
        if limit is not None and split is not None:
            held = HeldOut(model, info, chosen, profile, split.prompts, processes)
            made_from = make_provenance(dataset, statistics, PACKAGES, held.n_tokens)
            profile = replace(profile, provenance=made_from)
            profile = tune(profile, limit, held, held_out=dataset_hash(held.n_tokens))
        return processes.gather(profile)[0]  # they differ in when they were made


def _template(
    model: nn.Module, collector: Collector[Mapping[str, Any]], local_block: int | None, impl: Name | None
) -> SinkTemplate:
    """The template of the statistics that there are; where there are none, a learned one."""

    def measure(prompt: Mapping[str, Any]) -> SinkMass | None:
        reading = read_sinks(model, mode, prompt)
        return None if reading is None else reading.mass

    with observing(model, lambda info, attend: SinkMode(info, attend, REACH), impl) as mode:
        return collector.learn(measure, local_block)


@contextmanager
def measuring(
    model: nn.Module, info: ModelInfo, chosen: Implementation, template: SinkTemplate, rankings: Collection[str]
) -> Iterator[Callable[[Mapping[str, Any]], PromptStatistics | None]]:
    """In this context the model, in evaluation mode, is measured: gives what measures one prompt.

    Args:
        model: the model, not patched.
        info: its attention-relevant facts.
        chosen: what computes the attention that is measured.
        template: sinks and local blocks.
        rankings: which harm is measured, `rankings_for` a budget; with `"gradient"` by a backward pass.

    Returns:
        A function from a prompt, as `calibrate` takes them, to its record; None if it has fewer than two images.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(ResidualStream(model, info)) if "residual" in rankings else None
        kind = GradientMode if "gradient" in rankings else ObserveMode
        mode = kind(info, template, chosen.attend, stream)
        stack.enter_context(handle := Handle(model, info, mode, chosen))
        handle.install()
        yield lambda prompt: _measure(model, mode, prompt)


def _given(model: nn.Module, info: ModelInfo, prompts: Iterable[Mapping[str, Any]]) -> Given[Mapping[str, Any]]:
    """Held-out prompts of the caller's own, checked."""
    given: dict[str, Mapping[str, Any]] = {}
    telling = 0
    for number, prompt in enumerate(prompts):
        with of_prompt(f"held-out prompt {number}"):
            arrays, n_images = _arrays(model, info, prompt)
            given[prompt_digest(arrays)] = moved(prompt, "cpu")
            telling += n_images >= 2
    require_held_out(telling, len(given))
    return Given(given)


def _n_images(prompt: Mapping[str, Any], info: ModelInfo) -> int:
    """Images of a prompt.

    Raises:
        ValueError: it is malformed, or no whole prompt that could run sparse: left out, nobody would miss it.
    """
    if prompt["input_ids"].shape[1] == 1:
        return 0
    try:
        (layout,), _ = read_layouts(prompt, info.family, info.special)
        reason = "an image without its end" if layout.unfinished else None
    except Dense as dense:
        reason = str(dense)
    if reason is not None:
        raise ValueError(
            "a prompt must be one sequence as the processor returns it: whole, and padded at its ends alone. "
            f"Got: {reason}. Pass all that the processor returns, unchanged."
        )
    return layout.n_images


class _Aside(Split[Mapping[str, Any]]):
    """Keeps held-out prompts on the CPU: the pixels of a long one are gigabytes."""

    def holds_out(self, prompt_id: str, prompt: Mapping[str, Any]) -> bool:
        """Whether a prompt is held out; it is then kept in `prompts`."""
        held = super().holds_out(prompt_id, prompt)
        if held:
            self.prompts[prompt_id] = moved(prompt, "cpu")
        return held


def _check_prompt(model: nn.Module, prompt: Mapping[str, Any]) -> None:
    """Refuses what is not one prompt on the model's device."""
    if not isinstance(prompt, Mapping):
        raise ValueError(
            f"prompts must be a list of what the processor returns, tensors by name. Got a {type(prompt).__name__}. "
            "Put a single prompt in a list."
        )
    ids = prompt.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1:
        raise ValueError(
            "a prompt must be what the processor returns for one prompt with return_tensors='pt', input_ids [1, N]. "
            f"Got {tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__}."
        )
    if "labels" in prompt:
        raise ValueError("a prompt must be what the processor returns, without labels: nothing is trained. Got labels.")
    device = next(model.parameters()).device
    wrong = [name for name, value in prompt.items() if isinstance(value, torch.Tensor) and value.device != device]
    if wrong:
        raise ValueError(
            f"prompts must be on the model's device, {device}. Got {', '.join(wrong)} elsewhere: "
            f"call .to({str(device)!r})."
        )


def _arrays(model: nn.Module, info: ModelInfo, prompt: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], int]:
    """The prompt in NumPy, once checked, without what is None; and its number of images."""
    _check_prompt(model, prompt)
    n_images = _n_images(prompt, info)
    arrays = {}
    for name, x in prompt.items():
        if x is None:
            continue
        if isinstance(x, torch.Tensor):
            x = (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()  # NumPy has no bfloat16
        arrays[name] = np.asarray(x)
    return arrays, n_images


def _measure(model: nn.Module, mode: ObserveMode, prompt: Mapping[str, Any]) -> PromptStatistics | None:
    """Runs one prompt; None if it has fewer than two images."""
    observer: Observer | None
    if isinstance(mode, GradientMode):
        observer = measure_with_gradient(model, mode, prompt)
    else:
        mode.observer = None
        with torch.no_grad():
            model(**prompt, use_cache=False, logits_to_keep=1)
        observer = mode.observer
    return None if observer is None else observer.records()[0]
