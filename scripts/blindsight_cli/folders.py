"""Checkpoint folders and files to be written, as far as they can be looked at without a framework."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from blindsight_cli.errors import IncompatibleError
from shared_profiles import family_of
from shared_profiles._atomic import write_atomically
from shared_profiles.lookup import find_profile
from shared_profiles.profile import Fingerprint, Profile

Kind = Literal["profile", "page", "benchmark"]
_KINDS: dict[Kind, str] = {"profile": "a profile", "page": "an HTML page", "benchmark": "a result of blindsight bench"}
_FOR_JAX = "blindsight_jax.json"  # as jax_blindsight.checkpoint calls it, which cannot be imported without JAX
AGAIN = "Download or save the checkpoint again."


def check_family(folder: Path) -> None:
    """Reads a checkpoint's `config.json` before any weights are.

    Raises:
        IncompatibleError: the family is not supported.
        ValueError: the folder holds no checkpoint.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = "there is no config.json in it" if folder.is_dir() else "there is no such folder"
        raise ValueError(
            f"CHECKPOINT must be a folder, as save_pretrained writes it. Got {folder}: {found}. A checkpoint on a hub "
            f"must be downloaded first: hf download {folder} --local-dir FOLDER"
        )
    try:
        config = read_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON. Got: {error}. {AGAIN}") from error
    try:
        family_of(config if isinstance(config, dict) else {})
    except ValueError as error:
        raise IncompatibleError(f"{folder}: {error}") from error


def read_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def write_json(path: Path, document: Any) -> None:
    """Writes a result file, whole or not at all.

    Raises:
        ValueError: the document holds NaN or an infinity, which JSON has not.
        OSError: the file cannot be written.
    """
    write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def named_or_found(
    given: Profile | None, path: Path | None, print_: Fingerprint, checkpoint: Path
) -> tuple[Profile, Path] | tuple[None, None]:
    """The profile that was named, of the file `path`, else the one that is found for a model; and its file.

    Raises:
        ProfileError: it is damaged or belongs to another model.
    """
    if given is not None and path is not None:
        given.require(print_)
        return given, path
    return find_profile(print_, str(checkpoint)) or (None, None)


def is_for_jax(folder: Path) -> bool:
    """Whether a folder holds weights that `blindsight convert` wrote for JAX."""
    return (folder / _FOR_JAX).is_file()


def require_for_torch(folder: Path) -> None:
    """Refuses a folder that PyTorch cannot load.

    Raises:
        ValueError: its weights are converted for JAX.
    """
    if is_for_jax(folder):
        raise ValueError(
            f"PyTorch needs a checkpoint as save_pretrained writes it. Got {folder}, which `blindsight convert` wrote "
            "for JAX. Use --backend jax where the command has it, or name the checkpoint that was converted."
        )


def require_writable(
    option: str, path: Path, others: Mapping[str, Path | None] | None = None, *, kind: Kind | None = None
) -> None:
    """Refuses, before the work, a file that could not be written after it, or whose writing would destroy another.

    Args:
        option: the option that named the file.
        path: the file.
        others: what else is read or written, by the option or argument that named it.
        kind: what is written; a file that is there must be of that kind, or empty. Default: it may be any file.

    Raises:
        ValueError: it is one of the others, a folder, device or pipe, or of another kind, or the folder around it is
            missing or read-only.
    """
    for other, its in (others or {}).items():
        if its is not None and its.resolve() == path.resolve():
            raise ValueError(f"{option} must name a file of its own. Got {path}, which is also {other}.")
    folder = path.parent
    if path.is_dir():
        wrong = "it is a folder"
    elif path.exists() and not path.is_file():
        wrong = "it is a device or a pipe"
    elif not folder.is_dir():
        wrong = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        wrong = f"the folder {folder} is read-only"
    elif kind is not None and path.is_file() and not _is_of(kind, path):
        raise ValueError(
            f"{option} may write over {_KINDS[kind]} only. Got {path}, which is something else. Name another, or "
            "remove it first."
        )
    else:
        return
    raise ValueError(f"{option} must name a file that can be written. Got {path}: {wrong}. Name another.")


def _is_of(kind: Kind, path: Path) -> bool:
    """Whether a file is of a kind, or empty; of large files of weights only the beginning is read."""
    with path.open("rb") as file:
        begin = file.read(64).lstrip()
    if kind == "page" or not begin.startswith(b"{"):
        return path.stat().st_size == 0 or (kind == "page" and begin.lower().startswith(b"<!doctype html"))
    try:
        document = read_json(path.read_bytes())
    except ValueError:
        return False
    if kind == "profile":
        return str(document.get("schema")).startswith("blindsight.profile/")
    return {"machine", "repeats", "rows"} <= set(document)
