"""`ModelConfig`: what the JAX models need to know of a checkpoint; hashable, so that it can be static in jit.

Read from the transformers configuration (5.17 names), which is normalised across the versions that wrote checkpoints.
A family is one declaration here: what it adds to the common fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared_profiles import SpecialTokens, family_of

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")
_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
        theta: base of the wavelengths.
        factor: positions are divided by it (linear scaling); 1 where there is none.
    """

    theta: float
    factor: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    """The decoder.

    Attributes:
        scale: factor of the attention scores.
        windows: per layer, the keys a query sees counting itself, None for all.
        ropes: per layer.
        mrope_section: how many of the D/2 frequencies follow the temporal, height and width position, in turn;
            None where positions have one axis.
        attention_bias: whether the query, key and value projections have a bias; the output projection has none.
        qk_norm: whether queries and keys of every head are normalised before they are rotated.
        sandwich_norms: whether each branch is normalised on its way out too, before it is added.
        norm_offset: whether an RMS norm multiplies with 1 + weight, in float32.
        embedding_scale: factor of the token embeddings.
        tied: whether the logits come from the embedding table.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    scale: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    mrope_section: tuple[int, ...] | None
    attention_bias: bool
    qk_norm: bool
    sandwich_norms: bool
    norm_offset: bool
    embedding_scale: float
    tied: bool

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.windows)


@dataclass(frozen=True)
class VisionConfig:
    """What every vision tower has: patches and a stack of blocks.

    Attributes:
        rms_norm: RMS norms instead of layer norms.
        gated: the MLP is gated.
        fused_qkv: one projection makes queries, keys and values.
        merge: side of the square of patches that becomes one token.
        tokens_per_image: None where it follows from the image's size.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    activation: str
    norm_eps: float
    rms_norm: bool
    gated: bool
    fused_qkv: bool
    in_channels: int
    patch_size: int
    merge: int
    tokens_per_image: int | None


