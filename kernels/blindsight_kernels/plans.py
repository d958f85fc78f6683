"""Plans of a batch for a GPU kernel: tiles of its rows, and long text ranges in parts. The same for every lowering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from shared_profiles.layout import Layout
from shared_profiles.plan import Plan, build_plan
from shared_profiles.template import SinkTemplate

# A part of a text range has at most so many keys, or one of so many equal shares of all text ranges if that is more.
_MAX_KEYS, _MOST_PARTS = 16384, 128


def build_plans(
    layouts: Sequence[Layout],
    template: SinkTemplate,
    *,
    block_q: int = 128,
    window: int | None = None,
    q_start: int = 0,
    max_keys: int | Literal["balanced"] | None = "balanced",
) -> tuple[Plan, ...]:
    """One plan a batch row, its tiles and splits such as suit a kernel; other arguments as for `build_plan`.

    Args:
        layouts: one a batch row.
        template: sinks and local blocks.
        block_q: query rows of the kernel's tiles; those of the plan divide them and the local block.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.
        max_keys: where text ranges are split: longer ones than this; None never. "balanced": where they are longer than
            16K keys, or, where there is much text and so no lack of work for every processor, than 1/128 of all of them
            together: the parts of a head are kept in memory until they are merged.
    """
    return tuple(
        build_plan(
            layout,
            template,
            tile_rows=math.gcd(block_q, template.local_block),
            window=window,
            q_start=q_start,
            max_keys=_balanced(layout, block_q, window, q_start) if max_keys == "balanced" else max_keys,
        )
        for layout in layouts
    )


def _balanced(layout: Layout, block_q: int, window: int | None, q_start: int) -> int:
    """The longest range of a tile of text rows that is not split."""
    rows = layout.textual_rows
    rows = rows[np.searchsorted(rows, q_start) :]
    keys = np.minimum(rows[::block_q], layout.n_tokens if window is None else window).sum()  # of all tiles, about
    return max(_MAX_KEYS, int(keys) // _MOST_PARTS)
