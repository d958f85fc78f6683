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
from jax_blindsight.settings import with_own_settings
from shared_profiles.collection import of_prompt
from shared_profiles.measured import Measured, divergence, require_numbers
from shared_profiles.profile import Profile
from shared_profiles.split import require_held_out


class HeldOut:
    """Held-out prompts and what the dense model answers; calling it measures a choice of categories.

    Args:
        params: weights and configuration.
        prompts: the prompts by their digest, one each. Those with fewer than two images are left out: nothing is ever
            sparse about them.
        impl: what computes the attention; as in `sparse_prefill`.

    Attributes:
        prompts: those that are measured.
        n_tokens: how long each of them is.

    Raises:
        ValueError: no prompt has two images; or one is malformed, or makes the model answer NaN.
    """

    def __init__(self, params: Params, prompts: Mapping[str, Mapping[str, Any]], impl: str | None = None) -> None:
        self._params, self._impl = params, impl
        self.prompts: dict[str, Mapping[str, Any]] = {}
        self.n_tokens: dict[str, int] = {}
        n_images = []
        for prompt_id, prompt in prompts.items():
            with of_prompt(f"held-out prompt {prompt_id}"):
                (layout,) = read_inputs(params.config, prompt).tokens.layouts(params.config)
            if layout.n_images >= 2:
                self.prompts[prompt_id] = prompt
                self.n_tokens[prompt_id] = layout.stop - layout.start
                n_images.append(layout.n_images)
        require_held_out(len(self.prompts), len(prompts))
        self._n_images = np.array(n_images)
        self._dense, _ = self._log_probs(params, dense=True)  # [N, V] float32

    def __call__(self, profile: Profile, categories: np.ndarray) -> Measured:
        """Runs every prompt with categories `[L, H]` and the template of a profile.

        Raises:
            RuntimeError: a prefill that should have run sparse did not.
        """
        profile = replace(profile, categories=categories, curve=())
        sparse, ran = self._log_probs(replace(self._params, profile=profile), dense=False)
        if categories.any() and ran != {"sparse"}:
            raise RuntimeError(f"all {len(self.prompts)} held-out prompts must have run sparse. Got {sorted(ran)}.")
        return Measured(*divergence(self._dense, sparse), self._n_images)

    @with_own_settings
    def _log_probs(self, params: Params, *, dense: bool) -> tuple[np.ndarray, set[str]]:
        """Log-probabilities of the next tokens, `[N, V]` float32, and how the prefills ran."""
        rows, ran = [], set()
        for prompt_id, prompt in self.prompts.items():
            n = np.shape(prompt["input_ids"])[1]
            with of_prompt(f"held-out prompt {prompt_id}"):
                done = sparse_prefill(params, prompt, capacity=n, dense=dense, break_even=False, impl=self._impl)
                row = np.asarray(jax.nn.log_softmax(done.logits.astype(np.float32), axis=-1))
                if dense:
                    require_numbers(row)
            ran.add(done.how)
            rows.append(row)
        return np.concatenate(rows), ran
