"""What a batch row has been told so far, token by token, and what transformers makes of it from scratch.

No cache, no padding, no pieces: all of a row goes through transformers' own layers at once, with an attention that is
told for every token what its forward could see: by the definition of the categories where it ran sparsely, everything
before it and its own image where it ran densely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch

import by_masks
from jax_blindsight.config import ModelConfig
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.profile import Profile
from tiny_jax import Twin
from tiny_models import IMAGE, VIDEO

WORD = 20
PLACEHOLDERS = {"qwen2_vl": (IMAGE, VIDEO), "qwen2_5_vl": (IMAGE, VIDEO), "gemma3": (IMAGE,)}


@dataclass(frozen=True)
class Picture:
    """An image or a video, `shape` its frame groups, rows and columns in tokens."""

    shape: tuple[int, int, int]
    is_video: bool = False
    seconds: float = 1.0  # from one frame group to the next
    seed: int = 0

    @property
    def placeholder(self) -> int:
        return VIDEO if self.is_video else IMAGE

    @property
    def n_tokens(self) -> int:
        return int(np.prod(self.shape))

    @property
    def grid(self) -> list[int]:
        """In patches, of which 2 x 2 are a token."""
        return [self.shape[0], 2 * self.shape[1], 2 * self.shape[2]]

    def pixels(self, family: str) -> np.ndarray:
        shape = (1, 3, 32, 32) if family == "gemma3" else (4 * self.n_tokens, 96)
        return np.random.default_rng(self.seed).standard_normal(shape, dtype=np.float32)


Item = int | Picture  # a token of text, or all tokens of a picture, its delimiters not among them


def flatten(items: Sequence[Item]) -> list[int]:
    """Token ids."""
    return [id_ for item in items for id_ in ([item] if isinstance(item, int) else [item.placeholder] * item.n_tokens)]


@dataclass
class Row:
    """One batch row's tokens so far, and what each could see.

    Attributes:
        ids: as the model embeds them.
        marks: as layouts know them: a placeholder that the model wrote is a word.
        pictures: in order.
        positions: temporal, row and column of each token; what Gemma counts is all three.
        ran: for each token the profile that its forward ran by, None where it ran densely.
        count, highest: where a prompt counts on, and one more than the highest position so far.
    """

    family: str
    ids: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    ran: list[Profile | None] = field(default_factory=list)
    count: int = 0
    highest: int = 0

    @property
    def frames(self) -> list[int]:
        return [picture.shape[0] for picture in self.pictures if picture.is_video]

    @property
    def n_images(self) -> int:
        """As limits and layouts count them: every frame group of a video is one."""
        return sum(picture.shape[0] if picture.is_video else 1 for picture in self.pictures)

    @property
    def is_cut(self) -> bool:
        """Whether it ends with a picture whose end delimiter is still to come."""
        return bool(self.marks) and self.marks[-1] in PLACEHOLDERS[self.family]

    def copied(self) -> Row:
        return replace(self, **{name: [*x] for name, x in vars(self).items() if isinstance(x, list)})

    def read(self, items: Sequence[Item]) -> None:
        """Takes in what a prefill brings; `run` says later how it ran."""
        for item in items:
            if isinstance(item, int) or self.family == "gemma3":
                tokens = flatten([item])
                self.positions += [(p, p, p) for p in range(self.count, self.count + len(tokens))]
                self.count += len(tokens)
            else:
                step = np.float32(4 * item.seconds if item.is_video and self.family == "qwen2_5_vl" else 1)
                self.positions += [
                    (self.count + int(np.float32(t) * step), self.count + h, self.count + w)
                    for t, h, w in np.ndindex(item.shape)
                ]
                self.count += max(item.shape[1:])
        self.ids += flatten(items)
        self.marks += flatten(items)
        self.pictures += [item for item in items if isinstance(item, Picture)]
        self.highest = max(self.highest, *(1 + max(p) for p in self.positions[-len(flatten(items)) :]))

    def run(self, profile: Profile | None) -> None:
        """Tokens read since the last run ran by a profile or, with None, densely."""
        self.ran += [profile] * (len(self.ids) - len(self.ran))

    def write(self, token: int) -> None:
        """Takes in a token that the model wrote, or was made to."""
        self.ids.append(token)
        self.marks.append(WORD if token in PLACEHOLDERS[self.family] else token)
        self.positions.append((self.highest,) * 3)
        self.highest += 1
        self.count = self.highest
        self.run(None)


def masks_of(config: ModelConfig, row: Row) -> list[np.ndarray]:
    """What each token of a row could see, `[H, N, N]` bool for every layer."""
    layout = Layout.from_ids(
        row.marks, config.special, frames=row.frames, bidirectional=config.bidirectional, unfinished=True
    )

    @cache
    def see(category: Category, template: SinkTemplate, window: int | None) -> np.ndarray:
        return category_mask(layout, category, template, window=window)

    masks = []
    for layer, window in enumerate(config.text.windows):
        seen = np.repeat(see(Category.DENSE, SinkTemplate(), window)[None], config.text.n_heads, axis=0)
        for profile in {id(profile): profile for profile in row.ran if profile is not None}.values():
            theirs = [ran is profile for ran in row.ran]
            for head, category in enumerate(profile.categories[layer]):
                seen[head, theirs] = see(Category(category), profile.template, window)[theirs]
        masks.append(seen)
    return masks


@contextmanager
def _by_masks(model: Any) -> Iterator[None]:
    config = model.config.text_config
    before, config._attn_implementation = config._attn_implementation, by_masks.NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@cache
def _features(model: Any, family: str, picture: Picture) -> torch.Tensor:
    """The tokens of one picture, by transformers, `[n, E]`."""
    pixels = torch.tensor(picture.pixels(family), dtype=model.dtype)
    if family == "gemma3":
        return model.model.get_image_features(pixels).pooler_output[0]
    encode = model.model.get_video_features if picture.is_video else model.model.get_image_features
    return encode(pixels, torch.tensor([picture.grid])).pooler_output[0]


def logits_of(model: Any, config: ModelConfig, row: Row) -> np.ndarray:
    """What transformers makes of a row from scratch: `[N, V]`."""
    decoder, ids = model.model.language_model, torch.tensor([row.ids])
    positions = torch.tensor(row.positions)[:, None].permute(2, 1, 0)  # [3, 1, N]
    with torch.no_grad(), _by_masks(model):
        embedded = decoder.embed_tokens(ids)
        if row.pictures:
            features = [_features(model, row.family, picture) for picture in row.pictures]
            is_picture = np.isin(row.marks, config.special.placeholders)
            embedded[0, torch.tensor(is_picture)] = torch.cat(features)
        hidden = decoder(
            inputs_embeds=embedded,
            position_ids=positions[0] if row.family == "gemma3" else positions,
            allowed=masks_of(config, row),
            use_cache=False,
        ).last_hidden_state
        return model.lm_head(hidden)[0].numpy()


@dataclass(frozen=True)
class Truth:
    """Logits `[N, V]` of a row in float64, and what those of float32 may be off."""

    exact: np.ndarray
    allowed: float

    @classmethod
    def of(cls, twin: Twin, row: Row) -> Truth:
        """From all tokens of the row. Twice what `jax_parity` allows: here a row may have one token."""
        plain, exact = (logits_of(model, twin.params.config, row) for model in (twin.single, twin.double))
        return cls(exact, float(4 * np.abs(plain - exact).max() + 8 * np.finfo(np.float32).eps * np.abs(exact).max()))
