"""`sparse_prefill(params, inputs)`: a prompt with its images, every head attending by its category in the profile.

    inputs ──► Prompt ──► encode_images ──► features ─┐
                 │                                    ├──► embed ──► hidden ──► layers ──► logits, Cache
                 └──► ids, Layouts ──► work ──────────┴─────────────────────────┘

What is compiled, and when. Every program is compiled once for its shapes, and shapes are buckets, so another prompt of
the same buckets compiles nothing; nor does another profile, or running dense: the categories of heads are data, and the
layers share their programs, however many there are.

* the vision tower: per bucket of patches, one program for all its blocks, or two where some attend within windows
  (Gemma's tower: one, per power of two of images);
* embedding: per buckets of tokens and of features;
* the two halves of a layer, and the logits: per bucket of tokens and batch size;
* the attention: the same, per sizes of its work (powers of two of images and packed keys), for each different window of
  the model (Gemma has two); on CUDA a small one more for each number of dense heads that layers have;
* on a filled cache: the attention per bucket of new tokens and capacity of the cache.

So the first prompt of a bucket compiles about ten programs, however many layers there are. With jax's persistent cache
(`JAX_COMPILATION_CACHE_DIR=FOLDER JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`) a second process compiles none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jax_blindsight.attention import attend
from jax_blindsight.break_even import gains
from jax_blindsight.buckets import bucket, pad_last
from jax_blindsight.cache import Cache
from jax_blindsight.config import ModelConfig
from jax_blindsight.implementations import Name, build_work, implementation
from jax_blindsight.inputs import Prompt, read_inputs
from jax_blindsight.model import embed_tokens, final_norm, unembed
from jax_blindsight.params import Params
from jax_blindsight.settings import with_own_settings
from jax_blindsight.sharding import DATA, check_batch, sharded_rows
from jax_blindsight.stack import run_layers
from jax_blindsight.tower import encode_images
from jax_blindsight.vision_inputs import prepare_vision
from jax_blindsight.work import AttentionWork
from shared_profiles import Category, Layout, SinkTemplate
from shared_profiles.layout import why_dense

if TYPE_CHECKING:
    from blindsight_kernels.pallas_work import PallasWork

Works = dict[int | None, "AttentionWork | PallasWork"]  # by window

ROOM = 128
"""Slots for further tokens in a cache whose capacity nobody stated."""


@dataclass(frozen=True, eq=False)
class Prefilled:
    """What a prefill gives.

    Attributes:
        logits: of the token after each row's last, `[B, V]` float32; with `all_logits` `[B, N, V]`, where those at
            padding mean nothing.
        cache: keys and values of all tokens so far.
        how: "sparse", or "dense: " and why.
        impl: what computed the attention, "pallas" or "portable".
    """

    logits: Array
    cache: Cache
    how: str
    impl: str


@with_own_settings
def sparse_prefill(
    params: Params,
    inputs: Mapping[str, Any],
    *,
    cache: Cache | None = None,
    capacity: int | None = None,
    all_logits: bool = False,
    dense: bool = False,
    break_even: bool = True,
    impl: str | None = None,
) -> Prefilled:
    """Prefills a batch of prompts, or goes on from a filled cache with a chunk or a second turn.

    Rows with fewer than two images run dense; so does a whole batch where no category could save anything, see
    `Prefilled.how`. Pieces of a prompt give what the whole gives if they are cut between images, if none is too short
    to gain, and if the first piece has two images already or no head of the profile is `SINK`: a piece with one image
    runs dense.

    Args:
        params: weights, configuration and profile, from `load`.
        inputs: what the checkpoint's Hugging Face processor returns, as NumPy arrays; see `read_inputs`. With a cache,
            the new tokens and their pictures alone.
        cache: what a prefill or decode step returned last; it is consumed.
        capacity: slots of a new cache, rounded up to a bucket. Default: the prompt and `ROOM` more.
        all_logits: return the logits of every token.
        dense: run every head dense, whatever the profile says.
        break_even: run prompts dense that are too short to gain (`break_even.py` has the rule). False: all multi-image
            prompts run sparsely, which is what comparisons want.
        impl: what computes the attention: "pallas", the kernel for Hopper GPUs, or "portable", XLA on any device.
            Default: "pallas" where the weights are on CUDA devices, "portable" elsewhere.

    Raises:
        ValueError: `inputs` are malformed (see `read_inputs`) or do not fit into the cache or the capacity; the cache
            was consumed, lies on the host or is of another model, or a capacity is given beside it; a profile is needed
            and there is none; an unknown `impl`.
        NotImplementedError, ImportError: the Pallas kernel cannot serve this GPU, dtype, head dimension or jax.
    """
    config, mesh = params.config, params.mesh
    chosen = implementation_for(params, impl)
    prompt = read_inputs(config, inputs, past=None if cache is None else cache.valid)
    n = prompt.given.shape[1]
    if cache is None:
        tokens, q_start = prompt.tokens, 0
        slots = _capacity(capacity, n)
    else:
        if capacity is not None:
            raise ValueError(
                f"a filled cache keeps its capacity of {cache.capacity}. Got capacity={capacity}. Leave it out."
            )
        cache.require_room(params, n)
        tokens, q_start = cache.tokens(config.special).followed_by(prompt.tokens, config.special), cache.length
        slots = cache.capacity
    layouts = tokens.layouts(config)
    categories, template, how = _choose(params, layouts, q_start, dense)
    n_queries = bucket(n)
    n_keys = n_queries if cache is None else slots
    works = layer_work(params, chosen, layouts, template, q_start, n_queries, n_keys)
    if how == "sparse" and break_even and not gains(config, categories, works, mesh):
        categories, how = np.full_like(categories, Category.DENSE), "dense: too short to gain"
    works = place_rows(params, works)
    filled: list[tuple[Array, Array]] = []

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        if cache is None:
            filled.append(_grow(k, v, capacity=slots))
        else:
            k, v = _write(cache.keys[layer], cache.values[layer], k, v, np.int32(q_start))
            filled.append((k, v))
        window = config.text.windows[layer]
        return attend(
            q,
            k,
            v,
            works[window],
            categories=categories[layer],
            window=window,
            scale=config.text.scale,
            bidirectional=config.bidirectional,
            lse=False,
            mesh=mesh,
        )[0]

    positions, next_position, next_piece = prompt.tokens.positions(config)
    if cache is not None:
        positions, next_piece = positions + cache.next_piece[:, None], next_piece + cache.next_piece
        next_position = np.maximum(next_position + cache.next_piece, cache.next_position)
    embeddings = embed_prompt(params, prompt, n_queries)
    hidden = run_layers(params, embeddings, pad_last(positions, n_queries), attend_layer)
    rows = _wanted_rows(prompt, n_queries) if all_logits else np.full((len(prompt.given), 1), n - 1, np.int32)
    logits = _unembed(params.weights, hidden, rows, config=config)
    logits = logits[:, :n] if all_logits else logits[:, 0]
    keys, values = zip(*filled, strict=True)
    return Prefilled(logits, Cache(keys, values, q_start + n, next_position, next_piece, tokens), how, chosen)


def _capacity(asked: int | None, n: int) -> int:
    """Slots of a new cache, a bucket that holds the prompt's."""
    if asked is None:
        asked = n + ROOM
    if not isinstance(asked, int | np.integer) or asked < n:
        raise ValueError(
            f"capacity must be an integer of at least the prompt's {n} tokens, padding included. Got {asked!r}."
        )
    return bucket(asked)


