"""The four categories of an attention head."""

from __future__ import annotations

import enum


class Category(enum.IntEnum):
    """What an image token may look at, always within the model's own causal rule (arXiv 2507.09071).

    =================== ==========================================================================
    category            an image token of image *i* may look at
    =================== ==========================================================================
    `DENSE`             everything
    `SINK`              text, the sink tokens of every image, and a local block of its own image
    `INTRA_IMAGE`       its own image, and text
    `INTRA_IMAGE_SINK`  its own image, text, and the sink tokens of every image
    =================== ==========================================================================

    Text tokens look at everything before them in every category. An image's delimiters are its first sinks as
    keys, and are treated like text as queries; "text" above excludes them. `masks.category_mask` is the definition.

    Functions that take a category take its number, too, of any kind of integer, as `Profile.categories` has them.

    Raises:
        ValueError: there is no category of that number.
    """

    DENSE = 0
    SINK = 1
    INTRA_IMAGE = 2
    INTRA_IMAGE_SINK = 3

    @classmethod
    def _missing_(cls, value: object) -> None:
        known = ", ".join(f"{category.value} {category.name}" for category in cls)
        raise ValueError(f"a category must be one of {known}. Got {value!r:.200}. Of a name, take Category[name].")


SPARSE = (Category.SINK, Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK)
