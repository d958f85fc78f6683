"""Qwen's vision tower: patches of any number of images and video frames in one row, merged by squares into tokens.

Qwen2-VL attends within frames; Qwen2.5-VL in most blocks within windows of them, in whose order its patches lie.
"""

from __future__ import annotations

from flax import nnx
from jax import Array

from jax_blindsight.config import QwenVisionConfig
from jax_blindsight.layers import FLOAT32, MLP, LayerNorm, Linear, RMSNorm, Rotation, inverse_frequencies, rotation
from jax_blindsight.vision_blocks import VisionBlock


class PatchMerger(nnx.Module):
    """Joins `merge_unit` patches that follow one another into one token of the decoder's width."""

    def __init__(self, config: QwenVisionConfig, n_out: int) -> None:
        norm = RMSNorm if config.rms_norm else LayerNorm
        self.norm = norm(config.hidden_size, config.norm_eps)
        width = config.hidden_size * config.merge_unit
        self.mlp = MLP(width, width, n_out, "gelu")

    def __call__(self, x: Array) -> Array:
        """`[P, width]` to `[P / merge_unit, n_out]`."""
        return self.mlp(self.norm(x).reshape(-1, self.mlp.fc1.kernel.shape[0]))


class QwenVision(nnx.Module):
    """Patch embedding, blocks and merger; `tower.encode_images` runs them.

    The patch kernel is `[channels * frames * rows * columns, width]`.
    """

    def __init__(self, config: QwenVisionConfig, n_out: int) -> None:
        self.patch_embed = Linear(config.patch_features, config.hidden_size)
        self.blocks = nnx.List([VisionBlock(config) for _ in range(config.depth)])
        self.merger = PatchMerger(config, n_out)
        self.config = config

    def begin(self, pixels: Array, coordinates: Array) -> tuple[Array, Rotation]:
        """What the blocks read: embedded patches `[P, width]`, and the rotation of their queries and keys."""
        x = self.patch_embed(pixels.astype(self.patch_embed.kernel.dtype))
        frequencies = inverse_frequencies(self.config.hidden_size // self.config.n_heads // 2, self.config.rope_theta)
        angles = coordinates.astype(FLOAT32)[..., None] * frequencies  # [P, 2, D/4]
        return x, rotation(angles.reshape(len(x), -1))
