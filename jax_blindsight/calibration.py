"""`calibrate(params, prompts)`: from a data set to a profile, with the statistics that `torch_blindsight` measures.

The measured forward runs dense. For every layer the three sparse categories are computed beside it, and per head two
means over the image rows that have an earlier image are kept (DESIGN.md, section 4, stage 1):

* retained mass `exp(lse_category - lse_dense)`, the share of softmax weight that the category keeps;
* relative output error `||o_category - o_dense|| / ||o_dense||`.

The programs are a prefill's, compiled once per bucket. Nothing of size T * S ever exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from jax_blindsight.attention import attend
from jax_blindsight.buckets import bucket
from jax_blindsight.held_out import HeldOut
from jax_blindsight.inputs import read_inputs
from jax_blindsight.params import Params
from jax_blindsight.prefill import embed_prompt, implementation_for, layer_work, pad_last
from jax_blindsight.stack import run_layers
from jax_blindsight.work import AttentionWork
from shared_profiles import SPARSE, Category, SinkTemplate, count_layer_pairs
from shared_profiles.budget import Budget, tune
from shared_profiles.classifier import Thresholds
from shared_profiles.collection import collect
from shared_profiles.layout import concatenated_ranges
from shared_profiles.profile import Profile
from shared_profiles.provenance import dataset_hash, make_profile, make_provenance, prompt_digest
from shared_profiles.split import HELD_OUT, Given, Split
from shared_profiles.statistics import PromptStatistics

if TYPE_CHECKING:
    from blindsight_kernels.pallas_work import PallasWork

PACKAGES = ("jax", "flax")  # whose versions a profile's provenance names


def calibrate(
    params: Params,
    prompts: Iterable[Mapping[str, Any]],
    *,
    dataset: str = "unnamed",
    template: SinkTemplate | None = None,
    budget: Budget | None = None,
    thresholds: Thresholds | None = None,
    held_out: float | Iterable[Mapping[str, Any]] = HELD_OUT,
    state: str | Path | None = None,
    save_every: int = 8,
    progress: bool | None = None,
    impl: str | None = None,
) -> Profile:
    """Measures a model on prompts and chooses a category for every head.

    Prompts with fewer than two images are skipped: they show nothing. An interrupted run continues where it stopped
    when `state` is given: prompts already measured are recognized by their content. `torch_blindsight.calibrate` of the
    same checkpoint and template can go on from the same file.

    Args:
        params: weights and configuration, from `load`; a profile is not looked at.
        prompts: what the checkpoint's processor returns as NumPy arrays, one prompt each: `input_ids [1, N]`, ...
        dataset: name of the data, kept in the profile.
        template: sinks and local blocks.
        budget: allowed KL divergence of the next token, to choose by that; its ranking must be `"error"`, the one that
            this backend measures.
        thresholds: how much a head must retain, the default.
        held_out: the share of prompts that a budget is measured on, chosen by their content; or these prompts. They
            stay in memory until the end.
        state: file in which the statistics are kept, written every `save_every` prompts and on interruption.
        save_every: how often.
        progress: show a progress bar on standard error; default: when it is a terminal.
        impl: what computes the attention that is measured; as in `sparse_prefill`.

    Returns:
        The profile, with the statistics it was chosen from, their provenance and, by a budget, every measured point.
        It is not saved.

    Raises:
        ValueError: no prompt has two images, or none of the held-out ones; a prompt is malformed, or held out and
            calibrated on; budget and thresholds; an unknown `impl`.
        NotImplementedError: the budget ranks by what only `torch_blindsight` measures.
        NotImplementedError, ImportError: see `sparse_prefill`.
        OSError: the state cannot be written.
    """
    template = template or SinkTemplate()
    split = None if budget is None else _split(budget, thresholds, held_out)
    statistics = collect(
        tqdm(prompts, desc="calibrating", unit="prompt", disable=None if progress is None else not progress),
        lambda prompt: measure(params, prompt, template, impl),
        _arrays,
        params.fingerprint,
        template,
        state=state,
        save_every=save_every,
        split=split,
    )
    profile = make_profile(statistics, thresholds or Thresholds(), template, params.fingerprint, dataset, PACKAGES)
    if budget is None or split is None:
        return profile
    held = HeldOut(params, profile, split.prompts, impl)
    made_from = make_provenance(dataset, statistics, PACKAGES, held.n_tokens)
    return tune(replace(profile, provenance=made_from), budget, held, held_out=dataset_hash(held.prompts))


def _split(
    budget: Budget, thresholds: Thresholds | None, held_out: float | Iterable[Mapping[str, Any]]
) -> Split[Mapping[str, Any]]:
    """The held-out prompts of a budget that this backend can serve."""
    if thresholds is not None:
        raise ValueError("categories must be chosen by a budget or by thresholds. Got both. Leave one out.")
    if budget.ranking != "error":
        raise NotImplementedError(
            f"the JAX backend ranks heads by 'error'. Got {budget.ranking!r}. Pass Budget(kl, 'error'), or calibrate "
            "with torch_blindsight, whose profile serves both."
        )
    if isinstance(held_out, int | float):
        return Split(held_out)
    return Given({prompt_digest(_arrays(prompt)): prompt for prompt in held_out})


def _arrays(prompt: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The prompt in NumPy; refuses what is not one prompt."""
    ids = np.asarray(prompt.get("input_ids"))
    if ids.ndim != 2 or len(ids) != 1:
        raise ValueError(
            f"a prompt must be what the processor returns for one prompt, input_ids [1, N]. Got {ids.shape}."
        )
    return {name: np.asarray(value) for name, value in prompt.items() if value is not None}


