"""The portable attention in XLA: loops over the tiles of the work list, each a softmax carried over chunks of keys.

A tile's rows are the left side of every product, a chunk of keys the right side, all heads of a category at once:

    tile of rows  x  packed chunk, packed chunk, ...      (gathered once per layer)
                  x  chunk, chunk, ..., chunk             (its range [lo, hi), from the end to the start)

Loops run as often as the work list says, so nothing is computed for tiles, chunks or causal halves that are not
there, and nothing grows with T x S. Scores and sums are float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from jax_blindsight.work import GATHERED_ROWS, TILE_ROWS, AttentionWork
from shared_profiles import Category

# Keys of a chunk: for tiles, for the few rows of gathered tiles, and of packed keys. Small enough that a chunk's scores
# stay in a core's cache.
_CHUNK, _GATHERED_CHUNK, _PACKED_CHUNK = 128, 512, 64
# A range may be this much longer than whole chunks: an image's start delimiter is not worth one.
_SPARE = 8
_HIDDEN = -1e30  # finite, so that a row whose chunk is all hidden gives no NaN

# Per row and head: the highest score, the sum of exponentials, and the weighted sum of values.
_State = tuple[Array, Array, Array]


def attend_heads(
    q: Array,
    k: Array,
    v: Array,
    work: AttentionWork,
    *,
    category: Category,
    heads: Sequence[int],
    window: int | None,
    scale: float,
) -> tuple[Array, Array]:
    """Attention of the heads of one category over one sequence.

    Args:
        q: `[H, T, D]`.
        k, v: `[K, S, D]`, H a multiple of K.
        work: one row of the batch's work: its arrays without their B axis.
        category: of all these heads.
        heads: which of the H query heads, ascending.
        window: sliding window in tokens, None for none.
        scale: factor on the scores.

    Returns:
        `[T, heads, D]` outputs in q's dtype and `[heads, T]` log-sum-exps.
    """
    n_queries, dim = q.shape[1:]
    pick = HeadPicker(heads, q.shape[0] // k.shape[0])
    precise = jnp.promote_types(q.dtype, jnp.float32)
    has_packed = category is not Category.DENSE
    if has_packed:
        positions = work.packed[category]
        packed_k, packed_v = (jnp.take(x, positions, axis=1, mode="clip") for x in (k, v))

    def attend_rows(
        q_rows: Array, rows: Array, chunk: int, lo: Array, hi: Array, open_to: Array, p_start: Array, p_stop: Array
    ) -> tuple[Array, Array]:
        """`[H, R, D]` queries at `rows` `[R]` -> `[heads, R, D]`, `[heads, R]`."""
        q_rows = pick.queries(q_rows)
        shape = q_rows.shape[:-1]
        state = (jnp.full(shape, _HIDDEN, precise), jnp.zeros(shape, precise), jnp.zeros((*shape, dim), precise))
        if has_packed:

            def packed_step(i: Array, state: _State) -> _State:
                begin = p_start + i * _PACKED_CHUNK
                at = jnp.minimum(begin, positions.shape[0] - _PACKED_CHUNK)
                index = at + jnp.arange(_PACKED_CHUNK, dtype=jnp.int32)
                real = (index >= begin) & (index < p_stop)
                where = lax.dynamic_slice_in_dim(positions, at, _PACKED_CHUNK)
                shown = jnp.broadcast_to(real, (rows.shape[0], _PACKED_CHUNK))
                if window is not None:
                    shown &= where > rows[:, None] - window
                return _absorb(state, q_rows, *pick.keys(packed_k, packed_v, at, _PACKED_CHUNK), real, shown, scale)

            state = lax.fori_loop(0, (p_stop - p_start + _PACKED_CHUNK - 1) // _PACKED_CHUNK, packed_step, state)
        width = min(chunk + _SPARE, k.shape[1])
        n_chunks = jnp.maximum((hi - lo - _SPARE + chunk - 1) // chunk, 1)

        def step(i: Array, state: _State) -> _State:
            stop = hi - i * chunk
            start = jnp.where(i == n_chunks - 1, lo, stop - chunk)
            at = jnp.clip(stop - width, 0, k.shape[1] - width)
            key = at + jnp.arange(width, dtype=jnp.int32)
            real = (key >= start) & (key < stop)
            shown = real & (key < jnp.maximum(rows[:, None] + 1, open_to))
            if window is not None:
                shown &= key > rows[:, None] - window
            return _absorb(state, q_rows, *pick.keys(k, v, at, width), real, shown, scale)

        peak, total, weighted = lax.fori_loop(0, n_chunks, step, state)
        out = pick.merge((weighted / total[..., None]).astype(q.dtype))
        return out, pick.merge(peak + jnp.log(total))

    def tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        row_start, row_stop, lo, hi, open_to, p_start, p_stop = work.tiles[category, i]
        n_rows = min(TILE_ROWS, n_queries)
        at = jnp.clip(row_start - work.q_start, 0, n_queries - n_rows)
        rows = at + work.q_start + jnp.arange(n_rows, dtype=jnp.int32)
        q_rows = lax.dynamic_slice_in_dim(q, at, n_rows, axis=1)
        o, m = attend_rows(q_rows, rows, _CHUNK, lo, hi, open_to, p_start, p_stop)
        mine = (rows >= row_start) & (rows < row_stop)
        out, lse = carry
        old_o, old_m = lax.dynamic_slice_in_dim(out, at, n_rows, 0), lax.dynamic_slice_in_dim(lse, at, n_rows, 1)
        out = lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None, None], jnp.swapaxes(o, 0, 1), old_o), at, 0)
        return out, lax.dynamic_update_slice_in_dim(lse, jnp.where(mine, m, old_m), at, 1)

    def gathered_tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        first, _, lo, hi = work.gathered[i]
        rows = lax.dynamic_slice_in_dim(work.gathered_rows, first, GATHERED_ROWS)
        index = rows - work.q_start
        q_rows = jnp.take(q, index, axis=1, mode="clip")
        nothing = jnp.int32(0)
        o, m = attend_rows(q_rows, rows, _GATHERED_CHUNK, lo, hi, nothing, nothing, nothing)
        out, lse = carry
        return (
            out.at[index].set(jnp.swapaxes(o, 0, 1), mode="drop"),
            lse.at[:, index].set(m, mode="drop"),
        )

    carry = (
        jnp.zeros((n_queries, len(heads), dim), q.dtype),
        jnp.full((len(heads), n_queries), -jnp.inf, precise),
    )
    carry = lax.fori_loop(0, work.n_tiles[category], tile, carry)
    return lax.fori_loop(0, work.n_gathered[category], gathered_tile, carry)


def _absorb(state: _State, q: Array, k: Array, v: Array, real: Array, shown: Array, scale: float) -> _State:
    """Adds a chunk of keys to a running softmax.

    Args:
        state: what came before: `[K', G'R]`, `[K', G'R]`, `[K', G'R, D]`.
        q: queries `[K', G'R, D]`.
        k, v: `[K', C, D]`.
        real: `[C]` keys that exist for the tile; the others' values may be anything, NaN included.
        shown: `[R, C]` keys that a row may look at.
        scale: factor on the scores.
    """
    peak, total, weighted = state
    scores = _dot(q, k, 2)
    by_row = scores.reshape(q.shape[0], -1, *shown.shape)  # [K', G', R, C]
    scores = jnp.where(shown, by_row * scale, _HIDDEN).reshape(scores.shape)
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    weights = jnp.exp(scores - new_peak[..., None])
    faded = jnp.exp(peak - new_peak)
    v = jnp.where(real[:, None], v, 0)
    total = total * faded + weights.sum(axis=-1)
    return new_peak, total, weighted * faded[..., None] + _dot(weights.astype(v.dtype), v, 1)


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Batched product of `a`'s last axis with `b`'s `axis`, summed in at least float32."""
    return lax.dot_general(
        a,
        b,
        (((2,), (axis,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,  # no TF32
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


class HeadPicker:
    """Some query heads and the key heads they read, as `[K', G'R, D]` and `[K', C, D]`.

    Where every key head serves equally many of the heads it is read once for all of them; else once for each.

    Attributes:
        heads: the query heads, ascending.
        kv: `[K']` the key head of each group of `len(heads) // K'` query heads.
    """

    def __init__(self, heads: Sequence[int], group: int) -> None:
        self.heads = list(heads)
        kv = [h // group for h in self.heads]
        counts = {kv.count(x) for x in kv}
        self.kv = kv[:: counts.pop()] if len(counts) == 1 else kv

    def queries(self, x: Array) -> Array:
        """`[H, R, D]` -> `[K', G'R, D]`."""
        return select(x, self.heads, 0).reshape(len(self.kv), -1, x.shape[-1])

    def keys(self, k: Array, v: Array, at: Array, n: int) -> tuple[Array, Array]:
        """Keys and values `[at, at + n)`: `[K, S, D]` -> `[K', n, D]`."""
        k, v = (select(lax.dynamic_slice_in_dim(x, at, n, axis=1), self.kv, 0) for x in (k, v))
        return k, v

    def merge(self, x: Array) -> Array:
        """`[K', G'R, ...]` -> `[heads, R, ...]`."""
        return x.reshape(len(self.heads), -1, *x.shape[2:])


def select(x: Array, heads: Sequence[int], axis: int) -> Array:
    """The heads of `x` along an axis; `x` itself where they are all of it."""
    if list(heads) == list(range(x.shape[axis])):
        return x
    return jnp.concatenate([lax.slice_in_dim(x, h, h + 1, axis=axis) for h in heads], axis=axis)
