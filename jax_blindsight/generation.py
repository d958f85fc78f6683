"""What comes after the prefill: `decode_step` adds one token per row, `write` and `generate` whole answers.

Decode steps are dense: a written token is text, and text looks at everything. The step is compiled once per batch size
and capacity of the cache; sampling once per batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from jax_blindsight.cache import Cache
from jax_blindsight.config import ModelConfig
from jax_blindsight.inputs import as_arrays
from jax_blindsight.model import decode, embed_tokens, unembed
from jax_blindsight.params import Params
from jax_blindsight.prefill import Prefilled, sparse_prefill
from jax_blindsight.settings import with_own_settings
from jax_blindsight.sharding import sharded_rows

logger = logging.getLogger("jax_blindsight")

_NEVER = float(np.finfo(np.float32).min)  # a score that softmax makes 0; finite


@with_own_settings
def decode_step(params: Params, tokens: Array | np.ndarray | Sequence[int], cache: Cache) -> tuple[Array, Cache]:
    """Adds one token to every row.

    Args:
        params: what the cache was made with.
        tokens: `[B]` integer ids of the vocabulary. Those on a device are not waited for, and so not looked at: they
            may still be on their way.
        cache: what a prefill or decode step returned last; it is consumed.

    Returns:
        Logits of the next token, `[B, V]` float32, and the cache to go on with.

    Raises:
        ValueError: `tokens` have a wrong shape or dtype or are no ids, or the cache is full, consumed, on the host or
            of another model.
    """
    tokens = tokens if isinstance(tokens, Array) else np.asarray(tokens).copy()  # the caller may reuse theirs
    if tokens.shape != (cache.batch,) or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be integers [B], one for each of the {cache.batch} rows. Got {tokens.dtype} {tokens.shape}."
        )
    vocabulary = params.config.text.vocab_size
    if isinstance(tokens, np.ndarray) and ((tokens < 0) | (tokens >= vocabulary)).any():
        raise ValueError(f"tokens must be in [0, {vocabulary}), the model's vocabulary. Got {tokens.tolist()!s:.200}.")
    cache.require_room(params, 1)
    rows = np.stack([cache.next_position, cache.prefilled.start]).astype(np.int32)
    arrays = tokens, rows, np.int32(cache.length), cache.keys, cache.values
    logits, keys, values = _step(params.weights, *arrays, config=params.config, mesh=params.mesh)
    return logits, cache.after_step(keys, values, tokens)


def generate(
    params: Params,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Collection[int] | None = None,
    dense: bool = False,
    break_even: bool = True,
    impl: str | None = None,
) -> np.ndarray:
    """Writes an answer to every prompt of a batch: `sparse_prefill`, then `write`, whose options these are.

    What the prefill was, `Prefilled.how`, goes to the log: logger "jax_blindsight", level INFO.

    Args:
        params: weights, configuration and profile, from `load`.
        inputs: the prompts, as for `sparse_prefill`.
        dense: prefill every head dense.
        break_even: prefill prompts dense that are too short to gain.
        impl: what computes the prefill's attention, see `sparse_prefill`.

    Returns:
        `[B, n_new]` int32, see `write`.

    Raises:
        ValueError, NotImplementedError, ImportError: an option is out of its range, or see `sparse_prefill`.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, seed)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, eos=_stops(params, eos))
    arrays = as_arrays(inputs)
    width = np.shape(arrays.get("input_ids", ()))[-1:] or (0,)
    how: dict[str, Any] = dict(dense=dense, break_even=break_even, impl=impl)
    start = sparse_prefill(params, arrays, capacity=width[0] + max_new_tokens, **how)
    logger.info("the prefill of %d rows ran %s", len(start.logits), start.how)
    return write(params, start, max_new_tokens=max_new_tokens, **options)[0]  # type: ignore[arg-type]


