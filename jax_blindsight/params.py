"""`Params`: a model in one value, weights as leaves and everything else static. `load` makes it, `save` keeps it.

    checkpoint folder (safetensors) ──► convert ──┐
                                                  ├──► Params ──► save ──► folder (orbax)
    folder that save wrote ───────────────────────┘

Under `jax.jit` a `Params` is one argument: other weights of the same shapes compile nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_blindsight.checkpoint import CONFIG, SavedModel, is_saved, write
from jax_blindsight.config import ModelConfig
from jax_blindsight.convert import Conversion
from jax_blindsight.marks import has_mark, marks_of
from jax_blindsight.model import Weights, abstract_weights
from jax_blindsight.settings import with_own_settings
from jax_blindsight.sharding import param_shardings
from jax_blindsight.tensor_files import DTYPES, TensorFiles
from shared_profiles import family_of
from shared_profiles.fingerprints import make_fingerprint
from shared_profiles.lookup import FILE_NAME, find_profile
from shared_profiles.profile import Fingerprint, Profile

_GENERATION = "generation_config.json"
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Params:
    """A model: its weights are the leaves of a pytree, the rest is static under `jax.jit`.

    Attributes:
        weights: nested dicts of arrays, see `jax_blindsight.model`.
        config: the model's configuration.
        profile: the category of every head; None where no profile was found.
        fingerprint: identifies the model, the same in torch_blindsight.
        settings: the text of the checkpoint's `config.json`.
        mesh: the devices that the weights are split over; None for one device.
        eos: token ids at which the checkpoint says that an answer ends.
        marks: what `load` knows the weights by. They may be cast and moved; others in their place are another model,
            which profile and fingerprint do not belong to: `calibrate` and `save` refuse it. Empty for a model that was
            not loaded: its fingerprint is taken on trust.
    """

    weights: Weights
    config: ModelConfig
    profile: Profile | None
    fingerprint: Fingerprint
    settings: str
    mesh: Mesh | None = None
    eos: tuple[int, ...] = ()
    marks: frozenset[str] = frozenset()

    def tree_flatten(self) -> tuple[tuple[Weights], tuple]:
        """Leaves and static fields, for jax."""
        others = self.fingerprint, self.settings, self.mesh, self.eos, self.marks
        return (self.weights,), (self.config, self._static_profile, *others)

    @classmethod
    def tree_unflatten(cls, static: tuple, children: tuple[Weights]) -> Params:
        """The opposite of `tree_flatten`."""
        config, profile, *others = static
        return cls(*children, config, profile.profile, *others)

    @cached_property
    def _static_profile(self) -> _StaticProfile:
        return _StaticProfile(self.profile)

    @with_own_settings
    def require_loaded(self) -> None:
        """Demands the weights that the fingerprint was made of.

        Raises:
            ValueError: they were changed since `load`.
        """
        if self.marks and not has_mark(self.weights, self.marks):
            raise ValueError(
                "the weights must be those that were loaded: the fingerprint, which profiles and states are known by, "
                f"is theirs. Got others under {self.fingerprint.digest}. Write them as a Hugging Face checkpoint, and "
                "load that."
            )


class _StaticProfile:
    """A profile that can be hashed: equal where the profiles' texts are."""

    def __init__(self, profile: Profile | None) -> None:
        self.profile = profile

    @cached_property
    def _text(self) -> str:
        return "" if self.profile is None else self.profile.to_json()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StaticProfile) and (self.profile is other.profile or self._text == other._text)

    def __hash__(self) -> int:
        return hash(self._text)


@with_own_settings
def load(
    path: str | os.PathLike[str],
    profile: Profile | str | os.PathLike[str] | None = None,
    *,
    search: bool = True,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    allow_mismatch: bool = False,
) -> Params:
    """Loads a model: a Hugging Face checkpoint, converted on the way, or what `save` wrote.

    Args:
        path: the folder, or the name of a repository on the Hugging Face hub, `owner/name`, which is downloaded.
        profile: a profile, or the path of one. Default: one made for this very model is looked for beside the
            checkpoint, in the user's cache folder, and among those bundled.
        search: look for a profile where none is given. False: load without one, whatever lies beside the checkpoint.
        dtype: of the weights: "float32", "bfloat16" or "float16"; "auto" takes the checkpoint's own.
        mesh: split the model over these devices, see `jax_blindsight.sharding.make_mesh`.
        allow_mismatch: accept a given profile of another model with as many layers and heads.

    Returns:
        The model; its `profile` is None if none was given and none was found.

    Raises:
        ValueError: not a whole checkpoint folder of a supported family, a wrong dtype, or a mesh that does not fit.
        NotImplementedError: the configuration asks for something that the JAX models do not compute.
        ProfileError: the profile is damaged or belongs to another model.
        OSError: the profile or a file of the checkpoint cannot be read.
    """
    folder = _local(path)
    if dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(_DTYPES)}. Got {dtype!r}.")
    settings = _read_settings(folder)
    hf_config, config = _configurations(folder)
    shardings = _on_default_device(config) if mesh is None else param_shardings(config, mesh)
    source: SavedModel | Conversion
    if is_saved(folder):
        source = SavedModel(folder)
        fingerprint = source.fingerprint
    else:
        source = Conversion(TensorFiles(folder), config)
        text = hf_config.get_text_config().to_dict()
        fingerprint = make_fingerprint(config.family, text, source.samples())
    if profile is None:
        found = find_profile(fingerprint, str(folder)) if search else None
        profile = None if found is None else found[0]
    else:
        profile = profile if isinstance(profile, Profile) else Profile.load(profile)
        profile.require(fingerprint, allow_mismatch=allow_mismatch)
    if isinstance(source, Conversion):
        wanted = (_stated_dtype(settings) or source.dtype) if dtype == "auto" else _DTYPES[dtype]
        weights = source.weights(wanted, shardings)
    else:
        wanted = source.dtype if dtype == "auto" else _DTYPES[dtype]
        weights = source.read(_target(config, wanted, shardings))
    return Params(weights, config, profile, fingerprint, settings, mesh, _eos(folder, hf_config), marks_of(weights))


