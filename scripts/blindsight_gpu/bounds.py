"""Part `bounds`: the kernels at 300K tokens and past 2**31 elements against float64, and bitwise repeats.

At these lengths no N x N matrix exists, so rows are sampled: the last ones, whose offsets are the largest, and others
at random. Their error may be at most twice that of plain attention in the same precision, the bar of every kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from blindsight_gpu.measure import Place, free
from blindsight_gpu.prompts import GEMMA, LENGTHS, QWEN, TEMPLATE, Shape, make_layout, row_tables
from blindsight_gpu.results import Results, Row
from blindsight_kernels.triton_prefill import triton_attention
from shared_profiles import Category, Layout, SinkTemplate

_LIMIT = 2**31
_ROWS = 48


def run(results: Results, place: Place) -> None:
    """Three launches of each kernel; of the Pallas kernel one, in one head, where it must be simulated."""
    causal, wide, both_ways = QWEN, Shape("64 query heads", 64, 8, 128, 2048, False), GEMMA
    length = LENGTHS["300K"]
    if place.dry_run:
        causal, wide, both_ways = (Shape("toy", 4, 2, 16, 24, images) for images in (False, False, True))
        length = 128
    cases = [("300K", causal, False), ("past 2**31", wide, True), ("both ways", both_ways, False)]
    rows = {
        f"{name}: {shape.name}": partial(_launch, triton_attention, shape, length, place, far=far)
        for name, shape, far in cases
    }
    if place.dry_run:
        cases = [("both ways", replace(both_ways, heads=1, kv_heads=1, dim=64), False)]
    rows |= {
        f"Pallas, {name}: {shape.name}": partial(_launch, pallas, shape, length, place, far=far)
        for name, shape, far in cases
    }
    results.run(rows)


Attend = Callable[..., tuple[Tensor, Tensor]]


def pallas(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layouts: Sequence[Layout],
    categories: Sequence[Category],
    template: SinkTemplate,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The Pallas kernel, called as the Triton one; simulated on a CPU."""
    import jax  # only here: torch's part needs no JAX
    import jax.numpy as jnp

    from blindsight_gpu.in_jax import shared
    from blindsight_kernels.pallas_configurations import configuration
    from blindsight_kernels.pallas_prefill import pallas_attention
    from blindsight_kernels.pallas_requirements import plgpu
    from blindsight_kernels.pallas_work import build_pallas_work
    from blindsight_kernels.plans import build_plans

    n = q.shape[2]
    work = build_pallas_work(build_plans(layouts, template), configuration(q.shape[3]).block_k, n_queries=n, n_keys=n)
    simulator = None if q.is_cuda else plgpu.InterpretGPUParams()
    heads = jnp.asarray(categories, jnp.int32)
    out, lse = pallas_attention(shared(q), shared(k), shared(v), work, heads, scale=scale, interpret=simulator)
    jax.block_until_ready(out)
    return torch.from_dlpack(out), torch.from_dlpack(lse)


def _launch(attend: Attend, shape: Shape, n_tokens: int, place: Place, *, far: bool) -> Row:
    """One launch with all four categories among its heads, twice.

    Args:
        attend: our kernel.
        shape: heads.
        n_tokens: N.
        place: where.
        far: offsets must pass 2**31 elements: those of queries and outputs by their number and, for Triton, those of
            keys and values, which are put wide apart.

    Raises:
        AssertionError: not equal on repeat, or an error past the bar.
    """
    free(place)
    layout = make_layout(shape, n_tokens)
    q, k, v = draw(shape, n_tokens, place, spread=far and attend is not pallas)
    if attend is pallas:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))  # in a dry run too: it knows no float32
    categories = [Category(head % 4) for head in range(shape.heads)]
    scale = shape.dim**-0.5
    out, lse = attend(q, k, v, [layout], categories, TEMPLATE, scale=scale)
    again, again_lse = attend(q, k, v, [layout], categories, TEMPLATE, scale=scale)
    assert torch.equal(out, again), "outputs must be bitwise equal on a second call"
    assert torch.equal(lse, again_lse), "log-sum-exps must be bitwise equal on a second call"
    rows = _sample(layout, place)
    errors = [_errors(q, k, v, out, lse, layout, category, head, rows, scale) for head, category in _some(categories)]
    ours, plain, of_lse = (max(column) for column in zip(*errors, strict=True))
    assert ours <= 2 * plain, f"the error must be at most twice {plain:.2e}, that of plain attention. Got {ours:.2e}."
    assert of_lse < 1e-3, f"log-sum-exps must be right to 1e-3. Got {of_lse:.2e}."
    reach = max(sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in (q, k, out))
    if far and not place.dry_run:
        assert reach > _LIMIT, f"this case must reach past 2**31 elements. It reaches {reach}."
    return {
        "shape": shape.name,
        "tokens": n_tokens,
        "largest_offset": reach,
        "rows_compared": len(rows) * len(errors),
        "largest_error": ours,
        "plain_error": plain,
        "lse_error": of_lse,
        "bitwise_repeat": True,
    }


def draw(shape: Shape, n_tokens: int, place: Place, *, spread: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs; keys and values may be cut from an allocation that is eight times as wide."""
    generator = torch.Generator(place.device).manual_seed(0)

    def one(heads: int, width: int) -> Tensor:
        size = (1, n_tokens, heads, width * shape.dim)
        whole = torch.empty(size, dtype=place.dtype, device=place.device)
        part = whole[..., -shape.dim :]
        part.normal_(generator=generator)
        return part.transpose(1, 2)

    width = 8 if spread else 1
    return one(shape.heads, 1), one(shape.kv_heads, width), one(shape.kv_heads, width)


def _sample(layout: Layout, place: Place) -> Tensor:
    """Rows to compare: the last of text and of images, and some at random."""
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(layout.n_tokens, (_ROWS,), generator=generator)
    last = torch.tensor([layout.n_tokens - 1, int(layout.images[-1, 2]) - 1])
    return torch.cat([last, some]).to(place.device)


def _some(categories: list[Category]) -> list[tuple[int, Category]]:
    """Heads to compare: the first and the last of every category."""
    return [(head, c) for head, c in enumerate(categories) if head < 4 or head >= len(categories) - 4]


def _errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    category: Category,
    head: int,
    rows: Tensor,
    scale: float,
) -> tuple[float, float, float]:
    """Largest errors of one head at some rows: ours, plain attention's in q's dtype, and that of our log-sum-exp."""
    hidden = ~row_tables(layout, category, q.device).visible(rows)
    kv = head // (q.shape[1] // k.shape[1])
    low = q[0, head, rows], k[0, kv], v[0, kv]
    exact_q, exact_k, exact_v = (x.double() for x in low)
    scores = (exact_q @ exact_k.T * scale).masked_fill(hidden, -torch.inf)
    exact = scores.softmax(-1) @ exact_v
    plain = (low[0] @ low[1].T * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ low[2]
    of_lse = (lse[0, head, rows].double() - scores.logsumexp(-1)).abs().max()
    ours = (out[0, rows, head].double() - exact).abs().max()
    return float(ours), float((plain.double() - exact).abs().max()), float(of_lse)
