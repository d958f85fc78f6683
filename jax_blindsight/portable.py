"""The portable attention in XLA: a loop over teams of tiles, and for each a softmax over chunks of keys.

A tile is some query rows of one head. Its keys are its packed ones and then its range, gathered a chunk at a time:

    rows of tile 0, a head  x  [p p s s s|lo . . . . . .][. . . . . . . . . . hi]
    rows of tile 1, a head  x  [p p s|lo . . . . . . . .][. . . . . . hi]
    ...                             a chunk                   a chunk

The team's tiles are the batch of every product. They may be of any heads and categories: the pairs of a head and a
tile of its category form one list, numbered and cut into teams as the loop goes. The work list has the longest tiles
first, so tiles of a team are alike and little is computed for chunks that one has and another has not. Loops run as
often as the work list says, so nothing is computed for tiles or causal halves that are not there, and nothing grows
with T x S. The categories are data: one program serves every layer. Scores and sums are float32 (float64 for float64).

One tile at a time takes a tenth less processor time, but XLA leaves such small products on one core: on two, a sparse
prefill of 16K tokens (`blindsight bench jax-prefill`) took 1.36 times as long as torch's without teams, 1.16 with them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jax_blindsight.layers import NEGATIVE, precision
from jax_blindsight.work import GATHERED_ROWS, TILE_ROWS, AttentionWork
from shared_profiles import Category

# Tiles of a team: enough for a step to be worth several cores, few enough for short prompts to fill.
TEAM = 8
# Keys of a chunk: for tiles, and for the few rows of gathered ones.
CHUNK, GATHERED_CHUNK = 160, 512

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
    packed_keys, n_tiles, n_gathered = (jnp.asarray(x) for x in (work.packed, work.n_tiles, work.n_gathered))
    # Heads by category, those left out first, and where each category begins.
    by_category = jnp.argsort(categories).astype(jnp.int32)
    count = (categories[:, None] == jnp.arange(len(Category))).sum(axis=0, dtype=jnp.int32)  # [4]
    first = n_heads - jnp.cumsum(count[::-1], dtype=jnp.int32)[::-1]

    def walk(
        carry: tuple[Array, Array], tiles: Array, n_real: Array, chunk: int, rows_of: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """Adds the rows of `tiles` `[4, n, 7]`, of which `n_real` `[4]` are real.

        `rows_of` takes the tiles of a team, `[A, 7]`, to positions `[A, R]`; `q_start + T` is no row.

        Two heads, 0 and 1, are DENSE, which has three tiles, and head 2 is INTRA_IMAGE, which has two:

            count   2  0  1  0            heads of each category
            n_real  3  .  2  .            tiles of each category
            pairs   6  0  2  0
            end     6  6  8  8            as many pairs are of this category or of one before it

            pair    0  1  2  3  4  5 | 6  7
            head    0  1  0  1  0  1 | 2  2
            tile    0  0  1  1  2  2 | 0  1      of the head's category
        """
        pairs = count * n_real  # tile by tile, and each by all heads of the category
        end = jnp.cumsum(pairs, dtype=jnp.int32)

        def team(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            # The last team is filled up with the last pair, computed several times alike.
            pair = jnp.minimum(i * TEAM + jnp.arange(TEAM, dtype=jnp.int32), end[-1] - 1)
            category = (pair[:, None] >= end).sum(axis=1, dtype=jnp.int32)
            pair -= (end - pairs)[category]
            head = by_category[first[category] + pair % count[category]]
            tile = tiles[category, pair // count[category]]
            rows = rows_of(tile)
            head, index = head[:, None], rows - work.q_start
            q_rows = q.at[head, index].get(mode="clip")
            o, m = attend_rows(q_rows, rows[..., None], head // group, category[:, None], tile, chunk)
            out, lse = carry
            return out.at[index, head].set(o, mode="drop"), lse.at[head, index].set(m, mode="drop")

        return lax.fori_loop(0, (end[-1] + TEAM - 1) // TEAM, team, carry)

    def attend_rows(
        q_rows: Array, rows: Array, kv: Array, category: Array, tile: Array, chunk: int
    ) -> tuple[Array, Array]:
        """`[A, R, D]` queries at `rows` `[A, R, 1]` -> `[A, R, D]`, `[A, R]`; kv and category `[A, 1]`."""
        _, _, lo, hi, open_to, p_start, p_stop = (tile[:, j, None] for j in range(7))  # [A, 1]
        n_packed = p_stop - p_start
        n = n_packed + hi - lo
        shape = q_rows.shape[:2]

        def step(i: Array, state: _State) -> _State:
            which = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
            packed = packed_keys.at[category, p_start + which].get(mode="clip")
            key = jnp.where(which < n_packed, packed, lo + which - n_packed)  # [A, C]
            real = which < n
            shown = real[:, None] & (key[:, None] < jnp.maximum(rows + 1, open_to[..., None]))
            if window is not None:
                shown &= key[:, None] > rows - window
            some_k, some_v = (x.at[kv, key].get(mode="clip") for x in (k, v))
            return _absorb(state, q_rows, some_k, some_v, real, shown, scale)

        state = jnp.full(shape, NEGATIVE, precise), jnp.zeros(shape, precise), jnp.zeros((*shape, dim), precise)
        peak, total, weighted = lax.fori_loop(0, (n.max() + chunk - 1) // chunk, step, state)
        return (weighted / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    def neighbours(tile: Array) -> Array:
        """Rows of tiles of neighbouring rows."""
        rows = tile[:, :1] + jnp.arange(min(TILE_ROWS, n_queries), dtype=jnp.int32)
        return jnp.where(rows < tile[:, 1:2], rows, work.q_start + n_queries)

    def scattered(tile: Array) -> Array:
        """Rows of gathered tiles."""
        which = tile[:, :1] + jnp.arange(GATHERED_ROWS, dtype=jnp.int32)
        rows = jnp.take(work.gathered_rows, which, mode="clip")
        return jnp.where(which < tile[:, 1:2], rows, work.q_start + n_queries)

    carry = jnp.zeros((n_queries, n_heads, dim), q.dtype), jnp.full((n_heads, n_queries), -jnp.inf, precise)
    carry = walk(carry, jnp.asarray(work.tiles), n_tiles, CHUNK, neighbours)
    # Gathered tiles are the same under every category that has them.
    gathered = jnp.broadcast_to(work.gathered, (len(Category), *work.gathered.shape))
    return walk(carry, gathered, n_gathered, GATHERED_CHUNK, scattered)


def _absorb(state: _State, q: Array, k: Array, v: Array, real: Array, shown: Array, scale: float) -> _State:
    """Adds a chunk of keys to a running softmax.

    Args:
        state: what came before: `[A, R]`, `[A, R]`, `[A, R, D]`.
        q: queries `[A, R, D]`.
        k, v: `[A, C, D]`.
        real: `[A, C]` keys that exist for the tile; the others' values may be anything, NaN included.
        shown: `[A, R, C]` keys that a row may look at.
        scale: factor on the scores.
    """
    peak, total, weighted = state
    scores = jnp.where(shown, _dot(q, k, 2) * scale, NEGATIVE)  # [A, R, C]
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    weights = jnp.exp(scores - new_peak[..., None])
    faded = jnp.exp(peak - new_peak)
    v = jnp.where(real[..., None], v, 0)
    total = total * faded + weights.sum(axis=-1)
    return new_peak, total, weighted * faded[..., None] + _dot(weights.astype(v.dtype), v, 1)


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Batched product of `a`'s last axis with `b`'s `axis`, summed in at least float32."""
    return lax.dot_general(
        a,
        b,
        (((2,), (axis,)), ((0,), (0,))),
        precision=precision(a.dtype),
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )
