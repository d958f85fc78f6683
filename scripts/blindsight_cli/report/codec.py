"""Frozen records that check their own field types and travel as plain JSON values.

A subclass declares its fields and nothing else:

    @dataclass(frozen=True)
    class Row(Record):
        name: str
        values: tuple[float, ...]

    Row("a", [1, 2.5]).to_json()              == {"name": "a", "values": [1.0, 2.5]}
    Row(**{"name": "a", "values": [1, 2.5]})  == Row("a", (1.0, 2.5))

Construction is the only door: lists and NumPy arrays become tuples, dicts become records, and whatever does not fit
its declared type raises a `ValueError` that says where it stands. Field types may be `str`, `int`, `float`, `bool`,
`tuple[X, ...]`, `dict[str, X]`, `X | None` and other records.
"""

from __future__ import annotations

import math
import numbers
import types
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Record:
    """Base of the frozen dataclasses that a report is made of."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, conform(hint, getattr(self, name), name))
        self._validate()

    def _validate(self) -> None:
        """Raises a `ValueError` for what types alone cannot say; the fields already have their declared types."""

    def to_json(self) -> dict[str, Any]:
        """The record as dicts, lists, strings and finite numbers."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def conform(hint: Any, value: Any, where: str) -> Any:
    """Brings a value to its declared type, or says what is wrong with it.

    Args:
        hint: one of the types that the module docstring lists.
        value: a value of that type, or its JSON form, or a NumPy array or scalar that stands for it.
        where: the value's name, for the error message.

    Raises:
        ValueError: the value does not fit; the message begins with `where`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else conform(arguments[0], value, where)
    if origin is tuple:
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, list | tuple):
            raise ValueError(f"{where} must be a list. Got {_shown(value)}.")
        return tuple(conform(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(values))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where} must be a table with text keys. Got {_shown(value)}.")
        return {key: conform(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if issubclass(hint, Record):
        return _record(hint, value, where)
    return _scalar(hint, value, where)


def at_least(name: str, value: float, low: float) -> None:
    """Raises a `ValueError` unless `value >= low`."""
    if value < low:
        raise ValueError(f"{name} must be at least {low}. Got {value}.")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises a `ValueError` unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}]. Got {value}.")


def _record(cls: type[Record], value: Any, where: str) -> Record:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a {cls.__name__} or its JSON form. Got {_shown(value)}.")
    known = {field.name: field.default is MISSING for field in fields(cls)}
    unknown = sorted(set(value) - set(known))
    missing = sorted(name for name, required in known.items() if required and name not in value)
    if unknown or missing:
        raise ValueError(
            f"{where} must have the fields {sorted(known)}. Missing: {missing}; unknown: {unknown}. "
            "Was it written by another version?"
        )
    try:
        return cls(**value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return str(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool) and _is_finite(value):
        return float(value)
    kind = {str: "text", int: "an integer", float: "a finite number", bool: "true or false"}[hint]
    raise ValueError(f"{where} must be {kind}. Got {_shown(value)}.")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
