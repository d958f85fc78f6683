"""The text form of a profile: canonical JSON, its checksum, and strict reading.

Knows JSON and the envelope (schema, checksum), not what a profile means: `_profile_document.py` gives `record` a table
of decoders, one per key. Every decoder takes a JSON value and the place where it stands, and refuses with both.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from shared_profiles._values import rounded
from shared_profiles.profile_parts import ProfileError

VERSION = 4
SCHEMA = f"blindsight.profile/{VERSION}"
LARGEST_INTEGER = 2**53 - 1  # what every JSON reader keeps exactly

type Decoder = Callable[[Any, str], Any]


def refuse(where: str, must: str, got: object) -> NoReturn:
    """Raises the error of one wrong value."""
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise ProfileError(f"{where} must be {must}. Got {shown}.")


def canonical(document: dict[str, Any]) -> str:
    """The one text of a document: sorted keys, no spaces, ASCII, shortest decimals; without the final newline."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def checksum(document: dict[str, Any]) -> str:
    """SHA-256 over the canonical text of the document without its `checksum`."""
    content = {key: value for key, value in document.items() if key != "checksum"}
    return "sha256:" + hashlib.sha256(canonical(content).encode("ascii")).hexdigest()


def parse(text: str | bytes) -> dict[str, Any]:
    """Reads strict JSON: one object, no repeated keys, no NaN, no infinity.

    Raises:
        ProfileError: it is anything else, or a newer or older schema.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique)
        _require_finite(document, "")
    except ProfileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProfileError(
            f"a profile must be whole JSON. Got text that is not: {error}. It may be cut off; copy it again, or run "
            "calibrate again."
        ) from error
    if not isinstance(document, dict):
        raise ProfileError(f"a profile must be a JSON object. Got {type(document).__name__}. Is this the right file?")
    schema = document.get("schema")
    known = re.fullmatch(r"blindsight\.profile/(\d{1,9})", schema) if isinstance(schema, str) else None
    if known is None:
        raise ProfileError(f"schema must be {SCHEMA!r}. Got {schema!r}: not a BlindSight profile. Check the path.")
    if (version := int(known[1])) != VERSION:
        advice = "Install a newer BlindSight." if version > VERSION else "Run calibrate again with this version."
        age = "a newer" if version > VERSION else "an older"
        raise ProfileError(f"schema must be {SCHEMA!r}. Got {schema!r}, {age} format. {advice}")
    return document


def verify(document: dict[str, Any]) -> None:
    """Compares the checksum that a document states with its own.

    Raises:
        ProfileError: it is missing or another.
    """
    stated, actual = document.get("checksum"), checksum(document)
    if stated != actual:
        raise ProfileError(
            f"checksum must be {actual!r}. Got {stated!r}: the file was edited or damaged. Run calibrate again or "
            "copy the file again; after a deliberate edit, pass its text through shared_profiles.profile.reseal."
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        refuse("an object", "free of repeated keys", sorted({key for key in keys if keys.count(key) > 1}))
    return document


def _require_finite(value: Any, where: str) -> None:
    """Refuses NaN and infinities, which Python's reader lets through, wherever they are."""
    if isinstance(value, float) and not math.isfinite(value):
        refuse(where or "a profile", "free of NaN and infinities", value)
    if isinstance(value, dict):
        for key, item in value.items():
            _require_finite(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _require_finite(item, f"{where}[{i}]")


def record(value: Any, where: str, decoders: dict[str, Decoder]) -> dict[str, Any]:
    """An object with exactly the given keys, each decoded; `where` is empty for the document itself."""
    name = where or "the profile"
    if not isinstance(value, dict):
        refuse(name, "an object", value)
    if missing := sorted(decoders.keys() - value.keys()):
        refuse(name, f"an object with the keys {', '.join(decoders)}", f"none of {', '.join(missing)}")
    if unknown := sorted(value.keys() - decoders.keys()):
        refuse(name, f"an object with only the keys {', '.join(decoders)}", f"also {', '.join(unknown)}")
    prefix = f"{where}." if where else ""
    return {key: decode(value[key], prefix + key) for key, decode in decoders.items()}


def build(make: Callable[..., Any], decoders: dict[str, Decoder]) -> Decoder:
    """A decoder of objects that calls `make` with the decoded values; its ValueError gets the place in front."""

    def decode_and_make(value: Any, where: str) -> Any:
        values = record(value, where, decoders)
        try:
            return make(**values)
        except ValueError as error:
            raise ProfileError(f"{where}: {error}") from error

    return decode_and_make


def optional(decode: Decoder) -> Decoder:
    """A decoder that lets null through as None."""
    return lambda value, where: None if value is None else decode(value, where)


def sequence(decode: Decoder) -> Decoder:
    """A decoder of lists, giving tuples."""

    def decode_all(value: Any, where: str) -> tuple:
        if not isinstance(value, list):
            refuse(where, "a list", value)
        return tuple(decode(item, f"{where}[{i}]") for i, item in enumerate(value))

    return decode_all


def text(value: Any, where: str) -> str:
    """A string."""
    if not isinstance(value, str):
        refuse(where, "a string", value)
    return value


def integer(value: Any, where: str) -> int:
    """An integer that every JSON reader keeps exactly."""
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > LARGEST_INTEGER:
        refuse(where, "an integer below 2^53", value)
    return value


def number(value: Any, where: str) -> float:
    """An integer or a decimal, as a float."""
    if isinstance(value, float):
        return value
    return float(integer(value, where))


def array(ndim: int) -> Decoder:
    """A decoder of nested lists of numbers, `ndim` deep and not ragged, giving float64."""

    def decode_array(value: Any, where: str) -> np.ndarray:
        level, shape = [value], []
        for _ in range(ndim):
            if not all(isinstance(item, list) for item in level):
                refuse(where, f"lists of numbers nested {ndim} deep", value)
            lengths = {len(item) for item in level}
            if len(lengths) > 1:
                refuse(where, "a table whose rows are equally long", f"rows of lengths {sorted(lengths)}")
            shape.append(lengths.pop() if lengths else 0)
            level = [item for items in level for item in items]
        return np.array([number(item, where) for item in level], dtype=np.float64).reshape(shape)

    return decode_array


def json_value(value: Any, where: str) -> Any:
    """A copy that survives JSON unchanged: tuples become lists, floats are rounded.

    Raises:
        ProfileError: something in it is not a JSON value.
    """
    match value:
        case None | bool() | str():
            return value
        case np.generic():
            return json_value(value.item(), where)
        case int():
            return integer(int(value), where)
        case float() if math.isfinite(value):
            return rounded(value)
        case list() | tuple():
            return [json_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: json_value(item, f"{where}.{key}") for key, item in value.items()}
        case _:
            refuse(where, "a JSON value (null, bool, string, finite number, list, object with string keys)", value)
