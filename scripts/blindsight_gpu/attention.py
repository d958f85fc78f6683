"""Part `attention`: one layer's prefill attention, ours against every peer, at the shapes and lengths of real prompts.

Every row names its denominator. The bound is what the dense kernel's rate would allow on the pairs that are kept.
Packing, the work list's upload and the merge are inside every timing of ours; a prompt's plan, made once for all
layers, is a row of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from blindsight_gpu import peers
from blindsight_gpu.measure import Place, first_seconds, free, seconds_per_call
from blindsight_gpu.prompts import TEMPLATE, Shape, lengths, make_inputs, make_layout, mixed, shapes
from blindsight_gpu.results import Results, Row
from blindsight_kernels.plans import build_plans
from blindsight_kernels.triton_prefill import choose, triton_attention
from blindsight_kernels.triton_work import build_work, pack
from shared_profiles import Category, Layout, count_pairs
from torch_blindsight.mixed import mixed_attention
from torch_blindsight.vendor import vendor_attention

_NAMES = {Category.INTRA_IMAGE: "Intra-Image", Category.SINK: "Sink", Category.INTRA_IMAGE_SINK: "Intra-Image+Sink"}
_BY_VENDOR = "all Dense, the vendor's kernel by the head"
Inputs = list[tuple[Tensor, Tensor, Tensor]]


def run(results: Results, place: Place) -> None:
    """Measures every shape and length, short prompts first."""
    for name, n_tokens in lengths(place).items():
        for shape in shapes(place):
            _one_length(results, place, shape, name, n_tokens)


def profiles(n_heads: int) -> dict[str, list[Category]]:
    """The layers that are measured: every sparse category alone, and mixes with dense heads."""
    alone = {f"all {name}": [category] * n_heads for category, name in _NAMES.items()}
    shares = {f"{share:.0%} Dense, rest Intra-Image+Sink": mixed(n_heads, share) for share in (0.3, 0.5)}
    return {**alone, **shares, "all Dense, our kernel": [Category.DENSE] * n_heads}


def _one_length(results: Results, place: Place, shape: Shape, length: str, n_tokens: int) -> None:
    layout = make_layout(shape, n_tokens)
    case = partial("{} {}: {}".format, shape.name, length)
    layers = profiles(shape.heads)
    if place.dry_run:
        layers = dict(list(layers.items())[1::2])  # one of each kind
    if all(results.get(case(name)) for name in ("plan", "dense", _BY_VENDOR, *layers)):
        return
    free(place)
    inputs: Inputs = [make_inputs(shape, n_tokens, place, seed) for seed in range(2)]
    results.measure(case("plan"), partial(_plan_row, shape, layout, inputs, place))
    dense = results.measure(case("dense"), partial(_dense_row, shape, layout, inputs, place))
    if dense is None:
        return
    results.measure(case(_BY_VENDOR), partial(_vendor_row, shape, layout, inputs, place))
    for name, categories in layers.items():
        results.measure(case(name), partial(_sparse_row, name, categories, shape, layout, inputs, place, dense))


def _facts(shape: Shape, layout: Layout) -> Row:
    return dict(
        shape=shape.name,
        heads=f"{shape.heads}/{shape.kv_heads}, d={shape.dim}",
        tokens=layout.n_tokens,
        images=layout.n_images,
        image_tokens=shape.image_tokens,
    )


def _plan_row(shape: Shape, layout: Layout, inputs: Inputs, place: Place) -> Row:
    """What attention costs beside the kernel.

    Once a prompt, on the host: the plan of a prompt never seen before, and its work list, uploaded. In every layer:
    packing keys and values, on the device, and the host's part of a launch.
    """
    q, k, v = inputs[0]
    tiles = choose(q)
    begun = time.perf_counter()
    plan = build_plans([layout], TEMPLATE, block_q=tiles.block_q)[0]
    planned = time.perf_counter()
    work = build_work((plan,), tiles.block_k, place.device)
    place.wait()
    built = time.perf_counter()
    pack_s = seconds_per_call(lambda turn: (pack(inputs[turn % 2][1], work), pack(inputs[turn % 2][2], work)), place)
    launched = []
    for _ in range(1 if place.dry_run else 5):
        place.wait()
        begin = time.perf_counter()
        triton_attention(q, k, v, [layout], [Category.INTRA_IMAGE_SINK] * shape.heads, TEMPLATE, scale=shape.dim**-0.5)
        launched.append(time.perf_counter() - begin)
    return {
        **_facts(shape, layout),
        "plan_ms": 1e3 * (planned - begun),
        "plan_bytes": plan.nbytes,
        "work_ms": 1e3 * (built - planned),
        "pack_ms": 1e3 * pack_s,
        "launch_ms": 1e3 * median(launched),
    }


def _dense_row(shape: Shape, layout: Layout, inputs: Inputs, place: Place) -> Row:
    """The denominator: causal attention of the same tokens by the vendor's kernel."""
    q, k, v = inputs[0]
    _, name = peers.causal_dense(q[:, :, :128], k[:, :, :128], v[:, :, :128], place)
    first = first_seconds(lambda turn: peers.causal_dense(*inputs[turn], place), place)
    seconds = seconds_per_call(lambda turn: peers.causal_dense(*inputs[turn % 2], place), place)
    pairs = shape.heads * layout.n_tokens * (layout.n_tokens + 1) // 2
    return {
        **_facts(shape, layout),
        "kernel": name,
        "dense_ms": 1e3 * seconds,
        "first_ms": 1e3 * first,
        "pairs": pairs,
        **_rate(pairs, shape, seconds),
    }


def _vendor_row(shape: Shape, layout: Layout, inputs: Inputs, place: Place) -> Row:
    """All heads dense by the vendor's kernel, one at a time: the first call at this length, then warm."""
    q = inputs[0][0]
    out, lse = torch.empty_like(q.transpose(1, 2)), q.new_empty(q.shape[:3], dtype=torch.float32)

    def attend(turn: int) -> None:
        vendor_attention(out, lse, *inputs[turn % 2], [layout], range(shape.heads), scale=shape.dim**-0.5)

    first, warm = first_seconds(attend, place), seconds_per_call(attend, place)
    return {**_facts(shape, layout), "vendor_ms": 1e3 * warm, "first_ms": 1e3 * first}


def _rate(pairs: int, shape: Shape, seconds: float) -> Row:
    return {"useful_tflops": 4 * shape.dim * pairs / seconds / 1e12}


def _sparse_row(
    name: str,
    categories: list[Category],
    shape: Shape,
    layout: Layout,
    inputs: Inputs,
    place: Place,
    dense: Row,
) -> Row:
    """One profile by our kernel and by each peer that can."""
    scale = shape.dim**-0.5
    ours = triton_attention if "our kernel" in name else mixed_attention
    arguments = ([layout], categories, TEMPLATE)
    seconds = seconds_per_call(lambda turn: ours(*inputs[turn % 2], *arguments, scale=scale), place)
    pairs = sum(count_pairs(layout, category, TEMPLATE).total for category in categories)
    kept = pairs / dense["pairs"]
    row = {
        **_facts(shape, layout),
        "profile": name,
        "kept": kept,
        "ours_ms": 1e3 * seconds,
        "speed_up": dense["dense_ms"] / (1e3 * seconds),
        "denominator": f"{dense['kernel']}, causal, the same tokens",
        "bound_ms": dense["dense_ms"] * kept,
        **_rate(pairs, shape, seconds),
    }
    out = ours(*inputs[0], *arguments, scale=scale)[0]  # [1, N, H, D]
    images = torch.from_numpy(_image_rows(layout)).to(place.device)
    for peer, make in _peers(categories, shape, layout, place).items():
        row |= _peer(peer, make, inputs, place, out[0, images].transpose(0, 1), images)
    return row


def _image_rows(layout: Layout) -> np.ndarray:
    """Some rows of images, where every peer must agree with us."""
    first, last = layout.images[:, 1], layout.images[:, 2]
    return np.concatenate([first, last - 1])


def _peers(
    categories: list[Category], shape: Shape, layout: Layout, place: Place
) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """How each peer is set up for a case."""

    def varlen() -> peers.VarlenComposition:
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
        return {f"{peer}_note": f"failed: {type(error).__name__}: {str(error)[:200]}"}
    if isinstance(attend, peers.Flex):
        row |= {"flex_mask_ms": 1e3 * attend.mask_seconds, "flex_mask_mib": attend.mask_bytes / 2**20}
    return row
