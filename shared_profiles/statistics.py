"""Calibration statistics: one record per prompt, collected on any number of machines, merged without loss.

    machine 0:  prompts a, c  ──► Statistics ──► part0.npz ──┐
    machine 1:  prompts b, d  ──► Statistics ──► part1.npz ──┴─► merge ──► summarize ──► Summary

Nothing is averaged before the end. A state is a set of records keyed by prompt, so a merge is a union: it can be
repeated, regrouped and reordered, and the summary of the union is bit for bit the same however the prompts were dealt
out. A record of 28 layers of 28 heads takes 20 KB, and 9 KB more for every ranking that is measured.
"""

from __future__ import annotations

import errno
import io
import os
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from shared_profiles._atomic import write_atomically
from shared_profiles._values import is_integer, read_only, same_fields
from shared_profiles.categories import SPARSE, Category
from shared_profiles.sink_statistics import SinkMass, stack_sinks, unstack_sinks
from shared_profiles.summary import LEVELS, MEASURED_RANKINGS, Summary

SCHEMA = "blindsight.statistics/3"
MASS_SLACK = 1e-3  # exp(lse - lse) of low-precision kernels may pass 1 by this much

_MEMBERS = {"schema", "origin", "rankings", "prompt_ids", "counts", "mass", "error", "pairs", "harm"}
_SINKS = {"sink_ids", "sink_own", "sink_text", "sink_others", "sink_pairs"}
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """What one prompt showed. Axis 0 is `SPARSE`: `SINK`, `INTRA_IMAGE`, `INTRA_IMAGE_SINK`.

    Attributes:
        n_tokens: length of the prompt in tokens, padding excluded.
        n_images: its images, at least 2: with one image there is nothing to drop.
        n_rows: image rows that have an earlier image, the ones that the means below are over.
        mass: `[3, L, H]` float32, mean retained softmax mass, `exp(lse_category - lse_dense)`.
        error: `[3, L, H]` float32, mean relative output error, `||o_category - o_dense|| / ||o_dense||`.
        pairs: `[4, L]` int64, query-key pairs that one head of each category computes in each layer; axis 0 is
            `Category`.
        harm: per ranking that was measured, `[3, L, H]` float32, at least 0; `Summary` tells what each means.

    Raises:
        ValueError: a count is too small or a shape is wrong. Values are checked by `Statistics.add`, which can name
            the prompt.
    """

    n_tokens: int
    n_images: int
    n_rows: int
    mass: np.ndarray
    error: np.ndarray
    pairs: np.ndarray
    harm: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("n_tokens", 1), ("n_images", 2), ("n_rows", 1)):
            if not is_integer(value := getattr(self, name), least):
                raise ValueError(f"{name} must be an integer of at least {least}. Got {value!r}. Skip such a prompt.")
        if self.n_rows > self.n_tokens:
            raise ValueError(f"n_rows must be at most n_tokens. Got {self.n_rows} rows of {self.n_tokens} tokens.")
        for name in ("mass", "error"):
            object.__setattr__(self, name, _stored(getattr(self, name)))
        object.__setattr__(self, "harm", {name: _stored(self.harm[name]) for name in sorted(self.harm)})
        if unknown := sorted(set(self.harm) - set(MEASURED_RANKINGS)):
            raise ValueError(f"harm may have the rankings {', '.join(MEASURED_RANKINGS)}. Got {', '.join(unknown)}.")
        shapes = [self.mass.shape, self.error.shape, *(harm.shape for harm in self.harm.values())]
        if self.mass.ndim != 3 or len(self.mass) != len(SPARSE) or len(set(shapes)) > 1:
            raise ValueError(f"mass, error and every harm must have one shape (3, L, H). Got {shapes}.")
        pairs = np.array(self.pairs)
        if pairs.dtype.kind not in "iu" or pairs.shape != (len(Category), self.mass.shape[1]):
            wanted = (len(Category), self.mass.shape[1])
            raise ValueError(f"pairs must be integers of shape (4, L)={wanted}. Got {pairs.dtype} {pairs.shape}.")
        object.__setattr__(self, "pairs", read_only(pairs.astype(np.int64)))

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other)

    __hash__ = None  # type: ignore[assignment]  # holds arrays


