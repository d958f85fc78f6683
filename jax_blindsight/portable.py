"""The portable attention in XLA: loops over heads, and over the tiles of the work list, a softmax over chunks of keys.

A tile's rows are the left side of every product, a chunk of keys the right side, one head at a time:

    tile of rows  x  packed chunk, packed chunk, ...      (gathered once per head)
                  x  chunk, chunk, ..., chunk             (its range [lo, hi), from the end to the start)

Loops run as often as the work list says, so nothing is computed for tiles, chunks or causal halves that are not
there, and nothing grows with T x S. The category of a head says which tiles it walks and is data: one program serves
every layer. Scores and sums are float32 (float64 for float64).

All heads of a category at once take no less processor time but, on two cores, two thirds of the wall time: XLA splits
large products and sums over cores, small ones it does not. But then layers with other categories are other programs.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jax_blindsight.work import GATHERED_ROWS, TILE_ROWS, AttentionWork

# Keys of a chunk: for tiles, for the few rows of gathered tiles, and of packed keys. Small enough that a chunk's scores
# stay in a core's cache.
_CHUNK, _GATHERED_CHUNK, _PACKED_CHUNK = 128, 512, 64
# A range may be this much longer than whole chunks: an image's start delimiter is not worth one.
_SPARE = 8
_HIDDEN = -1e30  # finite, so that a row whose chunk is all hidden gives no NaN

# Per row: the highest score, the sum of exponentials, and the weighted sum of values.
_State = tuple[Array, Array, Array]


def attend_sequence(
    q: Array, k: Array, v: Array, work: AttentionWork, categories: Array, *, window: int | None, scale: float
) -> tuple[Array, Array]:
    """Attention over one sequence.

    Args:
        q: `[H, T, D]`.
        k, v: `[K, S, D]`, H a multiple of K.
        work: one row of the batch's work: its arrays without their B axis.
        categories: `[H]` int32, -1 for a head that is left out: zeros and `-inf`.
        window: sliding window in tokens, None for none.
        scale: factor on the scores.

    Returns:
        `[T, H, D]` outputs in q's dtype and `[H, T]` log-sum-exps.
    """
    n_heads, n_queries, dim = q.shape
    group = n_heads // k.shape[0]
    precise = jnp.promote_types(q.dtype, jnp.float32)
    zero = jnp.int32(0)  # indices are of one dtype, 64-bit floats or not

    def add_head(h: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kv, wanted, category = h // group, categories[h] >= 0, jnp.maximum(categories[h], 0)
        positions = work.packed[category]
        packed_k, packed_v = (x.at[kv, positions].get(mode="clip") for x in (k, v))  # [P, D]

        def attend_rows(
            q_rows: Array, rows: Array, chunk: int, lo: Array, hi: Array, open_to: Array, p_start: Array, p_stop: Array
        ) -> tuple[Array, Array]:
            """`[R, D]` queries at `rows` `[R]` -> `[R, D]`, `[R]`."""
            shape = rows.shape
            state = (jnp.full(shape, _HIDDEN, precise), jnp.zeros(shape, precise), jnp.zeros((*shape, dim), precise))

            def packed_step(i: Array, state: _State) -> _State:
                begin = p_start + i * _PACKED_CHUNK
                at = jnp.minimum(begin, positions.shape[0] - _PACKED_CHUNK)
                index = at + jnp.arange(_PACKED_CHUNK, dtype=jnp.int32)
                real = (index >= begin) & (index < p_stop)
                shown = jnp.broadcast_to(real, (rows.shape[0], _PACKED_CHUNK))
                if window is not None:
                    where = lax.dynamic_slice_in_dim(positions, at, _PACKED_CHUNK)
                    shown &= where > rows[:, None] - window
                some_k, some_v = (lax.dynamic_slice_in_dim(x, at, _PACKED_CHUNK) for x in (packed_k, packed_v))
                return _absorb(state, q_rows, some_k, some_v, real, shown, scale)

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
                some_k, some_v = (lax.dynamic_slice(x, (kv, at, zero), (1, width, dim))[0] for x in (k, v))
                return _absorb(state, q_rows, some_k, some_v, real, shown, scale)

            peak, total, weighted = lax.fori_loop(0, n_chunks, step, state)
            return (weighted / total[:, None]).astype(q.dtype), peak + jnp.log(total)

        def tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            row_start, row_stop, lo, hi, open_to, p_start, p_stop = work.tiles[category, i]
            n_rows = min(TILE_ROWS, n_queries)
            at = jnp.clip(row_start - work.q_start, 0, n_queries - n_rows)
            rows = at + work.q_start + jnp.arange(n_rows, dtype=jnp.int32)
            q_rows = lax.dynamic_slice(q, (h, at, zero), (1, n_rows, dim))[0]
            o, m = attend_rows(q_rows, rows, _CHUNK, lo, hi, open_to, p_start, p_stop)
            mine = (rows >= row_start) & (rows < row_stop)
            out, lse = carry
            old_o = lax.dynamic_slice(out, (at, h, zero), (n_rows, 1, dim))[:, 0]
            old_m = lax.dynamic_slice(lse, (h, at), (1, n_rows))[0]
            out = lax.dynamic_update_slice(out, jnp.where(mine[:, None], o, old_o)[:, None], (at, h, zero))
            return out, lax.dynamic_update_slice(lse, jnp.where(mine, m, old_m)[None], (h, at))

        def gathered_tile(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            first, stop, lo, hi = work.gathered[i]
            which = first + jnp.arange(GATHERED_ROWS, dtype=jnp.int32)  # the last tile may hang over the end
            rows = jnp.take(work.gathered_rows, which, mode="clip")
            index = jnp.where(which < stop, rows - work.q_start, n_queries)
            q_rows = q.at[h, index].get(mode="clip")
            o, m = attend_rows(q_rows, rows, _GATHERED_CHUNK, lo, hi, zero, zero, zero)
            out, lse = carry
            return out.at[index, h].set(o, mode="drop"), lse.at[h, index].set(m, mode="drop")

        carry = lax.fori_loop(0, wanted * work.n_tiles[category], tile, carry)
        return lax.fori_loop(0, wanted * work.n_gathered[category], gathered_tile, carry)

    nothing_yet = jnp.zeros((n_queries, n_heads, dim), q.dtype), jnp.full((n_heads, n_queries), -jnp.inf, precise)
    return lax.fori_loop(zero, jnp.int32(n_heads), add_head, nothing_yet)


def _absorb(state: _State, q: Array, k: Array, v: Array, real: Array, shown: Array, scale: float) -> _State:
    """Adds a chunk of keys to a running softmax.

    Args:
        state: what came before: `[R]`, `[R]`, `[R, D]`.
        q: queries `[R, D]`.
        k, v: `[C, D]`.
        real: `[C]` keys that exist for the tile; the others' values may be anything, NaN included.
        shown: `[R, C]` keys that a row may look at.
        scale: factor on the scores.
    """
    peak, total, weighted = state
    scores = jnp.where(shown, _dot(q, k, 1) * scale, _HIDDEN)  # [R, C]
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    weights = jnp.exp(scores - new_peak[:, None])
    faded = jnp.exp(peak - new_peak)
    v = jnp.where(real[:, None], v, 0)
    total = total * faded + weights.sum(axis=-1)
    return new_peak, total, weighted * faded[:, None] + _dot(weights.astype(v.dtype), v, 0)


def _dot(a: Array, b: Array, axis: int) -> Array:
    """The product of `a`'s last axis with `b`'s `axis`, summed in at least float32."""
    return lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,  # no TF32
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )
