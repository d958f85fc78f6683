"""Where profiles are looked for when the user names none, and where a frozen one is saved.

In this order, by fingerprint: `blindsight_profile.json` beside the checkpoint; the user's cache folder
(`$BLINDSIGHT_CACHE`, else `$XDG_CACHE_HOME/blindsight`, else `~/.cache/blindsight`); those bundled with the library.
"""

from __future__ import annotations

import logging
import os
from importlib import resources
from pathlib import Path

from shared_profiles._profile_json import VERSION
from shared_profiles.profile import Fingerprint, Profile, ProfileMismatchError

logger = logging.getLogger("shared_profiles")

FILE_NAME = "blindsight_profile.json"


def cache_path(fingerprint: Fingerprint) -> Path:
    """The file of a model's profile in the user's cache folder.

    Its name has the format's version, so that versions of this library that write others pass each other's files over.

    Raises:
        OSError: no variable names the folder, and the user has no home.
    """
    root = os.environ.get("BLINDSIGHT_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache", "blindsight")
    digest = fingerprint.digest.removeprefix("sha256:")[:24]
    return Path(root) / "profiles" / f"{fingerprint.family}-{digest}.v{VERSION}.json"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise OSError(f"no home folder: {str(error).rstrip('.')}") from error


def find_profile(fingerprint: Fingerprint, checkpoint: str | None) -> tuple[Profile, Path] | None:
    """The first profile made for this very model, and where it was found; None if there is none.

    A profile beside the checkpoint must fit it: one of another model there is an error, not a miss. A cache folder that
    cannot be read counts as empty, and the log says so.

    Args:
        fingerprint: the model's.
        checkpoint: the folder that the model was loaded from, if any.

    Raises:
        ProfileError: a file that should hold this model's profile is damaged or of another model.
        OSError: the one beside the checkpoint cannot be read.
    """
    if checkpoint and (found := _load(Path(checkpoint) / FILE_NAME, fingerprint)) is not None:
        return found
    try:
        found = _load(cache_path(fingerprint), fingerprint)
    except OSError as error:
        logger.warning(
            "no profile is looked for in the user's cache folder: %s. Set BLINDSIGHT_CACHE to a folder of yours.", error
        )
    else:
        if found is not None:
            return found
    for path in _bundled():
        profile = Profile.load(path)
        if profile.fingerprint == fingerprint:
            return profile, path
    return None


def searched(fingerprint: Fingerprint, checkpoint: str | None) -> str:
    """Where `find_profile` looks, in words, for those who must say that it found nothing."""
    try:
        cache = str(cache_path(fingerprint))
    except OSError as error:
        cache = str(error)
    return f"beside the checkpoint ({checkpoint or 'folder unknown'}), in the user's cache folder ({cache}), bundled"


def _load(path: Path, fingerprint: Fingerprint) -> tuple[Profile, Path] | None:
    """The profile of a file, which must be this model's; None where there is no file."""
    try:
        profile = Profile.load(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        profile.require(fingerprint)
    except ProfileMismatchError as error:
        raise ProfileMismatchError(f"{path}: {error} Or remove the file, to look further.") from error
    return profile, path


def _bundled() -> list[Path]:
    folder = Path(str(resources.files("shared_profiles"))) / "bundled"
    return sorted(folder.glob("*.json")) if folder.is_dir() else []
