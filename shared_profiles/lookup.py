"""Where profiles are looked for when the user names none, and where a frozen one is saved.

In this order, by fingerprint: `blindsight_profile.json` beside the checkpoint; the user's cache folder
(`$BLINDSIGHT_CACHE`, else `$XDG_CACHE_HOME/blindsight`, else `~/.cache/blindsight`); those bundled with the library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from shared_profiles.profile import Fingerprint, Profile, ProfileMismatchError

FILE_NAME = "blindsight_profile.json"


def cache_path(fingerprint: Fingerprint) -> Path:
    """The file of a model's profile in the user's cache folder."""
    root = os.environ.get("BLINDSIGHT_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "blindsight")
    return Path(root) / "profiles" / f"{fingerprint.family}-{fingerprint.digest.removeprefix('sha256:')[:24]}.json"


def find_profile(fingerprint: Fingerprint, checkpoint: str | None) -> tuple[Profile, Path] | None:
    """The first profile made for this very model, and where it was found; None if there is none.

    A profile beside the checkpoint must fit it: one of another model there is an error, not a miss.

    Args:
        fingerprint: the model's.
        checkpoint: the folder that the model was loaded from, if any.

    Raises:
        ProfileError: a file that should hold this model's profile is damaged or of another model.
    """
    for path in _candidates(fingerprint, checkpoint):
        if path.is_file():
            profile = Profile.load(path)
            try:
                profile.require(fingerprint)
            except ProfileMismatchError as error:
                raise ProfileMismatchError(f"{path}: {error} Or remove the file, to look further.") from error
            return profile, path
    for path in _bundled():
        profile = Profile.load(path)
        if profile.fingerprint == fingerprint:
            return profile, path
    return None


def _candidates(fingerprint: Fingerprint, checkpoint: str | None) -> Iterator[Path]:
    if checkpoint:
        yield Path(checkpoint) / FILE_NAME
    yield cache_path(fingerprint)


def _bundled() -> list[Path]:
    folder = Path(str(resources.files("shared_profiles"))) / "bundled"
    return sorted(folder.glob("*.json")) if folder.is_dir() else []
