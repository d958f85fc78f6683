"""What a processor returned, checked against itself and the model, and its rows brought to one end.

given        a b c . .        aligned    . . a b c
             d e f g h                   d e f g h
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_blindsight.config import ModelConfig
from jax_blindsight.tokens import Grids, Tokens

_PICTURES = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_TYPES = ("mm_token_type_ids", "token_type_ids")  # say again what the ids say
_LONGEST = 2**16  # seconds from one frame group to the next; rotary positions are int32
_NAMES = ("input_ids", "attention_mask", *_TYPES, *_PICTURES, *_PICTURES.values(), "second_per_grid_ts")


@dataclass(frozen=True, eq=False)
class Prompt:
    """Checked inputs.

    Attributes:
        tokens: the rows, aligned.
        given: `[B, N]` bool, the attention mask as given.
        pictures: the arrays that the vision tower needs, as given; empty for text.
    """

    tokens: Tokens
    given: np.ndarray
    pictures: dict[str, np.ndarray]


def read_inputs(config: ModelConfig, inputs: Mapping[str, Any], *, past: np.ndarray | None = None) -> Prompt:
    """Checks what a processor returned against itself and the model.

    Args:
        config: the model.
        inputs: NumPy arrays by name, as a Hugging Face processor returns with `return_tensors="np"`: `input_ids`
            `[B, N]`, `attention_mask` `[B, N]` (or `[B, P + N]`), `pixel_values`, `image_grid_thw`,
            `pixel_values_videos`, `video_grid_thw`, `second_per_grid_ts`, `mm_token_type_ids`, `token_type_ids`.
        past: `[B, P]` bool, which slots of a filled cache hold tokens, not padding.

    Raises:
        ValueError: an array is missing, unknown, or of a wrong shape or dtype; ids, grids and pictures do not match; or
            padding has another place than a row's ends, or, in the cache, than it has there.
    """
    arrays = _arrays(inputs)
    ids = _ids(arrays, config.text.vocab_size)
    past = np.ones((len(ids), 0), dtype=bool) if past is None else past
    given = _mask(arrays, ids, past)
    _check_types(config, arrays, ids, given, past.shape[1])
    shift = np.argmax(given[:, ::-1], axis=1)  # padding behind each row's last token
    columns = np.arange(ids.shape[1]) - shift[:, None]
    aligned = np.where(columns >= 0, np.take_along_axis(ids, np.maximum(columns, 0), axis=1), 0)
    start = np.argmax(given, axis=1) + shift
    aligned[np.arange(ids.shape[1]) < start[:, None]] = 0  # padding may hold any id
    pictures = {name: arrays[name] for name in (*_PICTURES, *_PICTURES.values()) if name in arrays}
    grids = _match(config, np.where(given, ids, -1), arrays)
    return Prompt(Tokens(aligned, start, grids), given, pictures)


def as_arrays(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inputs that are there, as arrays; what is bfloat16 in torch, which NumPy lacks, as float32.

    Raises:
        ValueError: they are not arrays by name.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs must be what the processor returns, arrays by name. Got a {type(inputs).__name__}.")
    arrays = {}
    for name, value in inputs.items():
        if value is None:
            continue
        if hasattr(value, "detach"):  # a tensor of torch
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        try:
            arrays[name] = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be an array, or lists of one shape. Got: {error}") from error
    return arrays


def _arrays(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inputs that are there, as arrays; refuses what is not input."""
    arrays = as_arrays(inputs)
    if unknown := sorted(set(arrays) - set(_NAMES)):
        raise ValueError(f"inputs may hold {', '.join(_NAMES)}. Got {', '.join(unknown)}. Leave it out.")
    if "input_ids" not in arrays:
        raise ValueError(f"inputs must hold input_ids. Got {sorted(arrays) or 'nothing'}.")
    return arrays


