"""Models at real shapes with random weights, whose vision tower can be left out: weights do not change times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from blindsight_gpu.measure import Place
from blindsight_gpu.prompts import TEXT, Shape, image_sizes

_START, _END, _IMAGE, _VIDEO = 3, 4, 5, 6
_QUESTION = 64  # text tokens at least at the end
_MROPE = {128: [16, 24, 24], 16: [2, 3, 3]}


@dataclass(frozen=True)
class Size:
    """The shape of a model; from the published configurations.

    Attributes:
        name: the model's.
        hidden, layers, heads, kv_heads, dim, width: E, L, H, K, D and that of the MLP.
        image: patches on a side of a square image for Qwen, pixels for Gemma.
        window: of Gemma's sliding layers, None for Qwen.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    width: int
    image: int
    window: int | None = None

    @property
    def is_toy(self) -> bool:
        """Whether it is one for dry runs, with a tower of one layer."""
        return self.hidden < 128

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: four patches of Qwen make one; Gemma pools to a fixed number."""
        return (self.image // 2) ** 2 if self.window is None else 16 if self.is_toy else 256

    @property
    def shape(self) -> Shape:
        """Of its attention."""
        return Shape(self.name, self.heads, self.kv_heads, self.dim, self.image_tokens, self.window is not None)


SIZES = (
    Size("Qwen2.5-VL-7B", 3584, 28, 28, 4, 128, 18944, 90),
    Size("Qwen2.5-VL-3B", 2048, 36, 16, 2, 128, 11008, 90),
    Size("Gemma-3-12B", 3840, 48, 16, 8, 256, 15360, 896, window=1024),
)
_TOYS = (
    Size("toy Qwen2.5-VL", 32, 2, 2, 1, 16, 64, 8),
    Size("toy Gemma-3", 32, 2, 2, 1, 16, 64, 32, window=24),
)


def sizes(place: Place) -> tuple[Size, ...]:
    """The models to measure."""
    return _TOYS if place.dry_run else SIZES


def make_config(size: Size) -> Any:
    """The transformers configuration of a model."""
    text: dict[str, Any] = dict(
        vocab_size=512 if size.is_toy else 152064 if size.window is None else 262208,
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=1 << 20,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if size.window is not None:
        text |= dict(head_dim=size.dim, query_pre_attn_scalar=size.dim, sliding_window=size.window)
        text["layer_types"] = [
            "full_attention" if layer % 6 == 5 or layer == size.layers - 1 else "sliding_attention"
            for layer in range(size.layers)
        ]
        depth, width, patch = (1, 32, 4) if size.is_toy else (27, 1152, 14)
        vision: dict[str, Any] = dict(
            hidden_size=width,
            intermediate_size=64 if size.is_toy else 4304,
            num_hidden_layers=depth,
            num_attention_heads=2 if size.is_toy else 16,
            image_size=size.image,
            patch_size=patch,
            vision_use_head=False,
        )
        return Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=size.image_tokens,
            boi_token_index=_START,
            eoi_token_index=_END,
            image_token_index=_IMAGE,
        )
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=_MROPE[size.dim])
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=size.hidden)
    if size.is_toy:
        vision |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, fullatt_block_indexes=[0])
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        tie_word_embeddings="3B" in size.name,
    )


def make_model(size: Size, place: Place) -> Any:
    """A random model in evaluation mode, bfloat16 on the GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(place.dtype)
    kind: Any = Qwen2_5_VLForConditionalGeneration if size.window is None else Gemma3ForConditionalGeneration
    try:
        with place.device:
            return kind(make_config(size)).eval()
    finally:
        torch.set_default_dtype(before)


def make_prompt(size: Size, n_tokens: int, place: Place) -> dict[str, Tensor]:
    """As many images as fit into `n_tokens`, and words; `pixel_values` has the right length and no content.

    The last image is as wide as the prompt has room for, where the family knows images of several sizes.
    """
    column = size.image // 2  # tokens
    step = column if size.window is None else size.image_tokens
    images = image_sizes(n_tokens, size.image_tokens, TEXT + 2, _QUESTION, step)
    words = [10 + i % 400 for i in range(n_tokens)]
    body = [token for n in images for token in (*words[:TEXT], _START, *[_IMAGE] * n, _END)]
    ids = torch.tensor([[*body, *words][:n_tokens]], device=place.device)
    types = (ids == _IMAGE).long()
    prompt = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if size.window is not None:
        return prompt | dict(token_type_ids=types, pixel_values=torch.empty(len(images), 0, device=place.device))
    return prompt | dict(
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor([[1, size.image, 2 * n // column] for n in images], device=place.device),
        pixel_values=torch.empty(0, dtype=place.dtype, device=place.device),
    )


def n_images(prompt: dict[str, Tensor]) -> int:
    """Images of a prompt."""
    return int((prompt["input_ids"] == _START).sum())


def n_image_tokens(prompt: dict[str, Tensor]) -> int:
    """Tokens of all images of a prompt."""
    return int((prompt["input_ids"] == _IMAGE).sum())


def encode_images(model: Any, size: Size, n: int, place: Place) -> Any:
    """A function that runs the vision tower on `n` random images."""
    if size.window is not None:
        pixels = torch.randn(n, 3, size.image, size.image, dtype=place.dtype, device=place.device)
        return lambda: model.model.get_image_features(pixels)
    pixels = torch.randn(n * size.image**2, 3 * 2 * 14 * 14, dtype=place.dtype, device=place.device)
    thw = torch.tensor([[1, size.image, size.image]] * n, device=place.device)
    return lambda: model.model.visual(pixels, grid_thw=thw)


class _NoTower(nn.Module):
    """Gives random image features at once."""

    spatial_merge_size = 2

    def __init__(self, size: Size, place: Place) -> None:
        super().__init__()
        self._size, self._place = size, place
        self.dtype = place.dtype

    def forward(self, pixel_values: Tensor, grid_thw: Tensor | None = None, **_: Any) -> SimpleNamespace:
        """Features of all images: `[n, E]` for Qwen, `[n_images, n, E]` for Gemma."""
        if grid_thw is None:
            shape = [len(pixel_values), self._size.image_tokens, self._size.hidden]
        else:
            shape = [int(grid_thw.prod(-1).sum()) // self.spatial_merge_size**2, self._size.hidden]
        generator = torch.Generator(self._place.device).manual_seed(0)
        features = torch.randn(shape, generator=generator, dtype=self.dtype, device=self._place.device)
        return SimpleNamespace(pooler_output=features, last_hidden_state=features)


@contextmanager
def without_tower(model: Any, size: Size, place: Place) -> Iterator[None]:
    """Leaves the vision tower out, to time the language model apart."""
    empty: dict[str, nn.Module] = {"visual": _NoTower(size, place)}
    if size.window is not None:
        empty = {"vision_tower": _NoTower(size, place), "multi_modal_projector": nn.Identity()}
    towers = {name: getattr(model.model, name) for name in empty}
    for name, module in empty.items():
        setattr(model.model, name, module)
    try:
        yield
    finally:
        for name, module in towers.items():
            setattr(model.model, name, module)
