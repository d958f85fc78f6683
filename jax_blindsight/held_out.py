"""Measuring a choice of categories on held-out prompts: what it does to the next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jax_blindsight.inputs import read_inputs
from jax_blindsight.params import Params
from jax_blindsight.prefill import sparse_prefill
from shared_profiles.budget import Measured, divergence
from shared_profiles.profile import Profile
from shared_profiles.split import require_held_out


class HeldOut:
    """Held-out prompts and what the dense model answers; calling it measures a choice of categories.

    Every choice is a program of its own per bucket of prompt lengths, compiled when it is measured.

    Args:
        params: weights and configuration.
        profile: whose template the sparse prefills have.
        prompts: the prompts by their digest, one each, in NumPy. Those with fewer than two images are left out:
            nothing is ever sparse about them.
        impl: what computes the attention; as in `sparse_prefill`.

    Attributes:
        prompts: those that are measured.
        n_tokens: how long each of them is.

    Raises:
        ValueError: no prompt has two images.
    """

    def __init__(
        self, params: Params, profile: Profile, prompts: Mapping[str, Mapping[str, Any]], impl: str | None = None
    ) -> None:
        self._params, self._profile, self._impl = params, profile, impl
        self.prompts: dict[str, Mapping[str, Any]] = {}
        self.n_tokens: dict[str, int] = {}
        for prompt_id, prompt in prompts.items():
            (layout,) = read_inputs(params.config, prompt).tokens.layouts(params.config)
            if layout.n_images >= 2:
                self.prompts[prompt_id] = prompt
                self.n_tokens[prompt_id] = layout.stop - layout.start
        require_held_out(len(self.prompts), len(prompts))
        self._dense = self._log_probs(params, dense=True)  # [N, V] float32

    def __call__(self, categories: np.ndarray) -> Measured:
        """Runs every prompt with categories `[L, H]`."""
        profile = replace(self._profile, categories=categories, curve=())
        return divergence(self._dense, self._log_probs(replace(self._params, profile=profile), dense=False))

    def _log_probs(self, params: Params, *, dense: bool) -> np.ndarray:
        rows = []
        for prompt in self.prompts.values():
            n = prompt["input_ids"].shape[1]
            logits = sparse_prefill(params, prompt, capacity=n, dense=dense, impl=self._impl).logits
            rows.append(np.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=-1)))
        return np.concatenate(rows)