def _choose(
    params: Params, layouts: Sequence[Layout], q_start: int, dense: bool
) -> tuple[np.ndarray, SinkTemplate, str]:
    """The category of every head for this batch, `[L, H]`, the template, and what to call that."""
    text = params.config.text
    everything = np.full((text.n_layers, text.n_heads), Category.DENSE)
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
    reason = why_dense(layouts, q_start) if profile.categories.any() else "all heads are Dense"
    if reason is None:
        return profile.categories, profile.template, "sparse"
    return everything, profile.template, f"dense: {reason}"


def implementation_for(params: Params, impl: str | None) -> Name:
    """What computes the attention of a model, see `implementations.implementation`."""
    table = _table(params)
    return implementation(impl, table.devices(), table.dtype, params.config.text.head_dim)


def layer_work(
    params: Params,
    impl: Name,
    layouts: Sequence[Layout],
    template: SinkTemplate,
    q_start: int,
    n_queries: int,
    n_keys: int,
) -> Works:
    """The attention work of each of the model's different windows, by window, in NumPy.

    Rows with fewer than two images run dense, as they would if they had come alone.

    Raises:
        ValueError: the mesh's data axis does not divide the batch.
    """
    text, mesh = params.config.text, params.mesh
    if mesh is None:
        n_shards = None
    else:
        check_batch(mesh, len(layouts))
        n_shards = mesh.shape[DATA]
    sizes: dict[str, Any] = dict(q_start=q_start, n_queries=n_queries, n_keys=n_keys)
    options: dict[str, Any] = dict(
        head_dim=text.head_dim, dense=[layout.n_images < 2 for layout in layouts], n_shards=n_shards
    )
    return {
        window: build_work(impl, layouts, template, window=window, **sizes, **options)
        for window in dict.fromkeys(text.windows)
    }


