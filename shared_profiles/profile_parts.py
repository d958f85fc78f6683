"""The small parts of a profile: which model it belongs to, where it came from, what was measured with it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from shared_profiles._values import is_integer, rounded

LETTERS = "DSIB"
"""One letter per category, in `Category`'s order: DENSE, SINK, INTRA_IMAGE, INTRA_IMAGE_SINK (both)."""

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")


class ProfileError(ValueError):
    """A profile, or a file that should hold one, is not what it must be."""


class ProfileMismatchError(ProfileError):
    """A profile was made for another model."""


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a model to a profile.

    Attributes:
        family: its `model_type`, for example `qwen2_5_vl`.
        n_layers: L, decoder layers.
        n_heads: H, query heads of a layer.
        n_kv_heads: K, key-value heads of a layer; divides H.
        head_dim: D.
        digest: `sha256:` and 64 hexadecimal digits, over the configuration and a sample of every weight.

    Raises:
        ValueError: a field is out of its range.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    digest: str

    def __post_init__(self) -> None:
        _require_text("family", self.family)
        for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim"):
            _require_positive(name, getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads. Got {self.n_kv_heads} and {self.n_heads}.")
        if not isinstance(self.digest, str) or not _SHA256.fullmatch(self.digest):
            raise ValueError(f"digest must be 'sha256:' and 64 lower-case hexadecimal digits. Got {self.digest!r}.")


@dataclass(frozen=True)
class Provenance:
    """Where a profile's statistics came from.

    Attributes:
        dataset: name of the calibration data.
        dataset_hash: hash of its content.
        n_prompts: prompts read.
        n_tokens: tokens in them, all together.
        created: when, ISO 8601 in UTC: `2026-11-21T03:40:49Z` or with `+00:00`.
        versions: version of each library that took part, by name.

    Raises:
        ValueError: a field is empty, out of its range or of the wrong form.
    """

    dataset: str
    dataset_hash: str
    n_prompts: int
    n_tokens: int
    created: str
    versions: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("dataset", "dataset_hash"):
            _require_text(name, getattr(self, name))
        for name in ("n_prompts", "n_tokens"):
            _require_positive(name, getattr(self, name))
        if not isinstance(self.created, str) or not _is_utc(self.created):
            raise ValueError(f"created must be a UTC time such as 2026-11-21T03:40:49Z. Got {self.created!r}.")
        object.__setattr__(self, "versions", dict(self.versions))
        if not all(isinstance(text, str) for pair in self.versions.items() for text in pair):
            raise ValueError(f"versions must map names to version strings. Got {self.versions!r}.")


@dataclass(frozen=True)
class CurvePoint:
    """One measured point of the speed/accuracy curve; six significant digits are kept.

    Attributes:
        kept: fraction of the dense query-key pairs that the whole model computes, in [0, 1].
        kl: KL divergence from the dense model of the next-token distribution at the answer, in nats, at least 0: the
            mean over the prompts of `n_images`, where it is worst (`shared_profiles.measured`).
        accuracy: share of right answers in [0, 1], or None where it was not measured.
        agreement: share of prompts whose likeliest next token is the dense model's, in [0, 1], or None.
        n_prompts: how many prompts were measured, or None where nobody wrote it down.
        heads: L rows of H letters of `LETTERS`: the categories that were measured; None where nobody wrote them down.
        n_images: the fewest and the most images of the prompts that `kl` is over; None if nobody wrote it down.

    Raises:
        ValueError: a value is out of its range.
    """

    kept: float
    kl: float
    accuracy: float | None = None
    agreement: float | None = None
    n_prompts: int | None = None
    heads: tuple[str, ...] | None = None
    n_images: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("kept", "kl", "accuracy", "agreement"):
            value = getattr(self, name)
            if value is None and name in ("accuracy", "agreement"):
                continue
            upper = math.inf if name == "kl" else 1.0
            if not math.isfinite(value) or not 0 <= value <= upper:
                wanted = "finite and at least 0" if upper == math.inf else "in [0, 1]"
                raise ValueError(f"{name} must be {wanted}. Got {value!r}.")
            object.__setattr__(self, name, rounded(value))
        if self.n_prompts is not None:
            _require_positive("n_prompts", self.n_prompts)
        if self.n_images is not None:
            least_most = tuple(self.n_images)
            if len(least_most) != 2 or not all(is_integer(n, 2) for n in least_most) or least_most[0] > least_most[1]:
                raise ValueError(f"n_images must be the fewest and the most, at least 2. Got {least_most!r:.80}.")
            object.__setattr__(self, "n_images", least_most)
        if self.heads is not None:
            rows = tuple(self.heads)
            if not rows or not rows[0] or any(len(row) != len(rows[0]) or row.strip(LETTERS) for row in rows):
                raise ValueError(f"heads must be equally long rows of the letters {LETTERS}. Got {rows!r:.80}.")
            object.__setattr__(self, "heads", rows)

    @property
    def categories(self) -> np.ndarray | None:
        """`[L, H]` int8, values of `Category`; None where `heads` is."""
        if self.heads is None:
            return None
        return np.array([[LETTERS.index(letter) for letter in row] for row in self.heads], dtype=np.int8)


def heads_of(categories: np.ndarray) -> tuple[str, ...]:
    """Categories `[L, H]` as `CurvePoint.heads` writes them."""
    return tuple("".join(LETTERS[value] for value in row) for row in categories.tolist())


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a string that is not empty. Got {value!r}.")


def _require_positive(name: str, value: object) -> None:
    if not is_integer(value, 1):
        raise ValueError(f"{name} must be a positive integer. Got {value!r}.")


def _is_utc(text: str) -> bool:
    """Whether a text is a date and time that exist, written in UTC."""
    try:
        return bool(_UTC.fullmatch(text)) and datetime.fromisoformat(text) is not None
    except ValueError:
        return False
