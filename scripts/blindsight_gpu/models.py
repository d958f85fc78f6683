"""Qwen2.5-VL at real shapes with random weights, whose vision tower can be left out: weights do not change times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from blindsight_gpu.measure import Place

_START, _END, _IMAGE, _VIDEO = 3, 4, 5, 6
_TEXT, _QUESTION = 8, 64
_MROPE = {128: [16, 24, 24], 16: [2, 3, 3]}
# hidden, layers, heads, kv heads, MLP width; from the published configurations.
_TEXT_SHAPES = {"3B": (2048, 36, 16, 2, 11008), "7B": (3584, 28, 28, 4, 18944), "toy": (32, 2, 2, 1, 64)}
GRID = 90  # patches on a side of a square image: 2,025 tokens after merging four patches to one
TOY_GRID = 8


def make_model(size: str, place: Place) -> Any:
    """A random model in evaluation mode, bfloat16 on the GPU; size "3B", "7B" or, anywhere, "toy"."""
    hidden, layers, heads, kv_heads, width = _TEXT_SHAPES[size]
    text = dict(
        vocab_size=152064 if size != "toy" else 512,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 20,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=_MROPE[hidden // heads]),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision: dict[str, Any] = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden
    )
    if size == "toy":
        vision |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, fullatt_block_indexes=[0])
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        tie_word_embeddings=size == "3B",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(place.dtype)
    try:
        with place.device:
            return Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_prompt(n_tokens: int, grid: int, place: Place) -> dict[str, Tensor]:
    """As many images of `grid` x `grid` patches as fit into `n_tokens`, and words; `pixel_values` stands empty."""
    tokens = (grid // 2) ** 2
    words = [10 + i % 400 for i in range(n_tokens)]
    one = [*words[:_TEXT], _START, *[_IMAGE] * tokens, _END]
    n_images = (n_tokens - _QUESTION) // len(one)
    ids = torch.tensor([[*one * n_images, *words][:n_tokens]], device=place.device)
    return dict(
        input_ids=ids,
        mm_token_type_ids=(ids == _IMAGE).long(),
        attention_mask=torch.ones_like(ids),
        image_grid_thw=torch.tensor([[1, grid, grid]] * n_images, device=place.device),
        pixel_values=torch.empty(0, dtype=place.dtype, device=place.device),
    )


def make_pixels(n_images: int, grid: int, place: Place) -> Tensor:
    """Random patches of some images: `[n_images * grid * grid, 1176]`."""
    return torch.randn(n_images * grid * grid, 3 * 2 * 14 * 14, dtype=place.dtype, device=place.device)


class _NoTower(nn.Module):
    """Gives random image features at once."""

    spatial_merge_size = 2

    def __init__(self, hidden: int, place: Place) -> None:
        super().__init__()
        self._hidden, self._place = hidden, place
        self.dtype = place.dtype

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, **_: Any) -> SimpleNamespace:
        """Features `[n, hidden]` of all images."""
        n = int(grid_thw.prod(-1).sum()) // self.spatial_merge_size**2
        generator = torch.Generator(self._place.device).manual_seed(0)
        features = torch.randn(n, self._hidden, generator=generator, dtype=self.dtype, device=self._place.device)
        return SimpleNamespace(pooler_output=features)


@contextmanager
def without_tower(model: Any, place: Place) -> Iterator[None]:
    """Leaves the vision tower out, to time the language model apart."""
    tower = model.model.visual
    model.model.visual = _NoTower(model.config.get_text_config().hidden_size, place)
    try:
        yield
    finally:
        model.model.visual = tower
