"""Attention within segments, planned: which blocks of queries read which keys.

Patches attend within segments (a frame, or a window of one), which lie one after another:

    patches     a a a a a a b b c d d d d .      segments a, b, c, d, then padding up to the bucket
    blocks     |a a a a|a a b b|c . . .|d d d d|      queries, at most `rows`; only long segments are cut
    keys        a a a a|a a
                a a a a|a a b b                       its segments, in tiles of `tile`; each row sees its own alone
                c . . .
                d d d d
    slot        0 1 2 3 4 5 6 7 8 12 13 14 15 .       where each patch stands among the rows of all blocks

A block's scores are taken tile by tile, so memory grows with the number of patches and never with its square. Blocks of
a similar number of tiles are computed together, and only the real ones: how many blocks and tiles there are is data,
and all shapes follow from the bucket of patches alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np

from jax_blindsight.buckets import pad_first, power_of_two

ROWS, TILE = 128, 256  # queries of a block and keys of a tile, of segments that have no smaller bound
SCORES_PER_STEP = 2**20  # about how many scores of a head are computed at once, at most


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Segments:
    """How patches attend within their segments: query blocks, those of most tiles first.

    Attributes:
        n_steps: int32, how many times `step` blocks are computed; those beyond have no real rows.
        query_start: `[n]` int32, the first of the block's `rows` patches.
        key_start: `[n]` int32, the first patch of its segments.
        n_tiles: `[n]` int32, how many tiles from there reach their end.
        first, last: `[P]` int32, each patch's segment is `[first, last)`.
        slot: `[P]` int32, where each patch stands among the rows of all blocks.
        rows, tile, step: sizes of a block and of a tile, and how many blocks are computed at once; n is a multiple.
    """

    n_steps: np.ndarray
    query_start: np.ndarray
    key_start: np.ndarray
    n_tiles: np.ndarray
    first: np.ndarray
    last: np.ndarray
    slot: np.ndarray
    rows: int = field(metadata=dict(static=True))
    tile: int = field(metadata=dict(static=True))
    step: int = field(metadata=dict(static=True))


def segments(lengths: np.ndarray, n_padded: int, rows: int = ROWS, tile: int = TILE) -> Segments:
    """Cuts segments that lie one after another into query blocks.

    Args:
        lengths: `[n]`, positive: patches of each segment.
        n_padded: length of the padded patch array.
        rows: of a block, at most.
        tile: keys of a tile, at most.
    """
    lengths, rows, tile = np.asarray(lengths, dtype=np.int64), min(rows, n_padded), min(tile, n_padded)
    stop = np.cumsum(lengths)
    starts = stop - lengths
    begin, end, key_start, key_end = np.array(_blocks(lengths.tolist(), rows)).T
    # Two blocks in a row hold more than `rows` patches together, else they would be one.
    most = 2 * (n_padded // (rows + 1)) + 1
    step = max(1, min(most // 4, SCORES_PER_STEP // (rows * tile)))
    step = power_of_two(step + 1) // 2
    n = -(-most // step) * step

    n_tiles = -(-(key_end - key_start) // tile)
    order = np.argsort(-n_tiles, kind="stable")
    query_start = np.minimum(begin, n_padded - rows)  # a slice may not reach beyond the array
    rank = np.argsort(order)
    slot = np.arange(stop[-1]) + np.repeat(rank * rows - query_start, end - begin)
    blocks = query_start, key_start, n_tiles
    query_start, key_start, n_tiles = (pad_first(x[order].astype(np.int32), n) for x in blocks)
    bounds = np.repeat([starts, stop], lengths, axis=1)
    first, last, slot = (pad_first(x.astype(np.int32), n_padded) for x in (*bounds, slot))
    n_steps = np.array(-(-len(order) // step), dtype=np.int32)
    return Segments(n_steps, query_start, key_start, n_tiles, first, last, slot, rows, tile, step)


def _blocks(lengths: list[int], rows: int) -> list[tuple[int, int, int, int]]:
    """The patches `[begin, end)` of every block, and those of all its segments.

    A segment that does not fit into what is left of a block begins the next.
    """
    blocks, begin, end, key_start = [], 0, 0, 0
    for n in lengths:
        if end - begin + n > rows and end > begin:
            blocks.append((begin, end, key_start, end))
            begin = key_start = end
        stop = end + n
        while stop - begin > rows:
            blocks.append((begin, begin + rows, key_start, stop))
            begin += rows
        end = stop
    return [*blocks, (begin, end, key_start, end)]
