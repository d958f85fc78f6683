"""Whether items were calibrated on, as far as that can be told.

A profile keeps one hash of all its prompts. It shows that a file is the one it was made from; which single prompts it
was made from, only that file can say (`--calibration FILE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blindsight_cli.evaluation.items import Item, about, digest
from blindsight_cli.prompt_file import PromptLoader, open_images, read_prompts
from shared_profiles.profile import Profile
from shared_profiles.provenance import dataset_hash, prompt_digest


@dataclass(frozen=True)
class Overlap:
    """What was found out.

    Attributes:
        checked: whether the items were compared with calibration prompts one by one.
        told: in words: by what, or why not.
        pictures: digests of the calibration's pictures and videos.
    """

    checked: bool
    told: str
    pictures: frozenset[str] = field(default=frozenset(), repr=False)

    def n_seen(self, parts: Sequence[str]) -> int:
        """How many of a prompt's pictures and videos, by their digests, were calibrated on, as far as that is known."""
        return sum(part in self.pictures for part in parts)


def check_overlap(
    items: Sequence[Item], data: Path, calibration: Path | None, profile: Profile, processor: Any
) -> Overlap:
    """Refuses items that were calibrated on: the same question about the same pictures and videos.

    Args:
        items: the items of `data`.
        data: the file of items.
        calibration: the file of calibration prompts, if it was named.
        profile: the profile to judge.
        processor: the checkpoint's, by whose output the profile's prompts are recognized.

    Raises:
        ValueError: items are among the calibration prompts, or a file is not as it should be.
        OSError: a file cannot be read.
    """
    compared = None if calibration is None else _compare(items, data, calibration)
    source = profile.provenance
    if calibration is not None and is_data_of(profile, calibration, processor):
        assert compared is not None
        return replace(compared, told=f"{compared.told}; the profile was made from it, by its hash")
    if source is not None and is_data_of(profile, data, processor):
        raise ValueError(
            f"items must not have been calibrated on. The profile was made from the first {source.n_prompts} "
            f"multi-image prompts of {data}. Take other items, or calibrate on others."
        )
    if compared is not None:
        return replace(compared, told=f"{compared.told}; that the profile was made from it could not be shown")
    if source is None:
        return Overlap(False, "the profile does not say what it was made from")
    return Overlap(
        False,
        f"the profile was made from {source.dataset!r} and keeps only a hash of it, which the first prompts of {data} "
        "do not have; name its file with --calibration to compare prompt by prompt",
    )


def is_data_of(profile: Profile, path: Path, processor: Any) -> bool:
    """Whether a profile was made from the first multi-image prompts of a file, by its hash."""
    provenance = profile.provenance
    telling = [prompt for prompt in read_prompts(path) if prompt.multi_image]
    if provenance is None or len(telling) < provenance.n_prompts:
        return False
    ids: set[str] = set()
    for inputs in PromptLoader(telling, path, processor, "cpu"):
        ids.add(prompt_digest({name: value.numpy() for name, value in inputs.items()}))
        if len(ids) == provenance.n_prompts:  # a prompt that is there twice is measured once
            break
    return dataset_hash(ids) == provenance.dataset_hash


def _compare(items: Sequence[Item], data: Path, calibration: Path) -> Overlap:
    """Compares items with calibration prompts by content."""
    prompts = read_prompts(calibration)
    prompts_seen: set[str] = set()
    pictures: set[str] = set()
    questions: set[str] = set()
    for prompt in prompts:
        parts = about(prompt, open_images(prompt, calibration))
        prompts_seen.add(digest(prompt, parts))
        pictures.update(parts)
        questions.add(prompt.question)
    suspects = [item.prompt for item in items if item.prompt.question in questions]
    same = [p.line for p in suspects if digest(p, about(p, open_images(p, data))) in prompts_seen]
    if same:
        lines = ", ".join(map(str, same[:10])) + (", ..." if len(same) > 10 else "")
        raise ValueError(
            f"items must not have been calibrated on. {len(same)} of {data} are prompts of {calibration}: lines "
            f"{lines}. Remove them, or calibrate on other prompts."
        )
    return Overlap(True, f"no item is among the {len(prompts)} prompts of {calibration}", frozenset(pictures))
