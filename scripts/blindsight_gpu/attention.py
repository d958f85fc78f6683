"""Part `attention`: one layer's prefill attention, ours against every peer, at the lengths that the targets speak of.

Every row names its denominator. The bound is what the dense kernel's rate would allow on the pairs that are kept.
Packing, the work list's upload and the merge are inside every timing of ours; a prompt's plan, made once for all
layers, is a row of its own. Part `attention_more` measures the other shape and length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from blindsight_gpu import peers
from blindsight_gpu.measure import Place, first_seconds, free, seconds_per_call
from blindsight_gpu.prompts import TEMPLATE, Shape, lengths, make_layout, mixed, shapes, two_inputs
from blindsight_gpu.results import Cases, Results, Row, note_of
from blindsight_kernels.plans import build_plans
from blindsight_kernels.triton_prefill import choose, triton_attention
from blindsight_kernels.triton_work import build_work, pack
from shared_profiles import Category, Layout, count_pairs
from shared_profiles.plan import build_plan
from torch_blindsight.mixed import mixed_attention
from torch_blindsight.vendor import MOST_DIM

_MIXED = "30% Dense, rest Intra-Image+Sink"
_VENDOR, _OURS = "all Dense, the vendor's kernel", "all Dense, our kernel"
# What is compared with the peers, which compile a kernel for every length, 10 s each: not the shortest.
_COMPARED, _NOT_COMPARED = ("all Intra-Image+Sink", _MIXED, "all Intra-Image"), "36K"
SOME = ("all Intra-Image+Sink", _MIXED, _VENDOR)  # of a dry run
Inputs = list[tuple[Tensor, Tensor, Tensor]]


def run(results: Results, place: Place) -> None:
    """Measures the first shape, the longest prompt first."""
    measure(results, place, [(shapes(place)[0], name, n) for name, n in lengths(place).items()])


def measure(results: Results, place: Place, prompts: Sequence[tuple[Shape, str, int]]) -> None:
    """Measures every row of these shapes and lengths, which have names, in their order."""
    results.run({case: row for prompt in prompts for case, row in _cases(results, place, *prompt).items()})


def profiles(n_heads: int) -> dict[str, list[Category]]:
    """The layers that are measured, those of the targets first."""
    one = {category: [category] * n_heads for category in Category}
    return {
        "all Intra-Image+Sink": one[Category.INTRA_IMAGE_SINK],
        _MIXED: mixed(n_heads, 0.3),
        "all Intra-Image": one[Category.INTRA_IMAGE],
        "all Sink": one[Category.SINK],
        _VENDOR: one[Category.DENSE],
        "50% Dense, rest Intra-Image+Sink": mixed(n_heads, 0.5),
        _OURS: one[Category.DENSE],
    }


def _cases(results: Results, place: Place, shape: Shape, length: str, n_tokens: int) -> Cases:
    """The rows of one shape and length, by case."""
    layout = make_layout(shape, n_tokens)
    case = partial("{} {}: {}".format, shape.name, length)
    layers = profiles(shape.heads)
    if shape.dim > MOST_DIM:
        del layers[_VENDOR]
    if place.dry_run:
        layers = {name: layers[name] for name in SOME}
    here = (shape, layout, place)
    found: Cases = {case("plan"): partial(_plan_row, *here), case("dense"): partial(_dense_row, *here)}

    def sparse(name: str) -> Row:
        dense, compared = results.good(case("dense")), name in _COMPARED and length != _NOT_COMPARED
        return _sparse_row(name, layers[name], *here, dense, compared=compared)

    return found | {case(name): partial(sparse, name) for name in layers}


def _plan_row(shape: Shape, layout: Layout, place: Place) -> Row:
    """What attention costs beside the kernel.

    Once a prompt, on the host: the plan of a prompt never seen before, and its work list, uploaded. In every layer:
    packing keys and values, on the device, and the host's part of a launch.
    """
    inputs = two_inputs(shape, layout.n_tokens, place)
    return {**shape.facts(layout), **costs_beside(shape, layout, inputs, place)}


def costs_beside(shape: Shape, layout: Layout, inputs: Inputs, place: Place) -> Row:
    """Those costs in ms, of a plan that is not in the cache, and its bytes."""
    q, k, v = inputs[0]
    tiles = choose(q)
    build_plan.cache_clear()
    begun = time.perf_counter()
    plan = build_plans([layout], TEMPLATE, block_q=tiles.block_q)[0]
    planned = time.perf_counter()
    work = build_work((plan,), tiles.block_k, place.device)
    place.wait()
    built = time.perf_counter()
    pack_s = seconds_per_call(
        lambda turn: (pack(inputs[turn % len(inputs)][1], work), pack(inputs[turn % len(inputs)][2], work)), place
    )
    launched = []
    for _ in range(1 if place.dry_run else 5):
        place.wait()
        begin = time.perf_counter()
        triton_attention(q, k, v, [layout], [Category.INTRA_IMAGE_SINK] * shape.heads, TEMPLATE, scale=shape.dim**-0.5)
        launched.append(time.perf_counter() - begin)
    return {
        "plan_ms": 1e3 * (planned - begun),
        "plan_bytes": plan.nbytes,
        "work_ms": 1e3 * (built - planned),
        "pack_ms": 1e3 * pack_s,
        "launch_ms": 1e3 * median(launched),
    }


def _dense_row(shape: Shape, layout: Layout, place: Place) -> Row:
    """The denominator: causal attention of the same tokens by the vendor's kernel."""
    inputs = two_inputs(shape, layout.n_tokens, place)
    q, k, v = inputs[0]
    _, name = peers.causal_dense(q[:, :, :128], k[:, :, :128], v[:, :, :128], place)
    first = first_seconds(lambda: peers.causal_dense(q, k, v, place), place)
    seconds = seconds_per_call(lambda turn: peers.causal_dense(*inputs[turn % 2], place), place)
    pairs = shape.heads * layout.n_tokens * (layout.n_tokens + 1) // 2
    return {
        **shape.facts(layout),
        "kernel": name,
        "dense_ms": 1e3 * seconds,
        "first_ms": 1e3 * first,
        "pairs": pairs,
        **_rate(pairs, shape, seconds),
    }


