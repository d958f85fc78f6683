"""`sparse_prefill(params, inputs)`: a prompt with its images, every head attending by its category in the profile.

    inputs ──► Prompt ──► encode_images ──► features ─┐
                 │                                    ├──► embed ──► hidden ──► layers ──► logits, Cache
                 └──► ids, Layouts ──► AttentionWork ─┴─────────────────────────┘

Three programs, each compiled once per bucket and apart from one another, so that their buckets do not multiply: the
vision tower per bucket of patches; the embedding, a look-up and a gather, per buckets of tokens and of features; the
layers, the only big one, per bucket of tokens, batch size and sizes of the attention work, sparse and dense apart; on a
filled cache per its capacity and the bucket of keys as well. Everything else about a prompt enters as arrays, so
another layout of the same buckets compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from jax_blindsight.attention import attend
from jax_blindsight.buckets import bucket
from jax_blindsight.cache import Cache
from jax_blindsight.config import ModelConfig
from jax_blindsight.inputs import Prompt, read_inputs
from jax_blindsight.model import decode, embed_tokens, encode_images, unembed
from jax_blindsight.params import Params
from jax_blindsight.sharding import attend_on_mesh, batch_sharded
from jax_blindsight.tokens import Tokens
from jax_blindsight.vision_inputs import prepare_vision
from jax_blindsight.work import AttentionWork, attention_work
from shared_profiles import Category, Layout, SinkTemplate

ROOM = 128
"""Slots for further tokens in a cache whose capacity nobody stated."""

Categories = tuple[tuple[int, ...], ...]  # [L][H], values of `Category`


@dataclass(frozen=True, eq=False)
class Prefilled:
    """What a prefill gives.

    Attributes:
        logits: of the token after each row's last, `[B, V]` float32; with `all_logits` `[B, N, V]`, where those at
            padding mean nothing.
        cache: keys and values of all tokens so far.
        how: "sparse", or "dense: " and why.
    """

    logits: Array
    cache: Cache
    how: str


def sparse_prefill(
    params: Params,
    inputs: Mapping[str, Any],
    *,
    cache: Cache | None = None,
    capacity: int | None = None,
    all_logits: bool = False,
    dense: bool = False,
) -> Prefilled:
    """Prefills a batch of prompts, or goes on from a filled cache with a chunk or a second turn.

    Rows with fewer than two images run dense; so does a whole batch where no category could save anything, see
    `Prefilled.how`. Pieces of a prompt give what the whole gives if they are cut between images, and if the first piece
    has two images already or no head of the profile is `SINK`: a piece with one image runs dense.

    Args:
        params: weights, configuration and profile, from `load`.
        inputs: what the checkpoint's Hugging Face processor returns, as NumPy arrays; see `read_inputs`. With a cache,
            the new tokens and their pictures alone.
        cache: what a prefill or decode step returned last; it is consumed.
        capacity: slots of a new cache, rounded up to a bucket. Default: the prompt and `ROOM` more.
        all_logits: return the logits of every token.
        dense: run every head dense, whatever the profile says.

    Raises:
        ValueError: `inputs` are malformed (see `read_inputs`), do not fit into the cache, or a profile is needed and
            there is none.
    """
    config = params.config
    prompt = read_inputs(config, inputs, past=0 if cache is None else cache.length)
    n = prompt.given.shape[1]
    if cache is None:
        tokens, q_start = prompt.tokens, 0
        slots = _capacity(capacity, n)
    else:
        if capacity is not None:
            raise ValueError(
                f"a filled cache keeps its capacity of {cache.capacity}. Got capacity={capacity}. Leave it out."
            )
        cache.require_room(n)
        tokens, q_start = cache.tokens(config.special).followed_by(prompt.tokens), cache.length
        slots = cache.capacity
    layouts = tokens.layouts(config)
    categories, template, how = _choose(params, layouts, q_start, dense)
    n_queries = bucket(n)
    n_keys = n_queries if cache is None else min(bucket(q_start + n), slots)
    positions, next_position = tokens.positions(config)
    logits, keys, values = _layers(
        params.weights,
        embed_prompt(params, prompt, n_queries),
        pad_last(positions[..., q_start:], n_queries),
        layer_work(config, layouts, template, q_start, n_queries, n_keys),
        None if cache is None else cache.keys,
        None if cache is None else cache.values,
        np.int32(q_start),
        _wanted_rows(prompt, n_queries) if all_logits else np.full((len(prompt.given), 1), n - 1, np.int32),
        config=config,
        categories=categories,
        n_keys=n_keys,
        mesh=params.mesh,
    )
    if cache is None:  # layer by layer, so that one layer at a time is there twice
        keys, values = (tuple(_grow(layer, slots) for layer in layers) for layers in (keys, values))
    logits = logits[:, :n] if all_logits else logits[:, 0]
    return Prefilled(logits, Cache(keys, values, q_start + n, next_position, tokens), how)


def _capacity(asked: int | None, n: int) -> int:
    """Slots of a new cache, a bucket that holds the prompt's."""
    if asked is None:
        asked = n + ROOM
    if asked < n:
        raise ValueError(f"capacity must be at least the prompt's {n} tokens, padding included. Got {asked}.")
    return bucket(asked)


