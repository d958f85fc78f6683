"""Part `tune`, not run by default: a few tile sizes per head dimension, measured beside what the cycle model says."""

from __future__ import annotations

from functools import partial

from blindsight_gpu.cycles import candidates, predict, rate
from blindsight_gpu.measure import Place, free, seconds_per_call
from blindsight_gpu.prompts import GEMMA, QWEN, TEMPLATE, Shape, make_inputs, make_layout
from blindsight_gpu.results import Results, Row
from blindsight_kernels.triton_configurations import Configuration, configuration
from blindsight_kernels.triton_prefill import triton_attention
from shared_profiles import Category

_SMALL = Shape("d=64", 32, 8, 64, 2048, False)
_TOKENS = 100_096


def run(results: Results, place: Place) -> None:
    """Measures every candidate on Intra-Image+Sink heads."""
    if place.dry_run:
        toy = Shape("toy", 1, 1, 16, 24, False)
        results.measure("toy: 16x16", partial(_row, toy, 128, Configuration(16, 16, 4, 2, tma=True), place))
        return
    for shape in (QWEN, GEMMA, _SMALL):
        for tiles in candidates(shape.dim):
            free(place)
            size = f"{tiles.block_q}x{tiles.block_k}, {tiles.num_warps} warps, {tiles.num_stages} stages"
            results.measure(f"{shape.name}: {size}", partial(_row, shape, _TOKENS, tiles, place))


def _row(shape: Shape, n_tokens: int, tiles: Configuration, place: Place) -> Row:
    layout, category = make_layout(shape, n_tokens), Category.INTRA_IMAGE_SINK
    inputs = [make_inputs(shape, n_tokens, place, seed) for seed in range(2)]

    def call(turn: int) -> object:
        return triton_attention(
            *inputs[turn % 2], [layout], [category] * shape.heads, TEMPLATE, scale=shape.dim**-0.5, tiles=tiles
        )

    seconds = seconds_per_call(call, place)
    # A dry run has no compiler to read machine code from: Triton is interpreted there.
    predicted = None if place.dry_run else 1e3 * predict(shape, layout, category, tiles)
    return {
        "shape": shape.name,
        "tokens": n_tokens,
        "chosen": tiles == configuration(90, shape.dim, place.dtype.itemsize),
        "ours_ms": 1e3 * seconds,
        "predicted_ms": predicted,
        "useful_tflops": rate(shape, layout, category, seconds),
    }
