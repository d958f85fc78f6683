"""Conversion: the tensors of a Hugging Face checkpoint become the leaves of a model's tree, by the table in `names`.

Strict both ways: every tensor fills one leaf (or is one that the model never reads), every leaf is filled, every shape
is checked, and all that is wrong is told at once, before any data is read. Then one tensor at a time is read,
converted and put where it belongs, so that memory stays near the model's size and one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_blindsight.config import ModelConfig
from jax_blindsight.model import Weights, abstract_weights
from jax_blindsight.names import NAMES, Source
from jax_blindsight.tensor_files import DTYPES, TensorFiles, listed
from shared_profiles.fingerprints import sampled_rows

_EMBEDDING = "decoder.embed_tokens.embedding"


class WeightsError(ValueError):
    """A checkpoint's tensors are not those of its model; the message names all that are wrong."""


class Conversion:
    """A checkpoint's tensors, matched with the leaves of its model.

    Args:
        files: the checkpoint's tensors.
        config: the model.

    Attributes:
        unused: tensors of the checkpoint that the model never reads.

    Raises:
        WeightsError: tensors are missing, unknown, misshapen, of a dtype that holds no plain weights, there twice, or
            an output projection differs from the embedding it is tied to.
    """

    def __init__(self, files: TensorFiles, config: ModelConfig) -> None:
        self._files, self._config = files, config
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(abstract_weights(config, np.float32))
        self._leaves = {path_name(path): leaf.shape for path, leaf in leaves}
        names = NAMES[config.family]
        self._sources = {path: names.source(path, shape, config) for path, shape in self._leaves.items()}
        self._on_disk, self.unused, problems = self._match()
        if problems:
            raise WeightsError(
                f"{files.folder} must hold the weights of its {config.family} model, each once and in its shape. Got "
                f"{'; '.join(problems)}. Download or save the checkpoint again, or bring the config.json that belongs "
                "to it."
            )

    def _match(self) -> tuple[dict[str, str], list[str], list[str]]:
        """The name on disk of every source, the unused names, and what is wrong."""
        names, tensors = NAMES[self._config.family], self._files.tensors
        wanted = {source.name: source for source in self._sources.values()}
        assert len(wanted) == len(self._sources), "two leaves of one name"
        on_disk: dict[str, str] = {}
        unused, extra, double, tied = [], [], [], []
        for name in tensors:
            respelled = names.respell(name)
            if respelled in wanted and respelled in on_disk:
                double.append(f"{name} and {on_disk[respelled]}")
            elif respelled in wanted:
                on_disk[respelled] = name
            elif names.is_unused(respelled):
                unused.append(name)
            elif respelled == names.head:  # not wanted, so the embeddings are tied
                tied.append(name)
            else:
                extra.append(name)
        embedding = on_disk.get(self._sources[_EMBEDDING].name)
        differing = [] if embedding is None else [name for name in tied if not self._files.equal(name, embedding)]
        found = {disk: (wanted[name].shape, tensors[disk]) for name, disk in on_disk.items()}
        misshapen = [
            f"{n} {info.shape} instead of {shape}" for n, (shape, info) in found.items() if info.shape != shape
        ]
        strange = [f"{n} {info.dtype}" for n, (_, info) in found.items() if info.dtype not in DTYPES]
        groups = {
            "missing": listed(name for name in wanted if name not in on_disk),
            "unknown": listed(extra),
            "misshapen": ", ".join(misshapen),
            f"neither {', '.join(DTYPES)}": ", ".join(strange),
            "the same tensor": ", ".join(double),
            "other than the embedding, although tie_word_embeddings is set": ", ".join(differing),
        }
        return on_disk, unused, [f"{what}: {which}" for what, which in groups.items() if which]

    @property
    def dtype(self) -> np.dtype:
        """The dtype on disk, that of the token embedding."""
        return DTYPES[self._files.tensors[self._on_disk[self._sources[_EMBEDDING].name]].dtype]

    def weights(self, dtype: Any, shardings: Weights) -> Weights:
        """Reads and converts everything, in the order of the files.

        Args:
            dtype: of the leaves.
            shardings: a `jax.sharding.Sharding` for every leaf, in a tree like the weights'.

        Returns:
            The weights of `jax_blindsight.model`.

        Raises:
            ValueError: a file is damaged.
        """
        targets = dict(zip(self._leaves, jax.tree.leaves(shardings), strict=True))
        order = {name: place for place, name in enumerate(self._files.tensors)}
        paths = sorted(self._leaves, key=lambda path: order[self._on_disk[self._sources[path].name]])
        done = {path: jax.block_until_ready(jax.device_put(self._read(path, dtype), targets[path])) for path in paths}
        return jax.tree.unflatten(self._tree, [done[path] for path in self._leaves])

    def _read(self, path: str, dtype: Any) -> np.ndarray:
        """A leaf on the host; transposed it is a view, whose copying is left to the transfer, which is faster at it."""
        source: Source = self._sources[path]
        tensor = self._files.read(self._on_disk[source.name]).astype(dtype, copy=False)
        return tensor.reshape(len(tensor), -1).T if source.transposed else tensor

    def samples(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """What `make_fingerprint` wants of every weight, read or not: transformers has them all."""
        on_disk = {name: disk for name, disk in self._on_disk.items() if name != NAMES[self._config.family].head}
        for name in (*on_disk.values(), *self.unused):
            shape = self._files.tensors[name].shape
            rows = self._files.read_rows(name, sampled_rows(shape))
            yield shape, rows.astype(ml_dtypes.bfloat16, copy=False).view(np.uint8)


def path_name(path: Iterable[Any]) -> str:
    """A leaf's path in a tree of dicts, joined by dots."""
    return ".".join(str(part.key) for part in path)
