"""The sink template: which tokens of an image count as sinks, and how wide a local block is."""

from __future__ import annotations

from dataclasses import dataclass


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

    Attributes:
        from_start: offsets from the image's first position, its start delimiter included (0 is the delimiter).
        from_end: offsets back from one past its last position, its end delimiter included (1 is the delimiter).
        local_block: width in tokens of the local blocks of `Category.SINK`, counted from the first image token.

    Raises:
        ValueError: a negative or repeated offset, or a local block that is not a positive multiple of 8.
    """

    from_start: tuple[int, ...] = (0, 1)
    from_end: tuple[int, ...] = (1, 2)
    local_block: int = 128

    def __post_init__(self) -> None:
        for name, least in (("from_start", 0), ("from_end", 1)):
            offsets = getattr(self, name)
            if any(o < least for o in offsets) or len(set(offsets)) != len(offsets):
                raise ValueError(f"{name} must hold distinct offsets of at least {least}. Got {offsets}.")
        if self.local_block < 8 or self.local_block % 8:
            raise ValueError(f"local_block must be a positive multiple of 8. Got {self.local_block}.")
