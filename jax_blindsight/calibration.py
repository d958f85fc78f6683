"""`calibrate(params, prompts)`: from a data set to a profile, with the statistics that `torch_blindsight` measures.

What is measured is told in `observe`, and in `gradient` for the default ranking.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jax_blindsight.gradient import measure_with_gradient
from jax_blindsight.held_out import HeldOut
from jax_blindsight.inputs import as_arrays
from jax_blindsight.observe import observe, observer_of
from jax_blindsight.params import Params
from jax_blindsight.prefill import implementation_for
from jax_blindsight.settings import with_own_settings
from jax_blindsight.sharding import DATA
from jax_blindsight.sinks import measure_sinks
from shared_profiles import SinkTemplate, count_layer_pairs
from shared_profiles.budget import Budget, budget_of, rankings_for, tune
from shared_profiles.classifier import Thresholds
from shared_profiles.collection import Collector, check_dataset, check_local_block, of_prompt
from shared_profiles.fisher import prompt_seed
from shared_profiles.profile import Profile
from shared_profiles.provenance import dataset_hash, make_profile, make_provenance, prompt_digest
from shared_profiles.split import HELD_OUT, Given, Split
from shared_profiles.state_files import one_writer
from shared_profiles.statistics import PromptStatistics

PACKAGES = ("jax", "flax")  # whose versions a profile's provenance names


def calibrate(
    params: Params,
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
    impl: str | None = None,
) -> Profile:
    """Measures a model on prompts and chooses a category for every head.

    By a budget, the default, some prompts are held out; the heads are ranked on the others and made sparse for as long
    as the next token of the held-out prompts stays within the budget (`shared_profiles.budget`). By thresholds all
    prompts are calibrated on, and nothing is held out.

    Prompts with fewer than two images are skipped: they show nothing. An interrupted run continues where it stopped
    when `state` is given: prompts already measured are recognized by their content. `torch_blindsight.calibrate` of the
    same checkpoint and template can go on from the same file.

    Args:
        params: weights and configuration, from `load`; a profile is not looked at.
        prompts: what the checkpoint's processor returns as NumPy arrays, one prompt each: `input_ids [1, N]`, ...
        dataset: name of the data, kept in the profile.
        template: sinks and local blocks. Default: that of the statistics in `state` and `merge`; where there are none
            yet, sinks are learned from the first 8 prompts (`shared_profiles.sink_statistics`).
        budget: allowed KL divergence of the next token in nats, or a `Budget`: that, and what ranks the heads
            (`"gradient"`, one backward pass a prompt; `"residual"`, for models too large for one; `"error"`), and over
            how many devices the heads are split where it is served. Default: `Budget()`, unless thresholds are given.
        thresholds: how much a head must retain, to choose by that instead.
        held_out: the share of prompts that a budget is measured on, chosen by their content; or these prompts. They
            stay in memory until the end.
        local_block: width of the local blocks of a template that is not given, a multiple of 8. Default: 128.
        state: file in which the statistics are kept, written every `save_every` prompts and on interruption, by one
            run at a time.
        merge: further such files, whose statistics count, too; of the same model, template and rankings.
        save_every: how often.
        progress: show a progress bar on standard error; default: when it is a terminal.
        impl: what computes the attention that is measured; as in `sparse_prefill`.

    Returns:
        The profile, with the statistics it was chosen from, their provenance and, by a budget, every measured point.
        It is not saved. Where no head can be sparse within the budget all are Dense, and `choice["reached"]` is false.

    Raises:
        ValueError: no prompt has two images, or none of the held-out ones; a prompt is malformed, or held out and
            calibrated on; budget and thresholds; a quantile or a dataset's name that cannot be; template and
            local_block; a state is of another model, template or rankings, or another run writes it; the weights were
            changed since `load`, or lie on a mesh whose data axis is more than 1; an unknown `impl`.
        NotImplementedError, ImportError: see `sparse_prefill`.
        OSError: a state cannot be read or written.
    """
    params.require_loaded()
    _check_mesh(params)
    limit = budget_of(budget, thresholds, params.config.text.n_heads)
    check_local_block(template, local_block)
    check_dataset(dataset)
    implementation_for(params, impl)  # refuses what cannot be, before any prompt
    rankings, split = rankings_for(limit), None if limit is None else _split(held_out)
    with one_writer(state):
        collector = Collector(
            tqdm(prompts, desc="calibrating", unit="prompt", disable=None if progress is None else not progress),
            _arrays,
            params.fingerprint,
            rankings=rankings,
            state=state,
            merge=merge,
            save_every=save_every,
            split=split,
        )
        # What is wrong with held-out prompts that were given shows before the others are measured.
        given = HeldOut(params, split.prompts, impl) if isinstance(split, Given) else None
        sinks = template or collector.learn(lambda prompt: measure_sinks(params, prompt, impl=impl), local_block)
        statistics = collector.collect(lambda prompt: measure(params, prompt, sinks, impl, rankings), sinks)
        profile = make_profile(statistics, thresholds or Thresholds(), sinks, params.fingerprint, dataset, PACKAGES)
        if limit is None or split is None:
            return profile
        held = given or HeldOut(params, split.prompts, impl)
        made_from = make_provenance(dataset, statistics, PACKAGES, held.n_tokens)
        profile = replace(profile, provenance=made_from)
        return tune(profile, limit, partial(held, profile), held_out=dataset_hash(held.prompts))


def _check_mesh(params: Params) -> None:
    """Refuses a mesh that every prompt would be refused on."""
    n = 1 if params.mesh is None else params.mesh.shape[DATA]
    if n > 1:
        raise ValueError(
            f"calibrate measures prompts one at a time: the mesh's data axis must be 1. Got {n} devices. Load on a "
            "mesh of the model axis alone; to share prompts out, calibrate on some of them each and merge the states."
        )


def _split(held_out: float | Iterable[Mapping[str, Any]]) -> Split[Mapping[str, Any]]:
    """The held-out prompts: a share, or the caller's own, checked."""
    if isinstance(held_out, int | float | np.floating):
        return Split(held_out)
    prompts = {}
    for number, prompt in enumerate(held_out):
        with of_prompt(f"held-out prompt {number}"):
            prompts[prompt_digest(_arrays(prompt))] = prompt
    return Given(prompts)


