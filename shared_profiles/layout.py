"""The layout of one prompt: where its text, its images, their delimiters and their sinks stand.

    ids        a  b  <s> .  .  .  <e> c  <s> .  .  <e> d
    position   0  1   2  3  4  5   6  7   8  9 10  11 12
    images     begin=2 first=3 last=6 end=7;  begin=8 first=9 last=11 end=12

Built from token ids and the model's special tokens, nothing else. One `Layout` is one sequence; a batch is a list
of them. It does not know what a category is: `masks.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shared_profiles.families import SpecialTokens
from shared_profiles.template import SinkTemplate

NO_IMAGE_TOKENS = "no image tokens among the queries"  # why a prefill runs dense


def concatenated_ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """`arange(starts[0], stops[0])`, then `arange(starts[1], stops[1])`, ... as one int64 array."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


@dataclass(frozen=True, eq=False)
class Layout:
    """Text and images of one sequence.

    Attributes:
        n_tokens: N, the row's length, padding included.
        start, stop: the real tokens are `[start, stop)`; the rest is padding.
        images: `[n_images, 4]` int64, columns `begin, first, last, end`. The image's tokens are `[first, last)`; its
            start delimiter is `[begin, first)`, empty where it has none; its end delimiter `[last, end)` likewise.
        bidirectional: whether an image's tokens look at later tokens of the same image.
        unfinished: the last image goes on beyond the sequence, as in a chunk of a prompt; which of its tokens are
            sinks counted from its end is not known yet.
        whole, kept: of a pruned prompt (`keep`), the layout before, and the positions in it of the tokens that are
            left: `[N]` int64, ascending. None for a prompt with all its tokens.

    Raises:
        ValueError: images out of order, overlapping, empty, or outside `[start, stop)`.
    """

    n_tokens: int
    start: int
    stop: int
    images: np.ndarray
    bidirectional: bool = False
    unfinished: bool = False
    whole: Layout | None = None
    kept: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.n_tokens:
            raise ValueError(
                f"0 <= start <= stop <= n_tokens must hold. Got {self.start}, {self.stop}, {self.n_tokens}."
            )
        images = np.array(self.images, dtype=np.int64).reshape(-1, 4)
        images.setflags(write=False)
        object.__setattr__(self, "images", images)
        begin, first, last, end = images.T
        ordered = (begin <= first) & (first < last) & (last <= end)
        apart = np.concatenate([[self.start], end]) <= np.concatenate([begin, [self.stop]])
        if not (ordered.all() and apart.all()):
            raise ValueError(
                "images must be rows (begin <= first < last <= end) in order, apart, inside "
                f"[{self.start}, {self.stop}). Got {images.tolist()}."
            )

    @property
    def n_images(self) -> int:
        """Number of images; each temporal group of a video's frames is one."""
        return len(self.images)

    @cached_property
    def key(self) -> tuple:
        """A hashable value equal for equal layouts."""
        pruned = None if self.whole is None or self.kept is None else (self.whole.key, self.kept.tobytes())
        return self.n_tokens, self.start, self.stop, self.bidirectional, self.unfinished, self.images.tobytes(), pruned

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def text(self) -> np.ndarray:
        """Positions of the text tokens, delimiters excluded: `[n_text]` int64, ascending."""
        return concatenated_ranges(np.r_[self.start, self.images[:, 3]], np.r_[self.images[:, 0], self.stop])

    @cached_property
    def textual_rows(self) -> np.ndarray:
        """Positions that query like text, i.e. text and delimiters: `[n]` int64, ascending."""
        return concatenated_ranges(np.r_[self.start, self.images[:, 2]], np.r_[self.images[:, 1], self.stop])

    @property
    def offset_origins(self) -> tuple[np.ndarray, np.ndarray]:
        """Where a template's offsets count from, at both ends of every image: `[n_images]` int64 each.

        The image's ends; one further out where it has no delimiter there, as in the midst of a video, so that an
        offset means the same token of a picture with and without.
        """
        begin, first, last, end = self.images.T
        return begin - (begin == first), end + (end == last)

    def sinks(self, template: SinkTemplate) -> np.ndarray:
        """Positions of the sink tokens of all images, delimiters included: `[n_sinks]` int64, ascending."""
        if self.whole is not None and self.kept is not None:
            left = np.flatnonzero(np.isin(self.kept, self.whole.sinks(template), assume_unique=True))
            return np.setdiff1d(left, self.text, assume_unique=True)
        begin, first, last, end = self.images.T
        zero, limit = (x[:, None] for x in self.offset_origins)
        from_start = zero + np.array(template.from_start, dtype=np.int64)
        from_end = limit - np.array(template.from_end, dtype=np.int64)
        is_start, is_end = ((x >= begin[:, None]) & (x < end[:, None]) for x in (from_start, from_end))
        is_end[len(is_end) - self.unfinished :] = False
        inside = np.concatenate([from_start[is_start], from_end[is_end]])
        return np.unique(np.concatenate([inside, concatenated_ranges(begin, first), concatenated_ranges(last, end)]))

    def keep(self, indices: Sequence[int] | np.ndarray) -> Layout:
        """The layout of what is left of a prompt that is pruned to some of its tokens.

            before    a  <s> .  .  .  .  <e> b  <s> .  .  <e> c      keep([0, 1, 3, 5, 6, 7, 8, 12])
            sinks         S  S        S  S      S  S  S  S           of the template (0, 1), (1, 2)
            after     a  <s>    .     .  <e> b  <s>           c
            sinks         S           S  S                           the second <s> is text now

        A token stays what it was. Images shrink; one that loses all its tokens is no image any more, and what is left
        of its delimiters is text. A delimiter may go while its image stays. Sinks are those of the whole
        prompt that are left: no token becomes one in the place of another. What is counted in tokens, the local
        blocks of `Category.SINK` and sliding windows, is from here on counted in kept tokens.

        Args:
            indices: `[n]` positions to keep, ascending. All of them give an equal layout, and `keep(a).keep(b)` is
                `keep(a[b])`.

        Raises:
            ValueError: no positions, not ascending, or outside the sequence.
        """
        kept = np.asarray(indices)
        integers = kept.ndim == 1 and len(kept) > 0 and kept.dtype.kind in "iu"
        if not (integers and kept[0] >= 0 and kept[-1] < self.n_tokens and (kept[1:] > kept[:-1]).all()):
            raise ValueError(
                f"indices must be at least one position of [0, {self.n_tokens}), ascending, each once. "
                f"Got {indices!r}. Of a mask, take np.flatnonzero(mask)."
            )
        kept = kept.astype(np.int64)
        if self.whole is not None and self.kept is not None:
            return self.whole.keep(self.kept[kept])
        if len(kept) == self.n_tokens:
            return self
        kept.setflags(write=False)
        start, stop = np.searchsorted(kept, (self.start, self.stop)).tolist()
        images = np.searchsorted(kept, self.images)
        seen = images[:, 1] < images[:, 2]
        unfinished = self.unfinished and bool(seen[-1])
        return Layout(len(kept), start, stop, images[seen], self.bidirectional, unfinished, self, kept)

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[int] | np.ndarray,
        special: SpecialTokens,
        *,
        valid: Sequence[int] | np.ndarray | None = None,
        frames: Sequence[int] = (),
        bidirectional: bool = False,
        unfinished: bool = False,
    ) -> Layout:
        """Finds the images of one sequence: runs of placeholders, and the delimiter on either side of each.

        Delimiters anywhere else are text: a user may type one, and a model may generate one.

        Args:
            ids: `[N]` integer token ids, placeholders expanded: one per image token.
            special: the model's special tokens.
            valid: `[N]`, nonzero for real tokens, zero for padding on the left or right. Default: all real.
            frames: for every video in order, its number of temporal frame groups; each becomes one image.
            bidirectional: whether the family's images look both ways.
            unfinished: the sequence is the beginning of a prompt, so its last image may lack its end.

        Raises:
            ValueError: a run of placeholders lacks a delimiter, a video's tokens do not divide into its frame groups,
                `frames` has another length than there are videos, or `valid` has holes.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise ValueError(
                f"ids must be one sequence [N]. Got shape {ids.shape}. Build one layout per row of a batch."
            )
        start, stop = _real_span(len(ids), valid)
        placeholder = np.isin(ids, special.placeholders)
        placeholder[:start] = placeholder[stop:] = False
        changes = np.diff(np.where(placeholder, ids, -1), prepend=-1, append=-1) != 0  # a video may touch an image
        first, last = np.flatnonzero(changes[:-1] & placeholder), np.flatnonzero(changes[1:] & placeholder) + 1

        opened = (first > start) & (ids[first - 1] == special.start)
        closed = (last < stop) & (ids[np.minimum(last, stop - 1)] == special.end)
        cut = bool(unfinished and len(last) and last[-1] == stop)
        closed[len(closed) - cut :] = True
        _check_delimiters(first, last, opened, closed)
        is_video = ids[first] == special.video if special.video is not None else np.zeros(len(first), dtype=bool)
        if is_video.sum() != len(frames):
            raise ValueError(
                f"frames must state the number of frame groups of each of the {is_video.sum()} videos. Got "
                f"{len(frames)} numbers. Pass the first column of video_grid_thw."
            )
        images = np.stack([first - 1, first, last, np.minimum(last + 1, stop)], axis=1)
        if len(frames):
            images = _split_videos(images, is_video, frames)
        return cls(len(ids), start, stop, images, bidirectional, cut)


def why_dense(layouts: Sequence[Layout], q_start: int) -> str | None:
    """Why no category could save anything in a prefill; None where one could.

    Args:
        layouts: of its rows, the cache included.
        q_start: position of the first query.
    """
    several = [layout for layout in layouts if layout.n_images >= 2]  # the others run dense whatever is new in them
    if not several:
        return "fewer than two images"
    if all(layout.images[-1, 2] <= q_start for layout in several):
        return NO_IMAGE_TOKENS
    return None


def _real_span(n: int, valid: Sequence[int] | np.ndarray | None) -> tuple[int, int]:
    """First and one past the last real token; refuses padding in the middle."""
    if valid is None:
        return 0, n
    mask = np.asarray(valid) != 0
    if mask.shape != (n,):
        raise ValueError(f"valid must have shape ({n},) like ids. Got {mask.shape}.")
    where = np.flatnonzero(mask)
    if not len(where):
        return 0, 0
    start, stop = int(where[0]), int(where[-1]) + 1
    if stop - start != len(where):
        raise ValueError("padding must be on the left or right of a sequence. Got an attention mask with holes.")
    return start, stop


def _check_delimiters(first: np.ndarray, last: np.ndarray, opened: np.ndarray, closed: np.ndarray) -> None:
    """Demands that every run of placeholders stands right between a start and an end delimiter."""
    wrong = np.flatnonzero(~(opened & closed))
    if len(wrong):
        i = int(wrong[0])
        lacking = " and ".join([*["start before"] * (not opened[i]), *["end after"] * (not closed[i])])
        raise ValueError(
            f"every image must be <start> placeholders <end>. Got image {i}, placeholders at [{first[i]}, {last[i]}), "
            f"with no {lacking} it. Use the ids that the model's processor returns, uncut."
        )


def _split_videos(images: np.ndarray, is_video: np.ndarray, frames: Sequence[int]) -> np.ndarray:
    """Replaces each video by its frame groups; the first keeps the start delimiter, the last the end delimiter."""
    rows: list[tuple[int, ...]] = []
    remaining = iter(frames)
    for (begin, first, last, end), video in zip(images.tolist(), is_video, strict=True):
        groups = int(next(remaining)) if video else 1
        length, left_over = divmod(last - first, groups) if groups > 0 else (0, 1)
        if left_over:
            raise ValueError(
                f"a video's tokens must divide evenly into its frame groups. Got {last - first} tokens at "
                f"[{first}, {last}) for {groups} groups."
            )
        cuts = [first + g * length for g in range(groups + 1)]
        begins = [begin, *cuts[1:-1]]
        stops = [*cuts[1:-1], end]
        rows += zip(begins, cuts[:-1], cuts[1:], stops, strict=True)
    return np.array(rows, dtype=np.int64)
