"""From a forward's arguments to layouts: what a prefill will see, the tokens already in its cache included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_profiles import Family, Layout, SpecialTokens
from shared_profiles.layout import NO_IMAGE_TOKENS, why_dense
from torch_blindsight.attention import made_of
from torch_blindsight.known_tokens import Chunk, length_of, tokens_before


class Dense(Exception):
    """This forward runs dense; the message is the reason that `Handle.report` counts."""


def read_layouts(arguments: Mapping[str, Any], family: Family, special: SpecialTokens) -> tuple[list[Layout], int]:
    """The layouts of a forward and the position of its first query.

    Args:
        arguments: the forward's arguments by name.
        family, special: how the model marks images.

    Returns:
        One layout per batch row, covering cache and new tokens, and the number of tokens in the cache.

    Raises:
        Dense: the forward is no prefill that BlindSight could speed up; says why.
        ValueError: the prompt is malformed.
    """
    ids = arguments.get("input_ids")
    if ids is None:
        raise Dense("no input_ids")
    if ids.shape[1] == 1:
        raise Dense("decode step")
    cache = arguments.get("past_key_values")
    past = length_of(cache)
    if _packed(arguments):
        raise Dense("several sequences in one row")
    mask = made_of(arguments.get("attention_mask"))
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + ids.shape[1]):
        raise Dense("attention_mask is not [batch, tokens]")
    if past and not holds_pictures(ids, special):
        # Known without the whole cache's tokens: an assistant's candidates come by the thousand.
        raise Dense(NO_IMAGE_TOKENS)
    chunks = [Chunk.of(arguments)]
    if past:
        before = tokens_before(cache, past)
        if not before or len(before[0].ids) != len(ids):
            raise Dense("tokens in the cache are unknown")
        chunks = [*before, *chunks]
    valid = None if mask is None else (mask != 0).cpu().numpy()
    if valid is not None and (np.diff(valid, axis=1, prepend=False, append=False).sum(axis=1) > 2).any():
        raise Dense("padding inside a row")
    rows = torch.cat([chunk.ids.to(ids.device) for chunk in chunks], dim=1).cpu().numpy()
    # Gemma 3 looks both ways where token_type_ids say so; generate leaves them out of a chunked prefill, but not out of
    # the masks that it makes for a static cache.
    types = arguments.get("token_type_ids") if family.bidirectional else None
    in_mask = family.bidirectional and types is None and arguments.get("attention_mask") is not mask
    if in_mask or (types is not None and not np.array_equal(types.cpu().numpy() == 1, rows == special.image)):
        raise Dense("token_type_ids are not those of all tokens")
    try:
        frames = _frames(rows, valid, special, chunks)
        layouts = [
            Layout.from_ids(
                row,
                special,
                valid=None if valid is None else valid[b],
                frames=frames[b],
                bidirectional=types is not None,
                unfinished=True,
            )
            for b, row in enumerate(rows)
        ]
    except ValueError:
        if past:  # an answer may hold any token
            raise Dense("placeholders behind the first prompt that mark no image") from None
        raise
    return layouts, past


def _packed(arguments: Mapping[str, Any]) -> bool:
    """Whether transformers would see several sequences in one row: positions that start over, no mask, no cache."""
    positions = arguments.get("position_ids")
    if positions is None or any(arguments.get(name) is not None for name in ("attention_mask", "past_key_values")):
        return False
    if positions.ndim == 3:  # mRoPE, with the text's positions in front or without them
        if len(positions) != 4:
            return False
        positions = positions[0]
    return bool((positions.diff(dim=-1) != 1).any())


def _frames(rows: np.ndarray, valid: np.ndarray | None, special: SpecialTokens, chunks: list[Chunk]) -> list[list[int]]:
    """Frame groups of every video of every row, chunk by chunk: no video may go on from one to the next."""
    frames: list[list[int]] = [[] for _ in rows]
    if special.video is None or not (rows == special.video).any():
        return frames
    start = 0
    for chunk in chunks:
        stop = start + chunk.ids.shape[1]
        found = _chunk_frames(rows[:, start:stop], None if valid is None else valid[:, start:stop], special, chunk)
        frames = [known + new for known, new in zip(frames, found, strict=True)]
        start = stop
    return frames


def _chunk_frames(rows: np.ndarray, valid: np.ndarray | None, special: SpecialTokens, chunk: Chunk) -> list[list[int]]:
    """Frame groups of a chunk's videos, from the grids or, where there are none, from the mRoPE positions."""
    runs = []
    for b, row in enumerate(rows):
        edges = np.flatnonzero(np.diff(row == special.video, prepend=False, append=False))
        runs.append(list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)))
        stop = len(row) if valid is None else np.flatnonzero(valid[b]).max(initial=-1) + 1
        if len(edges) and edges[-1] == stop:
            raise Dense("a video is cut")
    n_videos = sum(map(len, runs))
    if not n_videos:
        return [[] for _ in runs]
    if chunk.grids is not None and len(chunk.grids) == n_videos:
        groups = iter(chunk.grids[:, 0].tolist())
        return [[int(next(groups)) for _ in row] for row in runs]
    if chunk.positions is None or chunk.positions.ndim != 3:
        if chunk.grids is None:
            raise Dense("frames of a video are unknown")
        raise ValueError(
            f"video_grid_thw must have a row per video. Got {len(chunk.grids)} rows for {n_videos} videos."
        )
    height, width = chunk.positions[-2:].cpu().numpy()  # [B, N] each
    counts = []
    for b, row in enumerate(runs):
        # Every frame group starts at the same height and width.
        counts.append([int(((height[b, s:e] == height[b, s]) & (width[b, s:e] == width[b, s])).sum()) for s, e in row])
    return counts


def next_token_logits(model: nn.Module, prompt: Mapping[str, Any]) -> Tensor:
    """Runs one prompt, and gives the logits of the token after it, `[1, V]`, wherever its padding is."""
    mask, n_after = prompt.get("attention_mask"), 0
    if mask is not None and mask.ndim == 2:
        n_after = int((mask[0] != 0).flip(0).int().argmax())
    logits: Tensor = model(**prompt, use_cache=False, logits_to_keep=1 + n_after).logits[:, 0]
    return logits


def holds_pictures(ids: Tensor, special: SpecialTokens) -> bool:
    """Whether there are placeholders among tokens."""
    return any(bool((ids == token).any()) for token in special.placeholders)


def worth_it(layouts: list[Layout], q_start: int) -> None:
    """Raises `Dense` where no category could save anything."""
    reason = why_dense(layouts, q_start)
    if reason is not None:
        raise Dense(reason)
