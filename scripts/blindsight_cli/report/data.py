"""`ReportData`: everything a report shows, as plain frozen values.

The tree is written by `blindsight demo --json`, read back by `blindsight report`, and turned into HTML by `render`:

    ReportData
      model, categories [L][H], template            which model, and what every head was given
      curve       (CurveRow, ...)                    measured points of speed against accuracy, and the budget
      statistics  {category: CategoryStatistics}     what calibration measured, per head
      accuracy    (AccuracyRow, ...)                 dense against sparse, one row per number of images
      timings     Timings(rows, machine)             measured seconds; only their ratios mean anything elsewhere
      flops       (FlopsPoint, ...)                  counted query-key pairs over the number of images
      masks       MaskExample                        one small prompt, drawn once per category
      examples    (Example, ...)                     a few questions with their answers
      provenance, chosen_by, limits                  where the figures come from and what they do not show

Only `model`, `categories` and `template` are required; a report leaves out the sections it has no figures for.
It is not a profile: nothing reads it back into a model.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from dataclasses import dataclass
from typing import Any

from blindsight_cli.report.codec import Record, at_least, conform, within
from blindsight_cli.report.curve import CurveRow
from shared_profiles import categories

FORMAT = "blindsight-report"
VERSION = 1
CATEGORIES = tuple(category.name for category in categories.Category)
SPARSE = tuple(category.name for category in categories.SPARSE)
SEGMENT_KINDS = ("text", "image", "delimiter")
MAX_MASK_TOKENS = 160
DEMO_LIMITS = (
    "The questions are synthetic: coloured shapes, one word to answer. They say nothing about photographs, documents "
    "or free text.",
    "The model is small and was trained for these questions. Which heads can be made sparse, and how many, differs "
    "from model to model.",
    "The times were taken on a CPU. Compare the two columns of one row with each other; the seconds themselves, and "
    "what a GPU would make of them, are not shown here.",
    "FLOPs are counted for attention alone, not for projections, feed-forward layers or the vision encoder.",
)

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ModelInfo(Record):
    """The model under report. `n_heads` counts query heads of one layer, `head_dim` their width."""

    name: str
    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_parameters: int

    def _validate(self) -> None:
        for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "n_parameters"):
            at_least(name, getattr(self, name), 1)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads. Got {self.n_heads} and {self.n_kv_heads}.")


@dataclass(frozen=True)
class TemplateInfo(Record):
    """Which tokens of an image are sinks: offsets from its start (from 0) and back from its end (from 1).

    Delimiters count as positions of the image. `local_block` is the width, in tokens, of SINK's local blocks.
    """

    from_start: tuple[int, ...]
    from_end: tuple[int, ...]
    local_block: int

    def _validate(self) -> None:
        for offset in self.from_start:
            at_least("from_start", offset, 0)
        for offset in self.from_end:
            at_least("from_end", offset, 1)
        at_least("local_block", self.local_block, 1)


@dataclass(frozen=True)
class CategoryStatistics(Record):
    """What one sparse category would do to every head, measured over the calibration prompts.

    Attributes:
        mass_mean, mass_q05, mass_q50, mass_q95: `[L][H]` mean and quantiles of retained softmax mass, in [0, 1].
        error_mean: `[L][H]` mean of `||o_category - o_dense|| / ||o_dense||`.
        kept: fraction of the dense query-key pairs that a head of this category keeps, in [0, 1].
    """

    mass_mean: Matrix
    mass_q05: Matrix
    mass_q50: Matrix
    mass_q95: Matrix
    error_mean: Matrix
    kept: float

    def _validate(self) -> None:
        for name in ("mass_mean", "mass_q05", "mass_q50", "mass_q95"):
            for value in itertools.chain(*getattr(self, name)):
                within(name, value, 0.0, 1.0 + 1e-3)
        for value in itertools.chain(*self.error_mean):
            at_least("error_mean", value, 0)
        within("kept", self.kept, 0.0, 1.0)


@dataclass(frozen=True)
class KindAccuracy(Record):
    """Share of right answers to one kind of question, dense and sparse, each in [0, 1]."""

    kind: str
    n_questions: int
    dense: float
    sparse: float

    def _validate(self) -> None:
        at_least("n_questions", self.n_questions, 1)
        within("dense", self.dense, 0.0, 1.0)
        within("sparse", self.sparse, 0.0, 1.0)


@dataclass(frozen=True)
class AccuracyRow(Record):
    """Dense against sparse on questions about `n_images` images.

    Attributes:
        dense, sparse: share of right answers, in [0, 1].
        agreement: share of questions that both answer alike, in [0, 1].
        kl: mean KL(dense || sparse) of the next-token distribution at the answer, in nats.
        kept_flops: share of dense attention's query-key pairs that are computed, over all layers and heads, in [0, 1].
        by_kind: the same accuracies for each kind of question.
    """

    n_images: int
    n_questions: int
    dense: float
    sparse: float
    agreement: float
    kl: float
    kept_flops: float
    by_kind: tuple[KindAccuracy, ...] = ()

    def _validate(self) -> None:
        at_least("n_images", self.n_images, 1)
        at_least("n_questions", self.n_questions, 1)
        for name in ("dense", "sparse", "agreement", "kept_flops"):
            within(name, getattr(self, name), 0.0, 1.0)
        at_least("kl", self.kl, -1e-6)


@dataclass(frozen=True)
class TimingRow(Record):
    """One measurement: medians, in seconds, of `repeats` runs each of dense and sparse. `what` says what was timed."""

    what: str
    n_tokens: int
    n_images: int
    dense_seconds: float
    sparse_seconds: float
    repeats: int

    def _validate(self) -> None:
        for name in ("n_tokens", "n_images", "repeats"):
            at_least(name, getattr(self, name), 1)
        for name in ("dense_seconds", "sparse_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive. Got {getattr(self, name)}.")

    @property
    def ratio(self) -> float:
        """Dense seconds over sparse seconds: above 1, sparse is faster."""
        return self.dense_seconds / self.sparse_seconds


@dataclass(frozen=True)
class Machine(Record):
    """Where the times were taken: processor name, cores in use, name and version of the framework."""

    cpu: str
    cores: int
    framework: str


@dataclass(frozen=True)
class Timings(Record):
    """Measured times and the machine they were measured on."""

    rows: tuple[TimingRow, ...]
    machine: Machine


@dataclass(frozen=True)
class FlopsPoint(Record):
    """Query-key pairs of one prompt of `n_images` images and `n_tokens` tokens, summed over all layers and heads.

    `intra`: an image token looking at its own image; `inter`: at another image; `text`: text rows, and image tokens
    looking at text. `dense_*` counts dense attention, `kept_*` what the profile keeps of it.
    """

    n_images: int
    n_tokens: int
    dense_intra: float
    dense_inter: float
    dense_text: float
    kept_intra: float
    kept_inter: float
    kept_text: float

    def _validate(self) -> None:
        at_least("n_images", self.n_images, 1)
        at_least("n_tokens", self.n_tokens, 1)
        for part in ("intra", "inter", "text"):
            dense, kept = getattr(self, f"dense_{part}"), getattr(self, f"kept_{part}")
            within(f"kept_{part}", kept, 0.0, dense * (1 + 1e-9))
        if self.dense_total <= 0:
            raise ValueError(f"the dense pairs must be more than 0. Got {self.dense_total}.")

    @property
    def dense_total(self) -> float:
        """All pairs of dense attention."""
        return self.dense_intra + self.dense_inter + self.dense_text

    @property
    def kept_total(self) -> float:
        """All pairs that the profile keeps."""
        return self.kept_intra + self.kept_inter + self.kept_text


@dataclass(frozen=True)
class Segment(Record):
    """A run of tokens of one kind: `text`, `image` (without its delimiters) or `delimiter`."""

    kind: str
    length: int

    def _validate(self) -> None:
        if self.kind not in SEGMENT_KINDS:
            raise ValueError(f"kind must be one of {SEGMENT_KINDS}. Got {self.kind!r}.")
        at_least("length", self.length, 1)


@dataclass(frozen=True)
class MaskExample(Record):
    """The masks of one small prompt.

    Attributes:
        segments: the prompt from left to right; each delimiter is a segment of its own. Lengths add up to T.
        masks: for each category a picture of T rows (queries) of T characters (keys), `1` where the query looks.
    """

    segments: tuple[Segment, ...]
    masks: dict[str, tuple[str, ...]]

    def _validate(self) -> None:
        n = self.n_tokens
        within("the number of tokens of a mask picture", n, 1, MAX_MASK_TOKENS)
        _keys_within("masks", self.masks, CATEGORIES)
        for name, rows in self.masks.items():
            if len(rows) != n or any(len(row) != n for row in rows):
                widths = sorted({len(row) for row in rows})
                raise ValueError(
                    f"masks[{name!r}] must be (T, T)=({n}, {n}), T being the sum of the segments' lengths. "
                    f"Got {len(rows)} rows of {widths} characters."
                )
            if any(row.strip("01") for row in rows):
                raise ValueError(f"masks[{name!r}] must be made of the characters 0 and 1. Got others.")

    @property
    def n_tokens(self) -> int:
        """T, the length of the prompt in tokens."""
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True)
class Example(Record):
    """One question: its pictures as base64 PNG thumbnails, and the three answers."""

    images: tuple[str, ...]
    question: str
    expected: str
    dense: str
    sparse: str

    def _validate(self) -> None:
        for i, image in enumerate(self.images):
            try:
                png = base64.b64decode(image, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
            except binascii.Error:
                png = False
            if not png:
                raise ValueError(f"images[{i}] must be a PNG file in base64. Got {image[:20]!r}... Encode its bytes.")


@dataclass(frozen=True)
class ReportProvenance(Record):
    """Where the figures come from: calibration data, model fingerprint digest, library versions, time, command line."""

    dataset: str
    dataset_hash: str
    n_prompts: int
    n_tokens: int
    fingerprint: str
    versions: dict[str, str]
    created: str
    command: str


@dataclass(frozen=True)
class ReportData(Record):
    """Everything a report shows; see the module docstring. `chosen_by` is a sentence on how categories were chosen."""

    model: ModelInfo
    categories: tuple[tuple[str, ...], ...]
    template: TemplateInfo
    statistics: dict[str, CategoryStatistics] | None = None
    accuracy: tuple[AccuracyRow, ...] = ()
    timings: Timings | None = None
    flops: tuple[FlopsPoint, ...] = ()
    masks: MaskExample | None = None
    examples: tuple[Example, ...] = ()
    provenance: ReportProvenance | None = None
    chosen_by: str = ""
    limits: tuple[str, ...] = DEMO_LIMITS
    curve: tuple[CurveRow, ...] = ()
    budget: float | None = None

    def _validate(self) -> None:
        at_least("budget", self.budget or 0.0, 0.0)
        shape = (self.model.n_layers, self.model.n_heads)
        _has_shape("categories", self.categories, shape)
        for layer, row in enumerate(self.categories):
            for head, name in enumerate(row):
                if name not in CATEGORIES:
                    raise ValueError(f"categories[{layer}][{head}] must be one of {CATEGORIES}. Got {name!r}.")
        _keys_within("statistics", self.statistics or {}, SPARSE)
        for name, statistics in (self.statistics or {}).items():
            for part in ("mass_mean", "mass_q05", "mass_q50", "mass_q95", "error_mean"):
                _has_shape(f"statistics[{name!r}].{part}", getattr(statistics, part), shape)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, with the format's name and version in front."""
        return {"format": FORMAT, "version": VERSION, **super().to_json()}

    @staticmethod
    def from_json(data: Any) -> ReportData:
        """The inverse of `to_json`.

        Raises:
            ValueError: not a report, another version, or a value that does not fit; the message says where.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'a report must have "format": "{FORMAT}". Write one with `blindsight demo --json`.')
        if data.get("version") != VERSION:
            raise ValueError(
                f"the report's version must be {VERSION}. Got {data.get('version')!r}. Write it anew with this library."
            )
        rest = {key: value for key, value in data.items() if key not in ("format", "version")}
        report: ReportData = conform(ReportData, rest, "report")
        return report


def _has_shape(name: str, rows: tuple[tuple[Any, ...], ...], shape: tuple[int, int]) -> None:
    widths = sorted({len(row) for row in rows})
    if len(rows) != shape[0] or widths != [shape[1]]:
        raise ValueError(f"{name} must have shape (L, H)={shape}. Got {len(rows)} rows of {widths} values.")


def _keys_within(name: str, table: dict[str, Any], allowed: tuple[str, ...]) -> None:
    if unknown := sorted(set(table) - set(allowed)):
        raise ValueError(f"{name} may have the keys {allowed}. Got {unknown} besides.")
