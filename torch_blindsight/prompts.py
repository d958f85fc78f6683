"""From a forward's arguments to layouts: what a prefill will see, the tokens already in its cache included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from shared_profiles import Family, Layout, SpecialTokens


class Dense(Exception):
    """This forward runs dense; the message is the reason that `Handle.report` counts."""


class TokenHistory:
    """The token ids behind each cache, so that a chunk or a second turn knows the images before it.

    Ids are kept as the tensors they came in, so decode steps cost an append and no synchronization.
    """

    def __init__(self) -> None:
        self._ids: WeakKeyDictionary[Any, list[Tensor]] = WeakKeyDictionary()

    def before(self, cache: Any, length: int) -> Tensor | None:
        """Ids `[B, length]` of the tokens in the cache, or None where they did not all pass through here."""
        chunks = self._ids.get(cache)
        if chunks is None or sum(c.shape[1] for c in chunks) < length:
            return None
        return torch.cat(chunks, dim=1)[:, :length]

    def record(self, cache: Any, length: int, ids: Tensor) -> None:
        """Notes that `ids` `[B, T]` now follow the first `length` tokens of the cache."""
        chunks = self._ids.get(cache, [])
        known = sum(c.shape[1] for c in chunks)
        if chunks and len(chunks[0]) != len(ids):  # rows of the cache were repeated or selected
            self._ids.pop(cache)
        elif known == length:
            self._ids.setdefault(cache, chunks).append(ids)
        elif known > length:  # the cache was cropped
            self._ids[cache] = [torch.cat(chunks, dim=1)[:, :length], ids]
        else:
            self._ids.pop(cache, None)


def read_layouts(
    arguments: Mapping[str, Any], family: Family, special: SpecialTokens, history: TokenHistory
) -> tuple[list[Layout], int]:
    """The layouts of a forward and the position of its first query.

    Args:
        arguments: the forward's arguments by name.
        family, special: how the model marks images.
        history: the ids behind its cache.

    Returns:
        One layout per batch row, covering cache and new tokens, and the number of tokens in the cache.

    Raises:
        Dense: the forward is no prefill that BlindSight could speed up; says why.
        ValueError: the prompt is malformed.
    """
    ids = arguments.get("input_ids")
    if ids is None:
        raise Dense("no input_ids")
    cache = arguments.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    if ids.shape[1] == 1:
        raise Dense("decode step")
    if getattr(cache, "is_compileable", False):
        raise Dense("static cache")
    if _packed(arguments):
        raise Dense("several sequences in one row")
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + ids.shape[1]):
        raise Dense("attention_mask is not [batch, tokens]")
    if past:
        before = history.before(cache, past)
        if before is None or len(before) != len(ids):
            raise Dense("tokens in the cache are unknown")
        ids = torch.cat([before.to(ids.device), ids], dim=1)
    valid = None if mask is None else mask.cpu().numpy()
    rows = ids.cpu().numpy()
    frames = _frames(rows, valid, special, arguments, past)
    # Gemma 3 looks both ways where token_type_ids say so; generate leaves them out of a chunked prefill.
    bidirectional = family.bidirectional and arguments.get("token_type_ids") is not None
    layouts = [
        Layout.from_ids(
            row,
            special,
            valid=None if valid is None else valid[b],
            frames=frames[b],
            bidirectional=bidirectional,
            unfinished=True,
        )
        for b, row in enumerate(rows)
    ]
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


def _frames(
    rows: np.ndarray, valid: np.ndarray | None, special: SpecialTokens, arguments: Mapping[str, Any], past: int
) -> list[list[int]]:
    """Frame groups of every video of every row, from the grids or, where there are none, from the mRoPE positions."""
    if special.video is None or not (rows == special.video).any():
        return [[] for _ in rows]
    runs = []
    for b, row in enumerate(rows):
        edges = np.flatnonzero(np.diff(row == special.video, prepend=False, append=False))
        runs.append(list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)))
        stop = len(row) if valid is None else np.flatnonzero(valid[b]).max(initial=-1) + 1
        if len(edges) and edges[-1] == stop:
            raise Dense("a video is cut")
    grids = arguments.get("video_grid_thw")
    if grids is not None and not past:
        groups = iter(grids[:, 0].tolist())
        try:
            return [[int(next(groups)) for _ in row] for row in runs]
        except StopIteration:
            raise ValueError(
                f"video_grid_thw must have a row per video. Got {len(grids)} rows for {sum(map(len, runs))} videos."
            ) from None
    positions = arguments.get("position_ids")
    if positions is None or positions.ndim != 3 or past:
        raise Dense("frames of a video are unknown")
    height, width = positions[-2:].cpu().numpy()  # [B, N] each
    counts = []
    for b, row in enumerate(runs):
        # Every frame group starts at the same height and width.
        counts.append([int(((height[b, s:e] == height[b, s]) & (width[b, s:e] == width[b, s])).sum()) for s, e in row])
    return counts


def worth_it(layouts: list[Layout], q_start: int) -> None:
    """Raises `Dense` where no category could save anything: no image rows with an earlier image among the queries."""
    if all(layout.n_images < 2 for layout in layouts):
        raise Dense("fewer than two images")
    if all(layout.n_images == 0 or layout.images[-1, 2] <= q_start for layout in layouts):
        raise Dense("no image tokens among the queries")