def _ids(arrays: dict[str, np.ndarray], vocabulary: int) -> np.ndarray:
    ids = arrays["input_ids"]
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
        raise ValueError(
            f"input_ids must be integers [B, N], at least one. Got {ids.dtype} {ids.shape}. Pass "
            "return_tensors='np' and padding=True to the processor."
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"input_ids must be in [0, {vocabulary}), the model's vocabulary. Got {ids.min()}..{ids.max()}. Use the "
            "checkpoint's own processor."
        )
    return ids.astype(np.int64)


def _mask(arrays: dict[str, np.ndarray], ids: np.ndarray, past: np.ndarray) -> np.ndarray:
    """The new tokens' columns of the attention mask, `[B, N]` bool."""
    mask = arrays.get("attention_mask")
    if mask is None:
        return np.ones(ids.shape, dtype=bool)
    n_rows, n = ids.shape
    n_past = past.shape[1]
    if mask.shape not in ((n_rows, n), (n_rows, n_past + n)) or mask.dtype.kind not in "iub":
        raise ValueError(
            f"attention_mask must be integers of shape {(n_rows, n)} like input_ids"
            f"{f', or {(n_rows, n_past + n)} with the cache' if n_past else ''}. Got {mask.dtype} {mask.shape}."
        )
    if mask.shape[1] > n and not np.array_equal(mask[:, :-n] != 0, past):
        raise ValueError(
            f"attention_mask must be 1 at the tokens in the cache and 0 at its padding, on the left of {n_past} slots. "
            "Got other values. What is cached cannot be masked later: pass the new tokens' columns alone."
        )
    given = mask[:, -n:] != 0
    count = given.sum(axis=1)
    span = n - np.argmax(given[:, ::-1], axis=1) - np.argmax(given, axis=1)
    if not count.all() or (span != count).any():
        raise ValueError(
            "padding must be on the left or right of a row, and every row must have a token. Got row "
            f"{int(np.argmax((count == 0) | (span != count)))} otherwise."
        )
    return given


def _check_types(
    config: ModelConfig, arrays: dict[str, np.ndarray], ids: np.ndarray, given: np.ndarray, past: int
) -> None:
    """Token types must name as pictures what the ids name so."""
    kinds = np.where(ids == config.special.image, 1, np.where(ids == config.special.video, 2, 0))
    for name in _TYPES:
        if name not in arrays:
            continue
        types = arrays[name]
        if types.shape not in (ids.shape, (len(ids), past + ids.shape[1])):
            raise ValueError(f"{name} must have the shape {ids.shape} of input_ids. Got {types.shape}.")
        if ((types[:, -ids.shape[1] :] != kinds) & given).any():
            raise ValueError(
                f"{name} must be 1 at image placeholders, 2 at video placeholders and 0 elsewhere. Got other values. "
                "Use what the checkpoint's own processor returns, unchanged."
            )


def _match(config: ModelConfig, ids: np.ndarray, arrays: dict[str, np.ndarray]) -> tuple[Grids, ...]:
    """Deals the grids out to the rows, and demands that every image has its placeholders.

    `ids` `[B, N]` are as given, with -1 as padding.
    """
    special = config.special
    images, videos = _runs(ids, special.image), _runs(ids, special.video)
    tokens, merge = config.vision.tokens_per_image, config.vision.merge
    if tokens is not None:
        _match_alike(tokens, images, arrays)
        return tuple(Grids.none() for _ in ids)
    image_grids = _match_grids(merge, "pixel_values", images, arrays)
    video_grids = _match_grids(merge, "pixel_values_videos", videos, arrays)
    seconds = arrays.get("second_per_grid_ts", np.ones(len(video_grids)))
    if seconds.shape != (len(video_grids),) or seconds.dtype.kind not in "iuf":
        raise ValueError(
            f"second_per_grid_ts must have one number per video, {len(video_grids)}. Got {seconds.dtype} "
            f"{seconds.shape}."
        )
    if not ((seconds >= 0) & (seconds < _LONGEST)).all():
        raise ValueError(f"second_per_grid_ts must be in [0, {_LONGEST}). Got {seconds.tolist()!s:.200}.")
    rows = []
    for b in range(len(ids)):
        mine = [run[0] == b for run in videos]
        rows.append(Grids(image_grids[[run[0] == b for run in images]], video_grids[mine], seconds[mine]))
    return tuple(rows)


