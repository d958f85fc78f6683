"""Part `bounds`: the kernel at 300K tokens and past 2**31 elements against float64, bitwise repeats, and a sanitizer.

At these lengths no N x N matrix exists, so rows are sampled: the last ones, whose offsets are the largest, and others
at random. Their error may be at most twice that of plain attention in the same precision, the bar of every kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blindsight_gpu.measure import Place, free
from blindsight_gpu.prompts import TEMPLATE, Shape, make_layout, row_tables
from blindsight_gpu.results import Results, Row
from blindsight_kernels.triton_prefill import triton_attention
from shared_profiles import Category, Layout

_LIMIT = 2**31
_ROWS = 48
_CHECK = 40  # seconds that one check of the sanitizer may take


def run(results: Results, place: Place) -> None:
    """Three launches and the sanitizer."""
    causal = Shape("Qwen2.5-VL-7B", 28, 4, 128, 2048, False)
    wide = Shape("64 query heads", 64, 8, 128, 2048, False)
    both_ways = Shape("Gemma-3-12B", 16, 8, 256, 256, True)
    length = 299_008
    if place.dry_run:
        causal, wide, both_ways = (Shape("toy", 4, 2, 16, 24, images) for images in (False, False, True))
        length = 128
    for name, shape, far in (("300K", causal, False), ("past 2**31", wide, True), ("both ways", both_ways, False)):
        free(place)
        results.measure(f"{name}: {shape.name}", partial(_launch, shape, length, place, far=far))
    results.measure("compute-sanitizer", partial(_sanitizer, results, place))


def _launch(shape: Shape, n_tokens: int, place: Place, *, far: bool) -> Row:
    """One launch with all four categories among its heads, twice.

    Args:
        shape: heads.
        n_tokens: N.
        place: where.
        far: put keys and values so wide apart that their offsets, like those of the queries, pass 2**31 elements.

    Raises:
        AssertionError: not equal on repeat, or an error past the bar.
    """
    layout = make_layout(shape, n_tokens)
    q, k, v = _draw(shape, n_tokens, place, far)
    categories = [Category(head % 4) for head in range(shape.heads)]
    scale = shape.dim**-0.5
    out, lse = triton_attention(q, k, v, [layout], categories, TEMPLATE, scale=scale)
    again, again_lse = triton_attention(q, k, v, [layout], categories, TEMPLATE, scale=scale)
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


def _draw(shape: Shape, n_tokens: int, place: Place, far: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs; far ones are cut from an allocation that is eight times as wide."""
    generator = torch.Generator(place.device).manual_seed(0)

    def draw(heads: int, width: int) -> Tensor:
        size = (1, n_tokens, heads, width * shape.dim)
        whole = torch.empty(size, dtype=place.dtype, device=place.device)
        part = whole[..., -shape.dim :]
        part.normal_(generator=generator)
        return part.transpose(1, 2)

    width = 8 if far else 1
    return draw(shape.heads, 1), draw(shape.kv_heads, width), draw(shape.kv_heads, width)


def _sample(layout: Layout, place: Place) -> Tensor:
    """Rows to compare: the last of text and of images, and some at random."""
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(layout.n_tokens, (_ROWS,), generator=generator)
    last = torch.tensor([layout.n_tokens - 1, int(layout.images[-1, 2]) - 1])
    return torch.cat([last, some]).to(place.device)


def _some(categories: list[Category]) -> list[tuple[int, Category]]:
    """Heads to compare: the first and the last of every category."""
    n = len(categories)
    return [(head, categories[head]) for head in sorted({*range(4), *range(n - 4, n)})]


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


def _sanitizer(results: Results, place: Place) -> Row:
    """Out-of-bounds accesses and races of a small launch, by the tool that comes with CUDA.

    Raises:
        RuntimeError: it found something.
    """
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if place.dry_run or not Path(tool).exists():
        return {"note": "not run: a dry run" if place.dry_run else "not run: compute-sanitizer is not installed"}
    row: Row = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "99", sys.executable, "-m", __name__]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK, check=False, env=_uncached())
        except subprocess.TimeoutExpired:
            row[check] = f"did not end in {_CHECK} s"
            continue
        said = (done.stdout + done.stderr).strip().splitlines()
        row[check] = next((line for line in reversed(said) if "SUMMARY" in line), said[-1] if said else "said nothing")
        if done.returncode == 99:
            raise RuntimeError(f"{check}: {said[-20:]}")
        if done.returncode:
            row[check] = f"did not run: {row[check]}"
    return row


def _uncached() -> dict[str, str]:
    """Without torch's caching allocator every tensor is an allocation, and reads past its end are seen."""
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


if __name__ == "__main__":
    small = Shape("small", 4, 2, 64, 300, False)
    prompt = make_layout(small, 1000)
    tensors = _draw(small, 1000, Place(dry_run=False), far=False)
    triton_attention(*tensors, [prompt], list(Category), TEMPLATE, scale=0.125, max_keys=256)
    torch.cuda.synchronize()