@dataclass(frozen=True)
class QwenVisionConfig(VisionConfig):
    """Qwen's tower: images of any size and videos, merged by squares of patches.

    Attributes:
        temporal_patch_size: frames in a patch.
        window_size: side in pixels of the windows that the blocks not in `full_blocks` attend within; None where every
            block attends within whole frames.
        full_blocks: indexes of the blocks that attend within whole frames.
        rope_theta: base of the wavelengths of the axial rotary embedding.
        tokens_per_second: temporal positions per second of video, None where frame groups count one by one.
    """

    temporal_patch_size: int
    window_size: int | None
    full_blocks: tuple[int, ...]
    rope_theta: float
    tokens_per_second: int | None

    @property
    def merge_unit(self) -> int:
        """Patches in a token."""
        return self.merge**2

    @property
    def patch_features(self) -> int:
        """Numbers in a patch, as the processor flattens it: channels, frames, rows, columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class SiglipVisionConfig(VisionConfig):
    """SigLIP: square images of one size, their patches averaged into a fixed number of tokens.

    Attributes:
        image_size: side of an image in pixels.
    """

    image_size: int

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ModelConfig:
    """One model: its family's name, the token ids that mark images, its decoder and its vision tower.

    Attributes:
        family: a key of `shared_profiles.FAMILIES`.
        bidirectional: whether an image's tokens look at later tokens of the same image.
    """

    family: str
    special: SpecialTokens
    bidirectional: bool
    text: TextConfig
    vision: QwenVisionConfig | SiglipVisionConfig

    @classmethod
    def from_hf(cls, config: Any) -> ModelConfig:
        """Reads a transformers configuration, e.g. `AutoConfig.from_pretrained(path)`.

        Raises:
            ValueError: a family that is not supported, a token id is missing, or sizes that contradict each other.
            NotImplementedError: the configuration asks for something these models do not compute.
        """
        settings = config.to_dict()
        family = family_of(settings)
        if quantization := settings.get("quantization_config"):
            raise NotImplementedError(
                f"the checkpoint must hold plain weights. Got quantized ones ({quantization.get('quant_method')}). "
                "Load the one that it was made from."
            )
        _refuse("layer_types", set(config.get_text_config().layer_types) - set(_LAYERS), _LAYERS)
        text, vision = _READERS[family.name](config)
        _refuse("activation function", {text.activation, vision.activation} - set(ACTIVATIONS), ACTIVATIONS)
        return cls(family.name, family.special_tokens(settings), family.bidirectional, text, vision)


def _qwen2_vl(config: Any) -> tuple[TextConfig, QwenVisionConfig]:
    vision = config.vision_config
    return _qwen_text(config), QwenVisionConfig(
        hidden_size=vision.embed_dim,
        intermediate_size=int(vision.embed_dim * vision.mlp_ratio),
        rms_norm=False,
        gated=False,
        window_size=None,
        full_blocks=tuple(range(vision.depth)),
        tokens_per_second=None,
        **_qwen_vision(vision),
    )


def _qwen2_5_vl(config: Any) -> tuple[TextConfig, QwenVisionConfig]:
    vision = config.vision_config
    if vision.window_size < (token := vision.patch_size * vision.spatial_merge_size):
        raise ValueError(
            f"window_size must be at least the {token} pixels of a token. Got {vision.window_size}. Bring the "
            "config.json that belongs to the weights."
        )
    return _qwen_text(config), QwenVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        rms_norm=True,
        gated=True,
        window_size=vision.window_size,
        full_blocks=tuple(vision.fullatt_block_indexes),
        tokens_per_second=vision.tokens_per_second,
        **_qwen_vision(vision),
    )


def _gemma3(config: Any) -> tuple[TextConfig, SiglipVisionConfig]:
    text, vision = config.text_config, config.vision_config
    _refuse("attn_logit_softcapping", {text.attn_logit_softcapping} - {None}, (None,))
    _refuse("use_bidirectional_attention", {text.use_bidirectional_attention} - {None, False}, (False,))
    _refuse("attention_bias", {text.attention_bias} - {False}, (False,))
    side, tokens = vision.image_size // vision.patch_size, config.mm_tokens_per_image
    merge = side // max(1, math.isqrt(tokens))
    if not merge or (side // merge) ** 2 != tokens:
        raise ValueError(
            f"mm_tokens_per_image must be what squares of an image's {side} x {side} patches add up to. Got {tokens}. "
            "Bring the config.json that belongs to the weights."
        )
    return TextConfig(
        head_dim=text.head_dim,
        activation=text.hidden_activation,
        scale=text.query_pre_attn_scalar**-0.5,
        ropes=tuple(_rope(text.rope_parameters[kind]) for kind in text.layer_types),
        mrope_section=None,
        attention_bias=False,
        qk_norm=True,
        sandwich_norms=True,
        norm_offset=True,
        embedding_scale=text.hidden_size**0.5,
        **_text(config),
    ), SiglipVisionConfig(
        depth=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        n_heads=vision.num_attention_heads,
        activation=vision.hidden_act,
        norm_eps=vision.layer_norm_eps,
        rms_norm=False,
        gated=False,
        fused_qkv=False,
        in_channels=vision.num_channels,
        patch_size=vision.patch_size,
        merge=merge,
        tokens_per_image=tokens,
        image_size=vision.image_size,
    )


_Reader = Callable[[Any], tuple[TextConfig, QwenVisionConfig | SiglipVisionConfig]]
_READERS: dict[str, _Reader] = {"qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "gemma3": _gemma3}


def _qwen_text(config: Any) -> TextConfig:
    """The decoder of both Qwen families."""
    text = config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    sections = tuple(text.rope_parameters.get("mrope_section", (16, 24, 24)))
    if 2 * sum(sections) != head_dim:
        raise ValueError(
            f"mrope_section must add up to half the head dimension of {head_dim}. Got {sections}. Bring the "
            "config.json that belongs to the weights."
        )
    return TextConfig(
        head_dim=head_dim,
        activation=text.hidden_act,
        scale=head_dim**-0.5,
        ropes=(_rope(text.rope_parameters),) * text.num_hidden_layers,
        mrope_section=sections,
        attention_bias=True,
        qk_norm=False,
        sandwich_norms=False,
        norm_offset=False,
        embedding_scale=1.0,
        **_text(config),
    )


def _text(config: Any) -> dict[str, Any]:
    """The decoder's fields that every family spells alike."""
    text = config.text_config
    if "sliding_attention" in text.layer_types and (text.sliding_window or 0) < 1:
        raise ValueError(
            f"sliding_window must be at least 1 where layer_types has sliding_attention. Got {text.sliding_window}. "
            "Bring the config.json that belongs to the weights."
        )
    sliding = {"full_attention": None, "sliding_attention": text.sliding_window}
    return dict(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        n_heads=text.num_attention_heads,
        n_kv_heads=text.num_key_value_heads,
        norm_eps=text.rms_norm_eps,
        windows=tuple(sliding[kind] for kind in text.layer_types),
        tied=bool(config.tie_word_embeddings),
    )


def _qwen_vision(vision: Any) -> dict[str, Any]:
    """The tower's fields that both Qwen families spell alike."""
    return dict(
        depth=vision.depth,
        n_heads=vision.num_heads,
        activation=vision.hidden_act,
        norm_eps=1e-6,
        fused_qkv=True,
        in_channels=vision.in_channels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        tokens_per_image=None,
        rope_theta=float(vision.rope_parameters["rope_theta"]),
    )


def _rope(parameters: Mapping[str, Any]) -> Rope:
    kind = parameters["rope_type"]
    _refuse("rope_type", {kind} - {"default", "linear"}, ("default", "linear"))
    return Rope(float(parameters["rope_theta"]), float(parameters["factor"]) if kind == "linear" else 1.0)


def _refuse(what: str, unknown: set, known: tuple) -> None:
    if unknown:
        raise NotImplementedError(
            f"{what} must be {' or '.join(map(str, known))} in the JAX models. Got {unknown.pop()}. "
            "torch_blindsight runs every variant that transformers has."
        )
