"""Rotary positions of prompts, as transformers counts them (`get_rope_index`).

Text counts on by one. A Qwen image spans its own box from the position it begins at: temporal, row and column of each
token; what follows counts on from the box's longer side. Gemma 3's images count like text.

    tokens     a b <s> . . . . <e> c        an image of 2 x 2 tokens
    temporal   0 1  2  3 3 3 3  5  6
    row        0 1  2  3 3 4 4  5  6
    column     0 1  2  3 4 3 4  5  6

A video's time may run beyond what follows it. The rest of the prompt counts on from the box's side all the same; a
token that the model writes stands one after the highest position so far, and a later turn follows on from there. Its
frames lie as far apart as they were taken, in fractions of a second, too, where transformers 5.17 cut every distance
to whole seconds (mended since: its pull request 48669).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jax_blindsight.config import ModelConfig, QwenVisionConfig


def rope_positions(
    config: ModelConfig,
    ids: np.ndarray,
    valid: np.ndarray,
    image_grids: np.ndarray | None = None,
    video_grids: np.ndarray | None = None,
    second_per_grid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of every token of a batch of prompts, or of what goes on from others, from 0.

    Args:
        config: the model.
        ids: `[B, N]` token ids, placeholders expanded.
        valid: `[B, N]`, False for padding.
        image_grids, video_grids: `[n, 3]`, frame groups, rows and columns of patches of every image and video, row by
            row of the batch. Ignored for Gemma 3.
        second_per_grid: seconds between the frame groups of each video. Default: 1.

    Returns:
        positions: int32, 0 at padding: mRoPE `[3, B, N]` (temporal, row, column), or `[B, N]` for Gemma 3.
        next_position: `[B]` int32, of the token that the model writes after each row.
        next_piece: `[B]` int32, of the first token of what else the prompt holds.

    Raises:
        ValueError: grids that do not match the placeholders.
    """
    ids, valid = np.asarray(ids), np.asarray(valid) != 0
    if not isinstance(config.vision, QwenVisionConfig):
        positions = np.where(valid, valid.cumsum(axis=-1) - 1, 0).astype(np.int32)
        n_tokens = valid.sum(axis=-1).astype(np.int32)
        return positions, n_tokens, n_tokens
    special = config.special
    kinds = np.where(ids == special.image, 1, np.where(ids == special.video, 2, 0))
    images = _spans(config.vision.merge, image_grids, 1, None)  # a still image has no time
    videos = _spans(config.vision.merge, video_grids, config.vision.tokens_per_second, second_per_grid)
    positions = np.zeros((3, *ids.shape), np.int32)
    next_position, next_piece = np.zeros((2, len(ids)), np.int32)
    for b, (row, real) in enumerate(zip(kinds, valid, strict=True)):
        row_positions, next_piece[b] = _row_positions(row[real], images, videos)
        positions[:, b, real] = row_positions
        next_position[b] = row_positions.max(initial=-1) + 1
    for name, left in (("image_grids", images), ("video_grids", videos)):
        if (more := sum(1 for _ in left)) > 0:
            raise ValueError(f"{name} must have one row per run of placeholders in ids. Got {more} rows too many.")
    return positions, next_position, next_piece


def _spans(
    merge: int, grids: np.ndarray | None, tokens_per_second: int | None, seconds: np.ndarray | None
) -> Iterator[tuple[np.ndarray, int]]:
    """For every picture its tokens' positions from 0, `[3, n_tokens]`, and how far the text counts on."""
    grids = np.zeros((0, 3), np.int64) if grids is None else np.asarray(grids, dtype=np.int64).reshape(-1, 3)
    intervals = np.ones(len(grids), np.float32)  # torch's precision: it decides what is cut to a whole position
    if tokens_per_second is not None:
        intervals *= tokens_per_second * (1 if seconds is None else np.asarray(seconds, dtype=np.float32))
    for (groups, n_rows, n_columns), interval in zip(grids.tolist(), intervals, strict=True):
        shape = (groups, n_rows // merge, n_columns // merge)
        span = np.indices(shape, dtype=np.int32).reshape(3, -1)
        span[0] = span[0].astype(np.float32) * interval
        yield span, max(shape[1:])


def _row_positions(
    kinds: np.ndarray, images: Iterator[tuple[np.ndarray, int]], videos: Iterator[tuple[np.ndarray, int]]
) -> tuple[np.ndarray, int]:
    """Positions `[3, n]` of one row without padding, and from where it counts on.

    Kinds are 0 for text, 1 for image and 2 for video tokens.
    """
    positions = np.zeros((3, len(kinds)), np.int32)
    edges = np.flatnonzero(np.diff(kinds, prepend=-1, append=-1))
    start = 0
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        n = last - first
        if kinds[first] == 0:
            span, advance = np.arange(n), n
        else:
            name, source = ("image_grids", images) if kinds[first] == 1 else ("video_grids", videos)
            span, advance = next(source, (np.zeros((3, 0), np.int32), 0))
            if span.shape[1] != n:
                raise ValueError(
                    f"{name} must have one row per run of placeholders in ids. Got a run of {n} placeholders where the "
                    f"grids give {span.shape[1] or 'no more'} tokens. Pass the arrays that the processor returned."
                )
        positions[:, first:last] = start + span
        start += advance
    return positions, start