@with_own_settings
def write(
    params: Params,
    start: Prefilled,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Collection[int] | None = None,
) -> tuple[np.ndarray, Cache]:
    """Goes on from a prefill, token by token.

    Args:
        params: what the prefill ran with.
        start: the prefill, its logits those of the last tokens; its cache is consumed.
        max_new_tokens: length limit.
        temperature: 0 takes the likeliest token; more than 0 samples.
        top_k: sample from the k likeliest tokens only.
        top_p: of those, from the fewest whose probabilities add up to at least p.
        seed: of the sampling.
        eos: the token id or ids at which a row stops. Default: the checkpoint's, `Params.eos`; `()` for none, so that
            every row runs to the limit.

    Returns:
        `[B, n_new]` int32, `n_new <= max_new_tokens`: what was written, the stopping token included; from there on a
        row repeats it. And the cache, which holds all of it but the last column: a next turn begins with that.

    Raises:
        ValueError: an option is out of its range, the logits are those of all tokens, or the cache is full or consumed.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, seed)
    stops = _stops(params, eos)
    if start.logits.ndim != 2:
        raise ValueError(
            f"an answer goes on from the logits of the last tokens, [B, V]. Got {start.logits.shape}. Prefill without "
            "all_logits."
        )
    logits, cache, key = start.logits, start.cache, jax.random.key(seed, impl="threefry2x32")
    written: list[np.ndarray] = []
    ended = np.zeros(cache.batch, dtype=bool)
    while True:
        if temperature:
            key, drawn = jax.random.split(key)
            n_likeliest = min(top_k or logits.shape[-1], logits.shape[-1])
            token = _sample(logits, drawn, temperature, n_likeliest, top_p or 1.0)
        else:
            token = _likeliest(logits)
        ids = np.where(ended, written[-1], token) if ended.any() else np.asarray(token)
        written.append(ids)
        ended |= np.isin(ids, stops)
        if ended.all() or len(written) == max_new_tokens:
            return np.stack(written, axis=1), cache
        logits, cache = decode_step(params, ids, cache)


def _stops(params: Params, eos: int | Collection[int] | None) -> np.ndarray:
    """The ids at which a row stops, `[n]`."""
    given = params.eos if eos is None else eos
    stops = np.asarray([*given] if isinstance(given, Collection) else [given])
    if stops.size and stops.dtype.kind not in "iu":
        raise ValueError(f"eos must be a token id, ids, or None for the checkpoint's. Got {eos!r}.")
    return stops


def _check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1. Got {max_new_tokens}.")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature must be a finite number of at least 0. Got {temperature}.")
    if top_k is not None and (not isinstance(top_k, int | np.integer) or top_k < 1):
        raise ValueError(f"top_k must be an integer of at least 1, or None. Got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], or None. Got {top_p}.")
    if not isinstance(seed, int | np.integer) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits. Got {seed!r}.")
    if not temperature and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p are for sampling. Got them with temperature=0. Raise it, or leave them out.")


@jax.jit
def _likeliest(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def _sample(logits: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """One token per row `[B]` of logits `[B, V]`."""
    scores, order = lax.top_k(logits / temperature, logits.shape[-1])  # [B, V], likeliest first
    rank = jnp.arange(logits.shape[-1])
    scores = jnp.where(rank >= top_k, _NEVER, scores)
    probabilities = jax.nn.softmax(scores, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    scores = jnp.where((before >= top_p) & (rank > 0), _NEVER, scores)
    picked = jax.random.categorical(key, scores, axis=-1)  # [B]
    return jnp.take_along_axis(order, picked[:, None], axis=-1)[:, 0].astype(jnp.int32)


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("keys", "values"))
def _step(
    weights: Any,
    tokens: Array,  # [B]
    rows: Array,  # [2, B]: rotary position of the token, first slot that is no padding
    length: Array,  # slots used before
    keys: tuple[Array, ...],
    values: tuple[Array, ...],
    *,
    config: ModelConfig,
    mesh: Mesh | None,
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """Logits `[B, V]` and the cache with the token's keys and values."""
    positions, start = rows[0][:, None], rows[1][:, None]  # [B, 1]
    if config.text.mrope_section is not None:
        positions = jnp.broadcast_to(positions, (3, *positions.shape))
    slots = jnp.arange(keys[0].shape[2])
    filled: list[tuple[Array, Array]] = []

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        new = ((keys[layer], k), (values[layer], v))
        k, v = (lax.dynamic_update_slice_in_dim(cache, x, length, axis=2) for cache, x in new)  # [B, K, S, D]
        filled.append((k, v))
        window = config.text.windows[layer]
        first = start if window is None else jnp.maximum(start, length - window + 1)
        seen = (slots >= first) & (slots <= length)  # [B, S]
        return _attend_one(q, k, v, seen, config.text.scale)

    hidden = sharded_rows(mesh, embed_tokens(weights, config, tokens[:, None]))
    hidden = decode(weights, config, hidden, positions, attend_layer)
    new_keys, new_values = zip(*filled, strict=True)
    return unembed(weights, config, hidden[:, 0]), new_keys, new_values


def _attend_one(q: Array, k: Array, v: Array, seen: Array, scale: float) -> Array:
    """Attention of one query per row: q `[B, H, 1, D]`, k and v `[B, K, S, D]`, seen `[B, S]`; gives `[B, 1, H, D]`."""
    n_rows, n_heads, _, width = q.shape
    grouped = q.reshape(n_rows, k.shape[1], -1, width)  # [B, K, G, D]
    exact = dict(precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, k, **exact) * scale
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _NEVER), axis=-1)
    out = jnp.einsum("bkgs,bksd->bkgd", weights.astype(v.dtype), v, **exact)
    return out.astype(q.dtype).reshape(n_rows, 1, n_heads, width)
