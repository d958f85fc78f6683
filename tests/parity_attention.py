"""Every implementation of the attention on the same inputs, and how far each pair is apart.

    reference   float64, NumPy, the definition          portable  plain torch
    triton      interpreted on a CPU, native on a GPU   xla       JAX's loops
    pallas      in the simulator, native on a Hopper GPU

What counts as equal comes from float64: an implementation may err at most twice as much as a plain computation of the
same formula in the same precision, and two of them may differ by the sum of what each may err.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import interpreted
import simulated
from attention_inputs import draw_inputs
from blindsight_kernels.pallas_configurations import Configuration
from blindsight_kernels.reference import reference_attention
from jax_blindsight.attention import attend
from jax_blindsight.implementations import Name, build_work
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from torch_blindsight.portable import portable_attention

ULPS = 4  # last places of float32 at the largest value, beyond twice the plain computation's error
_SMALL_TILES = Configuration(64, 2)  # many tiles in a short prompt, for the simulator
_CATEGORIES = (3, 0, 1, 2)


@dataclass(frozen=True)
class Result:
    """What an implementation gave, float64: outputs `[B, T, H, D]` and log-sum-exps `[B, H, T]`."""

    out: np.ndarray
    lse: np.ndarray


Attend = Callable[["Case"], Result]


@dataclass(frozen=True)
class Case:
    """One call of the attention.

    Attributes:
        name: for people.
        layouts: one a batch row, of `q_start` + T tokens.
        template: sinks and local blocks.
        head_dim, dtype, heads, kv_heads: D, the name of a torch dtype, H, K.
        categories: `[H]`.
        window: sliding window in tokens, None for none.
        q_start: position of the first query.
        max_keys: longest range that one tile of text rows reads, None for no limit.
        seed: of the inputs.
        given: float32 `[B, H, T, D]` and twice `[B, K, S, D]` to use instead of random ones, S as many as there are.
    """

    name: str
    layouts: tuple[Layout, ...]
    template: SinkTemplate
    head_dim: int
    dtype: str = "bfloat16"
    heads: int = 4
    kv_heads: int = 2
    categories: tuple[int, ...] = _CATEGORIES
    window: int | None = None
    q_start: int = 0
    max_keys: int | None = None
    seed: int = 0
    given: tuple[np.ndarray, ...] | None = None

    @property
    def n_queries(self) -> int:
        """T."""
        return self.layouts[0].n_tokens - self.q_start

    @property
    def where(self) -> dict[str, int | None]:
        """Window and start, as every implementation takes them."""
        return dict(window=self.window, q_start=self.q_start)

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.head_dim**-0.5

    @cached_property
    def inputs(self) -> list[Tensor]:
        """`[B, H, T, D]` and twice `[B, K, S, D]` on the CPU; S is a multiple of 8, what is no key yet is NaN."""
        stop = self.layouts[0].n_tokens
        sizes = (len(self.layouts), self.heads, self.kv_heads, self.n_queries, -(-stop // 8) * 8, self.head_dim)
        dtype = getattr(torch, self.dtype)
        if self.given is not None:
            return [torch.from_numpy(x).to(dtype) for x in self.given]
        q, k, v = draw_inputs(self.seed, *sizes, dtype)
        k[:, :, stop:] = v[:, :, stop:] = torch.nan
        return [q, k, v]

    @cached_property
    def clean(self) -> list[np.ndarray]:
        """The inputs in float64, without what is no key yet."""
        stop = self.layouts[0].n_tokens
        return [x[:, :, :stop].double().numpy() for x in self.inputs]

    @cached_property
    def truth(self) -> Result:
        """By the definition, in float64."""
        out, lse = reference_attention(
            *self.clean, self.layouts, self.categories, self.template, scale=self.scale, **self.where
        )
        return Result(out.swapaxes(1, 2), lse)

    @cached_property
    def masks(self) -> np.ndarray:
        """`[B, H, T, S]` bool, S without what is no key yet."""
        per_row = [
            {c: category_mask(x, Category(c), self.template, **self.where) for c in set(self.categories)}
            for x in self.layouts
        ]
        return np.array([[row[c] for c in self.categories] for row in per_row])

    @cached_property
    def plain(self) -> Result:
        """Masked softmax with every step in the inputs' dtype; the log-sum-exps in float32, as kernels give them."""
        q, k, v = (x[:, :, : self.layouts[0].n_tokens] for x in self.inputs)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        masks = torch.from_numpy(self.masks)
        out = (q @ k.mT * self.scale).masked_fill(~masks, -torch.inf).softmax(-1).nan_to_num() @ v
        lse = (q.float() @ k.float().mT * self.scale).masked_fill(~masks, -torch.inf).logsumexp(-1)
        return Result(out.transpose(1, 2).double().numpy(), lse.double().numpy())

    @cached_property
    def fused_lse_error(self) -> float:
        """The largest error of the log-sum-exps of torch's own fused attention on a CPU, all keys before masking."""
        q, k, v = (x[:, :, : self.layouts[0].n_tokens] for x in self.inputs)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        masks = torch.zeros(self.masks.shape).masked_fill(~torch.from_numpy(self.masks), -1e30).to(q.dtype)
        _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=masks, scale=self.scale)
        seen = np.isfinite(self.truth.lse)
        return float(np.abs(lse.double().numpy() - self.truth.lse)[seen].max())

    @cached_property
    def _allowed(self) -> tuple[float, float]:
        plain = zip(_errors(self.plain, self.truth), (self.truth.out, self.truth.lse), strict=True)
        out, lse = (2 * error + _ulps(x) for error, x in plain)
        return out, lse

    def allowed(self, name: str) -> tuple[float, float]:
        """The largest errors that an implementation may have: of its outputs, of its log-sum-exps.

        On a CPU `portable` calls torch's fused attention, whose exponentials are quick and inexact in 16 bits: of its
        log-sum-exps that is the bar.
        """
        out, lse = (0.0, 0.0) if name == "reference" else self._allowed
        if name == "portable" and self.dtype != "float32":
            lse = max(lse, 2 * self.fused_lse_error)
        return out, lse


