"""The tensors of a Hugging Face checkpoint folder, read one at a time.

`model.safetensors`, or the shards that `model.safetensors.index.json` names. Headers are read at once, so that every
name, shape and dtype is known before the first byte of data is. A file is mapped only while one of its tensors is
read: mapped pages count as memory of the process, and a checkpoint's would add up to its size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# As safetensors calls them. Quantised weights need their scales, which no name here has a place for.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}

_ROWS_BYTES = 2**24  # of each tensor, while two are compared

_AGAIN = "Download or save the checkpoint again."


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what its file's header says of it; `dtype` as safetensors spells it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of one checkpoint folder.

    Args:
        folder: what `save_pretrained` wrote, or a downloaded snapshot.

    Attributes:
        folder: the folder.
        tensors: every tensor by its name on disk, in the order of the files.

    Raises:
        ValueError: there are no safetensors files, or they are damaged or not the ones that the index names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        index = None
        if (folder / SINGLE).is_file():
            files = [folder / SINGLE]
        elif (folder / INDEX).is_file():
            index = _read_index(folder / INDEX)
            files = [folder / name for name in sorted(set(index.values()))]
        else:
            found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise ValueError(
                f"{folder} must hold {SINGLE} or {INDEX} and its shards. Got {found}. Save the model with "
                "save_pretrained, which writes safetensors."
            )
        if lost := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{folder} must hold every file that {INDEX} names. Not there: {listed(lost)}. {_AGAIN}")
        for file in files:
            self._read_header(file)
        if index is not None and (wrong := self._contradictions(index)):
            raise ValueError(f"{folder / INDEX} must tell what its shards hold. Got {'; '.join(wrong)}. {_AGAIN}")

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is on disk, in memory of its own.

        Raises:
            ValueError: its file is damaged.
        """
        file = self.tensors[name].file
        with _opened(file) as tensors:
            return tensors.get_tensor(name)

    def read_rows(self, name: str, rows: list[int] | slice) -> np.ndarray:
        """Some rows of a tensor, and no more of the file than that.

        Raises:
            ValueError: its file is damaged.
        """
        with _opened(self.tensors[name].file) as tensors:
            data = tensors.get_slice(name)
            if isinstance(rows, slice):
                return data[rows]
            return np.concatenate([data[row : row + 1] for row in rows])

    def equal(self, a: str, b: str) -> bool:
        """Whether two tensors are the same to the bit; read a few rows at a time.

        Raises:
            ValueError: a file is damaged.
        """
        infos = self.tensors[a], self.tensors[b]
        if infos[0].shape != infos[1].shape or infos[0].dtype != infos[1].dtype:
            return False
        n_rows, *rest = (*infos[0].shape, 1)
        step = max(1, _ROWS_BYTES // max(1, 4 * int(np.prod(rest))))
        with _opened(infos[0].file) as file_a, _opened(infos[1].file) as file_b:
            slices = file_a.get_slice(a), file_b.get_slice(b)
            rows = (slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step))
            return all(slices[0][piece].tobytes() == slices[1][piece].tobytes() for piece in rows)

    def _read_header(self, file: Path) -> None:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name in self.tensors:
                    raise ValueError(
                        f"every tensor must be in one file. Got {name} in {self.tensors[name].file.name} and "
                        f"{file.name}. {_AGAIN}"
                    )
                data = tensors.get_slice(name)
                self.tensors[name] = TensorInfo(file, tuple(data.get_shape()), data.get_dtype())

    def _contradictions(self, index: dict[str, str]) -> list[str]:
        """How the index differs from what the shards hold."""
        held = {name: info.file.name for name, info in self.tensors.items()}
        groups = {
            "named but in no shard": sorted(index.keys() - held.keys()),
            "in a shard but not named": sorted(held.keys() - index.keys()),
            "in another shard than named": sorted(n for n in index.keys() & held.keys() if index[n] != held[n]),
        }
        return [f"{what}: {listed(names)}" for what, names in groups.items() if names]


class _opened:
    """`safe_open` whose errors are told as ValueErrors that name the file; a context manager."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Any:
        try:
            self.open = safe_open(self.file, framework="numpy")
            return self.open.__enter__()
        except SafetensorError as error:
            raise self._damaged(error) from error

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.open.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError):
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.file} must be a whole safetensors file. Got: {error}. {_AGAIN}")


def _read_index(path: Path) -> dict[str, str]:
    """The file name of every tensor."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be JSON with a weight_map. Got {error!r}. {_AGAIN}") from error
    good = isinstance(index, dict) and all(isinstance(name, str) and name == Path(name).name for name in index.values())
    if not good:
        raise ValueError(f"{path} must map tensors to names of files beside it. Got {str(index)[:200]}. {_AGAIN}")
    return index


def listed(names: Iterable[str]) -> str:
    """Names in one line; those that differ in their first number only are told together, `layers.[0-3, 7].norm`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = re.fullmatch(r"(.*?)(?:(?<=\.)(\d+)(?=\.)(.*))?", name).groups()  # type: ignore[union-attr]
        groups.setdefault((before, after or ""), []).extend([int(number)] if number else [])
    return ", ".join(before + _ranges(sorted(numbers)) + after for (before, after), numbers in groups.items())


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers, neighbours joined: "7" or "[0-3, 7]"; "" for none."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n for n in numbers if n + 1 not in numbers]
    return f"[{', '.join(str(a) if a == b else f'{a}-{b}' for a, b in zip(starts, stops, strict=True))}]"
