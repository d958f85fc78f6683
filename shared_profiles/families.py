"""Model families: how each one marks images in its token ids, and whether images look both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that mark images in a prompt.

    Attributes:
        start: the delimiter right before an image's tokens.
        end: the delimiter right after them.
        image: the placeholder that stands for one image token.
        video: the placeholder that stands for one video token, or None where the family has no videos.
    """

    start: int
    end: int
    image: int
    video: int | None = None

    @property
    def placeholders(self) -> list[int]:
        """The ids behind which there are pictures."""
        return [x for x in (self.image, self.video) if x is not None]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: the `model_type` of its Hugging Face configuration.
        bidirectional: whether an image's tokens look at later tokens of the same image.
        keys: the configuration's keys of start, end, image and (if any) video token id. Alternatives of one key
            are separated by a bar: names on disk and in memory differ.
    """

    name: str
    bidirectional: bool
    keys: tuple[str, ...]

    def special_tokens(self, config: Mapping[str, Any]) -> SpecialTokens:
        """Reads the special tokens from a configuration.

        Args:
            config: the model's `config.json` as a mapping.

        Raises:
            ValueError: a token id is missing.
        """
        ids = []
        for key in self.keys:
            found = [config[name] for name in key.split("|") if config.get(name) is not None]
            if not found:
                raise ValueError(
                    f"the configuration of a {self.name} model must have {' or '.join(key.split('|'))}. Got the keys "
                    f"{sorted(config)}. Load the model's own config.json."
                )
            ids.append(int(found[0]))
        return SpecialTokens(*ids)


_QWEN_KEYS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")

FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_vl", False, _QWEN_KEYS),
        Family("qwen2_5_vl", False, _QWEN_KEYS),
        Family(
            "gemma3",
            True,
            ("boi_token_index|boi_token_id", "eoi_token_index|eoi_token_id", "image_token_index|image_token_id"),
        ),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a configuration.

    Raises:
        ValueError: its `model_type` is not one of `FAMILIES`.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}. Got {name!r}: this family is not supported."
        )
    return FAMILIES[name]
