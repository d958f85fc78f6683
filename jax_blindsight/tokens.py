"""The token ids of a batch and the grids of its images: all that layouts and rotary positions are made of.

Rows end together, so padding stands on the left::

    . . a b c        start 2
    d e f g h        start 0
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_blindsight.config import ModelConfig
from jax_blindsight.positions import rope_positions
from shared_profiles import Layout, SpecialTokens


@dataclass(frozen=True, eq=False)
class Grids:
    """The images and videos of one row, in order; Gemma 3, whose images are all alike, has none.

    Attributes:
        images, videos: `[n, 3]` int64, temporal, height and width in patches.
        seconds: one per video, the time between its frame groups.
    """

    images: np.ndarray
    videos: np.ndarray
    seconds: np.ndarray

    @classmethod
    def none(cls) -> Grids:
        """Of a row of text."""
        return cls(np.zeros((0, 3), np.int64), np.zeros((0, 3), np.int64), np.zeros(0))

    def followed_by(self, more: Grids) -> Grids:
        """Both, one after the other."""
        return Grids(*(np.concatenate(pair) for pair in zip(vars(self).values(), vars(more).values(), strict=True)))


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token rows that end together.

    Attributes:
        ids: `[B, N]` int64; row b's tokens are `ids[b, start[b]:]`, what stands before them is padding.
        start: `[B]` int64.
        grids: one per row.
    """

    ids: np.ndarray
    start: np.ndarray
    grids: tuple[Grids, ...]

    @classmethod
    def text(cls, ids: np.ndarray) -> Tokens:
        """Rows `[B, N]` of text alone, without padding."""
        return cls(ids, np.zeros(len(ids), np.int64), (Grids.none(),) * len(ids))

    @property
    def valid(self) -> np.ndarray:
        """`[B, N]` bool, False for padding."""
        return np.arange(self.ids.shape[1]) >= self.start[:, None]

    def followed_by(self, more: Tokens, special: SpecialTokens) -> Tokens:
        """These tokens, then more.

        Raises:
            ValueError: another number of rows, padding between the two, or an image that goes on across the border.
        """
        if len(more.ids) != len(self.ids):
            raise ValueError(
                f"a batch goes on with as many rows as the cache has, {len(self.ids)}. Got {len(more.ids)}."
            )
        if more.start.any():
            raise ValueError(
                "what follows a filled cache must have no padding, or there would be holes in the cache. Got "
                f"{more.start.tolist()} padding tokens. Give all rows one length, or go on row by row."
            )
        border = self.ids[:, -1], more.ids[:, 0]
        if (np.isin(border[0], special.placeholders) & (border[0] == border[1])).any():
            raise ValueError(
                "an image must end with the piece that it is in. Got pieces whose border has placeholders on both "
                "sides. Keep every image's delimiters, and cut between images."
            )
        return Tokens(
            np.concatenate([self.ids, more.ids], axis=1),
            self.start,
            tuple(a.followed_by(b) for a, b in zip(self.grids, more.grids, strict=True)),
        )

    def layouts(self, config: ModelConfig) -> list[Layout]:
        """One layout per row.

        Raises:
            ValueError: an image lacks a delimiter.
        """
        return [
            Layout.from_ids(
                ids,
                config.special,
                valid=valid,
                frames=grids.videos[:, 0].tolist(),
                bidirectional=config.bidirectional,
                unfinished=True,
            )
            for ids, valid, grids in zip(self.ids, self.valid, self.grids, strict=True)
        ]

    def positions(self, config: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rotary positions from 0, mRoPE `[3, B, N]` or `[B, N]`, and how they go on, see `rope_positions`."""
        images, videos, seconds = (np.concatenate(x) for x in zip(*(vars(g).values() for g in self.grids), strict=True))
        return rope_positions(config, self.ids, self.valid, images, videos, seconds)
