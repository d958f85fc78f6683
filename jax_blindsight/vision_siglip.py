"""Gemma 3's vision tower: SigLIP over square images, then averages over squares of patches, projected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jax_blindsight.config import SiglipVisionConfig
from jax_blindsight.layers import Embedding, LayerNorm, Linear, RMSNorm
from jax_blindsight.vision_blocks import VisionBlock
from jax_blindsight.vision_inputs import VisionInputs
from jax_blindsight.vision_segments import segments


class Projector(nnx.Module):
    """Averages each square of merge x merge patches, normalises, and projects to the decoder's width."""

    def __init__(self, config: SiglipVisionConfig, n_out: int) -> None:
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, offset=True)
        self.linear = Linear(config.hidden_size, n_out)
        self.side, self.merge = config.patches_per_side, config.merge

    def __call__(self, x: Array) -> Array:
        """`[patches, width]` of one image to `[tokens_per_image, n_out]`."""
        n = self.side // self.merge
        squares = x.reshape(self.side, self.side, -1)[: n * self.merge, : n * self.merge]
        squares = squares.reshape(n, self.merge, n, self.merge, -1)
        pooled = squares.mean(axis=(1, 3), dtype=jnp.float32).astype(x.dtype)
        return self.linear(self.norm(pooled.reshape(n * n, -1)))


class SiglipVision(nnx.Module):
    """Patch and position embeddings, blocks, final norm, projector.

    The patch kernel is `[channels * rows * columns, width]`.
    """

    def __init__(self, config: SiglipVisionConfig, n_out: int) -> None:
        width = config.hidden_size
        self.patch_embed = Linear(config.in_channels * config.patch_size**2, width, bias=True)
        self.position_embed = Embedding(config.patches_per_side**2, width)
        self.blocks = nnx.List([VisionBlock(config) for _ in range(config.depth)])
        self.norm = LayerNorm(width, config.norm_eps)
        self.projector = Projector(config, n_out)
        self.config = config

    def __call__(self, vision: VisionInputs) -> Array:
        """Tokens `[n * tokens_per_image, n_out]`; image by image, so that memory does not grow with their number."""
        pixels = vision.pixels
        tokens = jax.eval_shape(self._encode, pixels[0])

        def encode(i: Array, out: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(out, self._encode(pixels[i]), i * len(tokens), axis=0)

        out = jnp.zeros((len(pixels) * len(tokens), *tokens.shape[1:]), tokens.dtype)
        return lax.fori_loop(0, vision.n_images, encode, out)

    def _encode(self, image: Array) -> Array:
        """`[channels, height, width]` to `[tokens_per_image, n_out]`."""
        side, patch = self.config.patches_per_side, self.config.patch_size
        patches = image[:, : side * patch, : side * patch].reshape(-1, side, patch, side, patch)
        patches = patches.transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
        x = self.patch_embed(patches.astype(self.patch_embed.kernel.dtype)) + self.position_embed.embedding[...]
        whole = segments(np.array([len(x)]), len(x))
        for block in self.blocks:
            x = block(x, whole)
        return self.projector(self.norm(x))
