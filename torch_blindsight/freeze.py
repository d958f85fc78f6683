"""Calibration on the fly: measure the first multi-image prompts, then freeze a profile from them and save it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared_profiles import Layout, SinkTemplate, SpecialTokens
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
        self._seen: list[_Prompt] = []

    def after(self, prefill: Prefill, arguments: dict[str, Any]) -> Mode:
        """Takes the records of the prefill that just ended; sparse once there are enough."""
        assert isinstance(prefill.attend, Observer)  # not `self.observer`: another thread may have begun since
        prompts = _prompts(prefill.layouts, arguments, self.info.special)
        for prompt, record in zip(prompts, prefill.attend.records(), strict=True):
            if record is None or any(prompt.repeats(known) for known in self._seen):
                continue
            self._seen.append(prompt)
            try:
                self.statistics.add(prompt_digest({"ids": prompt.ids, "pictures": prompt.pictures}), record)
            except ValueError as error:  # it is served all the same
                logger.warning("a prompt could not be measured, another one will be: %s", error)
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


@dataclass(frozen=True)
class _Prompt:
    """What tells a prompt from others.

    Attributes:
        ids: `[N]`, without padding.
        pictures: SHA-256 of its pixels, or of what the vision tower made of them, an array of bytes.
    """

    ids: np.ndarray
    pictures: np.ndarray

    def repeats(self, other: _Prompt) -> bool:
        """Whether they are one prompt, or one the other with an answer behind it.

        `generate` repeats rows for beams, and the whole prompt for every token where it keeps no cache.
        """
        n = min(len(self.ids), len(other.ids))
        return np.array_equal(self.pictures, other.pictures) and np.array_equal(self.ids[:n], other.ids[:n])


def _prompts(layouts: list[Layout], arguments: Mapping[str, Any], special: SpecialTokens) -> list[_Prompt]:
    """The rows of a forward."""
    ids = arguments["input_ids"].cpu().numpy()
    pictures = [hashlib.sha256() for _ in ids]
    encoded = arguments.get("mm_encoder_outputs") or {}  # instead of pixels, from `generate` of later transformers
    for name, kind, token in (
        ("pixel_values", "image", special.image),
        ("pixel_values_videos", "video", special.video),
    ):
        pixels = arguments.get(name)
        if pixels is None and encoded.get(kind) is not None:
            pixels = torch.cat([picture.detach().flatten(0, -2) for picture in encoded[kind].pooler_output])
        if pixels is not None:
            # An image of as many tokens has as many rows of pixels.
            share = (ids == token).sum(1)
            for digest, part in zip(pictures, pixels.split((share * len(pixels) // share.sum()).tolist()), strict=True):
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return [
        _Prompt(row[layout.start : layout.stop], np.frombuffer(digest.digest(), np.uint8))
        for row, layout, digest in zip(ids, layouts, pictures, strict=True)
    ]
