"""A random Qwen2.5-VL and random prompts for it: weights do not change how long a prefill takes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

_START, _END, _IMAGE, _VIDEO = 3, 4, 5, 6
_PATCH, _MERGE = 14, 2


def make_random_model(hidden: int = 512, layers: int = 8, heads: int = 8, kv_heads: int = 4) -> torch.nn.Module:
    """A random model in evaluation mode, float32 on the CPU, with a small vision tower."""
    torch.manual_seed(0)
    head_dim = hidden // heads
    text = dict(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 20,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=1e6,
            mrope_section=[head_dim // 8, head_dim // 16 * 3, head_dim // 16 * 3],
        ),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = dict(
        depth=1,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        patch_size=_PATCH,
        spatial_merge_size=_MERGE,
        out_hidden_size=hidden,
        window_size=112,
        fullatt_block_indexes=[],
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_random_prompt(n_images: int, grid: int, text: int) -> dict[str, Tensor]:
    """A prompt of `n_images` images of `grid` x `grid` patches and `text` words at its end."""
    tokens = (grid // _MERGE) ** 2
    words = [10 + i % 1000 for i in range(text)]
    ids = torch.tensor([[1, *[_START, *[_IMAGE] * tokens, _END] * n_images, *words]])
    inputs = dict(input_ids=ids, mm_token_type_ids=(ids == _IMAGE).long())
    if n_images:
        inputs["pixel_values"] = torch.randn(n_images * grid**2, 3 * 2 * _PATCH**2)
        inputs["image_grid_thw"] = torch.tensor([[1, grid, grid]]).repeat(n_images, 1)
    return inputs