def _rate(pairs: int, shape: Shape, seconds: float) -> Row:
    return {"useful_tflops": 4 * shape.dim * pairs / seconds / 1e12}


def _sparse_row(
    name: str,
    categories: list[Category],
    shape: Shape,
    layout: Layout,
    place: Place,
    dense: Row | None,
    *,
    compared: bool,
) -> Row:
    """One profile by our kernel and, if it is compared, by each peer that can; without `dense`, against nothing."""
    inputs, scale = two_inputs(shape, layout.n_tokens, place), shape.dim**-0.5
    kernels: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {_OURS: triton_attention, _VENDOR: vendor_for_dense}
    ours = kernels.get(name, mixed_attention)
    arguments = ([layout], categories, TEMPLATE)
    first = first_seconds(lambda: ours(*inputs[0], *arguments, scale=scale), place)
    seconds = seconds_per_call(lambda turn: ours(*inputs[turn % 2], *arguments, scale=scale), place)
    pairs = sum(count_pairs(layout, category, TEMPLATE).total for category in categories)
    row = {
        **shape.facts(layout),
        "profile": name,
        "ours_ms": 1e3 * seconds,
        "first_ms": 1e3 * first,
        **_rate(pairs, shape, seconds),
    }
    if dense is not None:
        kept = pairs / dense["pairs"]
        row |= {
            "kept": kept,
            "speed_up": dense["dense_ms"] / row["ours_ms"],
            "denominator": f"{dense['kernel']}, causal, the same tokens",
            "bound_ms": dense["dense_ms"] * kept,
        }
    if not compared:
        return row
    out = ours(*inputs[0], *arguments, scale=scale)[0]  # [1, N, H, D]
    rows = torch.from_numpy(_some_rows(layout)).to(place.device)
    want = out[0, rows].transpose(0, 1)  # [H, n_rows, D]
    del out
    for peer, make in _peers(categories, shape, layout, place).items():
        row |= _peer(peer, make, inputs, place, want, rows)
    return row


def vendor_for_dense(*arguments: Any, scale: float) -> tuple[Tensor, Tensor]:
    """`mixed_attention` that leaves dense heads, of at most `MOST_DIM`, to the vendor's kernel, whatever the length."""
    with patch("torch_blindsight.mixed.VENDOR_ROWS", 0):
        return mixed_attention(*arguments, scale=scale)


def _some_rows(layout: Layout) -> np.ndarray:
    """Some rows of images and of text, where every peer must agree with us."""
    begin, first, last, _ = layout.images.T
    return np.concatenate([begin, first, last - 1, last, [layout.n_tokens - 1]])


def _peers(
    categories: list[Category], shape: Shape, layout: Layout, place: Place
) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """How each peer is set up for a case."""

    def varlen() -> peers.VarlenComposition:
        if place.dry_run:
            raise peers.DoesNotFit("varlen_attn needs a GPU")
        if len(set(categories)) > 1:
            raise peers.DoesNotFit("composed for layers of one category")
        return peers.VarlenComposition(
            layout, categories[0], place, kv_heads=shape.kv_heads, dim=shape.dim, bytes_each=place.dtype.itemsize
        )

    return {"flex": lambda: peers.Flex(layout, categories, place), "varlen": varlen}


def _peer(
    peer: str, make: Callable[[], Callable[..., Tensor]], inputs: Inputs, place: Place, want: Tensor, rows: Tensor
) -> Row:
    """A peer's columns: its time and how far its result is from ours, or why it has none.

    Args:
        peer: the columns' prefix.
        make: sets it up.
        inputs: rotating inputs.
        place: where.
        want: our result at `rows` for the first inputs, `[H, n_rows, D]`.
        rows: positions.
    """
    free(place)
    try:
        attend = make()
        got = attend(*inputs[0])
        got = got[0, :, rows] if got.ndim == 4 else got[rows].transpose(0, 1)
        row = {f"{peer}_ms": 1e3 * seconds_per_call(lambda turn: attend(*inputs[turn % 2]), place)}
        row[f"{peer}_differs_by"] = float((got.float() - want.float()).abs().max())
    except peers.DoesNotFit as reason:
        return {f"{peer}_note": str(reason)}
    except torch.cuda.OutOfMemoryError:
        return {f"{peer}_note": "out of GPU memory"}
    except Exception as error:  # a peer that breaks is a finding about the peer, kept in the row
        return {f"{peer}_note": note_of(error)}
    if isinstance(attend, peers.Flex):
        row |= {"flex_mask_ms": 1e3 * attend.mask_seconds, "flex_mask_mib": attend.mask_bytes / 2**20}
    return row
