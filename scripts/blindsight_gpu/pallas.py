"""Part `pallas`: one layer's prefill attention in JAX, beside our Triton kernel on the same inputs.

Queries, keys and values are torch's, shared by DLPack. Every length is compiled once for all profiles without dense
heads; a profile with dense heads goes through `jax_blindsight.attention.attend`, which sends those to cuDNN, as a model
does. Peers: cuDNN through JAX, and tokamax where it can be imported. Tokamax takes one range of keys a row, so it is
given each image's own tokens and nothing of the text: less than we compute, in its favour.

In a dry run the kernel is simulated.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from blindsight_gpu.in_jax import compile_for, seconds_per_jax_call, shared
from blindsight_gpu.measure import Place, free, seconds_per_call
from blindsight_gpu.prompts import (
    ANOTHER,
    GEMMA,
    LENGTHS,
    QWEN,
    TEMPLATE,
    Shape,
    lengths,
    make_inputs,
    make_layout,
    mixed,
    row_tables,
)
from blindsight_gpu.results import Cases, Results, Row, note_of
from blindsight_kernels.pallas_configurations import configuration
from blindsight_kernels.pallas_prefill import pallas_attention
from blindsight_kernels.pallas_requirements import plgpu
from blindsight_kernels.pallas_work import build_pallas_work
from blindsight_kernels.plans import build_plans
from blindsight_kernels.triton_prefill import triton_attention
from jax_blindsight.attention import attend
from jax_blindsight.implementations import Name, build_work
from shared_profiles import Category, Layout, count_pairs
from torch_blindsight.mixed import mixed_attention

_MIXED = "30% Dense, rest Intra-Image+Sink"
_PROFILES = {
    "all Intra-Image+Sink": Category.INTRA_IMAGE_SINK,
    "all Intra-Image": Category.INTRA_IMAGE,
    "all Sink": Category.SINK,
    "all Dense, our kernel": Category.DENSE,
}
_NAMES = ("all Intra-Image+Sink", _MIXED, "all Intra-Image", "all Sink", "all Dense, our kernel")
_TOY = Shape("toy", 1, 1, 64, 40, False)


def run(results: Results, place: Place) -> None:
    """Measures Qwen's shape and Gemma's, the lengths of the targets first."""
    found = lengths(place) if place.dry_run else LENGTHS | ANOTHER
    order = [(_TOY, name) for name in found]
    if not place.dry_run:
        order = [(QWEN, "300K"), (QWEN, "100K"), (GEMMA, "100K"), (QWEN, "36K"), (GEMMA, "300K"), (QWEN, "144K")]
    cases: Cases = {}
    for shape, length in order:
        case = partial("{} {}: {}".format, shape.name, length)
        here = (shape, found[length], place)
        cases[case("dense")] = partial(_dense_row, *here)
        for name in ("all Intra-Image+Sink", _MIXED) if place.dry_run else _NAMES:
            cases[case(name)] = partial(_sparse_row, name, *here, partial(results.good, case("dense")))
    results.run(cases)


def _dense_row(shape: Shape, n_tokens: int, place: Place) -> Row:
    return _inputs(shape, n_tokens, place).dense_row()


def _sparse_row(name: str, shape: Shape, n_tokens: int, place: Place, dense: Callable[[], Row | None]) -> Row:
    return _inputs(shape, n_tokens, place).sparse_row(name, dense())


@lru_cache(maxsize=1)
def _inputs(shape: Shape, n_tokens: int, place: Place) -> Inputs:
    """Those of the length being measured, made in the first of its rows."""
    free(place)
    return Inputs(shape, n_tokens, place)


class Inputs:
    """Two sets of queries, keys and values of one length, in torch and in JAX, and what was compiled for them."""

    def __init__(self, shape: Shape, n_tokens: int, place: Place) -> None:
        dtype = torch.bfloat16  # in a dry run too: the kernel knows no float32
        self.shape, self.place = shape, place
        self.layout = make_layout(shape, n_tokens)
        self.torch = [[x.to(dtype) for x in make_inputs(shape, n_tokens, place, seed)] for seed in range(2)]
        self.jax = [[shared(x) for x in one] for one in self.torch]
        self.scale = shape.dim**-0.5
        self._of_categories: tuple[Callable[..., Any], float] | None = None

    def dense_row(self) -> Row:
        """Causal attention of the same tokens by cuDNN through JAX: the denominator."""
        by_row = [[jnp.swapaxes(x, 1, 2) for x in one] for one in self.jax]  # [B, T, H, D], as it wants them
        library = None if self.place.dry_run else "cudnn"
        attend = partial(jax.nn.dot_product_attention, scale=self.scale, is_causal=True, implementation=library)
        compiled, compile_s = compile_for(attend, *by_row[0])
        seconds = seconds_per_jax_call(lambda turn: compiled(*by_row[turn % 2]), self.place)
        pairs = self.shape.heads * self.layout.n_tokens * (self.layout.n_tokens + 1) // 2
        return self.shape.facts(self.layout) | {
            "kernel": "cuDNN in JAX" if library else "XLA on the CPU",
            "dense_ms": 1e3 * seconds,
            "compile_s": compile_s,
            "useful_tflops": self._tflops(pairs, seconds),
        }

    def sparse_row(self, name: str, dense: Row | None) -> Row:
        """One profile by Pallas and, on the same inputs, by Triton; what tokamax does of it."""
        heads = self.shape.heads
        categories = mixed(heads, 0.3) if name == _MIXED else [_PROFILES[name]] * heads
        call, compile_s = self.mixed(categories) if name == _MIXED else self._alone(categories)
        first = call(0)
        seconds = seconds_per_jax_call(call, self.place)
        pairs = sum(count_pairs(self.layout, category, TEMPLATE).total for category in categories)
        row = self.shape.facts(self.layout) | {
            "profile": name,
            "pallas_ms": 1e3 * seconds,
            "compile_s": compile_s,
            "useful_tflops": self._tflops(pairs, seconds),
        }
        row |= self._against_triton(categories, row["pallas_ms"], np.asarray(first[0, self._rows].astype(jnp.float32)))
        if dense is not None:
            kept = pairs / (heads * self.layout.n_tokens * (self.layout.n_tokens + 1) // 2)
            row |= {
                "kept": kept,
                "speed_up": dense["dense_ms"] / row["pallas_ms"],
                "bound_ms": dense["dense_ms"] * kept,
                "denominator": f"{dense['kernel']}, causal, the same tokens",
            }
        if name == "all Intra-Image" or (self.place.dry_run and name != _MIXED):
            row |= self._tokamax()
        return row

    def _tflops(self, pairs: int, seconds: float) -> float:
        return 4 * self.shape.dim * pairs / seconds / 1e12

    @property
    def _rows(self) -> np.ndarray:
        """Some rows of images, where the kernels must agree."""
        return np.concatenate([self.layout.images[:, 1], self.layout.images[:, 2] - 1])

    def _alone(self, categories: list[Category]) -> tuple[Callable[[int], jax.Array], float]:
        """The kernel for any categories: compiled for the first profile, used for all."""
        n, chosen = self.layout.n_tokens, configuration(self.shape.dim)
        work = build_pallas_work(
            build_plans([self.layout], TEMPLATE), chosen.block_k, n_queries=n, n_keys=n
        )  # kept, like the plan, for all layers of a model
        simulator = plgpu.InterpretGPUParams() if self.place.dry_run else None
        work = jax.device_put(work)
        heads = jnp.asarray(categories, jnp.int32)

        def attend(q: Any, k: Any, v: Any, work: Any, heads: Any) -> jax.Array:
            return pallas_attention(q, k, v, work, heads, scale=self.scale, interpret=simulator)[0]

        if self._of_categories is None:
            self._of_categories = compile_for(attend, *self.jax[0], work, heads)
        compiled, compile_s = self._of_categories
        return lambda turn: compiled(*self.jax[turn % 2], work, heads), compile_s

    def mixed(self, categories: list[Category]) -> tuple[Callable[[int], jax.Array], float]:
        """The attention of a model's layer, whose dense heads go to cuDNN; the portable one in a dry run."""
        n, dim = self.layout.n_tokens, self.shape.dim
        impl: Name = "portable" if self.place.dry_run else "pallas"
        work = jax.device_put(build_work(impl, [self.layout], TEMPLATE, head_dim=dim, n_queries=n, n_keys=n))
        heads = tuple(map(int, categories))

        def run(q: Any, k: Any, v: Any, work: Any) -> jax.Array:
            return attend(
                q,
                k,
                v,
                work,
                categories=heads,
                window=None,
                scale=self.scale,
                bidirectional=self.shape.bidirectional,
                lse=False,
            )[0]

        compiled, compile_s = compile_for(run, *self.jax[0], work)
        return lambda turn: compiled(*self.jax[turn % 2], work), compile_s

    def _against_triton(self, categories: list[Category], pallas_ms: float, got: np.ndarray) -> Row:
        """Our Triton kernel's time on the same inputs, and how far the two results are apart."""

        def attend_in_torch(turn: int) -> torch.Tensor:
            q, k, v = self.torch[turn % 2]
            ours = mixed_attention if len(set(categories)) > 1 else triton_attention
            return ours(q, k, v, [self.layout], categories, TEMPLATE, scale=self.scale)[0]

        try:
            seconds = seconds_per_call(attend_in_torch, self.place)
            want = attend_in_torch(0)
        except Exception as error:  # kept in the row: the Pallas kernel's own figures stay
            return {"triton_note": note_of(error)}
        some = want[0, torch.from_numpy(self._rows).to(want.device)].float().cpu().numpy()
        return {
            "triton_ms": 1e3 * seconds,
            "against_triton": 1e3 * seconds / pallas_ms,
            "differs_by": float(np.abs(got - some).max()),
        }

    def _tokamax(self) -> Row:
        """Tokamax's attention on a range of keys a row: those of the image, or only itself outside of images."""
        if importlib.util.find_spec("tokamax") is None:
            return {"tokamax_note": "not installed"}
        try:
            api, base = (import_module(f"tokamax._src.ops.attention.{name}") for name in ("api", "base"))
            mosaic = api.IMPLEMENTATIONS["mosaic_gpu"]  # the public function takes no ranges
            tables = row_tables(self.layout, Category.INTRA_IMAGE, torch.device("cpu"))
            newest = tables.newest.numpy()
            oldest = np.where(np.isin(np.arange(self.layout.n_tokens), _inside(self.layout)), tables.oldest, newest)
            ranges = dict(k_start=jnp.asarray(oldest)[None, None], k_end=jnp.asarray(newest + 1)[None, None])
            by_row = [[jnp.swapaxes(x, 1, 2) for x in one] for one in self.jax]

            def attend(q: Any, k: Any, v: Any, ranges: Any) -> Any:
                return mosaic(q, k, v, mask=base.Mask(**ranges), logits_scale=self.scale)

            compiled, compile_s = compile_for(attend, *by_row[0], ranges)
            seconds = seconds_per_jax_call(lambda turn: compiled(*by_row[turn % 2], ranges), self.place)
        except Exception as error:  # a peer that breaks is a finding about the peer, kept in the row
            return {"tokamax_note": note_of(error)}
        return {"tokamax_ms": 1e3 * seconds, "tokamax_compile_s": compile_s}


def _inside(layout: Layout) -> np.ndarray:
    """Positions of the images' tokens."""
    return np.concatenate([np.arange(first, stop) for _, first, stop, _ in layout.images])
