"""Sparse prefill attention in plain torch, on any device: the same rule as the kernels, one block of rows at a time.

The backward pass computes the same blocks again, from the log-sum-exps of whole rows: like the forward, it takes time
by the pairs that are kept, and holds the scores of one block only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blindsight_kernels.checks import check_arrays, check_categories, check_keys, check_layouts, check_window
from shared_profiles import Category, Layout, SinkTemplate
from torch_blindsight.blocks import Call, Rows
from torch_blindsight.fused import attend, attend_backward
from torch_blindsight.heads import add, as_index, put, take
from torch_blindsight.merging import merge


def portable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layouts: Sequence[Layout],
    categories: Sequence[int] | np.ndarray,
    template: SinkTemplate,
    *,
    scale: float,
    window: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Prefill attention of a batch, every head by its category.

    Args:
        q: queries `[B, H, T, D]`, row t standing at position `q_start + t`. float32, float64, bfloat16 or float16.
        k, v: keys and values `[B, K, S, D]`, H a multiple of K, S at least `q_start + T`; keys beyond are ignored.
        layouts: B layouts of `q_start + T` tokens.
        categories: `[H]` indices into `Category`.
        template: sinks and local blocks.
        scale: factor on the scores, usually `D ** -0.5`.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.

    Returns:
        `[B, T, H, D]` outputs in q's dtype, contiguous, and `[B, H, T]` log-sum-exps of the scaled scores, float32
        (float64 for float64). Rows of padding are zero and `-inf`. Only the outputs can be differentiated, once.

    Raises:
        ValueError: shapes, devices or layouts do not fit together; no such category; a window below 1.
    """
    check_arrays(q, k, v)
    check_layouts(layouts, q.shape[0], q_start, q.shape[2])
    check_keys(k.shape[2], q_start + q.shape[2])
    check_categories(categories, q.shape[1])
    check_window(window)
    prefill = _Prefill(tuple(layouts), np.array(list(map(Category, categories))), template, scale, window, q_start)
    # The fused CPU attention takes the last dimension for contiguous.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return _Attention.apply(q, k, v, prefill)


@dataclass(frozen=True)
class _Prefill:
    """What `portable_attention` is told beside the arrays."""

    layouts: tuple[Layout, ...]
    categories: np.ndarray
    template: SinkTemplate
    scale: float
    window: int | None
    q_start: int

    def calls(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, slice | Tensor, Tensor, Call]]:
        """Yields `(row of the batch, its heads, the kv head of each, call)` for all that the prefill is made of."""
        group = q.shape[1] // k.shape[1]
        for value in np.unique(self.categories):
            heads = np.flatnonzero(self.categories == value)
            where, of_keys = (as_index(x, q.device) for x in (heads, heads // group))
            kv_heads = torch.from_numpy(heads // group).to(q.device)
            q_heads, k_heads, v_heads = q[:, where], k[:, of_keys], v[:, of_keys]  # [B, heads, T or S, D]
            for b, layout in enumerate(self.layouts):
                one = slice(b, b + 1)
                rows = Rows(q_heads[one], k_heads[one], v_heads[one], layout, self.window, self.q_start)
                for call in rows.calls(Category(value), self.template):
                    yield b, where, kv_heads, call


class _Attention(torch.autograd.Function):
    """The attention of a prefill, and its gradient."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, prefill: _Prefill) -> tuple[Tensor, Tensor]:
        n_batch, n_heads, n_queries, dim = q.shape
        out = q.new_empty(n_batch, n_queries, n_heads, dim)
        precise = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full((n_batch, n_heads, n_queries), -torch.inf, dtype=precise, device=q.device)
        for b, layout in enumerate(prefill.layouts):
            out[b, : max(layout.start - prefill.q_start, 0)] = 0
            out[b, max(layout.stop - prefill.q_start, 0) :] = 0
        for b, where, _, call in prefill.calls(q, k, v):
            o, m = (x[0].transpose(0, 1) for x in attend(call, prefill.scale))  # [n, heads, D], [n, heads]
            if call.more:
                o, m = merge(take(out[b], call.rows, where), take(lse[b].T, call.rows, where), o, m)
            put(out[b], call.rows, where, o)
            put(lse[b].T, call.rows, where, m)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, _Prefill], output: tuple[Tensor, Tensor]) -> None:
        *arrays, ctx.prefill = inputs
        ctx.save_for_backward(*arrays, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_Gradient.apply(grad_out, *ctx.saved_tensors, ctx.prefill), None


class _Gradient(torch.autograd.Function):
    """The gradient of `_Attention`, a function of its own: `once_differentiable` lets some second gradients be zero."""

    @staticmethod
    def forward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, prefill: _Prefill
    ) -> tuple[Tensor, ...]:
        """Of calls that share rows each has its part of the gradient, as the log-sum-exps are those of all keys."""
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
        grad_out = grad_out.contiguous()
        for b, where, kv_heads, call in prefill.calls(q, k, v):
            g, o, m = (take(x, call.rows, where).transpose(0, 1)[None] for x in (grad_out[b], out[b], lse[b].T))
            of_call = attend_backward(call, g, o, m, prefill.scale)
            by_q, by_k, by_v = (x[b].transpose(0, 1) for x in grads)  # [T or S, H or K, D]
            add(by_q, call.rows, where, of_call[0][0].transpose(0, 1))
            packed = torch.from_numpy(call.positions[: call.n_packed]).to(q.device)
            own = as_index(call.positions[call.n_packed :], q.device)
            for total, part in zip((by_k, by_v), of_call[1:], strict=True):
                sums = total.new_zeros(k.shape[1], *part.shape[2:]).index_add_(0, kv_heads, part[0].to(total.dtype))
                total[packed] += sums[:, : call.n_packed].transpose(0, 1)
                total[own] += sums[:, call.n_packed :].transpose(0, 1)
        return tuple(x.to(q.dtype) for x in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            "sparse prefills must be differentiated once at most. Got a gradient of a gradient (create_graph=True, "
            "nested torch.func.grad). Take it of an unpatched model."
        )
