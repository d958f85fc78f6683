"""Tiny random models of every family, the real Hugging Face classes, and prompts for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from shared_profiles import SinkTemplate
from shared_profiles.profile import Profile
from torch_blindsight import Handle, fingerprint
from torch_blindsight import patch as patch_with_break_even

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "gemma3")
family_names = pytest.mark.parametrize("family", FAMILIES)
qwens = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
START, END, IMAGE, VIDEO, PAD = 3, 4, 5, 6, 0
IMAGE_TOKENS = 16  # 8 x 8 patches of 4 x 4 pixels, merged by 2 x 2


def patch(model: torch.nn.Module, profile: Any = None, **options: Any) -> Handle:
    """`torch_blindsight.patch` that runs the tests' prompts sparsely, short as they are."""
    return patch_with_break_even(model, profile, **dict(break_even=False) | options)


def make_model(family: str, seed: int = 0, n_layers: int = 4) -> torch.nn.Module:
    """A random model in evaluation mode, up to 4 layers, 4 query and 2 kv heads; scores spread enough to matter."""
    torch.manual_seed(seed)
    tokens = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    text = dict(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
        initializer_range=0.25,
    )
    if family == "gemma3":
        text |= dict(
            head_dim=16,
            query_pre_attn_scalar=21,  # not head_dim, as in Gemma 3 27B: 168 of 128
            sliding_window=24,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"][-n_layers:],
        )
        vision = dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
        )
        config = Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=IMAGE_TOKENS,
            boi_token_index=START,
            eoi_token_index=END,
            image_token_index=IMAGE,
            initializer_range=0.25,
        )
        model = Gemma3ForConditionalGeneration(config).eval()
        # A fresh one projects pictures to zeros.
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.25)
        return model
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    patches = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2)
    if family == "qwen2_vl":
        vision = patches | dict(embed_dim=32, hidden_size=64, mlp_ratio=2)
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)).eval()
    vision = patches | dict(
        hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1]
    )
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)).eval()


def make_ids(n_images: int, seed: int = 0, text: int = 3) -> list[int]:
    """Token ids of a prompt: some text, then images with text after each."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(10, 96, (n,), generator=generator).tolist()

    ids = [1, *words(text)]
    for _ in range(n_images):
        ids += [START, *[IMAGE] * IMAGE_TOKENS, END, *words(text)]
    return ids


def make_inputs(family: str, prompts: list[list[int]], seed: int = 0, left: bool = True) -> dict[str, torch.Tensor]:
    """A padded batch as the family's processor would return it, with random pictures."""
    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), PAD), torch.zeros(len(prompts), longest, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[b, where], mask[b, where] = torch.tensor(prompt), 1
    n_images = sum(p.count(START) for p in prompts)
    is_image = (ids == IMAGE).long()
    inputs = dict(input_ids=ids, attention_mask=mask)
    if family == "gemma3":
        return inputs | dict(pixel_values=torch.randn(n_images, 3, 32, 32), token_type_ids=is_image)
    grid = torch.tensor([[1, 8, 8]]).repeat(n_images, 1)
    return inputs | dict(pixel_values=torch.randn(64 * n_images, 96), image_grid_thw=grid, mm_token_type_ids=is_image)


def make_video_inputs(frames: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """One Qwen prompt of videos with these numbers of frame groups, text between them, with random pictures."""
    torch.manual_seed(seed)
    ids, words = [1, 10, 11], iter(range(20, 90))
    for groups in frames:
        ids += [START, *[VIDEO] * (IMAGE_TOKENS * groups), END, next(words), next(words)]
    row = torch.tensor([ids])
    return dict(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        pixel_values_videos=torch.randn(64 * sum(frames), 96),
        video_grid_thw=torch.tensor([[groups, 8, 8] for groups in frames]),
        mm_token_type_ids=2 * (row == VIDEO).long(),
    )


def mixed_profile(model: torch.nn.Module, seed: int = 0, template: SinkTemplate | None = None) -> Profile:
    """A profile with all four categories in every layer, in an order drawn from the seed."""
    rng = np.random.default_rng(seed)
    template = template or SinkTemplate((0, 1), (1, 2), 8)
    print_ = fingerprint(model)
    categories = np.stack([rng.permutation(4) for _ in range(print_.n_layers)])
    return Profile(categories, template, print_, None, {"method": "manual"})


@cache
def double_model(family: str) -> torch.nn.Module:
    """The family's model in float64, where two ways to one number agree to 1e-9. Shared: leave it unpatched."""
    return make_model(family).double()


def in_double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with their pictures in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def positions_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The position ids of a whole prompt: `[B, N]` for Gemma 3, mRoPE `[3, B, N]` for Qwen."""
    mask = inputs["attention_mask"]
    if model.config.model_type == "gemma3":
        return (mask.cumsum(-1) - 1).clamp(min=0)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    return model.model.get_rope_index(**{name: inputs.get(name) for name in names}, attention_mask=mask)[0]
