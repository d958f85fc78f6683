"""What stands in a profile's document: the keys of each part, both ways. `FORMAT.md` tells the same in prose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_profiles import _profile_json as form
from shared_profiles.categories import SPARSE, Category
from shared_profiles.profile_parts import CurvePoint, Fingerprint, Provenance
from shared_profiles.summary import MEASURED_RANKINGS, Summary
from shared_profiles.template import SinkTemplate

if TYPE_CHECKING:
    from shared_profiles.profile import Profile


def encode(profile: Profile) -> dict[str, Any]:
    """A profile as JSON values, without its checksum."""
    return {
        "schema": form.SCHEMA,
        "model": asdict(profile.fingerprint),
        "categories": [[Category(value).name for value in layer] for layer in profile.categories],
        "template": {
            "from_start": list(profile.template.from_start),
            "from_end": list(profile.template.from_end),
            "local_block": profile.template.local_block,
        },
        "choice": profile.choice,
        "provenance": None if profile.provenance is None else asdict(profile.provenance),
        "statistics": None if profile.summary is None else _statistics(profile.summary),
        "curve": [_point(point) for point in profile.curve],
    }


def _point(point: CurvePoint) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(point).items()}


def _statistics(summary: Summary) -> dict[str, Any]:

    def by_name(table: Mapping[Category, np.ndarray]) -> dict[str, Any]:
        return {category.name: values.tolist() for category, values in table.items()}

    tables = {name: by_name(getattr(summary, name)) for name in ("mass", "mass_mean", "error", "error_mean", "pairs")}
    harm = {name: by_name(table) for name, table in summary.harm.items()}
    kept = {category.name: value for category, value in summary.kept.items()}
    return {"n_prompts": summary.n_prompts, "levels": list(summary.levels), "kept": kept, "harm": harm, **tables}


def _categories(value: Any, where: str) -> np.ndarray:
    rows = form.sequence(form.sequence(_category))(value, where)
    if len(lengths := sorted({len(row) for row in rows})) > 1:
        form.refuse(where, "a table whose rows are equally long", f"rows of lengths {lengths}")
    return np.array(rows, dtype=np.int8)


def _category(value: Any, where: str) -> Category:
    if not isinstance(value, str) or value not in Category.__members__:
        form.refuse(where, f"one of {', '.join(Category.__members__)}", value)
    return Category[value]


def _per_category(decode: form.Decoder, categories: Sequence[Category] = SPARSE) -> form.Decoder:
    decoders = {category.name: decode for category in categories}
    return lambda value, where: {Category[k]: v for k, v in form.record(value, where, decoders).items()}


def _harm(value: Any, where: str) -> dict[str, Any]:
    """An object with any of the rankings as keys."""
    decoders = {name: _per_category(form.array(2)) for name in MEASURED_RANKINGS}
    there = decoders.keys() & value.keys() if isinstance(value, dict) else set()
    return form.record(value, where, {name: decoders[name] for name in decoders if name in there})


def _versions(value: Any, where: str) -> dict[str, str]:
    return form.record(value, where, dict.fromkeys(value if isinstance(value, dict) else (), form.text))


_PARTS: dict[str, form.Decoder] = {
    "schema": form.text,
    "checksum": form.text,
    "model": form.build(
        Fingerprint,
        {
            "family": form.text,
            "n_layers": form.integer,
            "n_heads": form.integer,
            "n_kv_heads": form.integer,
            "head_dim": form.integer,
            "digest": form.text,
        },
    ),
    "categories": _categories,
    "template": form.build(
        SinkTemplate,
        {
            "from_start": form.sequence(form.integer),
            "from_end": form.sequence(form.integer),
            "local_block": form.integer,
        },
    ),
    "choice": form.json_value,
    "provenance": form.optional(
        form.build(
            Provenance,
            {
                "dataset": form.text,
                "dataset_hash": form.text,
                "n_prompts": form.integer,
                "n_tokens": form.integer,
                "created": form.text,
                "versions": _versions,
            },
        )
    ),
    "statistics": form.optional(
        form.build(
            Summary,
            {
                "n_prompts": form.integer,
                "levels": form.sequence(form.number),
                "mass": _per_category(form.array(3)),
                "mass_mean": _per_category(form.array(2)),
                "error": _per_category(form.array(3)),
                "error_mean": _per_category(form.array(2)),
                "kept": _per_category(form.number),
                "pairs": _per_category(form.array(1), tuple(Category)),
                "harm": _harm,
            },
        )
    ),
    "curve": form.sequence(
        form.build(
            CurvePoint,
            {
                "kept": form.number,
                "kl": form.number,
                "accuracy": form.optional(form.number),
                "agreement": form.optional(form.number),
                "n_prompts": form.optional(form.integer),
                "n_images": form.optional(form.sequence(form.integer)),
                "heads": form.optional(form.sequence(form.text)),
            },
        )
    ),
}


def decode(document: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the `Profile` that a document describes.

    Raises:
        ProfileError: a key is missing or unknown, or a value is of the wrong kind or out of its range.
    """
    parts = form.record(document, "", _PARTS)
    names = {"model": "fingerprint", "statistics": "summary"}
    return {names.get(key, key): part for key, part in parts.items() if key not in ("schema", "checksum")}
