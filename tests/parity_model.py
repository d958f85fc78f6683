"""One prompt through a whole model in either framework, everything on the way kept, and where two ways first part.

A `Trace` holds, of the real tokens only: the embedded prompt, every layer's keys, values, attention and output, the
logits, and the tokens that a greedy answer goes on with. Traces are taken of the models as they are served: by hooks on
transformers' modules, and by taps between the programs of JAX's layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import DynamicCache

from jax_blindsight import Params, sparse_prefill, stack, write
from jax_blindsight import prefill as jax_prefill
from shared_profiles.profile import Profile
from tiny_models import patch

N_NEW = 64  # tokens of an answer
ULPS = 8  # last places of float32 at the largest value, beyond `TIMES` the error of transformers itself
TIMES = 3  # not twice, as for a kernel alone: the attention of the plain run, by definition, sums in float64


@dataclass(frozen=True)
class Trace:
    """What a model made of a batch.

    Attributes:
        points: float64 arrays `[n, ...]`, n the real tokens of all rows; in the order of computing.
        impl: what computed the attention: "sdpa" is transformers' own.
        tokens: `[B, N_NEW]` greedy; None where they were not asked for.
    """

    points: dict[str, np.ndarray]
    impl: str
    tokens: np.ndarray | None = None


def point_names(n_layers: int) -> list[str]:
    """Names of a trace's points, in the order of computing."""
    layers = [f"layer {i} {part}" for i in range(n_layers) for part in ("keys", "values", "attention", "output")]
    return ["embeddings", *layers, "logits"]


@torch.no_grad()
def trace_torch(
    model: Any, inputs: Mapping[str, torch.Tensor], profile: Profile | None = None, *, impl: Any = None, n_new: int = 0
) -> Trace:
    """Runs transformers.

    Args:
        model: on the device of the inputs, unpatched.
        inputs: a batch padded on the left.
        profile: patch the model with this; None runs it as it is.
        impl: of the patch.
        n_new: greedy tokens to add.
    """
    seen: dict[str, torch.Tensor] = {}
    decoder, cache = model.model.language_model, DynamicCache()

    def keep_input(name: str) -> Any:
        return lambda module, args: seen.update({name: args[0]})

    def keep_output(name: str) -> Any:
        return lambda module, args, output: seen.update({name: output[0] if isinstance(output, tuple) else output})

    with nullcontext() if profile is None else patch(model, profile, impl=impl) as handle:
        hooks = [decoder.layers[0].register_forward_pre_hook(keep_input("embeddings"))]
        for i, layer in enumerate(decoder.layers):
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(keep_input(f"layer {i} attention")))
            hooks.append(layer.register_forward_hook(keep_output(f"layer {i} output")))
        try:
            seen["logits"] = model(**inputs, past_key_values=cache).logits
        finally:
            for hook in hooks:
                hook.remove()
        tokens = greedy_tokens(model, inputs, n_new) if n_new else None
    for i, layer in enumerate(cache.layers):
        seen[f"layer {i} keys"], seen[f"layer {i} values"] = (x.transpose(1, 2) for x in (layer.keys, layer.values))
    valid = inputs["attention_mask"].bool()
    points = {name: seen[name][valid].double().cpu().numpy() for name in point_names(len(decoder.layers))}
    return Trace(points, "sdpa" if handle is None else handle.implementation.name, tokens)


def greedy_tokens(model: Any, inputs: Mapping[str, torch.Tensor], n_new: int = N_NEW) -> np.ndarray:
    """What transformers writes, `[B, n_new]`, its end-of-sequence tokens ignored."""
    stops, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        options = dict(do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=n_new)
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].cpu().numpy()
    finally:
        model.generation_config.eos_token_id = stops


def trace_jax(
    params: Params, inputs: Mapping[str, np.ndarray], *, dense: bool = False, n_new: int = 0, **options: Any
) -> Trace:
    """Runs `sparse_prefill` and, for tokens, `write`.

    Args:
        params: weights and profile.
        inputs: a batch padded on the left, in NumPy.
        dense: run every head dense.
        n_new: greedy tokens to add.
        options: of `sparse_prefill`.
    """
    n = inputs["input_ids"].shape[1]
    with tapped() as seen:
        options |= dict(dense=dense, break_even=False)
        done = sparse_prefill(params, inputs, capacity=n + N_NEW, all_logits=True, **options)
    assert done.how == ("dense: asked for" if dense else "sparse"), done.how
    seen["logits"] = done.logits
    for i, pair in enumerate(zip(done.cache.keys, done.cache.values, strict=True)):
        seen[f"layer {i} keys"], seen[f"layer {i} values"] = (x.swapaxes(1, 2) for x in pair)
    valid = np.asarray(inputs["attention_mask"]) != 0
    names = point_names(params.config.text.n_layers)
    points = {name: np.asarray(seen[name][:, :n], np.float64)[valid] for name in names}
    tokens = None
    if n_new:
        last = replace(done, logits=done.logits[:, -1])
        tokens, _ = write(params, last, max_new_tokens=n_new, eos=())
    return Trace(points, done.impl, tokens)