class Statistics:
    """The mergeable state of a calibration: one `PromptStatistics` per prompt.

    Args:
        n_layers: L.
        n_heads: H, query heads.
        origin: what the numbers were measured on, in a short line of ASCII: for example the model's digest and the
            sink template. States of different origin do not merge.
        rankings: which `harm` every record has, of `MEASURED_RANKINGS`. States of different rankings do not merge.

    Raises:
        ValueError: a size is not a positive integer, the origin is not printable ASCII, or a ranking is unknown.
    """

    def __init__(self, n_layers: int, n_heads: int, *, origin: str = "", rankings: Collection[str] = ()) -> None:
        if not is_integer(n_layers, 1) or not is_integer(n_heads, 1):
            raise ValueError(f"n_layers and n_heads must be positive integers. Got {n_layers!r}, {n_heads!r}.")
        if not _plain(origin):
            raise ValueError(f"origin must be printable ASCII. Got {origin!r}.")
        if unknown := sorted(set(rankings) - set(MEASURED_RANKINGS)):
            raise ValueError(f"rankings must be of {', '.join(MEASURED_RANKINGS)}. Got {', '.join(unknown)}.")
        self.n_layers, self.n_heads, self.origin = n_layers, n_heads, origin
        self.rankings = tuple(sorted(rankings))
        self._records: dict[str, PromptStatistics] = {}
        self._sinks: dict[str, SinkMass] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self._records

    def __getitem__(self, prompt_id: str) -> PromptStatistics:
        return self._records[prompt_id]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics) or self._key != other._key:
            return False
        return self._records == other._records and self._sinks == other._sinks

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Statistics({self.n_layers}, {self.n_heads}, origin={self.origin!r}, {len(self)} prompts)"

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """The prompts that have been added, in ascending order."""
        return tuple(sorted(self._records))

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts together, padding excluded."""
        return sum(record.n_tokens for record in self._records.values())

    @property
    def sinks(self) -> Mapping[str, SinkMass]:
        """By prompt, what the sink template was learned from; none where it was given. Merged like the records."""
        return MappingProxyType(self._sinks)

    @property
    def _key(self) -> tuple[int, int, str, tuple[str, ...]]:
        return self.n_layers, self.n_heads, self.origin, self.rankings

    def add(self, prompt_id: str, record: PromptStatistics) -> None:
        """Adds one prompt. Adding it again with the same values changes nothing.

        Args:
            prompt_id: a content hash of the prompt, or any other name that is the same on every machine.
            record: its statistics.

        Raises:
            ValueError: the id is not printable ASCII, the shape is not (3, L, H), a value is not finite or out of
                its range (the message names prompt, layer, head and category), or the prompt was added before
                with different values.
        """
        _check_id(prompt_id)
        shape = (len(SPARSE), self.n_layers, self.n_heads)
        if record.mass.shape != shape:
            raise ValueError(f"prompt {prompt_id}: mass must have shape (3, L, H)={shape}. Got {record.mass.shape}.")
        if tuple(record.harm) != self.rankings:
            raise ValueError(f"prompt {prompt_id}: harm must have the rankings {self.rankings}. Got {[*record.harm]}.")
        if not (_within(record.pairs) and (record.pairs.sum(axis=1) > 0).all()):
            raise ValueError(
                f"prompt {prompt_id}: pairs must be at least 0, at most those of DENSE, and not all 0. Got "
                f"{record.pairs.tolist()!r:.80}. Measure this prompt again."
            )
        tables = {"mass": record.mass, "error": record.error} | {f"{k} harm": v for k, v in record.harm.items()}
        for name, array in tables.items():
            upper = 1 + MASS_SLACK if name == "mass" else np.inf
            good = np.isfinite(array) & (array >= 0) & (array <= upper)
            if not good.all():
                at = tuple(np.argwhere(~good)[0])
                wanted = "finite and at least 0" if upper == np.inf else f"in [0, {upper:g}]"
                raise ValueError(
                    f"prompt {prompt_id}, layer {at[1]}, head {at[2]}, {SPARSE[at[0]].name}: {name} must be {wanted}. "
                    f"Got {array[at]:g}. Measure this prompt again in higher precision, or leave it out."
                )
        if self._records.setdefault(prompt_id, record) != record:
            raise _two_values(prompt_id)

    def add_sinks(self, prompt_id: str, mass: SinkMass) -> None:
        """Adds what one prompt told of the sinks. Adding it again with the same values changes nothing.

        Raises:
            ValueError: the id is not printable ASCII, the shape is not that of this model or of the others' bins, or
                the prompt was added before with different values.
        """
        _check_id(prompt_id)
        bins = next((other.others.shape for other in self._sinks.values()), (*mass.own.shape, mass.others.shape[-1]))
        if mass.own.shape != (self.n_layers, self.n_heads) or mass.others.shape != bins:
            shape = (self.n_layers, self.n_heads, bins[-1])
            raise ValueError(f"prompt {prompt_id}: sinks must have shape {shape}. Got {mass.others.shape}.")
        if self._sinks.setdefault(prompt_id, mass) != mass:
            raise _two_values(prompt_id)

    def merge(self, other: Statistics) -> Statistics:
        """The union of two states, as a new one. Associative, commutative and idempotent, bit for bit.

        Raises:
            ValueError: the states are of different shape or origin, or disagree about a prompt.
        """
        if self._key != other._key:
            raise ValueError(
                f"merged states must have one (n_layers, n_heads, origin, rankings). Got {self._key} and {other._key}. "
                "Merge only parts of one calibration run."
            )
        merged = Statistics(self.n_layers, self.n_heads, origin=self.origin, rankings=self.rankings)
        merged._records, merged._sinks = dict(self._records), dict(self._sinks)
        for prompt_id, record in other._records.items():
            merged.add(prompt_id, record)
        for prompt_id, mass in other._sinks.items():
            merged.add_sinks(prompt_id, mass)
        return merged

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state as an uncompressed `.npz`, atomically; equal states give equal bytes.

        Members, N prompts in ascending order of id, R rankings: `schema` and `origin`, strings; `rankings` `[R]` and
        `prompt_ids` `[N]` strings; `counts` `[N, 3]` int64 (n_tokens, n_images, n_rows); `mass` and `error`
        `[N, 3, L, H]` and `harm` `[R, N, 3, L, H]` float32; `pairs` `[N, 4, L]` int64; and `stack_sinks`.

        Raises:
            OSError: the file cannot be written; an older one is then untouched.
        """
        buffer = io.BytesIO()
        members = self._stacked() | stack_sinks(self._sinks, self.n_layers, self.n_heads)
        np.savez(buffer, schema=np.array(SCHEMA), origin=np.array(self.origin), **members)
        write_atomically(path, buffer.getbuffer())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads a state that `save` wrote, and checks every value as `add` does.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a statistics file, of another version, or damaged.
        """
        with open(path, "rb") as file:
            try:
                return cls._read(file)
            except (*_DAMAGE, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file's begin
                    raise
                raise ValueError(
                    f"{os.fspath(path)} must be a whole file written by Statistics.save ({SCHEMA}). Got: {error}. "
                    "Measure this part again."
                ) from error

    @classmethod
    def _read(cls, file: io.BufferedReader) -> Statistics:
        if not zipfile.is_zipfile(file):  # NumPy would advise to unpickle it
            raise ValueError("no whole .npz archive")
        file.seek(0)
        with np.load(file, allow_pickle=False) as loaded:
            schema = str(loaded["schema"])
            if schema != SCHEMA:
                raise ValueError(f"the schema {schema!r}")
            if set(loaded.files) != _MEMBERS | _SINKS:
                raise ValueError(f"the members {sorted(loaded.files)}")
            sinks = unstack_sinks({name: loaded[name] for name in _SINKS})
            counts, mass = loaded["counts"], loaded["mass"]
            ids, error, pairs = loaded["prompt_ids"], loaded["error"], loaded["pairs"]
            origin, rankings, harm = str(loaded["origin"]), loaded["rankings"], loaded["harm"]
        kinds = ids.dtype.kind == rankings.dtype.kind == "U" and counts.dtype == np.int64
        shapes = ids.ndim == rankings.ndim == 1 and counts.shape == (len(ids), 3)
        alike = error.shape == mass.shape and len(mass) == len(pairs) == len(ids)
        if not kinds or not shapes or not alike or mass.ndim != 4 or harm.shape != (len(rankings), *mass.shape):
            raise ValueError(f"arrays of shapes {ids.shape}, {counts.shape}, {mass.shape}, {harm.shape}")
        names = rankings.tolist()
        statistics = cls(*mass.shape[2:], origin=origin, rankings=names)
        for i, prompt_id in enumerate(ids.tolist()):
            n_tokens, n_images, n_rows = counts[i].tolist()
            by_name = {name: harm[r, i] for r, name in enumerate(names)}
            statistics.add(
                prompt_id, PromptStatistics(n_tokens, n_images, n_rows, mass[i], error[i], pairs[i], by_name)
            )
        for prompt_id, sink_mass in sinks.items():
            statistics.add_sinks(prompt_id, sink_mass)
        return statistics

    def _stacked(self) -> dict[str, Any]:
        """The records as arrays over prompts in ascending order of id, as `save` describes them."""
        ids = self.prompt_ids
        records = [self._records[i] for i in ids]
        heads = (len(records), len(SPARSE), self.n_layers, self.n_heads)
        counts = np.array([(r.n_tokens, r.n_images, r.n_rows) for r in records], dtype=np.int64)
        harm = [[r.harm[name] for r in records] for name in self.rankings]
        return {
            "rankings": np.array(self.rankings, dtype=np.str_),
            "prompt_ids": np.array(ids, dtype=np.str_),
            "counts": counts.reshape(-1, 3),
            "mass": np.array([r.mass for r in records], dtype=np.float32).reshape(heads),
            "error": np.array([r.error for r in records], dtype=np.float32).reshape(heads),
            "pairs": np.array([r.pairs for r in records], dtype=np.int64).reshape(-1, len(Category), self.n_layers),
            "harm": np.array(harm, dtype=np.float32).reshape(len(self.rankings), *heads),
        }

    def summarize(self) -> Summary:
        """Quantiles at `LEVELS` and means over the prompts; mass that rounding took past 1 counts as 1.

        Before the mean, a prompt's harm is divided by the square root of its sum (`Summary.harm` says why).

        Raises:
            ValueError: no prompt was added.
        """
        n = len(self)
        if not n:
            raise ValueError("a summary must have at least one prompt with two or more images. Got none. Add some.")
        stacked = self._stacked()
        mass = np.minimum(stacked["mass"].astype(np.float64), 1.0)  # [N, 3, L, H]
        error = stacked["error"].astype(np.float64)  # [N, 3, L, H]
        totals = stacked["pairs"].sum(axis=2)  # [N, 4]
        kept = (totals[:, 1:] / totals[:, :1]).mean(axis=0)
        harm = stacked["harm"].astype(np.float64)  # [R, N, 3, L, H]
        total = harm.sum(axis=(2, 3, 4), keepdims=True)
        harm = (harm / np.sqrt(np.where(total > 0, total, 1))).mean(axis=1)  # [R, 3, L, H]
        picks = [min(i * n // (len(LEVELS) - 1), n - 1) for i in range(len(LEVELS))]  # floor(level * n), exactly

        def quantiles(values: np.ndarray) -> np.ndarray:
            return np.moveaxis(np.sort(values, axis=0)[picks], 0, -1)  # [3, L, H, Q]

        def by_category(values: np.ndarray) -> dict:
            return dict(zip(SPARSE, values, strict=True))

        return Summary(
            n_prompts=n,
            levels=LEVELS,
            mass=by_category(quantiles(mass)),
            mass_mean=by_category(mass.mean(axis=0)),
            error=by_category(quantiles(error)),
            error_mean=by_category(error.mean(axis=0)),
            kept=by_category(kept),
            pairs=dict(zip(Category, stacked["pairs"].mean(axis=0), strict=True)),
            harm={name: by_category(values) for name, values in zip(self.rankings, harm, strict=True)},
        )


def _check_id(prompt_id: str) -> None:
    if not prompt_id or not _plain(prompt_id):
        raise ValueError(f"prompt_id must be one or more printable ASCII characters. Got {prompt_id!r}.")


def _two_values(prompt_id: str) -> ValueError:
    """Of one prompt."""
    return ValueError(
        f"prompt {prompt_id} must have the same values wherever it was measured. Got two different records. "
        "Measure every prompt on one machine only, or start over from one state."
    )


def _stored(values: np.ndarray) -> np.ndarray:
    """A record's table: float32, read-only."""
    with np.errstate(over="ignore"):  # an overflow becomes inf, which `Statistics.add` refuses
        array = np.array(values, dtype=np.float32)
    array[array == 0] = 0  # -0.0 becomes 0.0: equal records have equal bits
    return read_only(array)


def _within(pairs: np.ndarray) -> bool:
    """Whether no category computes fewer pairs than none, or more than `DENSE`."""
    return bool((pairs >= 0).all() and (pairs <= pairs[Category.DENSE]).all())


def _plain(text: str) -> bool:
    """Whether a text survives as a NumPy string: printable ASCII."""
    return text.isascii() and text.isprintable()
