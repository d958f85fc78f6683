"""Synthetic multi-image questions: deterministic by seed, drawn with Pillow, answerable in one word.

A *puzzle* is a few pictures, each one coloured shape on a grey noisy ground, and one question about them::

    [red circle] [blue cross] [red square]      "Is the color of images 1 and 3 the same?"  ->  "yes"

Kinds look at one image (`color`, `shape`), at all of them (`which`, `count`), or compare two (`same color`,
`same shape`). The words are plain English; the model's tokenizer drops the stop words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = ("color", "shape", "which", "count", "same color", "same shape")
IMAGE_SIZE = 64  # pixels a side

_COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Question:
    """One question about the images of a puzzle.

    Attributes:
        kind: one of `KINDS`.
        text: the question in English.
        answer: the one-word answer.
    """

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Puzzle:
    """Some pictures and one question about them.

    Attributes:
        images: RGB pictures, `IMAGE_SIZE` pixels a side.
        question: the question.
        colors, shapes: what each picture shows, as indices into `COLORS` and `SHAPES`.
    """

    images: tuple[Image.Image, ...]
    question: Question
    colors: tuple[int, ...]
    shapes: tuple[int, ...]


def draw(color: int, shape: int, rng: np.random.Generator) -> Image.Image:
    """Draws one coloured shape at a random place and size on a grey ground, with pixel noise."""
    size = IMAGE_SIZE
    ground = int(rng.uniform(0, 90))
    image = Image.new("RGB", (size, size), (ground,) * 3)
    pen = ImageDraw.Draw(image)
    r = rng.uniform(16, 26)
    x, y = rng.uniform(26, size - 26, 2)
    brightness = rng.uniform(0.7, 1.0)
    fill = tuple(int(channel * brightness) for channel in COLORS[_COLOR_NAMES[color]])
    match SHAPES[shape]:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        case "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill)
        case "triangle":
            pen.polygon(((x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)), fill)
        case "cross":
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
    noisy = np.asarray(image, np.int16) + rng.integers(-20, 21, (size, size, 3), np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def ask(kind: str, colors: np.ndarray, shapes: np.ndarray, rng: np.random.Generator) -> Question:
    """Makes a question of the given kind about pictures whose contents are known.

    Yes and no are equally likely wherever the pictures allow both.

    Args:
        kind: one of `KINDS`.
        colors, shapes: `[n]` integers, indices into `COLORS` and `SHAPES`, one per picture.
        rng: where the randomness comes from.

    Raises:
        ValueError: unknown kind.
    """
    i = int(rng.integers(len(colors)))
    if kind == "color":
        return Question(kind, f"What color is image {i + 1}?", _COLOR_NAMES[colors[i]])
    if kind == "shape":
        return Question(kind, f"What shape is image {i + 1}?", SHAPES[shapes[i]])
    if kind == "which":
        color, shape = (
            (colors[i], shapes[i]) if rng.random() < 0.8 else (rng.integers(len(COLORS)), rng.integers(len(SHAPES)))
        )
        hits = np.flatnonzero((colors == color) & (shapes == shape))
        answer = str(hits[0] + 1) if len(hits) else "none"
        return Question(kind, f"Which image is the first {_COLOR_NAMES[color]} {SHAPES[shape]}?", answer)
    if kind == "count":
        color = colors[i] if rng.random() < 0.7 else rng.integers(len(COLORS))
        return Question(kind, f"How many images are {_COLOR_NAMES[color]}?", str(int((colors == color).sum())))
    if kind in ("same color", "same shape"):
        values = colors if kind == "same color" else shapes
        wanted = (values == values[i]) == (rng.random() < 0.5)
        wanted[i] = False
        others = np.flatnonzero(wanted)
        if not len(others):
            others = np.delete(np.arange(len(values)), i)
        j = int(rng.choice(others))
        answer = "yes" if values[i] == values[j] else "no"
        return Question(kind, f"Is the {kind.split()[1]} of images {i + 1} and {j + 1} the same?", answer)
    raise ValueError(f"kind must be one of {KINDS}. Got {kind!r}.")


def make_puzzle(n_images: int, seed: int, kind: str | None = None) -> Puzzle:
    """The puzzle of this seed: the same arguments always give the same pictures and question.

    Args:
        n_images: number of pictures, at least 2.
        seed: any non-negative integer.
        kind: one of `KINDS`; by default drawn by the seed.

    Raises:
        ValueError: fewer than two images, or an unknown kind.
    """
    if n_images < 2:
        raise ValueError(f"a puzzle compares images, so n_images must be at least 2. Got {n_images}.")
    rng = np.random.default_rng([seed, n_images])
    colors = rng.integers(len(COLORS), size=n_images)
    shapes = rng.integers(len(SHAPES), size=n_images)
    question = ask(kind or KINDS[rng.integers(len(KINDS))], colors, shapes, rng)
    images = tuple(draw(c, s, rng) for c, s in zip(colors, shapes, strict=True))
    return Puzzle(images, question, tuple(colors.tolist()), tuple(shapes.tolist()))
