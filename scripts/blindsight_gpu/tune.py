"""Part `tune`: constants that were chosen without a GPU, measured.

A few tile sizes of the Triton kernel per head dimension, beside what the cycle model says. And lengths, for
`TRITON_COSTS` in `torch_blindsight.break_even`, below which a prompt runs dense, and for `VENDOR_ROWS` in
`torch_blindsight.mixed`, from which dense heads go to the vendor's kernel. The Pallas kernel's tiles are not searched:
each takes half a minute to compile, and 128 rows on two warpgroups leave shared memory for no larger ones.
"""

from __future__ import annotations

from functools import partial

from blindsight_gpu import peers
from blindsight_gpu.attention import vendor_for_dense
from blindsight_gpu.cycles import candidates, predict, rate
from blindsight_gpu.measure import Place, first_seconds, free, seconds_per_call
from blindsight_gpu.prompts import GEMMA, LENGTHS, QWEN, TEMPLATE, Shape, make_layout, mixed, two_inputs
from blindsight_gpu.results import Cases, Results, Row, note_of
from blindsight_kernels.triton_configurations import Configuration, configuration
from blindsight_kernels.triton_prefill import triton_attention
from shared_profiles import Category
from torch_blindsight.vendor import MOST_DIM

_SMALL = Shape("d=64", 32, 8, 64, 2048, False)
_LENGTHS: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 36864, 65536)


def run(results: Results, place: Place) -> None:
    """Measures every candidate on Intra-Image+Sink heads, then every length; the first shape first."""
    shapes: tuple[Shape, ...] = (QWEN, GEMMA, _SMALL)
    tokens, all_lengths = LENGTHS["100K"], _LENGTHS
    tiles = {shape: candidates(shape.dim) for shape in shapes}
    if place.dry_run:
        toy = Shape("toy", 2, 1, 16, 24, False)
        shapes, tokens, all_lengths, tiles = (toy,), 128, (128,), {toy: [Configuration(16, 16, 4, 2, tma=True)]}
    cases: Cases = {}
    for shape in shapes:
        for one in tiles[shape]:
            size = f"{one.block_q}x{one.block_k}, {one.num_warps} warps, {one.num_stages} stages"
            cases[f"{shape.name}: {size}"] = partial(_tiles_row, shape, tokens, one, place)
        for n in all_lengths if shape in shapes[:2] else ():
            cases[f"{shape.name}: {n:,} tokens"] = partial(_length_row, shape, n, place)
    results.run(cases)


def _tiles_row(shape: Shape, n_tokens: int, tiles: Configuration, place: Place) -> Row:
    free(place)
    layout, category = make_layout(shape, n_tokens), Category.INTRA_IMAGE_SINK
    inputs = two_inputs(shape, n_tokens, place)

    def call(turn: int) -> object:
        return triton_attention(
            *inputs[turn % 2], [layout], [category] * shape.heads, TEMPLATE, scale=shape.dim**-0.5, tiles=tiles
        )

    seconds = seconds_per_call(call, place)
    row = {
        "shape": shape.name,
        "tokens": n_tokens,
        "chosen": tiles == configuration(90, shape.dim, place.dtype.itemsize),
        "ours_ms": 1e3 * seconds,
        "useful_tflops": rate(shape, layout, category, seconds),
    }
    try:
        # A dry run has no compiler to read machine code from: Triton is interpreted there.
        row["predicted_ms"] = None if place.dry_run else 1e3 * predict(shape, layout, category, tiles)
    except Exception as error:  # a prediction that fails costs no measured time
        row["predicted_note"] = note_of(error)
    return row


def _length_row(shape: Shape, n_tokens: int, place: Place) -> Row:
    """A layer of 30% dense heads by our kernel alone, with those by the vendor's, and all dense by the vendor's."""
    # Images of a quarter of the prompt at most: with a single one there would be nothing to leave out.
    images = Shape(
        shape.name, shape.heads, shape.kv_heads, shape.dim, min(shape.image_tokens, n_tokens // 4), shape.bidirectional
    )
    layout, inputs = make_layout(images, n_tokens), two_inputs(images, n_tokens, place)
    arguments = ([layout], mixed(shape.heads, 0.3), TEMPLATE)
    scale = shape.dim**-0.5
    ours = seconds_per_call(lambda turn: triton_attention(*inputs[turn % 2], *arguments, scale=scale), place)
    dense = seconds_per_call(lambda turn: peers.causal_dense(*inputs[turn % 2], place), place)
    row = {"shape": shape.name, "tokens": n_tokens, "ours_ms": 1e3 * ours, "dense_ms": 1e3 * dense}
    if shape.dim > MOST_DIM:
        return row
    first = first_seconds(lambda: vendor_for_dense(*inputs[0], *arguments, scale=scale), place)
    vendor = seconds_per_call(lambda turn: vendor_for_dense(*inputs[turn % 2], *arguments, scale=scale), place)
    return row | {"first_ms": 1e3 * first, "vendor_ms": 1e3 * vendor}
