"""Joining attention over parts of the keys."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from that over each, by their log-sum-exps.

    Args:
        out, lse: `[..., D]` and `[...]` of the first set, of which every row sees some keys.
        other, other_lse: the same of the second.

    Returns:
        Output and log-sum-exp over both, in the precision of the log-sum-exps.
    """
    weight = torch.sigmoid(other_lse - lse)[..., None]
    return torch.lerp(out.to(lse.dtype), other.to(lse.dtype), weight), torch.logaddexp(lse, other_lse)
