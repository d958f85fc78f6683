"""`blindsight bench`: the project's speed figures, both sides in one run, as a table and as a result file."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import JustifyMethod
from rich.table import Table

from blindsight_cli.folders import require_writable, write_json
from blindsight_cli.output import print_json, results
from blindsight_cli.timing import describe_cpu, time_pair
from shared_profiles import Category, Layout, SinkTemplate, build_plan, count_pairs
from torch_blindsight import portable_attention

Row = dict[str, Any]

_CASES = ((16, 512), (8, 2048), (32, 512))  # images x tokens of an image, delimiters included
_HEADS, _DIM = 8, 128


def even_layout(n_images: int, image_tokens: int, text: int = 0) -> Layout:
    """Images of `image_tokens` tokens, delimiters included, with `text` tokens before each."""
    begin = np.arange(n_images) * (image_tokens + text) + text
    images = np.stack([begin, begin + 1, begin + image_tokens - 1, begin + image_tokens], axis=1)
    n_tokens = n_images * (image_tokens + text)
    return Layout(n_tokens, 0, n_tokens, images)


def bench_attention(repeats: int) -> list[Row]:
    """One layer, every head Intra-Image+Sink with 4 sinks an image, float32, against torch's causal SDPA."""
    template, rows = SinkTemplate(), []
    for n_images, image_tokens in _CASES:
        layout = even_layout(n_images, image_tokens)
        q, k, v = (torch.randn(1, _HEADS, layout.n_tokens, _DIM) for _ in range(3))
        heads = [Category.INTRA_IMAGE_SINK] * _HEADS
        dense, sparse = time_pair(
            partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True),
            partial(portable_attention, q, k, v, [layout], heads, template, scale=_DIM**-0.5),
            repeats,
        )
        pairs = [count_pairs(layout, c, template).total for c in (Category.DENSE, Category.INTRA_IMAGE_SINK)]
        bound = pairs[0] / pairs[1]
        rows.append(
            {
                "case": f"attention, {n_images} images x {image_tokens} tokens, {_HEADS} heads, d={_DIM}, float32",
                "denominator": "scaled_dot_product_attention(is_causal=True)",
                "dense_s": dense,
                "sparse_s": sparse,
                "ratio": dense / sparse,
                "bound": bound,
                "share_of_bound": dense / sparse / bound,
            }
        )
    return rows


def bench_prefill(repeats: int) -> list[Row]:
    """A random Qwen2.5-VL, hidden 512, 8 layers, through `patch`, against the same model unpatched (SDPA)."""
    from blindsight_cli.random_model import make_random_model, make_random_prompt
    from shared_profiles.profile import Profile
    from torch_blindsight import fingerprint, patch

    model = make_random_model()
    patched = copy.deepcopy(model)
    patch(patched, Profile.uniform(Category.INTRA_IMAGE_SINK, fingerprint(model)))
    rows = []
    for n_images, grid in ((16, 64), (1, 64), (0, 0)):
        inputs = make_random_prompt(n_images, grid, text=64 if n_images else 4096)

        @torch.no_grad()
        def forward(side: torch.nn.Module, inputs: dict[str, torch.Tensor] = inputs) -> None:
            side(**inputs, use_cache=False, logits_to_keep=1)

        # Short prompts differ by less than a shared machine's noise: they are run more often.
        dense, sparse = time_pair(
            partial(forward, model), partial(forward, patched), repeats if n_images > 1 else 5 * repeats
        )
        n_tokens = inputs["input_ids"].shape[1]
        rows.append(
            {
                "case": f"prefill, {n_tokens} tokens, {n_images} images, hidden 512, 8 layers, float32",
                "denominator": "the same model unpatched (SDPA)",
                "dense_s": dense,
                "sparse_s": sparse,
                "ratio": dense / sparse,
            }
        )
    return rows


def bench_plan(repeats: int) -> list[Row]:
    """The plan of 300K tokens and 150 images: milliseconds and bytes."""
    seconds = []
    plan = build_plan(even_layout(2, 2000), SinkTemplate())
    for i in range(repeats + 1):  # another layout each time: an equal one would come from the cache
        layout = even_layout(150, 1990 - i, text=10)
        begun = time.perf_counter()
        plan = build_plan(layout, SinkTemplate())
        seconds.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    build_plan(layout, SinkTemplate())
    cached = time.perf_counter() - begun
    case = f"plan, {plan.layout.n_tokens} tokens, 150 images"
    return [{"case": case, "plan_ms": 1e3 * median(seconds[1:]), "cached_ms": 1e3 * cached, "bytes": plan.nbytes}]