@contextmanager
def tapped() -> Iterator[dict[str, Any]]:
    """Keeps what goes into JAX's decoder layers, what each attends to, and what each gives."""
    seen: dict[str, Any] = {}
    run_layers, end = jax_prefill.run_layers, stack._end

    def keep_input(params: Params, hidden: Any, *args: Any) -> Any:
        seen["embeddings"] = np.array(hidden)  # a copy: the next layer takes the buffer
        return run_layers(params, hidden, *args)

    def keep_layer(weights: Any, hidden: Any, out: Any, **options: Any) -> Any:
        layer = sum(name.endswith("output") for name in seen)
        seen[f"layer {layer} attention"] = np.array(out).reshape(*out.shape[:2], -1)
        hidden = end(weights, hidden, out, **options)
        seen[f"layer {layer} output"] = np.array(hidden)
        return hidden

    with mock.patch.object(jax_prefill, "run_layers", keep_input), mock.patch.object(stack, "_end", keep_layer):
        yield seen


@dataclass(frozen=True)
class Gap:
    """How far two traces are apart at a point.

    Attributes:
        point: its name.
        error: the largest absolute difference.
        relative: `||a - b|| / ||b||`.
        allowed: the largest difference that still counts as equal.
    """

    point: str
    error: float
    relative: float
    allowed: float

    @property
    def equal(self) -> bool:
        """Whether the difference is allowed."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Bar:
    """What counts as equal: transformers' own float32 against its float64, at every point.

    Attributes:
        truth: the trace in float64.
        plain: the same computation by transformers in float32.
    """

    truth: Trace
    plain: Trace
    allowed: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        allowed = {}
        for name, truth in self.truth.points.items():
            error = np.abs(self.plain.points[name] - truth).max()
            allowed[name] = float(TIMES * error + ULPS * np.finfo(np.float32).eps * np.abs(truth).max())
        object.__setattr__(self, "allowed", allowed)

    def gaps(self, got: Trace, want: Trace | None = None) -> list[Gap]:
        """Differences at every point; from the truth, or between two computations that may both err."""
        other, factor = (self.truth, 1) if want is None else (want, 2)
        gaps = []
        for name, b in other.points.items():
            a = got.points[name]
            assert a.shape == b.shape, f"{name}: {a.shape}, not {b.shape}"
            error = float(np.nan_to_num(np.abs(a - b), nan=np.inf).max())
            relative = float(np.nan_to_num(np.linalg.norm(a - b) / np.linalg.norm(b), nan=np.inf))
            gaps.append(Gap(name, error, relative, factor * self.allowed[name]))
        return gaps

    def divergence(self, got: Trace, want: Trace | None = None) -> str | None:
        """Where `got` first leaves what is allowed, in words; None where it never does."""
        return first_divergence(self.gaps(got, want))


def first_divergence(gaps: list[Gap]) -> str | None:
    """Names the first point that differs, and how the ones after it fare."""
    wrong = [i for i, gap in enumerate(gaps) if not gap.equal]
    if not wrong:
        return None
    gap = gaps[wrong[0]]
    before = f"equal up to {gaps[wrong[0] - 1].point}" if wrong[0] else "from the very start"
    return (
        f"first divergence: {gap.point}, {before}. Error {gap.error:.3g}, allowed {gap.allowed:.3g}, relative "
        f"{gap.relative:.3g}; {len(wrong)} of {len(gaps)} points differ."
    )


def first_other_token(got: np.ndarray, want: np.ndarray) -> str | None:
    """Names the first token that differs; None where none does. Both `[B, n]`."""
    wrong = np.argwhere(got != want)
    if not len(wrong):
        return None
    b, i = wrong[np.argmin(wrong[:, 1])].tolist()
    return (
        f"first divergence: token {i} of row {b} is {got[b, i]}, not {want[b, i]}; {len(wrong)} of {got.size} differ."
    )


def divergence_of_logits(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """KL of the next-token distributions of logits `[n, V]` from those wanted, in nats: `[n]`."""
    p, q = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in (want, got)
    )
    return (np.exp(p) * (p - q)).sum(-1)