@dataclass(frozen=True)
class Difference:
    """How far two implementations are apart; maxima over all rows, heads and dimensions.

    Attributes:
        pair: their names.
        out, lse: the largest absolute differences, infinite where one is not finite and the other is.
        out_relative: `||a - b|| / ||b||` of the outputs.
        out_allowed, lse_allowed: the largest differences that still count as equal.
    """

    pair: tuple[str, str]
    out: float
    out_relative: float
    out_allowed: float
    lse: float
    lse_allowed: float

    @property
    def equal(self) -> bool:
        """Whether both differences are allowed."""
        return self.out <= self.out_allowed and self.lse <= self.lse_allowed

    def __str__(self) -> str:
        return (
            f"{self.pair[0]} and {self.pair[1]}: outputs differ by {self.out:.3g} (allowed {self.out_allowed:.3g}), "
            f"log-sum-exps by {self.lse:.3g} (allowed {self.lse_allowed:.3g})"
        )


def compare(case: Case, results: Mapping[str, Result]) -> list[Difference]:
    """Every pair, the definition first among them."""
    everyone = {"reference": case.truth} | dict(results)
    differences = []
    for a, b in combinations(everyone, 2):
        out, lse = _errors(everyone[b], everyone[a])
        size = float(np.linalg.norm(everyone[a].out))
        gap = float(np.nan_to_num(np.linalg.norm(everyone[b].out - everyone[a].out), nan=np.inf))
        out_allowed, lse_allowed = (x + y for x, y in zip(case.allowed(a), case.allowed(b), strict=True))
        differences.append(Difference((a, b), out, gap / (size or 1.0), out_allowed, lse, lse_allowed))
    return differences


def _ulps(x: np.ndarray) -> float:
    finite = np.abs(x[np.isfinite(x)])
    return ULPS * float(np.finfo(np.float32).eps) * float(finite.max(initial=0.0))


