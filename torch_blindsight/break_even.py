"""Whether a prompt is long enough to gain by running sparsely: a rule of three numbers.

Time is counted in products: one is a query-key pair times one element of a head, four floating-point operations. A
layer gains the products that its sparse heads leave out, and pays for those they keep, which run at a lower rate than
one dense call, and for what is not arithmetic: launches, small calls, packing::

    gain = sum over layers and heads of (dense - kept / rate)
    cost = sum over layers of (per_layer + per_block * sparse categories * blocks of 128 rows)

Where transformers' own attention needs a mask, it computes all pairs and hides some of them: in sliding layers, with
images that look both ways, in padded batches and on a filled cache.

Of a tensor-parallel model the process counts, layer by layer, that gains least: the others wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared_profiles import SPARSE, Category, Layout, SinkTemplate
from shared_profiles.plan import build_plan
from shared_profiles.profile import Profile
from torch_blindsight.models import ModelInfo

_BLOCK_ROWS = 128


@dataclass(frozen=True)
class Costs:
    """What an implementation pays for running sparsely, in products.

    Attributes:
        per_layer: a layer, whatever its size.
        per_block: 128 rows under one category.
        rate: speed of its arithmetic as a share of the dense kernel's.
    """

    per_layer: float
    per_block: float
    rate: float


# Fitted to one layer of 8 heads on one x86-64 core, float32, against causal SDPA: head dimensions 16, 64 and 128, 48 to
# 4,224 tokens, images of 16 to 1,024 tokens, one category or all. Of those fifty-odd cases none goes sparse and loses;
# two that would have gained stay dense. Then tried on 103 random prompts (43 with masks: images both ways, windows,
# filled caches) with five choices of categories each, on a CPU with AVX-512: one goes sparse and loses, 4%; 58 that
# would have gained by more than 5%, up to 1.7x, stay dense. A rate of 0.7 leaves two thirds of these, and lets a few
# lose up to 8%.
PORTABLE_COSTS = Costs(per_layer=2e7, per_block=3e6, rate=0.6)
# Estimates, not measured yet: 0.1 ms of launches and packing a layer where dense attention does 150e12 products a
# second, and two thirds of its rate.
TRITON_COSTS = Costs(per_layer=1.5e10, per_block=0.0, rate=0.67)


def gains(costs: Costs, profile: Profile, info: ModelInfo, layouts: Sequence[Layout], q_start: int) -> bool:
    """Whether the queries of a forward gain by running sparsely.

    Args:
        costs: of the implementation.
        profile: the categories.
        info: the model, with its sliding windows.
        layouts: one per batch row.
        q_start: position of the first query.
    """
    rows = [layout for layout in layouts if layout.n_images > 1]  # the others run dense either way
    blocks = sum(-(-(layout.stop - max(layout.start, q_start)) // _BLOCK_ROWS) for layout in rows)
    pairs = {
        window: sum((_pairs(layout, profile.template, window, q_start) for layout in rows), start=np.zeros(4))
        for window in set(info.windows)
    }  # [4] each
    n_tokens = layouts[0].n_tokens
    everything = len(rows) * (n_tokens - q_start) * n_tokens
    masked = q_start > 0 or any(row.bidirectional or row.stop - row.start < n_tokens for row in layouts)
    gain = 0.0
    for categories, window in zip(profile.categories, info.windows, strict=True):
        by_process = categories.reshape(-1, len(info.heads))
        heads = (by_process[:, :, None] == SPARSE).sum(1)  # [n_processes, 3]
        if heads.any():
            kept = pairs[window][list(SPARSE)]
            dense = everything if masked or window is not None else pairs[window][Category.DENSE]
            overhead = costs.per_layer + costs.per_block * np.count_nonzero(heads, axis=1) * blocks
            gain += float((info.head_dim * (heads @ (dense - kept / costs.rate)) - overhead).min())
    return gain > 0


def _pairs(layout: Layout, template: SinkTemplate, window: int | None, q_start: int) -> np.ndarray:
    """Query-key pairs that a head of each category visits, tile by tile: `[4]` float64."""
    plan = build_plan(
        layout, template, tile_rows=math.gcd(_BLOCK_ROWS, template.local_block), window=window, q_start=q_start
    )
    return plan.n_keys.astype(np.float64) @ plan.n_rows
