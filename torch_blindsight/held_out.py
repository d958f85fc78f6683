"""Measuring a choice of categories on held-out prompts: what it does to the next token.

Several processes each run their share of the prompts, and all learn what came of every prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from shared_profiles import Layout
from shared_profiles.collection import of_prompt
from shared_profiles.measured import Measured, divergence, require_numbers
from shared_profiles.processes import ALONE, Processes
from shared_profiles.profile import Profile
from shared_profiles.split import require_held_out
from torch_blindsight.attention import AttendLayer
from torch_blindsight.handle import Handle
from torch_blindsight.implementations import Implementation
from torch_blindsight.models import ModelInfo
from torch_blindsight.modes import Mode, SparseMode
from torch_blindsight.prompts import next_token_logits


class HeldOut:
    """Held-out prompts and what the dense model answers; calling it measures a choice of categories.

    Args:
        model: the model, in evaluation mode and not patched.
        info: its attention-relevant facts.
        implementation: what computes the sparse prefills.
        profile: whose template they have.
        prompts: the prompts by their digest, one each, on any device. Those with fewer than two images are left out:
            nothing is ever sparse about them.
        processes: those that share the prompts; each must make one of these, and call it with the same categories.

    Attributes:
        n_tokens: how long each prompt is that is measured, by its digest in ascending order.

    Raises:
        ValueError: no prompt has two images; or one is malformed, or makes the model answer NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo,
        implementation: Implementation,
        profile: Profile,
        prompts: Mapping[str, Mapping[str, Any]],
        processes: Processes = ALONE,
    ) -> None:
        self._model, self._info, self._implementation, self._profile = model, info, implementation, profile
        self._processes = processes
        self._prompts: dict[str, Mapping[str, Any]] = {}  # this process's
        self._dense: dict[str, np.ndarray] = {}  # [1, V] float32 each
        sizes: dict[str, tuple[int, int]] = {}
        reference = self._reference = _Reference(profile, implementation, info, break_even=False)
        with self._patched(reference):
            for turn, prompt_id in enumerate(sorted(prompts)):
                if not processes.is_mine(turn):
                    continue
                reference.layout = None
                with of_prompt(f"held-out prompt {prompt_id}"):
                    log_probs = self._log_probs(prompts[prompt_id])
                    layout = reference.layout
                    if layout is not None:
                        require_numbers(log_probs)
                        self._prompts[prompt_id], self._dense[prompt_id] = prompts[prompt_id], log_probs
                        sizes[prompt_id] = layout.stop - layout.start, layout.n_images
        together = dict(sorted((k, size) for theirs in processes.gather(sizes) for k, size in theirs.items()))
        self.n_tokens = {prompt_id: n for prompt_id, (n, _) in together.items()}
        self._n_images = np.array([n for _, n in together.values()])
        require_held_out(len(self.n_tokens), len(prompts))

    def __call__(self, categories: np.ndarray) -> Measured:
        """Runs every prompt with categories `[L, H]`; the figures are in the order of `n_tokens`.

        Raises:
            RuntimeError: a prefill that should have run sparse did not.
        """
        profile = replace(self._profile, categories=categories, curve=())
        mode = SparseMode(profile, self._implementation, self._info, break_even=False)
        mine: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        with self._patched(mode if categories.any() else self._reference) as handle:
            for prompt_id, prompt in self._prompts.items():
                mine[prompt_id] = divergence(self._dense[prompt_id], self._log_probs(prompt))
            ran = handle.report()["forwards"]
        if categories.any() and set(ran) - {"sparse"}:
            raise RuntimeError(f"all {len(self._prompts)} held-out prompts must have run sparse. Got {ran}.")
        all_ = {k: found for theirs in self._processes.gather(mine) for k, found in theirs.items()}
        kl, agree = zip(*(all_[prompt_id] for prompt_id in self.n_tokens), strict=True)
        return Measured(np.concatenate(kl), np.concatenate(agree), self._n_images)

    def _patched(self, mode: Mode) -> Handle:
        handle = Handle(self._model, self._info, mode, self._implementation)
        handle.install()
        return handle

    @torch.no_grad()
    def _log_probs(self, prompt: Mapping[str, Any]) -> np.ndarray:
        """`[1, V]` float32."""
        here = moved(prompt, next(self._model.parameters()).device)
        return next_token_logits(self._model, here).float().log_softmax(-1).cpu().numpy()


def moved(prompt: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The prompt with its tensors on a device."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in prompt.items()}


class _Reference(SparseMode):
    """Runs every prompt with all heads dense, and notes those that could have been sparse; a `Mode`.

    By the implementation, as transformers' SDPA needs an N x N mask for Gemma 3.
    """

    layout: Layout | None = None

    def prefill(self, layouts: list[Layout], q_start: int, arguments: dict[str, Any]) -> tuple[str, AttendLayer]:
        """Notes this prompt."""
        (self.layout,) = layouts
        return "reference", self.attend_dense