def _errors(got: Result, want: Result) -> tuple[float, float]:
    """Largest absolute differences; rows that see nothing must be zero and `-inf` on both sides."""
    errors = []
    for a, b in ((got.out, want.out), (got.lse, want.lse)):
        assert a.shape == b.shape, f"{a.shape}, not {b.shape}"
        same = a == b  # infinities
        with np.errstate(invalid="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
        errors.append(float(np.where(np.isnan(gap), np.inf, gap).max(initial=0.0)))
    return errors[0], errors[1]


def portable(case: Case, device: str = "cpu") -> Result:
    """torch_blindsight's portable attention."""
    inputs = [x.to(device) for x in case.inputs]
    out, lse = portable_attention(*inputs, case.layouts, case.categories, case.template, scale=case.scale, **case.where)
    return Result(out.double().cpu().numpy(), lse.double().cpu().numpy())


def triton(run: interpreted.Attend, case: Case) -> Result:
    """The Triton kernel, wherever `run` takes it."""
    out, lse = run(
        *case.inputs,
        list(case.layouts),
        case.categories,
        case.template,
        scale=case.scale,
        max_keys=case.max_keys,
        **case.where,
    )
    return Result(out.double().numpy(), lse.double().numpy())


def jax_attend(impl: Name, case: Case, device: str = "cpu", sizes: tuple[int, int] | None = None) -> Result:
    """An implementation of the JAX backend on torch's memory, by DLPack.

    Args:
        impl: which.
        case: the call.
        device: where torch puts the inputs, and JAX finds them.
        sizes: T and S to pad to, so that cases share one compiled program; default the case's own.
    """
    q, k, v = case.inputs
    n_queries, n_keys = sizes or (q.shape[2], k.shape[2])
    if sizes is not None:
        q, k, v = (
            torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[2]), value=torch.nan)
            for x, n in ((q, n_queries), (k, n_keys), (v, n_keys))
        )
    where = dict(head_dim=case.head_dim, n_queries=n_queries, n_keys=n_keys, **case.where)
    work = build_work(impl, case.layouts, case.template, **where)
    arrays = [to_jax(x.to(device)) for x in (q, k, v)]
    options = dict(categories=case.categories, window=case.window, scale=case.scale)
    out, lse = attend(*arrays, work, bidirectional=case.layouts[0].bidirectional, **options)
    n = case.n_queries
    assert not np.asarray(out[:, n:]).any() and np.isneginf(lse[:, :, n:]).all(), "rows beyond the real ones"
    return Result(np.asarray(out[:, :n], np.float64), np.asarray(lse[:, :, :n], np.float64))


def to_jax(x: Tensor) -> jax.Array:
    """A tensor as a JAX array over the same memory; JAX reads bfloat16 too."""
    return jnp.from_dlpack(x.contiguous())


def simulated_pallas(run: simulated.Simulate, case: Case) -> Result:
    """The Pallas kernel in the simulator."""
    q, k, v = (x.float().numpy() for x in case.inputs)
    options = dict(dtype=case.dtype, max_keys=case.max_keys, tiles=_SMALL_TILES, races=False)
    out, lse, _ = run(q, k, v, list(case.layouts), case.categories, case.template, **options, **case.where)
    return Result(out.astype(np.float64), lse.astype(np.float64))


@contextmanager
def implementations(device: str) -> Iterator[dict[str, Attend]]:
    """All of them by name: interpreted and simulated for "cpu", native for "cuda"."""
    on_jax = {"xla": partial(jax_attend, "portable", device=device)}
    if device == "cuda":
        with interpreted.native() as run:
            native = {"pallas": partial(jax_attend, "pallas", device=device)}
            yield {"portable": partial(portable, device=device), "triton": partial(triton, run), **on_jax, **native}
        return
    with interpreted.interpreted() as run, simulated.simulator() as simulate:
        yield {
            "portable": portable,
            "triton": partial(triton, run),
            **on_jax,
            "pallas": partial(simulated_pallas, simulate),
        }


def serves(name: str, case: Case) -> bool:
    """Whether an implementation takes a case: the Pallas kernel computes in 16 bits and in the sizes of wgmma."""
    return name != "pallas" or (case.dtype != "float32" and case.head_dim in (64, 128, 256))


def run_all(case: Case, attends: Mapping[str, Attend]) -> list[Difference]:
    """Runs a case by every implementation that serves it, and compares all pairs."""
    return compare(case, {name: run(case) for name, run in attends.items() if serves(name, case)})


def _images(*rows: Sequence[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


# Few tiles: in the simulator each costs as much as a whole case elsewhere.
_LEFT = Layout(61, 9, 61, _images((11, 12, 27, 28), (36, 37, 53, 54)))
_RIGHT = Layout(61, 0, 57, _images((3, 4, 20, 21), (38, 39, 54, 55)))
_BOTH_WAYS = Layout(61, 0, 61, _images((4, 5, 28, 29), (31, 31, 58, 58)), True)
# Rows of text in runs fill the last of XLA's tiles of them, which hangs over the end.
_SCATTERED = _images(*((p, p, p + 1, p + 1) for p in range(20, 138, 24)))
_RUNS = (Layout(144, 0, 144, _SCATTERED), Layout(144, 7, 140, _SCATTERED))
_TEMPLATE = SinkTemplate((0, 5), (2,), 32)
CASES = (
    Case("D64 bf16, ragged batch, chunk, text in parts", (_LEFT, _RIGHT), _TEMPLATE, 64, q_start=30, max_keys=40),
    Case("D128 fp16, bidirectional images, window", (_BOTH_WAYS,), _TEMPLATE, 128, "float16", window=20),
    Case("D256 bf16, bidirectional images", (_BOTH_WAYS,), _TEMPLATE, 256, kv_heads=1),
    Case("D64 fp32, short runs of text, ragged batch, window", _RUNS, _TEMPLATE, 64, "float32", window=16),
)