def place_rows(params: Params, works: Works) -> Works:
    """The same on the devices of the weights, the rows of a batch dealt out over a mesh."""
    place = _place(params, PartitionSpec(DATA))
    return {window: jax.device_put(work, place) for window, work in works.items()}


def _table(params: Params) -> Array:
    """The embeddings, for where the weights are and what they are like.

    Raises:
        ValueError: they are not on any device.
    """
    table = params.weights["decoder"]["embed_tokens"]["embedding"]
    if not isinstance(table, Array):
        raise ValueError(
            f"the weights must be arrays of JAX. Got a {type(table).__name__}, which every prompt would copy to a "
            "device anew. Pass jax.device_put(params)."
        )
    return table


def _place(params: Params, over_mesh: PartitionSpec) -> Sharding:
    """Where arrays go that meet the weights."""
    return _table(params).sharding if params.mesh is None else NamedSharding(params.mesh, over_mesh)


def _wanted_rows(prompt: Prompt, n_queries: int) -> np.ndarray:
    """Where each given token stands after alignment, `[B, T]` int32."""
    n = prompt.given.shape[1]
    shift = np.argmax(prompt.given[:, ::-1], axis=1)[:, None]
    return pad_last(np.minimum(np.arange(n) + shift, n - 1), n_queries).astype(np.int32)


def embed_prompt(params: Params, prompt: Prompt, n_queries: int) -> Array:
    """Embedded tokens with the image features in their places: `[B, T, E]`, T the bucket."""
    ids = pad_last(prompt.tokens.ids, n_queries).astype(np.int32)
    static: dict[str, Any] = dict(config=params.config, mesh=params.mesh)
    if not prompt.pictures:
        return _embed(params.weights, ids, None, None, **static)
    vision, place = prepare_vision(params.config, {"input_ids": ids, **prompt.pictures})  # padding is text
    features = encode_images(params.weights, params.config, jax.device_put(vision, _place(params, PartitionSpec())))
    return _embed(params.weights, ids, features, place, **static)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _embed(
    weights: Any, ids: Array, features: Array | None, place: Array | None, *, config: ModelConfig, mesh: Mesh | None
) -> Array:
    hidden = embed_tokens(weights, config, ids)  # [B, T, E]
    if features is not None and place is not None:
        hidden = jnp.where(place[..., None] >= 0, features.astype(hidden.dtype)[jnp.maximum(place, 0)], hidden)
    return sharded_rows(mesh, hidden)


@partial(jax.jit, static_argnames="config")
def _unembed(weights: Any, hidden: Array, rows: Array, *, config: ModelConfig) -> Array:
    """Logits `[B, R, V]` of the wanted rows `[B, R]` of the last layer's `[B, T, E]`."""
    hidden = jnp.take_along_axis(hidden, rows[..., None], axis=1)
    return unembed(weights, config, final_norm(weights, config, hidden))


@partial(jax.jit, static_argnames="capacity")
def _grow(k: Array, v: Array, *, capacity: int) -> tuple[Array, Array]:
    """A layer's keys and values `[B, K, T, D]` with room for more: `[B, K, S, D]`."""
    room = [(0, 0), (0, 0), (0, capacity - k.shape[2]), (0, 0)]
    return jnp.pad(k, room), jnp.pad(v, room)


@partial(jax.jit, donate_argnames=("keys", "values"))
def _write(keys: Array, values: Array, k: Array, v: Array, start: Array) -> tuple[Array, Array]:
    """A layer of the cache, `[B, K, S, D]` each, with k and v `[B, K, T, D]` written from slot `start` on."""
    return _written(keys, k, start), _written(values, v, start)


def _written(cache: Array, new: Array, start: Array) -> Array:
    """The cache `[B, K, S, D]` with `[B, K, T, D]` written at slot `start`; what hangs over the end falls away.

    Only the unused tail of a bucket may hang over: `dynamic_update_slice` would move the whole to the left.
    """
    n = new.shape[2]
    moved = jnp.minimum(start, cache.shape[2] - n)
    late = start - moved
    old = lax.dynamic_slice_in_dim(cache, moved, n, axis=2)
    merged = jnp.where((jnp.arange(n) < late)[:, None], old, jnp.roll(new, late, axis=2))
    return lax.dynamic_update_slice_in_dim(cache, merged, moved, axis=2)