def _choose(
    params: Params, layouts: Sequence[Layout], q_start: int, dense: bool
) -> tuple[Categories, SinkTemplate, str]:
    """The category of every head for this batch, the template, and what to call that."""
    text = params.config.text
    everything = ((int(Category.DENSE),) * text.n_heads,) * text.n_layers
    if dense:
        return everything, SinkTemplate(), "dense: asked for"
    profile = params.profile
    if profile is None:
        raise ValueError(
            "sparse_prefill needs a profile of this model. Got params without one. Make one with "
            "jax_blindsight.calibrate or `blindsight calibrate`, and load with profile=...; or pass dense=True."
        )
    if profile.categories.shape != (text.n_layers, text.n_heads):
        raise ValueError(
            f"the profile must be of this model, {text.n_layers} layers of {text.n_heads} heads. Got one of "
            f"{profile.categories.shape}. Load with this model's own."
        )
    if not profile.categories.any():
        reason = "all heads are Dense"
    elif all(layout.n_images < 2 for layout in layouts):
        reason = "fewer than two images"
    elif all(layout.n_images == 0 or layout.images[-1, 2] <= q_start for layout in layouts):
        reason = "no image tokens among the queries"
    else:
        return tuple(map(tuple, profile.categories.tolist())), profile.template, "sparse"
    return everything, profile.template, f"dense: {reason}"


def layer_work(
    config: ModelConfig, layouts: Sequence[Layout], template: SinkTemplate, q_start: int, n_queries: int, n_keys: int
) -> tuple[AttentionWork, ...]:
    """The attention work of each of the model's different windows, in the order of `windows_of`.

    Rows with fewer than two images run dense, as they would if they had come alone.
    """
    sizes = dict(q_start=q_start, n_queries=n_queries, n_keys=n_keys)
    lone = [layout.n_images < 2 for layout in layouts]
    return tuple(attention_work(layouts, template, window=w, dense=lone, **sizes) for w in windows_of(config))


def windows_of(config: ModelConfig) -> list[int | None]:
    """The different windows of the model's layers, by first appearance."""
    return list(dict.fromkeys(config.text.windows))


