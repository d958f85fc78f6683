"""How each small model is trained: what a step shows, for how many steps, and with which optimizer.

One picture first, then a few, then up to six. The first model was trained with AdamW; its sisters with Muon, which
needs a third of the steps: after 400, half of them with two or three pictures, "which" was right 84 times in a hundred
(AdamW: 35 times after 300). "Which" comes last, so they are asked it more often.
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


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        peak: the highest learning rate.
        steps: how many there are.
        stages: what they show.
    """

    peak: float
    steps: int
    stages: tuple[Stage, ...]

    def stage_at(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return next(stage for stage in self.stages if step < stage.until)


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
    Stage(300, _ONE, None, 64, 2, (1, 2, 0, 0, 0, 0)),
    Stage(700, _FEW, None, 32, 10, _HARD),
    Stage(np.inf, _MANY, _CHANCES, 24, 14, _HARD),
)
# A recipe belongs to an optimizer, a key of `optimizers.OPTIMIZERS`: rates and steps of one do not suit another.
RECIPES = {"adamw": Recipe(1.5e-3, 5500, _FIRST), "muon": Recipe(4e-3, 2000, _SISTERS)}
SHIPPED = {"qwen2_5_vl": "adamw", "qwen2_vl": "muon", "gemma3": "muon"}  # how each shipped model was trained
