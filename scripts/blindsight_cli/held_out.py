"""Measuring a choice of categories on prompts, whatever framework runs the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from blindsight_cli.backends import Backend, Prompt, next_tokens
from shared_profiles import SinkTemplate
from shared_profiles.measured import Measured, divergence
from shared_profiles.profile import Profile
from shared_profiles.provenance import dataset_hash, prompt_digest
from shared_profiles.split import require_held_out


class HeldOut:
    """Prompts and what the dense model answers; calling it measures a choice of categories.

    Args:
        model: the model.
        profile: whose template the sparse prefills have.
        prompts: one or more rows each. Those where a row has fewer than two images are left out.

    Attributes:
        prompts: those that are measured, by the digest of their content.
        dense: `[N, V]` float32, log-probabilities of the dense next tokens.

    Raises:
        ValueError: no prompt has two images.
    """

    def __init__(self, model: Backend, profile: Profile, prompts: Iterable[Prompt]) -> None:
        self._model, self._profile = model, profile
        self.prompts: dict[str, Prompt] = {}
        n = 0
        n_images: dict[str, list[int]] = {}
        for prompt in prompts:
            n += 1
            rows = [layout.n_images for layout in model.facts.layouts(prompt)]
            if min(rows) >= 2:
                digest = prompt_digest({name: x.cpu().numpy() for name, x in prompt.items()})
                self.prompts[digest], n_images[digest] = prompt, rows
        require_held_out(len(self.prompts), n)
        self._n_images = np.concatenate(list(n_images.values()))
        self.dense = next_tokens(model, self.prompts.values(), None)

    @property
    def digest(self) -> str:
        """One hash of all of them."""
        return dataset_hash(self.prompts)

    def log_probs(self, categories: np.ndarray, template: SinkTemplate | None = None) -> np.ndarray:
        """The next tokens with categories `[L, H]`: `[N, V]` float32.

        Args:
            categories: of every head.
            template: other sinks than the profile's.

        Raises:
            RuntimeError: a prefill that should have run sparse did not.
        """
        template = template or self._profile.template
        profile = replace(self._profile, categories=categories, template=template, curve=())
        return next_tokens(self._model, self.prompts.values(), profile)

    def __call__(self, categories: np.ndarray) -> Measured:
        """Measures categories `[L, H]`."""
        return Measured(*divergence(self.dense, self.log_probs(categories)), self._n_images)