def pad_last(array: np.ndarray, n: int) -> np.ndarray:
    """Zeros after the last axis, up to length n."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, n - array.shape[-1])])


def _wanted_rows(prompt: Prompt, n_queries: int) -> np.ndarray:
    """Where each given token stands after alignment, `[B, T]` int32."""
    n = prompt.given.shape[1]
    shift = np.argmax(prompt.given[:, ::-1], axis=1)[:, None]
    return pad_last(np.minimum(np.arange(n) + shift, n - 1), n_queries).astype(np.int32)


def embed_prompt(params: Params, prompt: Prompt, n_queries: int) -> Array:
    """Embedded tokens with the image features in their places: `[B, T, E]`, T the bucket."""
    ids = pad_last(prompt.tokens.ids, n_queries).astype(np.int32)
    if not prompt.pictures:
        return _embed(params.weights, ids, None, None, config=params.config)
    vision = prepare_vision(params.config, {"input_ids": prompt.tokens.ids, **prompt.pictures})
    features = _encode(params.weights, vision, config=params.config)
    place = feature_places(params.config, prompt.tokens)
    return _embed(params.weights, ids, features, pad_last(place + 1, n_queries) - 1, config=params.config)


def feature_places(config: ModelConfig, tokens: Tokens) -> np.ndarray:
    """Row of the image features that each token takes, `[B, N]` int32, -1 for text."""
    is_picture = np.isin(tokens.ids, [x for x in (config.special.image, config.special.video) if x is not None])
    is_picture &= tokens.valid
    place = np.cumsum(is_picture.reshape(-1)).reshape(is_picture.shape) - 1
    return np.where(is_picture, place, -1).astype(np.int32)


@partial(jax.jit, static_argnames="config")
def _encode(weights: Any, vision: Any, *, config: ModelConfig) -> Array:
    return encode_images(weights, config, vision)


@partial(jax.jit, static_argnames="config")
def _embed(weights: Any, ids: Array, features: Array | None, place: Array | None, *, config: ModelConfig) -> Array:
    hidden = embed_tokens(weights, config, ids)  # [B, T, E]
    if features is None or place is None:
        return hidden
    return jnp.where(place[..., None] >= 0, features.astype(hidden.dtype)[jnp.maximum(place, 0)], hidden)


@partial(jax.jit, static_argnames=("config", "categories", "n_keys", "mesh"), donate_argnames=("keys", "values"))
def _layers(
    weights: Any,
    hidden: Array,  # [B, T, E]
    positions: Array,
    works: tuple[AttentionWork, ...],
    keys: tuple[Array, ...] | None,  # L x [B, K, S, D]
    values: tuple[Array, ...] | None,
    q_start: Array,
    rows: Array,  # [B, R]
    *,
    config: ModelConfig,
    categories: Categories,
    n_keys: int,
    mesh: Mesh | None,
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """Logits `[B, R, V]` of the wanted rows, and the filled cache; without one before, of T slots."""
    windows = windows_of(config)
    filled: list[tuple[Array, Array]] = []

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        if keys is None or values is None:
            filled.append((k, v))
        else:
            filled.append((_write(keys[layer], k, q_start), _write(values[layer], v, q_start)))
            k, v = (x[:, :, :n_keys] for x in filled[layer])
        out, _ = attend_on_mesh(
            attend,
            mesh,
            q,
            k,
            v,
            works[windows.index(config.text.windows[layer])],
            categories=categories[layer],
            window=config.text.windows[layer],
            scale=config.text.scale,
            bidirectional=config.bidirectional,
            lse=False,
        )
        return out

    hidden = decode(weights, config, batch_sharded(mesh, hidden), positions, attend_layer)
    hidden = jnp.take_along_axis(hidden, rows[..., None], axis=1)  # [B, R, E]
    new_keys, new_values = zip(*filled, strict=True)
    return unembed(weights, config, hidden), new_keys, new_values


@partial(jax.jit, static_argnames="capacity")
def _grow(layer: Array, capacity: int) -> Array:
    """Keys or values `[B, K, T, D]` with room for more: `[B, K, S, D]`."""
    return jnp.pad(layer, [(0, 0), (0, 0), (0, capacity - layer.shape[2]), (0, 0)])


def _write(cache: Array, new: Array, start: Array) -> Array:
    """The cache `[B, K, S, D]` with `[B, K, T, D]` written at slot `start`; what hangs over the end falls away.

    Only the unused tail of a bucket may hang over: `dynamic_update_slice` would move the whole to the left.
    """
    n = new.shape[2]
    moved = jnp.minimum(start, cache.shape[2] - n)
    late = start - moved
    old = lax.dynamic_slice_in_dim(cache, moved, n, axis=2)
    merged = jnp.where((jnp.arange(n) < late)[:, None], old, jnp.roll(new, late, axis=2))
    return lax.dynamic_update_slice_in_dim(cache, merged, moved, axis=2)
