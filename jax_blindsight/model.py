"""Whole models as functions of a plain dict of weights.

The NNX modules define a model; its graph is made once per configuration and merged with the weights inside jit, so a
call passes nothing but arrays. The weights are nested dicts (lists as dicts of int) with the modules' attribute names:

    {"decoder": {"embed_tokens": {"embedding": ...}, "layers": {0: {...}, ...}, ...}, "vision": {...}}
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
from flax import nnx
from jax import Array

from jax_blindsight.config import ModelConfig, QwenVisionConfig, TextConfig
from jax_blindsight.decoder import Attend, Decoder, DecoderLayer
from jax_blindsight.layers import Rotation
from jax_blindsight.vision_blocks import VisionBlock
from jax_blindsight.vision_inputs import VisionInputs
from jax_blindsight.vision_qwen import QwenVision
from jax_blindsight.vision_segments import Segments
from jax_blindsight.vision_siglip import SiglipVision

Weights = dict[Any, Any]


class VisionLanguageModel(nnx.Module):
    """A vision tower and a decoder."""

    def __init__(self, config: ModelConfig) -> None:
        n_out = config.text.hidden_size
        if isinstance(config.vision, QwenVisionConfig):
            self.vision: QwenVision | SiglipVision = QwenVision(config.vision, n_out)
        else:
            self.vision = SiglipVision(config.vision, n_out)
        self.decoder = Decoder(config.text)


@lru_cache
def _split(config: ModelConfig) -> tuple[nnx.GraphDef, Weights]:
    """The graph of the model and its abstract weights in float32."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionLanguageModel(config)))
    return graph, nnx.to_pure_dict(state)


def _merge(weights: Weights, config: ModelConfig) -> VisionLanguageModel:
    return nnx.merge(_split(config)[0], weights)


@lru_cache
def _layer_graph(config: TextConfig) -> nnx.GraphDef:
    """The graph of one decoder layer; all layers of a model have the same."""
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(config)))[0]


def _qwen_tower(weights: Weights, config: ModelConfig) -> QwenVision:
    tower = _merge(weights, config).vision
    assert isinstance(tower, QwenVision)
    return tower


@lru_cache
def _vision_graph(config: ModelConfig) -> nnx.GraphDef:
    """The graph of one block of the vision tower; all have the same."""
    return nnx.split(nnx.eval_shape(lambda: VisionBlock(config.vision)))[0]


def abstract_weights(config: ModelConfig, dtype: Any) -> Weights:
    """The weights that a model of this configuration has: nested dicts of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _split(config)[1])


def embed_tokens(weights: Weights, config: ModelConfig, ids: Array) -> Array:
    """Token ids `[B, T]` to embeddings `[B, T, E]`; image features take the places of placeholders afterwards."""
    return _merge(weights, config).decoder.embed(ids)


def encode_siglip(weights: Weights, config: ModelConfig, vision: VisionInputs) -> Array:
    """Features of the images one after another, `[n_padded_tokens, E]`; rows beyond the last one mean nothing."""
    return _merge(weights, config).vision(vision)


def begin_vision(weights: Weights, config: ModelConfig, pixels: Array, coordinates: Array) -> tuple[Array, Rotation]:
    """What the blocks of Qwen's tower read, of `VisionInputs`: patches `[P, width]`, and their rotation."""
    return _qwen_tower(weights, config).begin(pixels, coordinates)


def vision_block(weights: Weights, config: ModelConfig, x: Array, segments: Segments, by: Rotation) -> Array:
    """One block of Qwen's tower, `[P, width]` to the same; `weights["vision"]["blocks"][i]` are its weights."""
    return nnx.merge(_vision_graph(config), weights)(x, segments, by)


def end_vision(weights: Weights, config: ModelConfig, x: Array) -> Array:
    """What the blocks of Qwen's tower gave, `[P, width]`, to features `[n_padded_tokens, E]`."""
    return _qwen_tower(weights, config).merger(x)


def decode(weights: Weights, config: ModelConfig, hidden: Array, positions: Array, attend: Attend) -> Array:
    """Runs the decoder's layers and its final norm.

    Args:
        weights: of the model.
        config: its configuration.
        hidden: `[B, T, E]` embeddings.
        positions: int, mRoPE `[3, B, T]` or `[B, T]` as the family has it.
        attend: `(layer, q [B, H, T, D], k [B, K, T, D], v) -> [B, T, H, D]`, called once per layer; q and k are rotated
            and not scaled.

    Returns:
        `[B, T, E]`.
    """
    return _merge(weights, config).decoder(hidden, positions, attend)


def begin_layer(weights: Weights, config: ModelConfig, hidden: Array, by: Rotation) -> tuple[Array, Array, Array]:
    """One decoder layer up to its attention.

    Args:
        weights: of the layer, `weights["decoder"]["layers"][i]`.
        config: of the model.
        hidden: `[B, T, E]`.
        by: from `decoder.rope_rotation` with the layer's rope.

    Returns:
        q `[B, H, T, D]`, k and v `[B, K, T, D]`; q and k are rotated and not scaled.
    """
    return nnx.merge(_layer_graph(config.text), weights).begin(hidden, by)


def end_layer(weights: Weights, config: ModelConfig, hidden: Array, out: Array) -> Array:
    """One decoder layer from its attention on: its input `[B, T, E]` and what was attended `[B, T, H, D]`."""
    return nnx.merge(_layer_graph(config.text), weights).end(hidden, out)


def attention_branch(weights: Weights, config: ModelConfig, out: Array) -> tuple[Array, Array]:
    """What one layer's attention adds to its input: what was attended `[B, T, H, D]` to `[B, T, E]` twice.

    Returns:
        Before the norm on its way out, and after it; the same in families without one.
    """
    layer = nnx.merge(_layer_graph(config.text), weights)
    branch = layer.attention.merge(out)
    return branch, branch if layer.post_attention_norm is None else layer.post_attention_norm(branch)


def final_norm(weights: Weights, config: ModelConfig, hidden: Array) -> Array:
    """The last layer's hidden states `[..., E]`, normalised."""
    return _merge(weights, config).decoder.norm(hidden)


def unembed(weights: Weights, config: ModelConfig, hidden: Array) -> Array:
    """Normalised hidden states `[..., E]` to logits `[..., V]` in float32."""
    return _merge(weights, config).decoder.logits(hidden)