def _arrays(prompt: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The prompt in NumPy; refuses what is not one prompt."""
    arrays = as_arrays(prompt)
    shape = arrays["input_ids"].shape if "input_ids" in arrays else None
    if shape is None or len(shape) != 2 or shape[0] != 1:
        raise ValueError(f"a prompt must be what the processor returns for one prompt, input_ids [1, N]. Got {shape}.")
    return arrays


@with_own_settings
def measure(
    params: Params,
    inputs: Mapping[str, Any],
    template: SinkTemplate,
    impl: str | None = None,
    rankings: Collection[str] = (),
) -> PromptStatistics | None:
    """The statistics of one prompt, with the harm of these rankings; None if it has fewer than two images.

    Raises:
        ValueError: the prompt is malformed.
        NotImplementedError, ImportError: see `sparse_prefill`.
    """
    observer = observer_of(params, inputs, template, impl, rankings)
    if observer is None:
        return None
    if "gradient" in rankings:
        measure_with_gradient(observer, prompt_seed(inputs["input_ids"]))
    else:
        observe(observer)
    found, layout = observer.tables(), observer.layout
    return PromptStatistics(
        n_tokens=layout.stop - layout.start,
        n_images=layout.n_images,
        n_rows=len(observer.rows),
        mass=found.pop("mass"),
        error=found.pop("error"),
        pairs=count_layer_pairs(layout, template, params.config.text.windows),
        harm=found,
    )