@with_own_settings
def save(params: Params, path: str | os.PathLike[str], *, beside: Iterable[Path] = ()) -> None:
    """Writes a model to a folder that `load` takes; bit-equal, whole or not at all.

    Args:
        params: the model.
        path: a new folder, or an empty one.
        beside: files to copy into it, such as those of the processor.

    Raises:
        ValueError: the folder is not empty, or cannot be made; or the weights were changed since `load`.
        OSError: the disk is full, or a file cannot be read.
    """
    params.require_loaded()
    files: dict[str, str | Path] = {file.name: file for file in beside}
    files[CONFIG] = params.settings
    files.setdefault(_GENERATION, json.dumps({"eos_token_id": list(params.eos)}))
    if params.profile is not None:
        files[FILE_NAME] = params.profile.to_json()
    write(Path(path), params.weights, params.fingerprint, files)


def _eos(folder: Path, hf_config: Any) -> tuple[int, ...]:
    """Where an answer ends, by the folder's generation_config.json, else by its config.json."""
    path = folder / _GENERATION
    try:
        stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be a JSON object. Got: {error}. Save the checkpoint again.") from error
    if not path.is_file():
        stated = getattr(hf_config, "eos_token_id", None)
        stated = hf_config.get_text_config().eos_token_id if stated is None else stated  # 0 is an id
    return () if stated is None else (stated,) if isinstance(stated, int) else tuple(stated)


def _local(path: str | os.PathLike[str]) -> Path:
    """The folder itself, or the downloaded snapshot of the repository that is named."""
    folder = Path(path)
    if folder.exists() or not (isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path)):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"a model must be a folder, or a repository that the Hugging Face hub has. Got {path!r}: there is no such "
            f"folder, and the hub says: {reason}."
        ) from error


def _read_settings(folder: Path) -> str:
    """The text of a folder's `config.json`, of a supported family."""
    path = folder / CONFIG
    if not path.is_file():
        found = f"there is no {CONFIG} in it" if folder.is_dir() else "there is no such folder"
        raise ValueError(
            f"a model must be a folder, as save_pretrained or `blindsight convert` writes it. Got {folder}: {found}. A "
            f"checkpoint on a hub must be downloaded first: hf download {folder} --local-dir FOLDER"
        )
    text = path.read_text(encoding="utf-8")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} must be JSON. Got: {error}. Download or save the checkpoint again.") from error
    try:
        family_of(settings if isinstance(settings, dict) else {})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return text


def _configurations(folder: Path) -> tuple[Any, ModelConfig]:
    """The configuration in the names of today's transformers, whichever version wrote it; and what we need of it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    # Values of a wrong kind fail wherever they are first used.
    damaged = StrictDataclassError, AttributeError, LookupError, TypeError, ZeroDivisionError
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return hf_config, ModelConfig.from_hf(hf_config)
    except damaged as error:
        reason = " ".join(str(error).split()).rstrip(".!")
        raise ValueError(
            f"{folder / CONFIG} must be a valid configuration. Got: {reason}. Download or save the checkpoint again."
        ) from error


def _stated_dtype(settings: str) -> np.dtype | None:
    """The dtype that a `config.json` states, None where it states none."""
    values = json.loads(settings)
    name = values.get("dtype") or values.get("torch_dtype")
    if name is not None and name not in _DTYPES:
        raise ValueError(
            f"{CONFIG} must state a dtype of {', '.join(_DTYPES)}. Got {name!r}. Load with dtype=... to choose one."
        )
    return None if name is None else _DTYPES[name]


def _on_default_device(config: ModelConfig) -> Weights:
    """Every weight on JAX's default device, and bound to it: what is computed with them is computed there."""
    here = jnp.zeros(()).sharding
    return jax.tree.map(lambda _: here, abstract_weights(config, np.float32))


def _target(config: ModelConfig, dtype: np.dtype, shardings: Weights) -> Weights:
    """What a restored tree must be, leaf by leaf."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_weights(config, dtype),
        shardings,
    )