def bench_memory(_: int) -> list[Row]:
    """Peak memory of the portable attention beyond its inputs, each prompt in a process of its own."""
    rows = []
    for n_images in (8, 16, 32, 64):
        code = f"from blindsight_cli.commands.bench import _peak_growth; print(_peak_growth({n_images}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        mib = float(done.stdout)
        rows.append(
            {"case": f"memory, {n_images * 512} tokens", "peak_mib": mib, "mib_per_1k_tokens": mib / n_images * 2}
        )
    return rows


def _peak_growth(n_images: int) -> float:
    """How far one sparse attention raises this process's peak memory, in MiB."""
    layout = even_layout(n_images, 512)
    q, k, v = (torch.randn(1, _HEADS, layout.n_tokens, _DIM) for _ in range(3))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    portable_attention(q, k, v, [layout], [Category.INTRA_IMAGE_SINK] * _HEADS, SinkTemplate(), scale=_DIM**-0.5)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """A memory figure of this process as Linux reports it, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def bench_jax_convert(repeats: int) -> list[Row]:
    """Checkpoints to JAX, see `bench_convert`."""
    from blindsight_cli.commands.bench_convert import bench_convert  # the others need no JAX

    return bench_convert(repeats)


def bench_jax_attention(repeats: int) -> list[Row]:
    """One layer in JAX, see `bench_jax`."""
    from blindsight_cli.commands import bench_jax

    return bench_jax.bench_attention(repeats, even_layout(16, 1024))


def bench_jax_prefill(repeats: int) -> list[Row]:
    """Whole prefills in JAX, see `bench_jax`."""
    from blindsight_cli.commands import bench_jax

    return bench_jax.bench_prefill(repeats)


def bench_jax_decode(repeats: int) -> list[Row]:
    """Decode steps in JAX, see `bench_jax`."""
    from blindsight_cli.commands import bench_jax

    return bench_jax.bench_decode(repeats)


def bench_jax_compile(repeats: int) -> list[Row]:
    """The first prefill of a bucket in JAX, see `bench_jax`."""
    from blindsight_cli.commands import bench_jax

    return bench_jax.bench_compile(repeats)


BENCHMARKS: dict[str, Callable[[int], list[Row]]] = {
    "attention": bench_attention,
    "prefill": bench_prefill,
    "plan": bench_plan,
    "memory": bench_memory,
    "jax-convert": bench_jax_convert,
    "jax-attention": bench_jax_attention,
    "jax-prefill": bench_jax_prefill,
    "jax-decode": bench_jax_decode,
    "jax-compile": bench_jax_compile,
}


def run_bench(*, what: str, out: Path | None, repeats: int, as_json: bool) -> int:
    """Runs benchmarks.

    Args:
        what: one of `BENCHMARKS`, or "all".
        out: JSON result file to write, if any.
        repeats: timed runs of each side; medians are reported.
        as_json: print the result as JSON instead of a table.

    Returns:
        The exit code: 0.

    Raises:
        ValueError: the file cannot be written.
        ModuleNotFoundError: one of them needs JAX, which is not installed; nothing was measured.
    """
    names = list(BENCHMARKS) if what == "all" else [what]
    if out is not None:
        require_writable("--out", out, kind="benchmark")
    if find_spec("jax") is None and any(name.startswith("jax") for name in names):  # not after minutes of the others
        raise ModuleNotFoundError("No module named 'jax'", name="jax")
    torch.manual_seed(0)
    cpu, cores = describe_cpu()
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    machine = {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads(), **versions}
    console = results(stderr=as_json)
    rows: list[Row] = []
    for name in names:
        found = BENCHMARKS[name](repeats)
        rows += found
        console.print(_table(name, found))
    result = {"machine": machine, "repeats": repeats, "rows": rows}
    console.print(f"{cpu}, {machine['threads']} threads, torch {versions['torch']}; medians of {repeats}")
    if as_json:  # before the file, whose disk may be full
        print_json(result)
    if out is not None:
        write_json(out, result)
    return 0


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    for name, first in rows[0].items():
        justify: JustifyMethod = "left" if isinstance(first, str) else "right"
        table.add_column(name.replace("_", " "), justify=justify, overflow="fold")  # in a narrow terminal none is cut
    for row in rows:
        table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()))
    return table
