"""Checkpoints run by JAX: converted weights, and programs that are compiled once per bucket of prompt lengths."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from blindsight_cli.backends import NO_PROFILE, Answer, Facts, Prompt
from blindsight_cli.folders import check_family
from blindsight_cli.timing import describe_cpu
from jax_blindsight import Params, Prefilled, calibrate, load, sparse_prefill, write
from jax_blindsight.attention import attend
from jax_blindsight.buckets import bucket
from jax_blindsight.implementations import Name, build_work
from jax_blindsight.prefill import implementation_for
from shared_profiles import FAMILIES, Category, Layout, SinkTemplate
from shared_profiles.budget import Budget
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import Profile
from shared_profiles.split import HELD_OUT


class JaxBackend:
    """A `Backend`."""

    device = "cpu"  # of the prompts: arrays go where the weights are

    def __init__(self, folder: Path, dtype: str, device: str | None) -> None:
        check_family(folder)
        self.version = f"jax {jax.__version__}"
        place = pick_device(device)
        jax.config.update("jax_default_device", place)  # a command runs one model
        self.hardware = describe_cpu()[0] if place.platform == "cpu" else place.device_kind
        self.params = load(folder, search=False, dtype=dtype)  # each call names its profile
        config = self.params.config
        n_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params.weights))
        self.facts = Facts(
            FAMILIES[config.family], config.special, self.params.fingerprint, config.text.windows, n_parameters
        )
        self._compiled: set[tuple] = set()
        self._impl = _pick_implementation(self.params)

    def calibrate(
        self,
        prompts: Iterable[Prompt],
        *,
        dataset: str,
        template: SinkTemplate | None,
        budget: Budget | None = None,
        thresholds: Thresholds | None = None,
        held_out: float | Sequence[Prompt] = HELD_OUT,
        local_block: int | None = None,
        state: Path | None = None,
        merge: Sequence[Path] = (),
    ) -> Profile:
        """See `Backend`."""
        return calibrate(
            self.params,
            prompts,
            dataset=dataset,
            template=template,
            budget=budget,
            thresholds=thresholds,
            held_out=held_out,
            local_block=local_block,
            state=state,
            merge=merge,
            impl=self._impl,
        )

    def answer(self, prompt: Prompt, profile: Profile | None, max_new_tokens: int) -> Answer:
        """See `Backend`."""
        params, done = self._prefill(prompt, profile, max_new_tokens)
        log_probs = _log_softmax(done.logits)[0]
        ids, _ = write(params, done, max_new_tokens=max_new_tokens)
        return Answer(ids[0].tolist(), log_probs, "dense" if profile is None else done.how)

    def answer_unprofiled(self, prompt: Prompt, max_new_tokens: int) -> Answer:
        """Runs dense."""
        return replace(self.answer(prompt, None, max_new_tokens), ran=f"dense: {NO_PROFILE}")

    def next_token(self, prompt: Prompt, profile: Profile | None) -> tuple[np.ndarray, str]:
        """See `Backend`."""
        _, done = self._prefill(prompt, profile, 1)
        return _log_softmax(done.logits).astype(np.float32), done.how

    def prefill_seconds(self, prompt: Prompt, profile: Profile | None) -> float:
        """See `Backend`."""
        shape = (prompt["input_ids"].shape, None if profile is None else profile.to_json())
        return self._seconds(("prefill", *shape), lambda: self._prefill(prompt, profile, 1)[1].logits)

    def attention_seconds(self, layout: Layout, profile: Profile | None) -> float:
        """See `Backend`; without a profile all heads dense in the same program."""
        shape = self.facts.fingerprint
        n = bucket(layout.n_tokens)
        template = SinkTemplate() if profile is None else profile.template
        heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
        work = build_work(self._impl, [layout], template, head_dim=shape.head_dim, n_queries=n, n_keys=n)
        work = jax.tree.map(jax.numpy.asarray, work)
        keys, dtype = jax.random.split(jax.random.key(0), 3), jax.tree.leaves(self.params.weights)[0].dtype
        q, k, v = (jax.random.normal(key, (1, h, n, shape.head_dim), dtype) for key, h in zip(keys, heads, strict=True))
        options: dict[str, Any] = dict(window=None, scale=shape.head_dim**-0.5, bidirectional=False, lse=False)
        layers = np.full((shape.n_layers, shape.n_heads), Category.DENSE) if profile is None else profile.categories
        return self._seconds(
            ("attention", layout, layers.tobytes()),
            lambda: [attend(q, k, v, work, categories=c, **options)[0] for c in layers],
        )

    def _seconds(self, what: tuple, run: Callable[[], Any]) -> float:
        """Seconds of a run, once everything is compiled."""
        if what not in self._compiled:
            jax.block_until_ready(run())
            self._compiled.add(what)
        begun = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - begun

    def _prefill(self, prompt: Prompt, profile: Profile | None, room: int) -> tuple[Params, Prefilled]:
        params = self.params if profile is None else replace(self.params, profile=profile)
        # Whoever asks for a comparison gets one, however short the prompt.
        how: dict[str, Any] = dict(dense=profile is None, break_even=False, impl=self._impl)
        capacity = prompt["input_ids"].shape[1] + room
        return params, sparse_prefill(params, prompt, capacity=capacity, **how)


def _pick_implementation(params: Params) -> Name:
    """What computes the attention; says so where XLA stands in for the Pallas kernel on a GPU."""
    try:
        return implementation_for(params, None)
    except (NotImplementedError, ImportError) as error:
        print(f"attention by XLA, not by the Pallas kernel: {error}", file=sys.stderr)
        return "portable"


def pick_device(name: str | None) -> jax.Device:
    """The named device, such as cpu, cuda or cuda:1, else JAX's default.

    Raises:
        ValueError: this machine has no such device, or JAX no plug-in for it.
    """
    if name is None:
        return jax.devices()[0]
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0].rstrip(".!")
        raise ValueError(f"the device must exist for JAX, such as cpu or cuda. Got {name!r}: {reason}.") from error


def _log_softmax(logits: Array) -> np.ndarray:
    """Float64, as the torch backend has it."""
    scores = np.asarray(logits, dtype=np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
