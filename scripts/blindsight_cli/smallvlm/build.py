"""The small models before training: a real configuration and the real processor of each family.

All have the same text shape (6 layers of 8 query and 4 key/value heads, hidden size 128), the same vocabulary and 16
tokens a picture; a family is one `SmallFamily`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from blindsight_cli.smallvlm.puzzles import IMAGE_SIZE
from blindsight_cli.smallvlm.vocabulary import (
    END,
    IMAGE_PAD,
    SPECIAL,
    START,
    TURN_END,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCAB,
    WORDS,
    chat_template,
    make_tokenizer,
)

PATCH_SIZE = 8
MERGE_SIZE = 2
GRID = IMAGE_SIZE // PATCH_SIZE  # patches a side
IMAGE_TOKENS = (GRID // MERGE_SIZE) ** 2

_HIDDEN = 128
_TEXT: dict[str, Any] = dict(
    vocab_size=len(WORDS),
    hidden_size=_HIDDEN,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    bos_token_id=VOCAB[START],
    eos_token_id=VOCAB[TURN_END],
    pad_token_id=VOCAB[END],
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class SmallFamily:
    """One family of small models.

    Attributes:
        model: the Hugging Face class.
        make_config: its configuration, about 1.5 M parameters.
        make_processor: its processor; every picture becomes `IMAGE_TOKENS` tokens.
        to_pixels: pictures `[n, IMAGE_SIZE, IMAGE_SIZE, 3]` uint8 -> float32, exactly as that processor gives them.
        see: model, pixels, number of pictures -> what stands in place of their tokens, `[n * IMAGE_TOKENS, hidden]`.
        positions: model, ids `[1, N]` -> position ids `[..., 1, N]` of a prompt, as the model would count them.
        initialize: what the first weights have that transformers does not give them.
    """

    model: type[Any]
    make_config: Callable[[], Any]
    make_processor: Callable[[], Any]
    to_pixels: Callable[[np.ndarray], torch.Tensor]
    see: Callable[[Any, torch.Tensor, int], torch.Tensor]
    positions: Callable[[Any, torch.Tensor], torch.Tensor]
    initialize: Callable[[Any], None] = lambda model: None


def make_model(family: str = "qwen2_5_vl") -> Any:
    """The untrained model; seed torch first for repeatable weights."""
    declared = FAMILIES[family]
    model = declared.model(declared.make_config())
    declared.initialize(model)
    return model


def make_processor(family: str = "qwen2_5_vl") -> Any:
    """The real processor of the family."""
    return FAMILIES[family].make_processor()


def _qwen_processor(processor: type[Any]) -> Any:
    template = chat_template(*(VISION_START + pad + VISION_END for pad in (IMAGE_PAD, VIDEO_PAD)))
    look: dict[str, Any] = dict(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=2,
        size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return processor(
        image_processor=Qwen2VLImageProcessor(**look),
        tokenizer=make_tokenizer(template, additional_special_tokens=list(SPECIAL[1:2] + SPECIAL[3:])),
        video_processor=Qwen2VLVideoProcessor(**look, cap_pixels_per_frame=False),
        chat_template=template,
    )


def _gemma_processor() -> Gemma3Processor:
    template = chat_template(VISION_START)  # the processor puts the picture's tokens and the end behind it
    tokenizer = make_tokenizer(
        template,
        bos_token=START,
        extra_special_tokens=dict(boi_token=VISION_START, eoi_token=VISION_END, image_token=IMAGE_PAD),
    )
    pictures = Gemma3ImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=IMAGE_TOKENS)


def _qwen_config(config: type[Any], vision: dict[str, Any]) -> Any:
    patches = dict(
        depth=2,
        num_heads=4,
        patch_size=PATCH_SIZE,
        spatial_merge_size=MERGE_SIZE,
        temporal_patch_size=2,
        in_channels=3,
    )
    return config(
        text_config=_TEXT
        | dict(rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 3, 3])),
        vision_config=patches | vision,
        image_token_id=VOCAB[IMAGE_PAD],
        video_token_id=VOCAB[VIDEO_PAD],
        vision_start_token_id=VOCAB[VISION_START],
        vision_end_token_id=VOCAB[VISION_END],
        tie_word_embeddings=True,
    )


def _qwen2_vl_config() -> Qwen2VLConfig:
    return _qwen_config(Qwen2VLConfig, dict(embed_dim=96, mlp_ratio=2, hidden_size=_HIDDEN))


def _qwen2_5_vl_config() -> Qwen2_5_VLConfig:
    vision = dict(
        hidden_size=96,
        intermediate_size=192,
        out_hidden_size=_HIDDEN,
        window_size=IMAGE_SIZE,
        fullatt_block_indexes=[0, 1],
    )
    return _qwen_config(Qwen2_5_VLConfig, vision)


def _gemma_config() -> Gemma3Config:
    """Windows of 64 tokens see three of six pictures; every third layer sees all."""
    text = _TEXT | dict(
        head_dim=_HIDDEN // 8,
        query_pre_attn_scalar=_HIDDEN // 8,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=10_000.0),
            full_attention=dict(rope_type="default", rope_theta=100_000.0),
        ),
    )
    vision = dict(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=VOCAB[VISION_START],
        eoi_token_index=VOCAB[VISION_END],
        image_token_index=VOCAB[IMAGE_PAD],
        tie_word_embeddings=True,
    )


@torch.no_grad()
def _initialize_gemma(model: Any) -> None:
    """Embeddings and pictures of unit size, and layers that add little to them at first.

    What transformers gives is for real sizes: at this one every layer, normalized as it is, would add five times the
    embeddings' size, and pictures would start at zero. (After 150 steps of 48 pictures, 23% of shapes were right with
    that start, 49% with this one.)
    """
    for parameter in model.model.language_model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=_HIDDEN**-0.5)
    for layer in model.model.language_model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.fill_(-0.7)  # scales by 1 + weight
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    projection.normal_(std=len(projection) ** -0.5)


def _to_unit(images: np.ndarray) -> torch.Tensor:
    """`[n, H, W, 3]` uint8 -> `[n, 3, H, W]` float32 from -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _to_patches(images: np.ndarray) -> torch.Tensor:
    """Patches as `Qwen2VLImageProcessor` orders them, `[n * GRID**2, 3 * 2 * PATCH_SIZE**2]`."""
    p, m = PATCH_SIZE, MERGE_SIZE
    x = _to_unit(images)
    x = x.reshape(-1, 3, GRID // m, m, p, GRID // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # a still image fills both frames
    return x.reshape(len(images) * GRID**2, -1)


def _grid(n: int) -> torch.Tensor:
    return torch.tensor([[1, GRID, GRID]] * n)


def _qwen_see(model: Any, patches: torch.Tensor, n: int) -> torch.Tensor:
    return model.model.visual(patches, grid_thw=_grid(n)).pooler_output


def _gemma_see(model: Any, pixels: torch.Tensor, n: int) -> torch.Tensor:
    return model.model.get_image_features(pixels).pooler_output.flatten(0, 1)


def _qwen_positions(model: Any, ids: torch.Tensor) -> torch.Tensor:
    is_image = ids == VOCAB[IMAGE_PAD]
    return model.model.get_rope_index(ids, is_image.int(), _grid(int(is_image.sum()) // IMAGE_TOKENS))[0]


def _gemma_positions(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1])[None]


FAMILIES = {
    "qwen2_5_vl": SmallFamily(
        model=Qwen2_5_VLForConditionalGeneration,
        make_config=_qwen2_5_vl_config,
        make_processor=lambda: _qwen_processor(Qwen2_5_VLProcessor),
        to_pixels=_to_patches,
        see=_qwen_see,
        positions=_qwen_positions,
    ),
    "qwen2_vl": SmallFamily(
        model=Qwen2VLForConditionalGeneration,
        make_config=_qwen2_vl_config,
        make_processor=lambda: _qwen_processor(Qwen2VLProcessor),
        to_pixels=_to_patches,
        see=_qwen_see,
        positions=_qwen_positions,
    ),
    "gemma3": SmallFamily(
        model=Gemma3ForConditionalGeneration,
        make_config=_gemma_config,
        make_processor=_gemma_processor,
        to_pixels=_to_unit,
        see=_gemma_see,
        positions=_gemma_positions,
        initialize=_initialize_gemma,
    ),
}
