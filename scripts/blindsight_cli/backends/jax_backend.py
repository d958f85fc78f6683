"""Checkpoints run by JAX: converted weights, and programs that are compiled once per bucket of prompt lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from transformers import AutoConfig, GenerationConfig

from blindsight_cli.backends import NO_PROFILE, Answer, Facts, Prompt
from blindsight_cli.loading import check_family
from jax_blindsight import Params, Prefilled, calibrate, load, sparse_prefill, write
from jax_blindsight.attention import attend
from jax_blindsight.buckets import bucket
from jax_blindsight.work import AttentionWork, attention_work
from shared_profiles import FAMILIES, Category, Layout, SinkTemplate
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import Profile


class JaxBackend:
    """A `Backend`."""

    device = "cpu"  # of the prompts: arrays go where the weights are

    def __init__(self, folder: Path, dtype: str, device: str | None) -> None:
        check_family(folder)
        self.version = f"jax {jax.__version__}"
        jax.config.update("jax_default_device", pick_device(device))  # a command runs one model
        self.params = load(folder, dtype=dtype)
        config = self.params.config
        n_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params.weights))
        self.facts = Facts(
            FAMILIES[config.family], config.special, self.params.fingerprint, config.text.windows, n_parameters
        )
        self._eos = _stopping_tokens(folder)
        self._compiled: set[tuple] = set()

    def calibrate(
        self,
        prompts: Iterable[Prompt],
        *,
        dataset: str,
        template: SinkTemplate,
        thresholds: Thresholds,
        state: Path | None = None,
    ) -> Profile:
        """See `Backend`."""
        arrays = _InNumPy(prompts)
        return calibrate(self.params, arrays, dataset=dataset, template=template, thresholds=thresholds, state=state)

    def answer(self, prompt: Prompt, profile: Profile | None, max_new_tokens: int) -> Answer:
        """See `Backend`."""
        params, done = self._prefill(prompt, profile, max_new_tokens)
        log_probs = _log_softmax(done.logits)[0]
        ids, _ = write(params, done, max_new_tokens=max_new_tokens, eos=self._eos)
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
        work = attention_work([layout], template, n_queries=n, n_keys=n)
        heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
        qkv = [jax.random.normal(jax.random.key(i), (1, h, n, shape.head_dim)) for i, h in enumerate(heads)]
        layers = np.full((shape.n_layers, shape.n_heads), Category.DENSE) if profile is None else profile.categories
        return self._seconds(
            ("attention", layout, layers.tobytes()),
            lambda: [_attention(*qkv, work, categories=tuple(c), scale=shape.head_dim**-0.5) for c in layers.tolist()],
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
        capacity = prompt["input_ids"].shape[1] + room
        return params, sparse_prefill(params, _in_numpy(prompt), capacity=capacity, dense=profile is None)


class _InNumPy:
    """Prompts in NumPy, one at a time."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        return map(_in_numpy, self._prompts)


def _in_numpy(prompt: Prompt) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in prompt.items()}


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


def _stopping_tokens(folder: Path) -> list[int]:
    """Where the checkpoint says that an answer ends."""
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    eos = config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _log_softmax(logits: Array) -> np.ndarray:
    """Float64, as the torch backend has it."""
    scores = np.asarray(logits, dtype=np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


@partial(jax.jit, static_argnames=("categories", "scale"))
def _attention(
    q: Array, k: Array, v: Array, work: AttentionWork, *, categories: tuple[int, ...], scale: float
) -> Array:
    return attend(q, k, v, work, categories=categories, window=None, scale=scale, bidirectional=False)[0]
