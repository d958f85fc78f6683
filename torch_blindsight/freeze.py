"""Calibration on the fly: measure the first multi-image prompts, then freeze a profile from them and save it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared_profiles import SinkTemplate, SpecialTokens
from shared_profiles.classifier import Thresholds
from shared_profiles.lookup import cache_path
from shared_profiles.profile import Fingerprint, Profile
from shared_profiles.provenance import make_profile, prompt_digest
from shared_profiles.statistics import Statistics
from torch_blindsight.attention import Prefill
from torch_blindsight.implementations import Implementation
from torch_blindsight.models import PACKAGES, ModelInfo
from torch_blindsight.modes import Mode, SparseMode
from torch_blindsight.observe import ObserveMode, Observer

logger = logging.getLogger("torch_blindsight")


class Freezer(ObserveMode):
    """Measures prompts until there are enough, then becomes the sparse mode of the profile they give; a `Mode`.

    Args:
        info: the model.
        fingerprint: what the profile will be bound to.
        template: sinks and local blocks.
        n_prompts: how many prompts to measure.
        implementation: what measures them, and computes what comes after.
        break_even: see `SparseMode`.

    Raises:
        ValueError: `n_prompts` is not positive.
    """

    def __init__(
        self,
        info: ModelInfo,
        fingerprint: Fingerprint,
        template: SinkTemplate,
        n_prompts: int,
        implementation: Implementation,
        break_even: bool,
    ) -> None:
        super().__init__(info, template, implementation.attend)
        if n_prompts < 1:
            raise ValueError(f"measure_prompts must be at least 1. Got {n_prompts}.")
        self.fingerprint, self.n_prompts = fingerprint, n_prompts
        self._implementation, self._break_even = implementation, break_even
        self.statistics = Statistics(info.n_layers, info.n_heads, origin=fingerprint.digest)

    def after(self, prefill: Prefill, arguments: dict[str, Any]) -> Mode:
        """Takes the records of the prefill that just ended; sparse once there are enough."""
        assert isinstance(prefill.attend, Observer)  # not `self.observer`: another thread may have begun since
        repeats = _repeats(arguments, self.info.special)
        for row, record, again in zip(arguments["input_ids"], prefill.attend.records(), repeats, strict=True):
            if record is not None and not again:
                # Only the ids are hashed, and equal ids may be different prompts.
                digest = prompt_digest({"input_ids": row.cpu().numpy()})
                self.statistics.add(f"{digest}-{len(self.statistics)}", record)
        if len(self.statistics) < self.n_prompts:
            return self
        profile = make_profile(
            self.statistics, Thresholds(), self.template, self.fingerprint, "first prompts seen", PACKAGES
        )
        return SparseMode(profile, self._implementation, self.info, self._break_even, self._save(profile))

    def _save(self, profile: Profile) -> str:
        """Returns where it lies then."""
        counts = ", ".join(f"{n} {category.name}" for category, n in profile.counts().items())
        measured = f"measured {len(self.statistics)} prompts and froze a profile ({counts}); prefills " + (
            "are sparse from now on" if profile.categories.any() else "stay dense: no head may be sparse"
        )
        try:
            path = cache_path(self.fingerprint)
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.save(path)
        except OSError as error:  # serving goes on: the profile is in memory, and the user is told how to keep it
            logger.error(
                "%s, but it could not be saved: %s. It stays in memory: call handle.profile.save(path) to keep it, or "
                "set BLINDSIGHT_CACHE to a folder that can be written.",
                measured,
                error,
            )
            return "in memory"
        logger.warning("%s; saved as %s", measured, path)
        return str(path)


def _repeats(arguments: Mapping[str, Any], special: SpecialTokens) -> list[bool]:
    """For each row of a forward, whether an earlier row is the same prompt: `generate` repeats rows for beams."""
    ids = arguments["input_ids"]
    pictures = []
    for name, token in (("pixel_values", special.image), ("pixel_values_videos", special.video)):
        pixels = arguments.get(name)
        if pixels is not None:
            # An image of as many tokens has as many rows of pixels.
            share = (ids == token).sum(1).cpu()
            sizes = share * len(pixels) // share.sum()
            pictures.append(torch.split(pixels, sizes.tolist()))
    rows = list(zip(ids, *pictures, strict=True))

    def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    return [any(same(row, earlier) for earlier in rows[:i]) for i, row in enumerate(rows)]
