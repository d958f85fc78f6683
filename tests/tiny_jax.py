"""The tiny models loaded by JAX from their checkpoints, beside the transformers models that they must equal."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

import jax_blindsight
from jax_blindsight import Params, Prefilled
from jax_parity import assert_as_exact, pair
from shared_profiles.profile import Profile
from tiny_models import in_double, mixed_profile, patch


def sparse_prefill(params: Params, inputs: Mapping[str, Any], **options: Any) -> Prefilled:
    """`jax_blindsight.sparse_prefill` that runs the tests' prompts sparsely, short as they are."""
    return jax_blindsight.sparse_prefill(params, inputs, **dict(break_even=False) | options)


def generate(params: Params, inputs: Mapping[str, Any], **options: Any) -> np.ndarray:
    """`jax_blindsight.generate` that does."""
    return jax_blindsight.generate(params, inputs, **dict(break_even=False) | options)


@dataclass(frozen=True)
class Expected:
    """Logits `[B, N, V]` of transformers in float32 and in float64, and `[B, N]` which of them mean something."""

    plain: np.ndarray
    truth: np.ndarray
    valid: np.ndarray

    def check(self, logits: Any, at: tuple | None = None) -> None:
        """Demands logits of all real tokens, or of those `at` an index, as exact as transformers' own."""
        at = (self.valid,) if at is None else at
        assert_as_exact(np.asarray(logits)[at], self.plain[at], self.truth[at])


@dataclass(frozen=True)
class Twin:
    """One model: in transformers in float32 and float64, in JAX in float32 with a profile of all categories."""

    single: Any
    double: Any
    params: jax_blindsight.Params

    def expect(self, inputs: Mapping[str, torch.Tensor], profile: Profile | None) -> Expected:
        """What transformers makes of a batch, patched with the profile or, without one, as it is."""
        logits = []
        for model, given in ((self.single, inputs), (self.double, in_double(dict(inputs)))):
            with torch.no_grad(), nullcontext() if profile is None else patch(model, profile, impl="portable"):
                logits.append(model(**given).logits.numpy())
        return Expected(*logits, valid=inputs["attention_mask"].numpy() != 0)


def _profile(family: str, model: Any) -> Profile:
    """All categories in every layer of Qwen2.5-VL; of the others two in each, all in all, which compiles faster."""
    mixed = mixed_profile(model, seed=3)
    if family == "qwen2_5_vl":
        return mixed
    return replace(mixed, categories=np.array([[1, 1, 3, 3], [0, 2, 0, 2], [3, 3, 0, 0], [2, 1, 1, 2]]))


@cache
def twin(family: str) -> Twin:
    """Shared: leave its models unpatched."""
    models = pair(family)
    with tempfile.TemporaryDirectory() as folder:
        models.single.save_pretrained(folder)
        params = jax_blindsight.load(folder, _profile(family, models.single))
    return Twin(models.single, models.double, params)


def in_numpy(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the processor would return with `return_tensors="np"`."""
    return {name: value.numpy() for name, value in inputs.items()}
