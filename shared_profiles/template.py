"""The sink template: which tokens of an image count as sinks, and how wide a local block is."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_LIMIT = 2**31  # far beyond any prompt, and sums with positions fit int64


@dataclass(frozen=True)
class SinkTemplate:
    """Sinks of every image, as offsets from its two ends; one template serves all images of all prompts.

    With `from_start=(0, 1)` and `from_end=(1, 2)`::

        <start>  t0  t1  t2  ...  t8  t9  <end>
           S     S                    S     S        delimiters are sinks in every template

    Offsets name the same tokens of a picture that has no delimiter, as a frame in the midst of a video: there `(0, 1)`
    and `(1, 2)` leave its first and its last token::

        t0  t1  t2  ...  t8  t9
        S                     S

    Integers of any kind, NumPy's too, and sequences of them are taken, and kept as tuples of `int`.

    Attributes:
        from_start: offsets from the image's first position, its start delimiter included (0 is the delimiter).
        from_end: offsets back from one past its last position, its end delimiter included (1 is the delimiter).
        local_block: width in tokens of the local blocks of `Category.SINK`, counted from the first image token.

    Raises:
        ValueError: an offset that is negative or there twice, or a local block that is not a positive multiple of 8; or
            either is no integer below 2^31.
    """

    from_start: tuple[int, ...] = (0, 1)
    from_end: tuple[int, ...] = (1, 2)
    local_block: int = 128

    def __post_init__(self) -> None:
        for name, least in (("from_start", 0), ("from_end", 1)):
            offsets = _integers(given := getattr(self, name))
            if offsets is None or any(not least <= o < _LIMIT for o in offsets) or len(set(offsets)) != len(offsets):
                raise ValueError(
                    f"{name} must hold distinct offsets of at least {least}, integers below 2^31. Got {given!s:.200}."
                )
            object.__setattr__(self, name, offsets)
        width = _integers([self.local_block])
        if width is None or not 8 <= width[0] < _LIMIT or width[0] % 8:
            raise ValueError(
                f"local_block must be a positive multiple of 8, an integer below 2^31. Got {self.local_block!s:.200}."
            )
        object.__setattr__(self, "local_block", width[0])


def _integers(values: Iterable[Any]) -> tuple[int, ...] | None:
    """Values as plain integers; None where one is none, as a bool is."""
    try:
        values = tuple(values)
        return None if any(isinstance(x, bool) for x in values) else tuple(map(operator.index, values))
    except TypeError:
        return None
