"""Whether a prompt is long enough to gain by running sparsely: what its layers compute, counted both ways.

How often the loops of an attention run follows from its work and from how many heads each category has, so it is known
before anything runs. An image takes tiles of its own, however short: many short images cost more sparse than dense.

Nothing is fitted for the portable attention, whose dense heads run in the same loops. Timed on two x86-64 cores, one
layer of 8 heads, float32, 115 random prompts of 50 to 5,000 tokens (with windows, images both ways, caches), six
choices of categories each: three prompts go sparse and lose, up to 15%; none that would gain over 5% stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import Mesh

from jax_blindsight.attention import is_plain
from jax_blindsight.config import ModelConfig
from jax_blindsight.portable import CHUNK, GATHERED_CHUNK, TEAM
from jax_blindsight.sharding import DATA, MODEL
from jax_blindsight.work import GATHERED_ROWS, TILE_ROWS, AttentionWork, keys_of
from shared_profiles import Category

if TYPE_CHECKING:
    from blindsight_kernels.pallas_work import PallasWork

# Estimates, not measured yet: the steps that a tile of the Pallas kernel loses at its beginning and end, and the speed
# of dense heads by cuDNN, ours being 1.
_ENDS, _CUDNN = 2, 1.5


def gains(
    config: ModelConfig,
    categories: np.ndarray,
    works: Mapping[int | None, AttentionWork | PallasWork],
    mesh: Mesh | None = None,
) -> bool:
    """Whether a prefill gains by running sparsely.

    Args:
        config: the model, with its sliding windows.
        categories: `[L, H]` of its heads.
        works: by window, in NumPy.
        mesh: a layer takes as long as the device with most to do, for which the others wait.
    """
    n_data, n_model = (1, 1) if mesh is None else (mesh.shape[DATA], mesh.shape[MODEL])

    @cache
    def time_of(window: int | None, heads: tuple[int, ...]) -> float:
        """Of one layer with so many heads of each category on a device."""
        work = works[window]
        if isinstance(work, AttentionWork):
            return float(_portable(work, heads).reshape(n_data, -1).sum(axis=1).max())
        return _pallas(work, heads, window is None and not config.bidirectional and bool(is_plain(work)))

    def time(categories: np.ndarray) -> float:
        total = 0.0
        for layer, window in zip(categories, config.text.windows, strict=True):
            on_devices = [np.bincount(heads, minlength=len(Category)) for heads in layer.reshape(n_model, -1)]
            total += max(time_of(window, tuple(heads.tolist())) for heads in on_devices)
        return total

    return time(categories) < time(np.full_like(categories, Category.DENSE))


def _portable(work: AttentionWork, heads: tuple[int, ...]) -> np.ndarray:
    """Query-key pairs that the loops of `portable.attend_sequence` compute for each batch row: `[B]`."""
    rows = min(TILE_ROWS, work.gathered_rows.shape[1])
    gathered = np.broadcast_to(work.gathered[:, None], (*work.n_gathered.shape, *work.gathered.shape[1:]))
    own = [_steps(*row, heads, CHUNK) for row in zip(work.tiles, work.n_tiles, strict=True)]
    others = [_steps(*row, heads, GATHERED_CHUNK) for row in zip(gathered, work.n_gathered, strict=True)]
    return np.array(own) * (rows * CHUNK) + np.array(others) * (GATHERED_ROWS * GATHERED_CHUNK)


def _steps(tiles: np.ndarray, n_tiles: np.ndarray, heads: tuple[int, ...], chunk: int) -> int:
    """Steps of all tiles `[4, n, 7]`, of which `n_tiles` are real: in a team, of each as many as its longest takes."""
    steps = -(-keys_of(tiles) // chunk)  # [4, n]
    each = np.concatenate([np.repeat(some[:n], times) for some, n, times in zip(steps, n_tiles, heads, strict=True)])
    return TEAM * int(np.maximum.reduceat(each, np.arange(0, len(each), TEAM)).sum())


def _pallas(work: PallasWork, heads: tuple[int, ...], by_cudnn: bool) -> float:
    """The steps of the kernel's tiles, on the device with most; of dense heads by cuDNN, as many as take as long."""
    steps = work.steps
    steps = (steps + _ENDS * (steps > 0)).sum(axis=-1).astype(np.float64)  # [..., 4]
    if by_cudnn:
        steps[..., Category.DENSE] /= _CUDNN
    return float((steps @ heads).max())
