"""The profile: a category for every attention head of one model, and everything that explains the choice.

A profile is made offline, once per model, and used for every prompt. It is one JSON file that both frameworks read;
`FORMAT.md` describes it field by field, `profile.schema.json` is its JSON Schema.

    calibrate ──► Profile ──save──► profile.json ──load──► Profile ──require(model)──► plans

Loading never repairs and never guesses: a file that does not say what `save` wrote is refused with a `ProfileError`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_profiles import _profile_json as form
from shared_profiles._atomic import write_atomically
from shared_profiles._profile_document import decode, encode
from shared_profiles._values import read_only, same_fields
from shared_profiles.categories import Category
from shared_profiles.profile_parts import CurvePoint, Fingerprint, ProfileError, ProfileMismatchError, Provenance
from shared_profiles.summary import Summary
from shared_profiles.template import SinkTemplate

__all__ = [
    "METHODS",
    "CurvePoint",
    "Fingerprint",
    "HeadChange",
    "Profile",
    "ProfileDiff",
    "ProfileError",
    "ProfileMismatchError",
    "Provenance",
    "diff",
    "reseal",
]

METHODS = ("thresholds", "budget", "manual")
"""How categories can have been chosen; `Profile.choice["method"]` is one of them."""

ABSENT = "(absent)"
_ADVICE = "Run calibrate again; after a deliberate edit, correct it and reseal."


@dataclass(frozen=True, eq=False)
class Profile:
    """The category of every (layer, query head) of one model. L layers, H query heads.

    Attributes:
        categories: `[L, H]` int8, values of `Category`; read-only.
        template: which tokens of an image are sinks, and the width of local blocks.
        fingerprint: the model that the profile belongs to.
        summary: the statistics that the choice was made from, or None.
        choice: how it was made: `"method"`, one of `METHODS`, and the method's parameters, as JSON values. Floats are
            held to six significant digits, tuples become lists.
        provenance: the data behind the statistics, or None.
        curve: measured points of speed against accuracy.

    Raises:
        ProfileError: the parts do not fit together, or a value is out of its range.
    """

    categories: np.ndarray
    template: SinkTemplate
    fingerprint: Fingerprint
    summary: Summary | None
    choice: dict[str, Any]
    provenance: Provenance | None = None
    curve: tuple[CurvePoint, ...] = ()

    def __post_init__(self) -> None:
        shape = (self.fingerprint.n_layers, self.fingerprint.n_heads)
        given = np.asarray(self.categories)
        if given.shape != shape:
            raise ProfileError(f"categories must have shape (n_layers, n_heads)={shape}. Got {given.shape}.")
        if given.dtype.kind not in "iu" or not np.isin(given, list(Category)).all():
            raise ProfileError(f"categories must be integers in [0, {max(Category):d}]. Got {np.unique(given)[:8]}.")
        if self.summary is not None and self.summary.shape != shape:
            raise ProfileError(f"summary must have shape (n_layers, n_heads)={shape}. Got {self.summary.shape}.")
        if not isinstance(self.choice, dict) or self.choice.get("method") not in METHODS:
            raise ProfileError(f"choice must be a dict whose 'method' is one of {METHODS}. Got {self.choice!r}.")
        for i, point in enumerate(self.curve):
            if point.heads is not None and (len(point.heads), len(point.heads[0])) != shape:
                got = (len(point.heads), len(point.heads[0]))
                raise ProfileError(f"curve[{i}].heads must have shape (n_layers, n_heads)={shape}. Got {got}.")
        object.__setattr__(self, "categories", read_only(given.astype(np.int8)))
        object.__setattr__(self, "choice", form.json_value(self.choice, "choice"))
        object.__setattr__(self, "curve", tuple(self.curve))

    @classmethod
    def uniform(cls, category: Category, fingerprint: Fingerprint, template: SinkTemplate | None = None) -> Profile:
        """A profile that gives every head the same category: for trying things out, and as a baseline.

        Raises:
            ValueError: what is given is no category.
        """
        category = Category(category)
        categories = np.full((fingerprint.n_layers, fingerprint.n_heads), category, dtype=np.int8)
        choice = {"method": "manual", "category": category.name}
        return cls(categories, template or SinkTemplate(), fingerprint, None, choice)

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other)

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    def counts(self) -> dict[Category, int]:
        """How many heads of the model have each category."""
        return {category: int((self.categories == category).sum()) for category in Category}

    def require(self, fingerprint: Fingerprint, *, allow_mismatch: bool = False) -> None:
        """Accepts a model only when the profile was made for it.

        Args:
            fingerprint: the model at hand.
            allow_mismatch: accept another model too, as long as it has as many layers and query heads.

        Raises:
            ProfileMismatchError: the fingerprints differ; the message names every field, with both values.
        """
        mine, theirs = asdict(self.fingerprint), asdict(fingerprint)
        different = [name for name in mine if mine[name] != theirs[name]]
        wrong_shape = any(name in different for name in ("n_layers", "n_heads"))
        if not different or (allow_mismatch and not wrong_shape):
            return
        lines = [f"  {name}: the profile says {mine[name]!r}, the model has {theirs[name]!r}" for name in different]
        advice = "Load the model that it was made for, or run calibrate on this one."
        if wrong_shape:
            advice += " With other numbers of layers or heads it cannot be applied, allow_mismatch or not."
        else:
            advice += (
                " If this model is close enough, such as the same float32 checkpoint loaded in float16, pass "
                "allow_mismatch=True to patch or load."
            )
        raise ProfileMismatchError("\n".join(["a profile must belong to the model. This one differs:", *lines, advice]))

    def to_json(self) -> str:
        """The profile as its file's text: canonical JSON with a checksum and a final newline."""
        document = encode(self)
        return form.canonical({**document, "checksum": form.checksum(document)}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Reads a profile from its file's text; `from_json(p.to_json()) == p`.

        Raises:
            ProfileError: the text is not a whole, unedited profile of this version. The message says what must hold,
                what was found and what to do.
        """
        document = form.parse(text)
        form.verify(document)
        return _checked(document)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile's file, whole or not at all.

        Raises:
            OSError: it cannot be written; an older file is then untouched.
        """
        write_atomically(path, self.to_json().encode("ascii"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads a profile's file.

        Raises:
            OSError: the file cannot be read.
            ProfileError: see `from_json`; the message starts with the path.
        """
        content = Path(path).read_bytes()
        try:
            return cls.from_json(content)
        except ProfileError as error:
            raise ProfileError(f"{os.fspath(path)}: {error}") from error


def reseal(text: str | bytes) -> str:
    """Gives a deliberately edited profile a fresh checksum, in canonical form.

    Everything but the checksum is checked as on loading.

    Raises:
        ProfileError: the edited text is not a valid profile.
    """
    document = form.parse(text)
    return _checked({**document, "checksum": form.checksum(document)}).to_json()


def _checked(document: dict[str, Any]) -> Profile:
    """The profile of a document with a good envelope, or a ProfileError that ends with what to do."""
    try:
        return Profile(**decode(document))
    except ProfileError as error:
        raise ProfileError(f"{error} {_ADVICE}") from error


@dataclass(frozen=True)
class HeadChange:
    """A head that two profiles give different categories."""

    layer: int
    head: int
    before: Category
    after: Category


@dataclass(frozen=True)
class ProfileDiff:
    """How two profiles of one shape differ; false when they do not. `str` gives one line per difference.

    Attributes:
        heads: heads that changed category, by layer and head.
        fields: every other difference, by the field's name in the file such as `template.local_block`, as (before,
            after). Statistics and curves are compared as a whole and shown by a short hash.
    """

    heads: tuple[HeadChange, ...]
    fields: dict[str, tuple[Any, Any]]

    def __bool__(self) -> bool:
        return bool(self.heads or self.fields)

    def __str__(self) -> str:
        lines = [f"{name}: {before} -> {after}" for name, (before, after) in self.fields.items()]
        lines += [f"layer {c.layer}, head {c.head}: {c.before.name} -> {c.after.name}" for c in self.heads]
        return "\n".join(lines) or "no difference"


def diff(a: Profile, b: Profile) -> ProfileDiff:
    """What changes from profile `a` to profile `b`.

    Raises:
        ProfileError: they have different numbers of layers or heads.
    """
    if a.categories.shape != b.categories.shape:
        raise ProfileError(
            f"compared profiles must have one shape (L, H). Got {a.categories.shape} and {b.categories.shape}. "
            "Compare profiles of one model."
        )
    heads = tuple(
        HeadChange(layer, head, Category(a.categories[layer, head]), Category(b.categories[layer, head]))
        for layer, head in np.argwhere(a.categories != b.categories).tolist()
    )
    before, after = _flat(a), _flat(b)
    fields = {
        name: (before.get(name, ABSENT), after.get(name, ABSENT))
        for name in sorted(before | after)
        if before.get(name, ABSENT) != after.get(name, ABSENT)
    }
    return ProfileDiff(heads, fields)


def _flat(profile: Profile) -> dict[str, Any]:
    """Everything in a profile but its categories, as `section.key` -> value."""
    document = encode(profile)
    del document["categories"]
    for name in ("statistics", "curve"):
        if document[name]:
            document[name] = hashlib.sha256(form.canonical({name: document[name]}).encode()).hexdigest()[:12]
    flat: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{name}.{key}", item)
        else:
            flat[name] = value

    for name, value in document.items():
        walk(name, value)
    return flat