def _runs(ids: np.ndarray, placeholder: int | None) -> list[tuple[int, int, int]]:
    """Runs of a placeholder as (row, first, last), row by row; no id equals None."""
    where = np.pad(ids == placeholder, ((0, 0), (1, 1)))
    edges = np.diff(where.astype(np.int8), axis=1)
    rows, first = np.nonzero(edges == 1)
    return list(zip(rows.tolist(), first.tolist(), np.nonzero(edges == -1)[1].tolist(), strict=True))


def _match_alike(tokens: int, runs: list[tuple[int, int, int]], arrays: dict[str, np.ndarray]) -> None:
    """Pictures of one size: as many as there are runs of placeholders, each of as many tokens."""
    for name in (*_PICTURES.values(), "pixel_values_videos", "second_per_grid_ts"):
        if name in arrays:
            raise ValueError(f"this model takes no {name}. Leave it out.")
    _check_pixels("pixel_values", runs, arrays)
    for i, (row, first, last) in enumerate(runs):
        if last - first != tokens:
            raise ValueError(_wrong_length("image", i, row, first, last, tokens))


def _match_grids(merge: int, name: str, runs: list[tuple[int, int, int]], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The checked grids `[n, 3]` of images or videos: one per run of placeholders."""
    grid_name = _PICTURES[name]
    if not _check_pixels(name, runs, arrays):
        if grid_name in arrays:
            raise ValueError(f"{grid_name} comes with {name}. Got it alone. Pass all that the processor returns.")
        return np.zeros((0, 3), np.int64)
    grids = arrays.get(grid_name)
    if grids is None or grids.ndim != 2 or grids.shape[1] != 3 or grids.dtype.kind not in "iu":
        got = "nothing" if grids is None else f"{grids.dtype} {grids.shape}"
        raise ValueError(f"{grid_name} must be integers [n, 3] beside {name}. Got {got}.")
    if len(grids) != len(runs):
        raise ValueError(
            f"{grid_name} must have one row for each of the {len(runs)} runs of placeholders in input_ids. Got "
            f"{len(grids)} rows. Pass ids and pictures of one call of the processor, uncut."
        )
    if (grids < 1).any() or (grids[:, 1:] % merge).any():
        raise ValueError(
            f"{grid_name} must hold positive sizes, rows and columns multiples of {merge} patches. Got "
            f"{grids.tolist()!s:.200}."
        )
    wanted = grids.prod(axis=1) // merge**2
    for i, (row, first, last) in enumerate(runs):
        if last - first != wanted[i]:
            raise ValueError(
                _wrong_length("image" if name == "pixel_values" else "video", i, row, first, last, wanted[i])
            )
    return grids.astype(np.int64)


def _check_pixels(name: str, runs: list[tuple[int, int, int]], arrays: dict[str, np.ndarray]) -> bool:
    """Whether there are pictures: if and only if there are placeholders."""
    pixels = arrays.get(name)
    if (pixels is None) == bool(runs):
        raise ValueError(
            f"{name} must be there just when input_ids holds placeholders for it. Got "
            f"{'none' if pixels is None else pixels.shape} for {len(runs)} runs of placeholders."
        )
    if pixels is not None and pixels.dtype.kind != "f" and pixels.dtype.name != "bfloat16":
        raise ValueError(f"{name} must be floating-point, as the processor returns it. Got {pixels.dtype}.")
    return pixels is not None


def _wrong_length(kind: str, i: int, row: int, first: int, last: int, wanted: int) -> str:
    return (
        f"{kind} {i} must have {wanted} placeholders in input_ids. Got {last - first}, at [{first}, {last}) of row "
        f"{row}. A prompt may be cut between images, not inside one."
    )
