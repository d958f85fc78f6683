"""Conversations as the machine of `test_jax_conversations.py` holds them: what is told, and what was computed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_blindsight import Cache
from jax_blindsight.prefill import Prefilled
from jax_oracle import WORD, Item, Picture, Row, Truth, flatten
from shared_profiles import Category
from shared_profiles.profile import Profile
from tiny_models import END, IMAGE, PAD, START, VIDEO

VOCABULARY = 96


@dataclass(frozen=True)
class Told:
    """What to tell a row: pictures and the words before each, and where the turn ends."""

    pictures: list[tuple[int, Picture]]
    ending: str
    seed: int

    def fit(self, row: Row, n: int) -> list[Item]:
        """A turn of n tokens, with those of the pictures that there is room for."""
        rng = np.random.default_rng(self.seed)
        closing: list[Item] = [END] * row.is_cut
        items: list[Item] = []
        left = n - len(closing)
        for n_words, picture in self.pictures:
            picture = Picture((1, 4, 4), seed=picture.seed) if row.family == "gemma3" else picture
            is_open = row.marks[-1:] == [START] and not items  # by the turn before, or by what was written
            more = [picture, END] if is_open else [*words(rng, n_words), START, picture, END]
            if len(flatten(more)) <= left:
                items += more
                left -= len(flatten(more))
        if not items or self.ending == "words" or isinstance(items[0], Picture):
            return [*closing, *items, *words(rng, left)]
        if self.ending == "cut":  # between the last picture and the delimiter after it
            items.pop()
            left += 1
        return [*closing, *words(rng, left), *items]


def words(rng: np.random.Generator, n: int) -> list[int]:
    """Text, with delimiters and the id of padding among it."""
    return np.where(rng.random(n) < 0.9, rng.integers(10, VOCABULARY, n), rng.choice([0, START, END], n)).tolist()


@dataclass
class Talk:
    """A conversation: what its rows were told, and what JAX computed for it.

    Attributes:
        rows: one per batch row.
        length: slots that the cache must have in use.
        cache: to go on from.
        stale: the one before, where it was consumed.
        is_viewed: on a CPU `device_get` copies nothing, and JAX leaves what NumPy looks at as it is.
        logits: `[B, V]` of the next tokens; None where nobody returned them.
        found: row, token, and the logits after it.
        likeliest: row, place, and the token that was the likeliest there.
    """

    rows: list[Row]
    length: int = 0
    cache: Cache | None = None
    stale: Cache | None = None
    is_viewed: bool = False
    logits: Any = None
    found: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    likeliest: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def room(self) -> int:
        return self.cache.capacity - self.length

    @property
    def start(self) -> Prefilled:
        return Prefilled(self.logits, self.cache, "", "portable")

    def goes_on(self, after: Cache, n: int, logits: Any) -> None:
        """After a call that added n slots, and gave `[B, V]` logits or none."""
        if after is not self.cache:
            self.stale, self.is_viewed = None if self.is_viewed else self.cache, False
        self.cache, self.length, self.logits = after, self.length + n, logits
        assert after.length == self.length

    def run(self, turn: Sequence[Sequence[Item]], profile: Profile | None, dense: bool) -> str:
        """Takes in a prefill's tokens; gives how it must run, as docs/limits.md has it."""
        for row, items in zip(self.rows, turn, strict=True):
            row.read(items)
        several = [row.n_images >= 2 for row in self.rows]
        has_new = [any(isinstance(item, Picture) for item in items) for items in turn]
        if dense:
            how = "dense: asked for"
        elif (profile.categories == Category.DENSE).all():
            how = "dense: all heads are Dense"
        elif not any(several):
            how = "dense: fewer than two images"
        elif not any(np.logical_and(several, has_new)):
            how = "dense: no image tokens among the queries"
        else:
            how = "sparse"
        for row, is_sparse in zip(self.rows, several, strict=True):
            row.run(profile if how == "sparse" and is_sparse else None)
        return how

    def write(self, ids: np.ndarray, stops: Sequence[int], limit: int, greedy: bool) -> None:
        """Takes in an answer `[B, n]` but its last column, which no cache holds."""
        stopped = np.isin(ids, stops)
        ended = np.cumsum(stopped, axis=1) - stopped > 0  # before this token
        assert (ids == np.where(ended, np.roll(ids, 1, axis=1), ids)).all(), "a row that ended repeats itself"
        assert not ended[:, -1].all() and (ids.shape[1] == limit or (ended | stopped)[:, -1].all())
        for i, column in enumerate(ids.T):
            if greedy:
                self.likeliest += [(b, len(row.ids), column[b]) for b, row in enumerate(self.rows) if not ended[b, i]]
            if i + 1 < ids.shape[1]:
                self.add(column)

    def add(self, column: Sequence[int]) -> None:
        for row, token in zip(self.rows, column, strict=True):
            row.write(int(token))

    def check(self, model: Any) -> None:
        """Holds all that was found against the oracle."""
        truths = [Truth.of(model, row) for row in self.rows]
        for b, i, logits in self.found:
            error, allowed = np.abs(logits - truths[b].exact[i]).max(), truths[b].allowed
            assert error <= allowed, (
                f"row {b}, token {i} of {len(self.rows[b].ids)}: {error:.3g}, allowed {allowed:.3g}"
            )
        for b, i, token in self.likeliest:
            logits = truths[b].exact[i - 1]
            assert logits[token] >= logits.max() - 2 * truths[b].allowed, f"row {b} wrote {token} as token {i}"


