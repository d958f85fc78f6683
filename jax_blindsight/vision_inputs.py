"""Pictures as the vision towers take them: NumPy arrays of bucketed sizes, made from what a processor returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_blindsight.buckets import bucket, pad_first, power_of_two
from jax_blindsight.config import ModelConfig, QwenVisionConfig, SiglipVisionConfig
from jax_blindsight.vision_segments import Segments, segments

MIN_IMAGES = 4  # so that prompts of few images share one size


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class VisionInputs:
    """All pictures of a prompt, images before videos, and what their attention needs.

    Attributes:
        pixels: float32. Qwen: patches `[P, channels * frames * rows * columns]`, those of a window one after another,
            windows and frames in order. Gemma 3: `[n, channels, height, width]`.
        coordinates: `[P, 2]` int32, row and column of each patch in its frame; None for Gemma 3.
        frames: segments of the blocks that attend within whole frames; None for Gemma 3.
        windows: segments of the others; None where there are none.
        n_images: int32, how many of the padded images are real; None for Qwen.
    """

    pixels: np.ndarray
    coordinates: np.ndarray | None
    frames: Segments | None
    windows: Segments | None
    n_images: np.ndarray | None


def prepare_vision(config: ModelConfig, inputs: Mapping[str, Any]) -> tuple[VisionInputs, np.ndarray]:
    """Prepares the pictures of a prompt for `encode_images`.

    Args:
        config: the model.
        inputs: NumPy arrays as `read_inputs` checked them. `input_ids` `[B, N]` says where the pictures go. Qwen:
            `pixel_values` `[patches, features]` with `image_grid_thw` `[n, 3]`, `pixel_values_videos` with
            `video_grid_thw`. Gemma 3: `pixel_values` `[n, channels, height, width]`.

    Returns:
        The pictures, and `[B, N]` int32, the row of the tower's output that each token takes, -1 for text.

    Raises:
        ValueError: pictures of another size or number than the grids or placeholders say.
    """
    prepare = _prepare_qwen if isinstance(config.vision, QwenVisionConfig) else _prepare_siglip
    return prepare(config, config.vision, inputs)  # type: ignore[arg-type]


def _prepare_siglip(
    config: ModelConfig, vision: SiglipVisionConfig, inputs: Mapping[str, Any]
) -> tuple[VisionInputs, np.ndarray]:
    pixels = np.asarray(inputs.get("pixel_values", ()), dtype=np.float32)
    shape = (vision.in_channels, vision.image_size, vision.image_size)
    if pixels.shape[1:] != shape or not len(pixels):
        raise ValueError(f"pixel_values must have shape (n, {', '.join(map(str, shape))}), n > 0. Got {pixels.shape}.")
    tokens = (vision.patches_per_side // vision.merge) ** 2
    place = feature_places(config, inputs["input_ids"], len(pixels) * tokens, 0)
    n_padded = power_of_two(max(len(pixels), MIN_IMAGES))  # only the real ones are computed
    n_images = np.array(len(pixels), dtype=np.int32)
    return VisionInputs(pad_first(pixels, n_padded), None, None, None, n_images), place


def _prepare_qwen(
    config: ModelConfig, vision: QwenVisionConfig, inputs: Mapping[str, Any]
) -> tuple[VisionInputs, np.ndarray]:
    images, image_grids = _patches(vision, inputs, "pixel_values", "image_grid_thw")
    videos, video_grids = _patches(vision, inputs, "pixel_values_videos", "video_grid_thw")
    grids = np.concatenate([image_grids, video_grids])
    n = len(images) + len(videos)
    counts = [len(x) // vision.merge_unit for x in (images, videos)]
    place = feature_places(config, inputs["input_ids"], *counts)

    side = (vision.window_size or 0) // vision.merge // vision.patch_size  # in tokens
    window = side**2 * vision.merge_unit
    n_padded = bucket(n)
    n_padded += -n_padded % vision.merge_unit
    rows, windows = np.arange(n), None
    if window:
        tokens, lengths = window_order(grids // [1, vision.merge, vision.merge], side)
        rows = (tokens[:, None] * vision.merge_unit + np.arange(vision.merge_unit)).reshape(-1)
        windows = segments(lengths * vision.merge_unit, n_padded, rows=window, tile=window)
        place = np.where(place >= 0, np.argsort(tokens).astype(np.int32)[place], place)
    frames = segments(np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0]), n_padded)
    pixels = np.zeros((n_padded, vision.patch_features), np.float32)
    cut = len(images)  # windows keep the pictures in order
    np.take(images, rows[:cut], axis=0, out=pixels[:cut], mode="clip")
    np.take(videos, rows[cut:] - cut, axis=0, out=pixels[cut:n], mode="clip")
    coordinates = patch_coordinates(grids, vision.merge)[rows]
    return VisionInputs(pixels, pad_first(coordinates, n_padded), frames, windows, None), place


def patch_coordinates(grids: np.ndarray, merge: int) -> np.ndarray:
    """Row and column of every patch in its frame, in the processor's order: squares of merge x merge patches.

    Args:
        grids: `[n, 3]`, frame groups, rows and columns of patches of each picture.
        merge: side of a square.

    Returns:
        `[P, 2]` int32.
    """
    parts = []
    for groups, n_rows, n_columns in grids.tolist():
        cells = np.indices((n_rows, n_columns), dtype=np.int32)
        squares = cells.reshape(2, n_rows // merge, merge, n_columns // merge, merge).transpose(1, 3, 2, 4, 0)
        parts.append(np.tile(squares.reshape(-1, 2), (groups, 1)))
    return np.concatenate(parts)


def window_order(grids: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The order that puts the tokens of each window of side x side one after another; windows at an edge are cut.

    Args:
        grids: `[n, 3]`, frame groups, rows and columns of *tokens* of each picture.
        side: of a window, in tokens.

    Returns:
        `[n_tokens]` int64, the token that comes at each place, and `[n_windows]` int64, tokens in each window.
    """
    tokens, lengths, first = [], [], 0
    for groups, n_rows, n_columns in grids.tolist():
        windows_across = -(-n_columns // side)
        row, column = np.indices((n_rows, n_columns))
        window = (row // side * windows_across + column // side).reshape(-1)
        in_frame = np.argsort(window, kind="stable")
        tokens.append((first + np.arange(groups)[:, None] * len(in_frame) + in_frame).reshape(-1))
        lengths.append(np.tile(np.bincount(window), groups))
        first += groups * len(in_frame)
    return np.concatenate(tokens), np.concatenate(lengths)


def _patches(
    vision: QwenVisionConfig, inputs: Mapping[str, Any], pixels_name: str, grid_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Patches `[n, features]` float32 and grids `[m, 3]` int64 that match, both empty where the prompt has none."""
    if pixels_name not in inputs:
        return np.zeros((0, vision.patch_features), np.float32), np.zeros((0, 3), np.int64)
    grids = np.asarray(inputs[grid_name], dtype=np.int64).reshape(-1, 3)
    patches = np.asarray(inputs[pixels_name], dtype=np.float32)
    shape = (int(grids.prod(axis=1).sum()), vision.patch_features)
    if patches.shape != shape:
        raise ValueError(f"{pixels_name} must have shape {shape} for these grids. Got {patches.shape}.")
    return patches, grids


def feature_places(config: ModelConfig, ids: Any, n_images: int, n_videos: int) -> np.ndarray:
    """For each token its row among image tokens followed by video tokens, -1 for text: `[B, N]` int32.

    Raises:
        ValueError: there are other numbers of placeholders.
    """
    ids, special = np.asarray(ids), config.special
    is_image, is_video = ids == special.image, ids == special.video
    if (is_image.sum(), is_video.sum()) != (n_images, n_videos):
        raise ValueError(
            f"input_ids must hold one placeholder per image token ({n_images}) and per video token ({n_videos}). Got "
            f"{is_image.sum()} and {is_video.sum()}. Pass ids and pictures that one call of the processor returned."
        )
    place = np.full(ids.shape, -1, np.int32)
    place[is_image], place[is_video] = np.arange(n_images), n_images + np.arange(n_videos)
    return place
