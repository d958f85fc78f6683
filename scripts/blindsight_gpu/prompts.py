"""The prompts and model shapes that are measured, and per row which keys each category sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from blindsight_gpu.measure import Place, free
from blindsight_gpu.results import Row
from shared_profiles import Category, Layout, SinkTemplate
from shared_profiles.layout import concatenated_ranges
from shared_profiles.plan import image_tiles, packed_positions

TEMPLATE = SinkTemplate()
# Those that the targets speak of, the longest first, and another. Multiples of 128, as FlexAttention wants, and buckets
# of `jax_blindsight`: there JAX pads nothing, and computes what torch does.
LENGTHS = {"300K": 294_912, "100K": 98_304, "36K": 36_864}
ANOTHER = {"144K": 147_456}
_TOY_LENGTHS = {"toy": 128}
TEXT, _QUESTION = 8, 16  # text tokens before each image, and at least at the end


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

    def facts(self, layout: Layout) -> Row:
        """A row's columns that say what it is of."""
        return dict(
            shape=self.name,
            heads=f"{self.heads}/{self.kv_heads}, d={self.dim}",
            tokens=layout.n_tokens,
            images=layout.n_images,
            image_tokens=self.image_tokens,
        )


QWEN = Shape("Qwen2.5-VL-7B", 28, 4, 128, 2048, False)
GEMMA = Shape("Gemma-3-12B", 16, 8, 256, 256, True)


def shapes(place: Place) -> list[Shape]:
    """The shapes to measure."""
    if not place.dry_run:
        return [QWEN, GEMMA]
    return [Shape("toy", 2, 1, 16, 24, True), Shape("causal toy", 2, 1, 16, 24, False)]


def lengths(place: Place) -> dict[str, int]:
    """Prompt lengths that the targets speak of, in tokens, by name."""
    return _TOY_LENGTHS if place.dry_run else LENGTHS


def image_sizes(n_tokens: int, image_tokens: int, around: int, question: int, step: int = 1) -> list[int]:
    """Tokens of each image of a prompt: as many images as fit, the last one shortened, so that little text remains.

    A row of text sees the whole past: a long question, which no real prompt has, would be most of the work.

    Args:
        n_tokens: of the prompt.
        image_tokens: of a whole image.
        around: of the words before an image and its delimiters.
        question: at least so many remain.
        step: a shortened image has a multiple of so many.
    """
    whole, left = divmod(n_tokens - question, image_tokens + around)
    last = max(left - around, 0) // step * step
    return [image_tokens] * whole + [last] * (last > 0)


def make_layout(shape: Shape, n_tokens: int) -> Layout:
    """As many images as fit, each after a few words of text, the last one shortened, and a short question."""
    sizes = np.array(image_sizes(n_tokens, shape.image_tokens, TEXT + 2, _QUESTION))
    last = np.cumsum(sizes + TEXT + 2) - 1
    images = np.stack([last - sizes - 1, last - sizes, last, last + 1], axis=1)  # [n_images, 4]
    return Layout(n_tokens, 0, n_tokens, images, shape.bidirectional)


def make_inputs(shape: Shape, n_tokens: int, place: Place, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries `[1, H, N, D]`, keys and values `[1, K, N, D]`."""
    generator = torch.Generator(place.device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        size = (1, heads, n_tokens, shape.dim)
        return torch.randn(size, generator=generator, dtype=place.dtype, device=place.device)

    return draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)


@lru_cache(maxsize=1)
def two_inputs(shape: Shape, n_tokens: int, place: Place) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two sets of inputs to rotate among, kept for the rows of one length: the first that is measured makes them."""
    free(place)
    return [make_inputs(shape, n_tokens, place, seed) for seed in range(2)]


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
