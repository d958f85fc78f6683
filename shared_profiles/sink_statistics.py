"""Which tokens of an image other images look at: measured mass by offset, and the sink template it leads to.

Every token of an image, delimiters included, is in one bin, counted from the image's nearer end. With `reach` 2::

    <start>  t0  t1  t2  ...  t8  t9  <end>
       0      1   2   2  ...   2   3    4       bins: 2 from the start, the middle, 2 from the end

An image row gives its softmax mass to its own image, to text, and to the bins of the images before it. All of it is a
mean over the image rows that have an earlier image, the rows that a sparse category changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_profiles._values import read_only, same_fields
from shared_profiles.layout import Layout, concatenated_ranges
from shared_profiles.template import SinkTemplate

REACH = 8  # offsets told apart at either end of an image
LEARN_FROM = 8  # prompts that `calibrate` learns a template from

# A head has a sink at an offset that draws at least `LIFT` times the mass of an average token of other images, and at
# least `SHARE` of all that the head gives to other images; heads that give them less than `LOOKS` do not count. An
# offset that `HEADS` of the heads that count have as a sink is in the template, at most `MOST` beside the ends.
LIFT, SHARE, LOOKS, HEADS, MOST = 4.0, 0.05, 0.01, 0.05, 6


def offset_bins(layout: Layout, reach: int) -> np.ndarray:
    """The bin of every token: `[n_tokens]` int64, -1 for text and padding.

    Raises:
        ValueError: `reach` is not positive.
    """
    if reach < 1:
        raise ValueError(f"reach must be at least 1. Got {reach}.")
    bins = np.full(layout.n_tokens, -1)
    begin, end = layout.images[:, 0], layout.images[:, 3]
    where = concatenated_ranges(begin, end)
    zero, limit = (np.repeat(x, end - begin) for x in layout.offset_origins)
    from_start, from_end = where - zero, limit - where
    near = np.where(from_start < from_end, from_start, 2 * reach + 1 - from_end)
    bins[where] = np.where(np.minimum(from_start, from_end - 1) < reach, near, reach)
    return bins


def visible_pairs(layout: Layout, window: int | None, reach: int) -> np.ndarray:
    """Tokens of each bin that a row sees in earlier images, `[2 * reach + 1]` float64: the mean over image rows.

    Args:
        layout: a whole prompt of at least two images.
        window: the layer's sliding window: a row at p sees keys after `p - window`.
        reach: offsets told apart.
    """
    bins, images = offset_bins(layout, reach), layout.images[1:]
    rows = concatenated_ranges(images[:, 1], images[:, 2])
    stop = np.repeat(images[:, 0], images[:, 2] - images[:, 1])
    start = np.zeros_like(rows) if window is None else np.minimum(rows - window + 1, stop)
    places = [np.flatnonzero(bins == b) for b in range(2 * reach + 1)]
    return np.array([(np.searchsorted(at, stop) - np.searchsorted(at, start)).mean() for at in places])


@dataclass(frozen=True, eq=False)
class SinkRows:
    """What is measured of a prompt of at least two images, and where: few keys tell nearly all.

    Attributes:
        rows: `[R]` int64 positions of the image rows that have an earlier image, ascending.
        stops: `[R]` int64, where each row's own image begins, its delimiter included: earlier keys are others'.
        keys: `[P]` int64 positions, ascending, of text and of every bin but the middle.
        bins: `[P]` int64, the bin of each; `2 * reach + 1` for text.
    """

    rows: np.ndarray
    stops: np.ndarray
    keys: np.ndarray
    bins: np.ndarray

    @classmethod
    def of(cls, layout: Layout, reach: int = REACH) -> SinkRows:
        """Those of a prompt, with this many offsets told apart."""
        images = layout.images[1:]
        rows = concatenated_ranges(images[:, 1], images[:, 2])
        stops = np.repeat(images[:, 0], images[:, 2] - images[:, 1])
        bins = offset_bins(layout, reach)
        bins[layout.text] = 2 * reach + 1
        keys = np.flatnonzero((bins >= 0) & (bins != reach) & (np.arange(layout.n_tokens) < stops[-1]))
        return cls(rows, stops, keys, bins[keys])


@dataclass(frozen=True, eq=False)
class SinkMass:
    """What image rows look at; `own + text + others.sum(-1)` is 1, up to rounding.

    Attributes:
        own: `[L, H]` float32, mass on the row's own image, its start delimiter included.
        text: `[L, H]` float32, mass on text.
        others: `[L, H, 2 * reach + 1]` float32, mass on each bin of the earlier images.
        pairs: `[L, 2 * reach + 1]` float32, how many tokens of each bin a row sees, `visible_pairs`.

    Raises:
        ValueError: shapes do not go together, or a value is not finite or is negative.
    """

    own: np.ndarray
    text: np.ndarray
    others: np.ndarray
    pairs: np.ndarray

    def __post_init__(self) -> None:
        for name in ("own", "text", "others", "pairs"):
            array = np.array(getattr(self, name), dtype=np.float32)
            if not (np.isfinite(array) & (array >= 0)).all():
                raise ValueError(
                    f"what image rows look at, {name}, must be finite and at least 0. Got {array.min()} to "
                    f"{array.max()}. Are prompt and weights in order, and is their dtype wide enough?"
                )
            object.__setattr__(self, name, read_only(array))
        shape, n_bins = self.own.shape, self.others.shape[-1]
        wanted = {"text": shape, "others": (*shape, n_bins), "pairs": (*shape[:1], n_bins)}
        if len(shape) != 2 or n_bins % 2 == 0 or any(getattr(self, name).shape != s for name, s in wanted.items()):
            got = {name: getattr(self, name).shape for name in ("own", *wanted)}
            raise ValueError(f"own and text must be [L, H], others [L, H, 2 * reach + 1], pairs [L, ...]. Got {got}.")

    @property
    def reach(self) -> int:
        """Offsets told apart at either end."""
        return self.others.shape[-1] // 2

    @property
    def strength(self) -> np.ndarray:
        """`[L, H, 2 * reach + 1]` float64: mass of one token of a bin over that of an average token of other images.

        1 everywhere for a head that looks at all of them alike; 0 where a head sees nothing of a bin.
        """
        others, pairs = self.others.astype(np.float64), self.pairs.astype(np.float64)[:, None]
        average = others.sum(-1, keepdims=True) / np.maximum(pairs.sum(-1, keepdims=True), 1e-12)
        each = others / np.where(pairs > 0, pairs, np.inf)
        return np.divide(each, average, out=np.zeros_like(each), where=average > 0)

    @classmethod
    def of(cls, layout: Layout, windows: Sequence[int | None], told: np.ndarray, kept: np.ndarray) -> SinkMass:
        """What was measured of a prompt.

        Args:
            layout: the prompt.
            windows: L sliding windows.
            told: `[L, H, 2 * reach + 2]` float64, mass on every bin of `SinkRows`, a mean over its rows; the middle's
                is not looked at: it is what is left over.
            kept: `[L, H]` float64, mass on own image and text together.
        """
        others, text = told[..., :-1].copy(), told[..., -1]
        reach = others.shape[-1] // 2
        others[..., reach] = 0.0
        # Rounding may leave a little less than nothing.
        others[..., reach] = np.maximum(0.0, 1.0 - kept - others.sum(-1))
        pairs = {window: visible_pairs(layout, window, reach) for window in set(windows)}
        return cls(np.maximum(0.0, kept - text), text, others, np.array([pairs[window] for window in windows]))

    @classmethod
    def mean(cls, masses: Iterable[SinkMass]) -> SinkMass:
        """The mean over prompts, each of the same weight; the same bits for the same order.

        Raises:
            ValueError: there are none, or they are of different shapes.
        """
        masses = list(masses)
        if len({mass.others.shape for mass in masses}) != 1:
            raise ValueError(
                f"masses must be one or more of one shape. Got {sorted({mass.others.shape for mass in masses})}."
            )

        def mean(name: str) -> np.ndarray:
            return np.asarray(np.mean([getattr(mass, name) for mass in masses], axis=0, dtype=np.float64))

        return cls(mean("own"), mean("text"), mean("others"), mean("pairs"))

    def __eq__(self, other: object) -> bool:
        return same_fields(self, other)

    __hash__ = None  # type: ignore[assignment]  # holds arrays


def sink_heads(mass: SinkMass) -> np.ndarray:
    """Share of the heads that look at other images which have a sink in a bin: `[2 * reach + 1]` float64.

    The middle, `[reach]`, is no offset and counts as 0.
    """
    total = mass.others.sum(-1, keepdims=True)  # [L, H, 1]
    looks = total[..., 0] >= LOOKS
    is_sink = (mass.strength >= LIFT) & (mass.others >= SHARE * total) & looks[..., None]
    is_sink[..., mass.reach] = False
    shares: np.ndarray = is_sink.sum((0, 1)) / max(1, looks.sum())
    return shares


def learn_template(mass: SinkMass, local_block: int = SinkTemplate.local_block) -> SinkTemplate:
    """The sink template that measured mass leads to, by the rule stated above.

    An image's ends are always sinks: its delimiters and, inside them, its first and its last token. Those two draw
    hardly more mass than others, and yet what they tell of their image keeps the answer (docs/results/criteria.md).

    Args:
        mass: the mean over calibration prompts.
        local_block: see `SinkTemplate`.
    """
    shares, weight, reach = sink_heads(mass), mass.others.sum((0, 1)), mass.reach
    ends = {*SinkTemplate.from_start, *(2 * reach + 1 - offset for offset in SinkTemplate.from_end)}
    inner = [b for b in range(2 * reach + 1) if b not in ends and shares[b] >= HEADS]
    best = sorted(inner, key=lambda b: (-shares[b], -weight[b]))[:MOST]
    from_start = (*SinkTemplate.from_start, *sorted(b for b in best if b < reach))
    from_end = (*SinkTemplate.from_end, *sorted(2 * reach + 1 - b for b in best if b > reach))
    return SinkTemplate(from_start, from_end, local_block)


def learned_from(sinks: Mapping[str, SinkMass], template: SinkTemplate) -> dict[str, Any]:
    """What a profile says of a learned template, as JSON values; see FORMAT.md, `choice`.

    Args:
        sinks: by prompt, what it was learned from.
        template: what was learned.

    Returns:
        `prompts`, their number, and for each offset of `from_start` and `from_end` the mass that the image rows of all
        heads give to it in earlier images, a mean in [0, 1]; None for an offset beyond those that were told apart.
    """
    mass = SinkMass.mean(sinks[prompt_id] for prompt_id in sorted(sinks))
    received, n_bins = mass.others.mean((0, 1), dtype=np.float64), 2 * mass.reach + 1

    def of(bins: list[int], known: range) -> list[float | None]:
        return [float(received[b]) if b in known else None for b in bins]

    return {
        "prompts": len(sinks),
        "from_start": of([*template.from_start], range(mass.reach)),
        "from_end": of([n_bins - offset for offset in template.from_end], range(mass.reach + 1, n_bins)),
    }


def stack_sinks(sinks: Mapping[str, SinkMass], n_layers: int, n_heads: int) -> dict[str, np.ndarray]:
    """The members of a state file, M prompts in ascending order of id and 2R + 1 bins; see FORMAT.md."""
    ids, n_bins = sorted(sinks), next((mass.others.shape[-1] for mass in sinks.values()), 1)
    tails = {"own": (n_heads,), "text": (n_heads,), "others": (n_heads, n_bins), "pairs": (n_bins,)}
    members = {
        f"sink_{name}": np.array([getattr(sinks[i], name) for i in ids], np.float32).reshape(len(ids), n_layers, *tail)
        for name, tail in tails.items()
    }
    return {"sink_ids": np.array(ids, dtype=np.str_)} | members


def unstack_sinks(members: Mapping[str, np.ndarray]) -> dict[str, SinkMass]:
    """The reverse of `stack_sinks`.

    Raises:
        ValueError: the members do not go together.
    """
    ids, *tables = (members[f"sink_{name}"] for name in ("ids", "own", "text", "others", "pairs"))
    if ids.ndim != 1 or ids.dtype.kind != "U" or {len(table) for table in tables} != {len(ids)}:
        raise ValueError(f"sinks of shapes {[table.shape for table in (ids, *tables)]}")
    return {str(prompt_id): SinkMass(*(table[i] for table in tables)) for i, prompt_id in enumerate(ids)}
