"""The prompts and model shapes that are measured, and per row which keys each category sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blindsight_gpu.measure import Place
from shared_profiles import Category, Layout, SinkTemplate
from shared_profiles.layout import concatenated_ranges
from shared_profiles.plan import image_tiles, packed_positions

TEMPLATE = SinkTemplate()
LENGTHS = {"36K": 36_864, "72K": 73_728, "144K": 147_456, "300K": 299_008}  # multiples of 128, as FlexAttention wants
_TOY_LENGTHS = {"toy": 128}
_TEXT, _QUESTION = 8, 16  # text tokens before each image, and at least at the end


@dataclass(frozen=True)
class Shape:
    """The attention of one layer of a model.

    Attributes:
        name: the model's.
        heads, kv_heads, dim: H, K, D.
        image_tokens: of one image, without its two delimiters.
        bidirectional: whether images look both ways.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    image_tokens: int
    bidirectional: bool


QWEN = Shape("Qwen2.5-VL-7B", 28, 4, 128, 2048, False)
GEMMA = Shape("Gemma-3-12B", 16, 8, 256, 256, True)


def shapes(place: Place) -> list[Shape]:
    """The shapes to measure."""
    if not place.dry_run:
        return [QWEN, GEMMA]
    return [Shape("toy", 2, 1, 16, 24, True)]


def lengths(place: Place) -> dict[str, int]:
    """Prompt lengths to measure, in tokens, by name."""
    return _TOY_LENGTHS if place.dry_run else LENGTHS


def make_layout(shape: Shape, n_tokens: int) -> Layout:
    """As many images as fit, each after a few words of text, and a question that fills the prompt up."""
    step = shape.image_tokens + 2 + _TEXT
    begin = _TEXT + np.arange((n_tokens - _QUESTION) // step) * step
    images = np.stack(
        [begin, begin + 1, begin + 1 + shape.image_tokens, begin + 2 + shape.image_tokens], axis=1
    )  # [n_images, 4]
    return Layout(n_tokens, 0, n_tokens, images, shape.bidirectional)


def make_inputs(shape: Shape, n_tokens: int, place: Place, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries `[1, H, N, D]`, keys and values `[1, K, N, D]`."""
    generator = torch.Generator(place.device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        size = (1, heads, n_tokens, shape.dim)
        return torch.randn(size, generator=generator, dtype=place.dtype, device=place.device)

    return draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)


def mixed(n_heads: int, dense_share: float) -> list[Category]:
    """Categories of a layer: `dense_share` of the heads `DENSE`, spread evenly, the others `INTRA_IMAGE_SINK`."""
    n_dense = round(n_heads * dense_share)
    dense = set((np.arange(n_dense) * n_heads // max(n_dense, 1)).tolist())
    return [Category.DENSE if head in dense else Category.INTRA_IMAGE_SINK for head in range(n_heads)]


@dataclass(frozen=True)
class RowTables:
    """What a row sees under one category: key k if `k <= newest[q]` and (`k >= oldest[q]` or `packed[k]`).

    Attributes:
        oldest, newest: `[N]` int32.
        packed: `[N]` bool.
    """

    oldest: Tensor
    newest: Tensor
    packed: Tensor

    def visible(self, rows: Tensor) -> Tensor:
        """The mask of some rows: `[n_rows, N]` bool."""
        key = torch.arange(len(self.packed), device=rows.device, dtype=torch.int32)
        return (key <= self.newest[rows, None]) & ((key >= self.oldest[rows, None]) | self.packed)


def row_tables(layout: Layout, category: Category, device: torch.device) -> RowTables:
    """The tables of a category for a prompt without padding and without a sliding window."""
    packed = packed_positions(layout, category, TEMPLATE)
    tiles = image_tiles(layout, category, TEMPLATE, packed)
    rows = concatenated_ranges(tiles.row_start, tiles.row_stop)
    n_rows = tiles.row_stop - tiles.row_start
    oldest = np.zeros(layout.n_tokens, dtype=np.int32)
    newest = np.arange(layout.n_tokens, dtype=np.int32)
    oldest[rows] = np.repeat(tiles.lo, n_rows)
    if layout.bidirectional:
        newest[rows] = np.repeat(tiles.hi, n_rows) - 1
    is_packed = np.zeros(layout.n_tokens, dtype=bool)
    is_packed[packed] = True
    return RowTables(*(torch.from_numpy(x).to(device) for x in (oldest, newest, is_packed)))
