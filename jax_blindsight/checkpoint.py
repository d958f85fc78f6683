"""Saved models: a folder with the weights as orbax keeps them, and what else it takes to load them again.

    blindsight_jax.json       schema; dtype, shapes and fingerprint of the model; sizes of the files in weights/
    config.json               the Hugging Face configuration
    generation_config.json    at least the tokens that end an answer
    blindsight_profile.json   the profile, if there is one
    weights/                  orbax
    ...                       files of the processor, where they were given

A folder takes its name when all of it is written, so an interrupted save never looks like a whole one.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jax_blindsight.model import Weights
from jax_blindsight.tensor_files import DTYPES
from shared_profiles.profile import Fingerprint

CONFIG, MANIFEST, WEIGHTS = "config.json", "blindsight_jax.json", "weights"
SCHEMA = "blindsight-jax/1"

_AGAIN = "Convert the checkpoint again."


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `write`."""
    return (folder / MANIFEST).is_file()


def check_target(folder: Path) -> None:
    """Demands that a folder can be written.

    Raises:
        ValueError: it exists and is not empty, or is the working folder, whose place another would take; or the folder
            around it is missing or read-only.
    """
    around = folder.resolve().parent
    if folder.resolve() == Path.cwd():
        wrong = "it is the working folder"
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        wrong = "it exists"
    elif not around.is_dir():
        wrong = f"there is no folder {around}"
    elif not os.access(around, os.W_OK):
        wrong = f"the folder {around} is read-only"
    else:
        return
    raise ValueError(f"a model must be saved to a new folder, or an empty one. Got {folder}: {wrong}. Name another.")


def write(folder: Path, weights: Weights, fingerprint: Fingerprint, files: Mapping[str, str | Path]) -> None:
    """Writes a folder whole or not at all.

    Args:
        folder: where; new, or empty.
        weights: all of one dtype, float32, bfloat16 or float16.
        fingerprint: of the model.
        files: what goes beside them, by name: a text, or a file to copy.

    Raises:
        ValueError: see `check_target`; or the weights are of other or several dtypes.
        OSError: the disk is full, or a file cannot be read.
    """
    check_target(folder)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(weights)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES.values()):
        raise ValueError(
            f"a model to be saved must be of one dtype, {', '.join(x.name for x in DTYPES.values())}. Got "
            f"{', '.join(sorted(x.name for x in dtypes))}. Cast all leaves: jax.tree.map(lambda x: x.astype(...), ...)."
        )
    target = folder.resolve()
    size, free = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)), shutil.disk_usage(target.parent).free
    if size > free:  # orbax would tell it in hundreds of lines
        raise OSError(
            f"the disk must have room for {size:,} bytes. Got {folder}, where {free:,} are free. Make room, or "
            "name another folder."
        )
    temporary = target.with_name(f".blindsight-{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir()
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                (temporary / name).write_text(content, encoding="utf-8")
        try:
            with _checkpointer(weights) as checkpointer:
                checkpointer.save(temporary / WEIGHTS, weights)
        except ValueError as error:  # as orbax calls a disk that is full or fails
            raise OSError(f"{folder} could not be written: {error}") from error
        manifest = {
            "schema": SCHEMA,
            "dtype": dtypes.pop().name,
            "fingerprint": asdict(fingerprint),
            "shapes": _shapes(weights),
            "sizes": _sizes(temporary / WEIGHTS),
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the first failure is the one to report
        raise


def _checkpointer(weights: Weights) -> ocp.StandardCheckpointer:
    """Orbax with about 1 GB in flight, and room for the largest weight; by itself it copies everything at once."""
    gigabytes = 1 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights)) // 10**9
    return ocp.StandardCheckpointer(save_concurrent_gb=gigabytes, restore_concurrent_gb=gigabytes)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder, by path."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _shapes(weights: Weights) -> dict[str, list[int]]:
    """Shapes of all leaves, by path."""
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in jax.tree.leaves_with_path(weights)}


class SavedModel:
    """A folder that `write` wrote.

    Attributes:
        dtype: of its weights.
        fingerprint: of the model.

    Raises:
        ValueError: the manifest is damaged or of another version; or files of the weights are missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self._weights = (folder / WEIGHTS).absolute()
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["schema"] != SCHEMA:
                raise ValueError(f"schema {manifest['schema']!r}")
            self.dtype = {dtype.name: dtype for dtype in DTYPES.values()}[manifest["dtype"]]
            self.fingerprint = Fingerprint(**manifest["fingerprint"])
            self._shapes, sizes = dict(manifest["shapes"]), dict(manifest["sizes"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be a manifest of {SCHEMA}. Got {error!r}. {_AGAIN}") from error
        # Looked at first, as shapes are in `read`: orbax reads all at once, answers what does not fit with a page of
        # tracebacks, and leaves tasks behind.
        # Hidden files that a file manager or a network drive left there do no harm.
        found = {name: n for name, n in _sizes(self._weights).items() if name in sizes or not _is_hidden(name)}
        if wrong := sorted(name for name in sizes.keys() | found.keys() if sizes.get(name) != found.get(name)):
            raise ValueError(
                f"{self._weights} must hold the files that {MANIFEST} names, in their sizes. Other, missing or not "
                f"named: {', '.join(wrong)}. {_AGAIN}"
            )

    def read(self, target: Weights) -> Weights:
        """The weights.

        Args:
            target: a tree of `jax.ShapeDtypeStruct`, with a sharding each.

        Raises:
            ValueError: they are damaged, or not those of the target.
        """
        wanted = _shapes(target)
        wrong = sorted(x for x in wanted.keys() | self._shapes.keys() if wanted.get(x) != self._shapes.get(x))
        if wrong:
            raise ValueError(
                f"{self._weights} must hold the weights of the model in {CONFIG}. Of another shape, missing or not of "
                f"that model: {', '.join(wrong)[:400]}. {_AGAIN}"
            )
        try:
            with _checkpointer(target) as checkpointer:
                return checkpointer.restore(self._weights, target)
        except (ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:400]
            raise ValueError(
                f"{self._weights} must hold the weights of the model in {CONFIG}. Got: {reason}. {_AGAIN}"
            ) from error
