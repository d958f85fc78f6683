"""Items of an evaluation: how a question is asked, and what its answer is taken for.

An item with options is answered by one of them, by its text or its letter (A for the first):

    options ("red", "blue"):   "red"  "Red."  "A"  "(A)"  "A. red"   are all the first option;  "green" is none

An item without options is right if the answer's text is the expected one. Texts are compared without regard to case,
to white space, and to quotes, brackets and full stops around them.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blindsight_cli.prompt_file import Prompt, read_prompts

MAX_OPTIONS = len(string.ascii_uppercase)
LETTERS_INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""What lmms-eval and others append to a question with lettered options."""

_AROUND = ".,;:!?\"'`*()[]" + string.whitespace  # not what a number may begin or end with: -1, +2, 5%
_LETTER = re.compile(r"\(?([A-Z])(?:[.:)](?:\s.*)?)?", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """A question with its expected answer.

    Attributes:
        prompt: the line of the file.
        expected: what `verdict` must give for a right answer.
    """

    prompt: Prompt
    expected: str

    def question(self, letters: bool) -> str:
        """The text that is asked; with `letters`, options follow the question, and the request for a letter."""
        if not (letters and self.prompt.options):
            return self.prompt.question
        listed = [f"{string.ascii_uppercase[i]}. {option}" for i, option in enumerate(self.prompt.options)]
        return "\n".join([self.prompt.question, *listed, LETTERS_INSTRUCTION])

    def verdict(self, answer: str) -> str | None:
        """What an answer is taken for, in normal form; None if it is invalid: empty, or none of the options."""
        if not self.prompt.options:
            return normal(answer) or None
        return _chosen(answer, self.prompt.options)


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Reads and checks a file of questions with answers.

    Args:
        path: JSONL, see `prompt_file`.
        limit: how many to take, from the first; default: all.

    Raises:
        ValueError: see `read_prompts`; or options are alike or too many, an answer is none of its options, or no item
            has two images.
        OSError: the file cannot be read.
    """
    items = [_item(prompt, path) for prompt in read_prompts(path, limit, answered=True)]
    if not any(item.prompt.multi_image for item in items):
        raise ValueError(
            f"{path}: dense and sparse differ on prompts with at least two images only. Got {len(items)} with fewer. "
            "Take multi-image questions."
        )
    return items


def normal(text: str) -> str:
    """A text in the form in which texts are compared."""
    return " ".join((text.strip(_AROUND) or text).casefold().split())


def digest(prompt: Prompt, parts: Sequence[str]) -> str:
    """A hash of a prompt's question and of what it is about, `about`, whatever files that came from."""
    return hashlib.sha256("\n".join([prompt.question, *parts]).encode()).hexdigest()[:32]


def about(prompt: Prompt, images: Sequence[Image.Image]) -> list[str]:
    """A hash of each of a prompt's pictures, which are `images`, and of each of its videos' files."""
    return [*map(picture_digest, images), *map(file_digest, prompt.videos)]


def picture_digest(image: Image.Image) -> str:
    """A hash of a picture's size and pixels."""
    return hashlib.sha256(f"{image.size}{image.mode}".encode() + image.tobytes()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """A hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _item(prompt: Prompt, path: Path) -> Item:
    where = f"{path}, line {prompt.line}"
    options = prompt.options
    if len(options) > MAX_OPTIONS:
        raise ValueError(f"{where}: there must be at most {MAX_OPTIONS} options. Got {len(options)}.")
    if len({normal(option) for option in options}) < len(options):
        raise ValueError(
            f"{where}: options must differ in more than case, space and quotes. Got {list(options)!r:.120}."
        )
    expected = _chosen(prompt.answer, options) if options else normal(prompt.answer)
    if not expected:
        raise ValueError(f'{where}: "answer" must be one of the options, or its letter. Got {prompt.answer!r:.80}.')
    return Item(prompt, expected)


def _chosen(answer: str, options: Sequence[str]) -> str | None:
    """The option, in normal form, that an answer names by its text or else by its letter; None if none."""
    texts = [normal(option) for option in options]
    if normal(answer) in texts:
        return normal(answer)
    match = _LETTER.fullmatch(answer.strip())
    if match is None:
        return None
    index = string.ascii_uppercase.index(match[1])
    return texts[index] if index < len(texts) else None
