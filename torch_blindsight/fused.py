"""Attention of one call, and its gradient: torch's fused kernel on a CPU, matrix products elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_blindsight.blocks import Call

# Scores held at once by the matrix products.
_SCORES_AT_ONCE = 1 << 26


def attend(call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[1, H, n, D]` in q's dtype and log-sum-exps `[1, H, n]`, in float32 at least."""
    if call.q.device.type != "cpu":
        return _attend(call, scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, 0.0, call.causal, attn_mask=call.bias, scale=scale
    )


def attend_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a call adds to the gradients of its queries, keys and values.

    Section B.2 of FlashAttention (arXiv 2205.14135): with `P = exp(S - lse)`, `dV = P^T dO` and
    `dS = P (dO V^T - rowsum(dO O))`. Output and log-sum-exps may be those of more keys than the call's.

    Args:
        call: the call.
        grad, out: `[1, H, n, D]`, gradient by the rows' outputs, and these.
        lse: `[1, H, n]`.
        scale: factor on the scores.

    Returns:
        `[1, H, n, D]`, `[1, H, m, D]` and `[1, H, m, D]`.
    """
    if call.q.device.type != "cpu":
        return _attend_backward(call, grad, out, lse, scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, call.q, call.k, call.v, out, lse, 0.0, call.causal, attn_mask=call.bias, scale=scale
    )


def _attend(call: Call, scale: float) -> tuple[Tensor, Tensor]:
    v = call.v.to(_precise(call))
    outs, lses = [], []
    with torch.autocast(v.device.type, enabled=False):
        for _, scores in _scores(call, scale):
            lses.append(scores.logsumexp(-1))
            outs.append((torch.exp(scores - lses[-1][..., None]) @ v).to(call.q.dtype))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _attend_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad, out = (x.to(_precise(call)) for x in (call.q, call.k, call.v, grad, out))
    by_rows, by_k, by_v = [], torch.zeros_like(k), torch.zeros_like(v)
    with torch.autocast(q.device.type, enabled=False):
        for rows, scores in _scores(call, scale):
            weights, g = torch.exp(scores - lse[:, :, rows, None]), grad[:, :, rows]
            by_v += weights.transpose(2, 3) @ g
            by_scores = weights * (g @ v.transpose(2, 3) - (g * out[:, :, rows]).sum(-1, keepdim=True)) * scale
            by_rows.append(by_scores @ k)
            by_k += by_scores.transpose(2, 3) @ q[:, :, rows]
    return torch.cat(by_rows, dim=2), by_k, by_v


def _scores(call: Call, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time: which, and their scaled scores `[1, H, rows, m]`, -inf where they may not look."""
    precise = _precise(call)
    k = call.k.to(precise).transpose(2, 3)
    n = call.q.shape[2]
    step = max(1, _SCORES_AT_ONCE // (call.q.shape[1] * k.shape[3]))
    for s in range(0, n, step):
        rows = slice(s, min(s + step, n))
        scores = (call.q[:, :, rows].to(precise) @ k) * scale
        if call.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(s + 1), -torch.inf)
        if call.bias is not None:
            scores = scores + call.bias[rows]
        yield rows, scores


def _precise(call: Call) -> torch.dtype:
    return torch.promote_types(call.q.dtype, torch.float32)
