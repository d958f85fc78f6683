"""Conversations with a model, and what their logits must be: from the whole history at once, without any cache.

A conversation is a cache and, for every token in it, what it was made of and what it was allowed to see:

    forward          prefill, sparse              decode   second turn, dense
    tokens           a <s> . . <e> b <s> . . <e>  c        d e
    `allowed`        by each head's category,     all      all
                     `shared_profiles.masks`

`recompute` runs that history through an unpatched model whose attention reads these masks and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

import by_masks
from shared_profiles import Category, Layout
from shared_profiles.masks import category_mask
from shared_profiles.profile import Profile
from tiny_models import END, IMAGE, PAD, START, make_model

# A Qwen's pictures of 4, 8 and 16 tokens, by what stands for them in a turn. All of a Gemma's have 16.
GRIDS = {"1": (1, 4, 4), "2": (1, 4, 8), "3": (1, 8, 8)}


@cache
def judge(family: str, seed: int) -> Any:
    """The model of this seed in float64, whose attention is that of `by_masks`."""
    model = make_model(family, seed).double()
    model.set_attn_implementation({"text_config": by_masks.NAME})
    return model


def runs(marked: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last of every run of True."""
    edges = np.flatnonzero(np.diff(marked, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


class Conversation:
    """A cache, and the history of every token in it.

    Attributes:
        cache: the model's.
        ids, real: `[B, N]`, the tokens so far, and which are no padding.
        embeds: `[B, N, E]`, pictures encoded.
        positions: `[P, B, N]`, P = 3 for a Qwen.
        allowed: `[L, B, H, N, N]` bool, which tokens each token saw.
        known: whether the patch can know the tokens.
    """

    def __init__(self, family: str, seed: int, n_rows: int, cache: Cache | None) -> None:
        model = judge(family, seed)
        config = model.config.get_text_config()
        self.family, self.seed, self.cache, self.known = family, seed, cache, True
        self.windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.language_model.layers]
        self.ids, self.real = np.zeros((n_rows, 0), dtype=np.int64), np.zeros((n_rows, 0), dtype=bool)
        self.embeds = torch.zeros(n_rows, 0, config.hidden_size, dtype=torch.double)
        self.positions = torch.zeros(1 if family == "gemma3" else 3, n_rows, 0, dtype=torch.long)
        self.allowed = np.zeros((len(self.windows), n_rows, config.num_attention_heads, 0, 0), dtype=bool)

    @property
    def n(self) -> int:
        return self.ids.shape[1]

    @property
    def n_rows(self) -> int:
        return len(self.ids)

    def add(self, ids: np.ndarray, real: np.ndarray, embeds: Tensor, positions: Tensor) -> None:
        """The tokens of another forward; `note` says what they saw."""
        self.ids, self.real = np.concatenate([self.ids, ids], 1), np.concatenate([self.real, real], 1)
        self.embeds = torch.cat([self.embeds, embeds], 1)
        self.positions = torch.cat([self.positions, positions], 2)

    def note(self, profile: Profile | None, types: np.ndarray | None) -> None:
        """What the latest tokens saw: by this profile in a sparse forward, everything in a dense one (None).

        `types` are a Gemma's token types, `[B, <=N]`, where its images look both ways.
        """
        n_layers, n_rows, n_heads, start, _ = self.allowed.shape
        new = self.n - start
        allowed = np.zeros((n_layers, n_rows, n_heads, self.n, self.n), dtype=bool)
        allowed[..., :start, :start] = self.allowed
        for row in range(n_rows):
            images = runs(self.ids[row] == IMAGE)
            groups = [] if types is None else runs(types[row] == 1)
            rows: dict[tuple, np.ndarray] = {}  # [T, N] by category and window
            for layer, window in enumerate(self.windows):
                for head in range(n_heads):
                    sparse = profile is not None and len(images) > 1
                    category = Category(profile.categories[layer, head]) if sparse else None
                    if (category, window) not in rows:
                        rows[category, window] = (
                            self._seen_densely(row, groups, window)[start:]
                            if category is None
                            else self._seen(row, images, category, profile, window, types is not None, start)
                        )
                    allowed[layer, row, head, start:] = rows[category, window]
        padding = ~self.real[:, start:]
        here = np.eye(new, dtype=bool)[None] & padding[:, :, None]  # [B, T, T]: softmax needs a key
        allowed[:, :, :, start:, start:] |= here[None, :, None]
        self.allowed = allowed

    def _seen(self, row, images, category, profile, window, both_ways, start) -> np.ndarray:
        """What a sparse forward's tokens see under a category, by its definition: `[T, N]`."""
        real = np.flatnonzero(self.real[row])
        begin, stop = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        unfinished = bool(images) and images[-1][1] == stop
        delimited = [(first - 1, first, last, min(last + 1, stop)) for first, last in images]
        layout = Layout(self.n, begin, stop, np.array(delimited), both_ways, unfinished)
        return category_mask(layout, category, profile.template, window=window, q_start=start)

    def _seen_densely(self, row, groups, window) -> np.ndarray:
        """What the model's own attention sees of the tokens so far: `[N, N]`."""
        q, k = np.ogrid[: self.n, : self.n]
        seen = k <= q
        for first, last in groups:
            seen = seen | ((first <= q) & (q < last) & (first <= k) & (k < last))
        if window is not None:
            seen = seen & (k > q - window)
        return seen & self.real[row][None]

    def recompute(self) -> Tensor:
        """Logits of all tokens so far, `[B, N, V]`."""
        model = judge(self.family, self.seed)
        positions = self.positions[0] if self.family == "gemma3" else self.positions
        with torch.no_grad():
            out = model.model.language_model(
                inputs_embeds=self.embeds,
                position_ids=positions,
                use_cache=False,
                allowed=torch.from_numpy(self.allowed),
            )
            return model.lm_head(out.last_hidden_state)

    def fork(self) -> Conversation:
        """Another that goes on from here."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def uncut(self, n: int) -> int:
        """The most tokens, at most `n`, of which none saw any of the others: a Gemma's images are not torn."""
        return next(stop for stop in range(n, -1, -1) if not self.allowed[..., :stop, stop:].any())

    def cut(self, n: int) -> None:
        """Only the first `n` tokens are left in the cache."""
        self.ids, self.real, self.embeds = self.ids[:, :n], self.real[:, :n], self.embeds[:, :n]
        self.positions, self.allowed = self.positions[..., :n], self.allowed[..., :n, :n]

    def select(self, rows: Iterable[int]) -> None:
        """These rows are left in the cache, in this order."""
        rows = list(rows)
        self.ids, self.real, self.embeds = self.ids[rows], self.real[rows], self.embeds[rows]
        self.positions, self.allowed = self.positions[:, rows], self.allowed[:, rows]
        self.known = False


class Turn:
    """New tokens for every row of a conversation, with their pictures.

    Args:
        family, seed: the model.
        rows: a text per row: a digit is a picture of that grid, a letter some word.
        left: which side shorter rows are padded on.
        random: draws words and pixels.

    Attributes:
        ids, real, embeds: `[B, T]`, `[B, T]` and `[B, T, E]`, as of a `Conversation`.
    """

    def __init__(self, family: str, seed: int, rows: list[str], left: bool, random: np.random.Generator) -> None:
        self._gemma = family == "gemma3"
        tokens = [self._tokens(row, random) for row in rows]
        n = max(map(len, tokens))
        self.ids, self.real = np.full((len(rows), n), PAD), np.zeros((len(rows), n), dtype=bool)
        for b, row in enumerate(tokens):
            where = slice(n - len(row), n) if left else slice(0, len(row))
            self.ids[b, where], self.real[b, where] = row, True
        self._grids = [GRIDS[mark] for row in rows for mark in row if mark in GRIDS]
        shapes = [(1, 3, 32, 32) if self._gemma else (h * w, 96) for _, h, w in self._grids]
        self._pixels = [torch.from_numpy(random.normal(size=shape)) for shape in shapes]
        model, ids = judge(family, seed).model, torch.from_numpy(self.ids)
        with torch.no_grad():
            self._bare = self.embeds = model.get_input_embeddings()(ids)
            if self._pixels:
                encoded = model.get_image_features(**self.pictures()).pooler_output
                encoded = encoded if self._gemma else torch.cat(encoded)
                self.embeds = self.embeds.masked_scatter((ids == IMAGE)[..., None], encoded)

    def _tokens(self, row: str, random: np.random.Generator) -> list[int]:
        tokens = []
        for mark in row:
            if mark not in GRIDS:
                tokens.append(int(random.integers(10, 96)))
                continue
            _, height, width = GRIDS[mark]
            tokens += [START, *[IMAGE] * (16 if self._gemma else height * width // 4), END]
        return tokens

    def pictures(self) -> dict[str, Tensor]:
        """All pictures, as a forward takes them."""
        if not self._pixels:
            return {}
        pixels = dict(pixel_values=torch.cat(self._pixels))
        return pixels if self._gemma else pixels | dict(image_grid_thw=torch.tensor(self._grids))

    def pieces(self, cuts: Iterable[int]) -> Iterator[Turn]:
        """The turn, cut before these tokens.

        If one of them is within a picture, all go without pixels: transformers takes a picture whole or not at all.
        """
        n = self.ids.shape[1]
        ends = [*sorted(cut for cut in set(cuts) if cut < n), n]
        inside = (self.ids == IMAGE) & (np.roll(self.ids, 1, axis=1) == IMAGE)
        whole = not inside[:, ends[:-1]].any()
        first = (self.ids == IMAGE) & ~inside
        for start, stop in zip([0, *ends], ends, strict=False):
            piece = copy.copy(self)
            piece.ids, piece.real = self.ids[:, start:stop], self.real[:, start:stop]
            piece.embeds = (self.embeds if whole else self._bare)[:, start:stop]
            mine = np.flatnonzero((start <= np.nonzero(first)[1]) & (np.nonzero(first)[1] < stop)) if whole else []
            piece._pixels, piece._grids = [self._pixels[i] for i in mine], [self._grids[i] for i in mine]
            yield piece
