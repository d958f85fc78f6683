"""What a training step shows: how many pictures, how many prompts, how many questions of which kind.

One picture first, then a few, then up to six. The first model was trained by `_FIRST`. Its shapes and "which" came
late, and with one picture its 14 questions repeat one another, so its sisters look at single pictures for longer, at a
third of the cost, and are asked "which" more often.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stage:
    """The steps of a training up to `until`.

    Attributes:
        until: the first step that is not in the stage any more.
        images: numbers of pictures of a prompt, one of which is drawn for a step.
        chances: with which probabilities; None: all alike.
        prompts: prompts of a step.
        questions: questions of a prompt.
        weights: how often each of `puzzles.KINDS` is asked.
    """

    until: float
    images: tuple[int, ...]
    chances: tuple[float, ...] | None
    prompts: int
    questions: int
    weights: tuple[float, ...]

    def draw_images(self, rng: np.random.Generator) -> int:
        """The number of pictures of a step."""
        return int(rng.choice(self.images, p=self.chances))


_ONE, _FEW, _MANY = (1,), (2, 3), (2, 3, 4, 5, 6)
_CHANCES = (0.1, 0.15, 0.2, 0.2, 0.35)
_EVEN = (1, 1, 1.5, 1.5, 2, 2)
_HARD = (0.7, 0.7, 3, 1.5, 2, 2)

_FIRST = (
    Stage(300, _ONE, None, 128, 14, (1, 1, 0, 0, 0, 0)),
    Stage(900, _FEW, None, 64, 14, _EVEN),
    Stage(np.inf, _MANY, _CHANCES, 32, 14, _EVEN),
)
_SISTERS = (
    Stage(600, _ONE, None, 128, 2, (1, 2, 0, 0, 0, 0)),
    Stage(1500, _FEW, None, 48, 10, _HARD),
    Stage(np.inf, _MANY, _CHANCES, 32, 14, _HARD),
)
STAGES = {"qwen2_5_vl": _FIRST, "qwen2_vl": _SISTERS, "gemma3": _SISTERS}


def stage_at(family: str, step: int) -> Stage:
    """The stage that a step belongs to."""
    return next(stage for stage in STAGES[family] if step < stage.until)