def measure(
    params: Params, inputs: Mapping[str, Any], template: SinkTemplate, impl: str | None = None
) -> PromptStatistics | None:
    """The statistics of one prompt; None if it has fewer than two images.

    Raises:
        ValueError: the prompt is malformed.
    """
    config = params.config
    prompt = read_inputs(config, inputs)
    (layout,) = prompt.tokens.layouts(config)
    if layout.n_images < 2:
        return None
    # Image rows that have an earlier image: all that a category can change.
    rows = concatenated_ranges(layout.images[1:, 1], layout.images[1:, 2])
    n = bucket(layout.n_tokens)
    counted = np.zeros(n, dtype=np.float32)
    counted[rows] = 1
    mass, error = _measure(
        params,
        layer_work(params, implementation_for(params, impl), [layout], template, 0, n, n),
        embed_prompt(params, prompt, n),
        pad_last(prompt.tokens.positions(config)[0], n),
        counted,
    )
    return PromptStatistics(
        n_tokens=layout.stop - layout.start,
        n_images=layout.n_images,
        n_rows=len(rows),
        mass=mass,
        error=error,
        pairs=count_layer_pairs(layout, template, config.text.windows),
    )


def _measure(
    params: Params,
    works: Mapping[int | None, AttentionWork | PallasWork],
    hidden: Array,  # [1, T, E]
    positions: np.ndarray,
    counted: np.ndarray,  # [T], 1 for the rows that the means are over
) -> tuple[np.ndarray, np.ndarray]:
    """Retained mass and output error, `[3, L, H]` each."""
    config = params.config
    found: list[list[Array]] = []  # [L][3] of [2, H]

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        window = config.text.windows[layer]

        def run(category: Category) -> tuple[Array, Array]:
            return attend(  # type: ignore[return-value]  # with log-sum-exps
                q,
                k,
                v,
                works[window],
                categories=(category,) * config.text.n_heads,
                window=window,
                scale=config.text.scale,
                bidirectional=config.bidirectional,
                mesh=params.mesh,
            )

        dense = run(Category.DENSE)
        found.append([_compare(run(category), dense, counted) for category in SPARSE])
        return dense[0]

    run_layers(params, hidden, positions, attend_layer)
    mass, error = np.array(jax.device_get(found)).transpose(2, 1, 0, 3)
    return mass, error


@jax.jit
def _compare(sparse: tuple[Array, Array], dense: tuple[Array, Array], counted: Array) -> Array:
    """Means of retained mass and output error over the counted rows, `[2, H]`, of `[1, T, H, D]`, `[1, H, T]` each."""
    out, exact = (x[0][0].astype(jnp.float32) for x in (sparse, dense))
    change = jnp.linalg.norm(out - exact, axis=-1)  # [T, H]
    # A pruned head is all zeros.
    error = jnp.where(change == 0, 0.0, change / jnp.where(change == 0, 1.0, jnp.linalg.norm(exact, axis=-1)))
    both = jnp.stack([jnp.exp(sparse[1][0] - dense[1][0]).T, error])  # [2, T, H]
    return jnp.where(counted[:, None] > 0, both, 0.0).sum(axis=1) / counted.sum()
