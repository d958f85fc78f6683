"""Where image rows look, summed by hand from the whole attention matrix in float64."""

from __future__ import annotations

import numpy as np
import torch

from shared_profiles import Category, SinkTemplate, category_mask
from shared_profiles.sink_statistics import offset_bins

REACH = 3


def by_hand(q, k, layout, scale, window):
    """Mass `[H, 2 * REACH + 3]` on own image, text, and the bins, from the whole attention matrix in float64."""
    mask = torch.from_numpy(category_mask(layout, Category.DENSE, SinkTemplate(), window=window))
    keys = k.repeat_interleave(len(q) // len(k), dim=0).double()
    weights = ((q.double() @ keys.mT) * scale).masked_fill(~mask, -torch.inf).softmax(-1).numpy()
    bins, total, n = offset_bins(layout, REACH), 0, 0
    is_text = np.isin(np.arange(layout.n_tokens), layout.text)
    for begin, first, last, end in layout.images[1:].tolist():
        for p in range(first, last):
            row = weights[:, p]
            own = row[:, begin:end].sum(-1)
            others = [(row[:, :begin] * (bins[:begin] == b)).sum(-1) for b in range(2 * REACH + 1)]
            total, n = total + np.stack([own, row[:, is_text].sum(-1), *others], axis=-1), n + 1
    return total / n


def lse(q, k, layout, category, scale, window):
    """Log-sum-exp `[H, T]` float64 under a category."""
    mask = torch.from_numpy(category_mask(layout, category, SinkTemplate(), window=window))
    keys = k.repeat_interleave(len(q) // len(k), dim=0).double()
    return ((q.double() @ keys.mT) * scale).masked_fill(~mask, -torch.inf).logsumexp(-1)


def stacked(mass):
    """A record of one layer as `by_hand` has it."""
    return np.concatenate([mass.own[0, :, None], mass.text[0, :, None], mass.others[0]], axis=-1)
