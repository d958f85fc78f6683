"""Files of prompts: JSONL, one prompt per line, for `calibrate` and, with answers, for `eval`.

    {"images": ["cats/1.png", "cats/2.png"], "question": "Is it the same cat?"}
    {"images": ["cats/1.png", "cats/2.png"], "question": "Same cat?", "answer": "yes", "options": ["yes", "no"]}
    {"images": ["cats/1.png"], "videos": ["street.mp4"], "fps": 1, "question": "Is the cat in the street?"}

Pictures and videos are named relative to the file; a prompt has either or both.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image
from torch import Tensor

from blindsight_cli.folders import read_json
from blindsight_cli.loading import ask, check_image, load_image
from blindsight_cli.videos import check_video, load_video
from shared_profiles.collection import of_prompt


@dataclass(frozen=True)
class Prompt:
    """One line.

    Attributes:
        line: its number, counted from 1.
        images: the pictures' files.
        question: the text.
        answer: the right answer; empty where none was asked for. With options, one of them or its letter.
        options: the answers to choose from; none for a free answer.
        videos: the videos' files.
        fps: frames that are taken of a second of them; None for what the checkpoint says.
    """

    line: int
    images: tuple[Path, ...]
    question: str
    answer: str = ""
    options: tuple[str, ...] = ()
    videos: tuple[Path, ...] = ()
    fps: float | None = None

    @property
    def multi_image(self) -> bool:
        """Whether a model sees at least two images; it sees one in every two frames of a video."""
        return len(self.images) >= 2 or bool(self.videos)


def read_prompts(path: Path, limit: int | None = None, *, answered: bool = False) -> list[Prompt]:
    """Reads and checks a whole file, so that a mistake in the last line shows before the first is measured.

    Further keys of a line are ignored, empty lines too.

    Args:
        path: the file.
        limit: how many prompts to take, from the first; default: all.
        answered: every prompt must have an answer; without, answers and options are not looked at.

    Raises:
        ValueError: a line is not such a prompt, or names a file that is no picture or video; or there is no line.
        OSError: the file cannot be read.
    """
    prompts: list[Prompt] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if limit is not None and len(prompts) == limit:
            break
        if line.strip():
            prompts.append(_parse(line, path, number, answered))
    if not prompts:
        more = ', "answer": "..."' if answered else ""
        raise ValueError(
            f'{path} must have a prompt per line: {{"images": ["a.png", "b.png"], "question": "..."{more}}}. Got none.'
        )
    return prompts


def _parse(line: bytes, path: Path, number: int, answered: bool) -> Prompt:
    where = _where(path, number)
    try:
        prompt = read_json(line)
    except ValueError as error:
        raise ValueError(f"{where} must be JSON. Got: {error}.") from error
    if not isinstance(prompt, dict) or "question" not in prompt or not {"images", "videos"} & set(prompt):
        got = f"the keys {sorted(prompt)}" if isinstance(prompt, dict) else f"a {type(prompt).__name__}"
        raise ValueError(f'{where} must be an object with "images" or "videos", and "question". Got {got}.')
    question, fps = prompt["question"], prompt.get("fps")
    if not _is_text(question):
        raise ValueError(f'{where}: "question" must be a text of whole characters. Got {question!r:.80}.')
    if fps is not None and not (type(fps) in (int, float) and 0 < fps <= sys.float_info.max):
        raise ValueError(f'{where}: "fps" must be a number above 0, frames a second. Got {fps!r:.80}.')
    images = _files(prompt, "images", path, where, check_image)
    videos = _files(prompt, "videos", path, where, check_video)
    answer, options = _answer(prompt, where) if answered else ("", ())
    return Prompt(number, images, question, answer, options, videos, fps)


def _files(prompt: dict[str, Any], key: str, path: Path, where: str, check: Callable[[Path], None]) -> tuple[Path, ...]:
    """The pictures or the videos of a line."""
    names = prompt.get(key, [])
    if not isinstance(names, list) or not all(_is_text(name) for name in names):
        raise ValueError(f'{where}: "{key}" must be a list of file names. Got {names!r:.80}.')
    files = tuple(path.parent / name for name in names)
    for file in files:
        if not os.path.isfile(file):  # pathlib raises where a name is too long
            raise ValueError(f'{where}: "{key}" must be files, relative to the JSONL file. There is no {file}.')
        with of_prompt(where):
            check(file)
    return files


def _is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a string of whole characters: JSON can spell half of one, a lone surrogate."""
    return isinstance(value, str) and re.search(r"[\ud800-\udfff]", value) is None


def _answer(prompt: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """Answer and options of a line."""
    answer, options = prompt.get("answer"), prompt.get("options", [])
    if not _is_text(answer) or not answer.strip():
        raise ValueError(f'{where} must have an "answer", a text that is not empty. Got {answer!r:.80}.')
    texts = isinstance(options, list) and all(_is_text(option) and option.strip() for option in options)
    if not texts or len(options) == 1:
        raise ValueError(f'{where}: "options" must be a list of two or more texts. Got {options!r:.80}.')
    return answer, tuple(options)


class PromptLoader:
    """Prompts as what the model takes, read one at a time: what `calibrate` iterates over.

    Iterating raises a ValueError, which names the line, where a file cannot be read or the processor refuses.

    Args:
        prompts: the prompts.
        path: the file they came from, for error messages.
        processor: the checkpoint's.
        device: where the tensors go.
    """

    def __init__(self, prompts: list[Prompt], path: Path, processor: Any, device: str) -> None:
        self.prompts, self.path, self.processor, self.device = prompts, path, processor, device

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for prompt in self.prompts:
            images = open_images(prompt, self.path)
            yield as_inputs(prompt, self.path, images, prompt.question, self.processor, self.device)


def as_inputs(
    prompt: Prompt, path: Path, images: Sequence[Image.Image], question: str, processor: Any, device: str
) -> dict[str, Tensor]:
    """What the model takes for a question about a prompt's pictures and videos; see `ask`.

    Args:
        prompt: the prompt, of the file `path`.
        path: the file.
        images: its pictures, as `open_images` gives them.
        question: its question, or that question with its options.
        processor: the checkpoint's.
        device: where the tensors go.

    Raises:
        ValueError: a video cannot be read, or the processor refuses; the message names the line.
    """
    with of_prompt(_where(path, prompt.line)):
        videos = [load_video(video, processor, prompt.fps) for video in prompt.videos]
        return ask(processor, images, question, device, videos)


def open_images(prompt: Prompt, path: Path) -> list[Image.Image]:
    """The pictures of a prompt of the file `path`, as RGB.

    Raises:
        ValueError: one cannot be read; the message names the line.
    """
    with of_prompt(_where(path, prompt.line)):
        return [load_image(image) for image in prompt.images]


def _where(path: Path, line: int) -> str:
    """File and line, for error messages."""
    return f"{path}, line {line}"
