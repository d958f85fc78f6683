"""The vision tower: Qwen's blocks one after another, by programs that all share; Gemma 3's SigLIP as one program.

    pixels ──► _begin ──► x ──► _block, of frames or of windows ──► x ──► ... ──► _end ──► features

All shapes follow from the bucket of patches (SigLIP: from the power of two of images), however many pictures there are
and whatever their sizes. `x` is one buffer from the first block to the last.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import Array

from jax_blindsight.config import ModelConfig, QwenVisionConfig
from jax_blindsight.layers import Rotation
from jax_blindsight.model import Weights, begin_vision, encode_siglip, end_vision, vision_block
from jax_blindsight.vision_inputs import VisionInputs
from jax_blindsight.vision_segments import Segments


def encode_images(weights: Weights, config: ModelConfig, vision: VisionInputs) -> Array:
    """Features of all pictures of a prompt.

    Args:
        weights: of the whole model.
        config: its configuration.
        vision: from `prepare_vision`, on the devices of the weights.

    Returns:
        `[n_padded_tokens, E]`, in the order of `prepare_vision`; rows that no token takes mean nothing.
    """
    if not isinstance(config.vision, QwenVisionConfig):
        return _siglip(weights, vision, config=config)
    x, by = _begin(weights, vision.pixels, vision.coordinates, config=config)
    for i in range(config.vision.depth):
        segments = vision.frames if i in config.vision.full_blocks else vision.windows
        x = _block(weights["vision"]["blocks"][i], x, segments, by, config=config)
    return _end(weights, x, config=config)


@partial(jax.jit, static_argnames="config")
def _siglip(weights: Weights, vision: VisionInputs, *, config: ModelConfig) -> Array:
    return encode_siglip(weights, config, vision)


@partial(jax.jit, static_argnames="config")
def _begin(weights: Weights, pixels: Array, coordinates: Array, *, config: ModelConfig) -> tuple[Array, Rotation]:
    return begin_vision(weights, config, pixels, coordinates)


@partial(jax.jit, static_argnames="config", donate_argnames="x")
def _block(weights: Weights, x: Array, segments: Segments, by: Rotation, *, config: ModelConfig) -> Array:
    return vision_block(weights, config, x, segments, by)


@partial(jax.jit, static_argnames="config")
def _end(weights: Weights, x: Array, *, config: ModelConfig) -> Array:
    return end_vision(weights, config, x)