def copied(how: str, talk: Talk) -> Cache:
    arrays = dict(keys=talk.cache.keys, values=talk.cache.values)
    match how:
        case "deepcopy":
            return copy.deepcopy(talk.cache)
        case "arrays":
            return replace(talk.cache, **jax.tree.map(jnp.copy, arrays))
        case "host":
            return replace(talk.cache, **jax.device_put(jax.device_get(arrays)))
        case _:
            return pickle.loads(pickle.dumps(talk.cache))


def arrays_of(
    family: str, rows: Sequence[Sequence[Item]], offsets: Sequence[int] | None = None, width: int | None = None
) -> dict[str, np.ndarray]:
    """What the family's processor would return for rows that begin at these columns of so many."""
    tokens = [flatten(row) for row in rows]
    offsets = [0] * len(rows) if offsets is None else offsets
    width = max(map(len, tokens)) if width is None else width
    ids, mask = np.full((len(rows), width), PAD), np.zeros((len(rows), width), np.int64)
    for b, (row, first) in enumerate(zip(tokens, offsets, strict=True)):
        ids[b, first : first + len(row)], mask[b, first : first + len(row)] = row, 1
    arrays = dict(input_ids=ids, attention_mask=mask)
    pictures = [item for row in rows for item in row if isinstance(item, Picture)]
    images, videos = ([p for p in pictures if p.is_video is kind] for kind in (False, True))
    if family == "gemma3":
        arrays["token_type_ids"] = (ids == IMAGE).astype(np.int64)
    else:
        arrays["mm_token_type_ids"] = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    if images:
        arrays["pixel_values"] = np.concatenate([p.pixels(family) for p in images])
        if family != "gemma3":
            arrays["image_grid_thw"] = np.array([p.grid for p in images])
    if videos:
        arrays["pixel_values_videos"] = np.concatenate([p.pixels(family) for p in videos])
        arrays["video_grid_thw"] = np.array([p.grid for p in videos])
        arrays["second_per_grid_ts"] = np.array([p.seconds for p in videos])
    return arrays


WRONG = ("padding", "rows", "capacity", "border", "no end", "no pixels", "mask")


def wrong_turn(talk: Talk, wrong: str) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """A turn of at most 40 tokens that no prefill takes: its arrays, its options, and what the error says."""
    n_rows, family = len(talk.rows), talk.rows[0].family
    turn: list[list[Item]] = [[END if row.is_cut else WORD, START, Picture((1, 4, 4)), END, WORD] for row in talk.rows]
    match wrong:
        case "padding":
            return arrays_of(family, turn, [1] * n_rows, 21), {}, "must have no padding"
        case "rows":
            more = [WORD] * len(flatten(turn[0]))
            return arrays_of(family, [*turn, more]), {}, f"as many rows as the cache has, {n_rows}"
        case "capacity":
            return arrays_of(family, turn), dict(capacity=400), "a filled cache keeps its capacity"
        case "border":
            again = [Picture((1, 4, 4), is_video=row.is_cut and row.marks[-1] == VIDEO) for row in talk.rows]
            message = "an image must end with the piece" if any(row.is_cut for row in talk.rows) else "no start before"
            turn = [[picture, *items] for picture, items in zip(again, turn, strict=True)]
            return arrays_of(family, turn), {}, message
        case "no end":
            return arrays_of(family, [[*items[:-2], WORD, WORD] for items in turn]), {}, "no end after"
        case "no pixels":
            arrays = arrays_of(family, turn)
            return {name: x for name, x in arrays.items() if name != "pixel_values"}, {}, "pixel_values must be there"
        case _:
            arrays = arrays_of(family, turn)
            past = np.zeros((n_rows, talk.length), np.int64)
            arrays["attention_mask"] = np.concatenate([past, arrays["attention_mask"]], axis=1)
            return arrays, {}, "attention_mask must be 1 at the tokens in the cache"
