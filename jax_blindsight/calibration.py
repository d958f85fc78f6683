"""`calibrate(params, prompts)`: from a data set to a profile, with the statistics that `torch_blindsight` measures.

The measured forward runs dense. For every layer the three sparse categories are computed beside it, and per head two
means over the image rows that have an earlier image are kept (DESIGN.md, section 4, stage 1):

* retained mass `exp(lse_category - lse_dense)`, the share of softmax weight that the category keeps;
* relative output error `||o_category - o_dense|| / ||o_dense||`.

The program is compiled once per bucket, as a prefill's is. Nothing of size T * S ever exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from jax_blindsight.attention import attend
from jax_blindsight.buckets import bucket
from jax_blindsight.config import ModelConfig
from jax_blindsight.inputs import read_inputs
from jax_blindsight.model import decode
from jax_blindsight.params import Params
from jax_blindsight.prefill import embed_prompt, layer_work, pad_last, windows_of
from jax_blindsight.sharding import attend_on_mesh
from jax_blindsight.work import AttentionWork
from shared_profiles import SPARSE, Category, SinkTemplate, count_model_pairs
from shared_profiles.classifier import Thresholds
from shared_profiles.collection import collect
from shared_profiles.layout import concatenated_ranges
from shared_profiles.profile import Profile
from shared_profiles.provenance import make_profile
from shared_profiles.statistics import PromptStatistics

PACKAGES = ("jax", "flax")  # whose versions a profile's provenance names


def calibrate(
    params: Params,
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
    when `state` is given: prompts already measured are recognized by their content. `torch_blindsight.calibrate` of the
    same checkpoint and template can go on from the same file.

    Args:
        params: weights and configuration, from `load`; a profile is not looked at.
        prompts: what the checkpoint's processor returns as NumPy arrays, one prompt each: `input_ids [1, N]`, ...
        dataset: name of the data, kept in the profile.
        template: sinks and local blocks.
        thresholds: how much a head must retain.
        state: file in which the statistics are kept, written every `save_every` prompts and on interruption.
        save_every: how often.
        progress: show a progress bar on standard error; default: when it is a terminal.

    Returns:
        The profile, with the statistics it was chosen from and their provenance. It is not saved.

    Raises:
        ValueError: no prompt has two images, or a prompt is malformed.
        OSError: the state cannot be written.
    """
    template, thresholds = template or SinkTemplate(), thresholds or Thresholds()
    statistics = collect(
        tqdm(prompts, desc="calibrating", unit="prompt", disable=None if progress is None else not progress),
        lambda prompt: measure(params, prompt, template),
        _arrays,
        params.fingerprint,
        template,
        state=state,
        save_every=save_every,
    )
    return make_profile(statistics, thresholds, template, params.fingerprint, dataset, PACKAGES)


def _arrays(prompt: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The prompt in NumPy; refuses what is not one prompt."""
    ids = np.asarray(prompt.get("input_ids"))
    if ids.ndim != 2 or len(ids) != 1:
        raise ValueError(
            f"a prompt must be what the processor returns for one prompt, input_ids [1, N]. Got {ids.shape}."
        )
    return {name: np.asarray(value) for name, value in prompt.items() if value is not None}


def measure(params: Params, inputs: Mapping[str, Any], template: SinkTemplate) -> PromptStatistics | None:
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
        params.weights,
        embed_prompt(params, prompt, n),
        pad_last(prompt.tokens.positions(config)[0], n),
        layer_work(config, [layout], template, 0, n, n),
        counted,
        config=config,
        mesh=params.mesh,
    )
    shape = config.text.n_layers, 1
    pairs = [
        count_model_pairs(layout, np.full(shape, category), template, windows=config.text.windows).total
        for category in (Category.DENSE, *SPARSE)
    ]
    return PromptStatistics(
        n_tokens=layout.stop - layout.start,
        n_images=layout.n_images,
        n_rows=len(rows),
        mass=np.asarray(mass),
        error=np.asarray(error),
        kept=np.array(pairs[1:]) / pairs[0],
    )


@partial(jax.jit, static_argnames=("config", "mesh"))
def _measure(
    weights: Any,
    hidden: Array,  # [1, T, E]
    positions: Array,
    works: tuple[AttentionWork, ...],
    counted: Array,  # [T], 1 for the rows that the means are over
    *,
    config: ModelConfig,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """Retained mass and output error, `[3, L, H]` each."""
    windows = windows_of(config)
    masses: list[Array] = []
    errors: list[Array] = []

    def mean(values: Array) -> Array:
        """Over the counted rows: `[T, H]` to `[H]`."""
        return jnp.where(counted[:, None] > 0, values, 0.0).sum(axis=0) / counted.sum()

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        window = config.text.windows[layer]

        def run(category: Category) -> tuple[Array, Array]:
            return attend_on_mesh(
                attend,
                mesh,
                q,
                k,
                v,
                works[windows.index(window)],
                categories=(int(category),) * config.text.n_heads,
                window=window,
                scale=config.text.scale,
                bidirectional=config.bidirectional,
            )

        dense, dense_lse = run(Category.DENSE)  # [1, T, H, D], [1, H, T]
        size = jnp.linalg.norm(dense[0].astype(jnp.float32), axis=-1)  # [T, H]
        mass, error = [], []
        for category in SPARSE:
            sparse, lse = run(category)
            change = jnp.linalg.norm(sparse[0].astype(jnp.float32) - dense[0].astype(jnp.float32), axis=-1)
            # A pruned head is all zeros.
            error.append(mean(jnp.where(change == 0, 0.0, change / jnp.where(change == 0, 1.0, size))))
            mass.append(mean(jnp.exp(lse[0] - dense_lse[0]).T))
        masses.append(jnp.stack(mass))
        errors.append(jnp.stack(error))
        return dense

    decode(weights, config, hidden, positions, attend_layer)
    return jnp.stack(masses, axis=1), jnp.stack(errors, axis=1)
