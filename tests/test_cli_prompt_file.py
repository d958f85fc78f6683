"""Prompt files with a bad line, and questions that a processor refuses: told with file and line, with no traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from blindsight_cli.loading import load_model
from blindsight_cli.main import app
from blindsight_cli.prompt_file import Prompt, read_prompts
from shared_profiles import Category
from shared_profiles.profile import Profile
from tiny_checkpoints import save_checkpoint, save_prompts
from torch_blindsight import fingerprint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model before training."""
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prompts(tmp_path_factory.mktemp("data"))


def blindsight(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


BAD_LINES = {
    "not-json": ("{oops", "line 2 must be JSON"),
    "not-utf8": ('{"images": [], "question": "\udcff"}', "line 2 must be JSON"),
    "too-deep": ("[" * 100_000, "line 2 must be JSON"),
    "no-question": ('{"images": ["0-0.png", "0-1.png"]}', "line 2 must be an object"),
    "a-list": ("[1]", "line 2 must be an object"),
    "images-text": ('{"images": "0-0.png", "question": "?"}', "list of file names"),
    "question-number": ('{"images": [], "question": 3}', "must be a text"),
    "half-a-character": ('{"images": [], "question": "\\ud800?"}', 'line 2: "question" must be a text of whole'),
    "half-a-name": ('{"images": ["\\udc00.png"], "question": "?"}', 'line 2: "images" must be a list of file names'),
    "missing-file": ('{"images": ["0-0.png", "nope.png"], "question": "?"}', "nope.png"),
    "long-name": ('{"images": ["0-0.png", "' + "x" * 300 + '"], "question": "?"}', 'line 2: "images" must be files'),
    "no-picture": ('{"images": ["0-0.png", "prompts.jsonl"], "question": "?"}', "line 2: an image must be a picture"),
    "cut-picture": ('{"images": ["0-0.png", "cut.png"], "question": "?"}', "line 2: an image must be a picture"),
    "thin-picture": ('{"images": ["0-0.png", "thin.png"], "question": "?"}', "line 2: the checkpoint's processor must"),
    "no-pictures": ('{"question": "?"}', 'an object with "images" or "videos", and "question"'),
    "videos-text": ('{"videos": "a.mp4", "question": "?"}', '"videos" must be a list of file names'),
    "missing-video": ('{"videos": ["a.mp4"], "question": "?"}', 'line 2: "videos" must be files'),
    "picture-video": ('{"videos": ["0-0.png"], "question": "?"}', "line 2: a video must be one that PyAV can read"),
    "text-video": ('{"videos": ["prompts.jsonl"], "question": "?"}', "line 2: a video must be one that PyAV can read"),
    "no-fps": ('{"videos": [], "fps": 0, "question": "?"}', 'line 2: "fps" must be a number above 0'),
    "true-fps": ('{"videos": [], "fps": true, "question": "?"}', 'line 2: "fps" must be a number above 0'),
    "long-fps": (f'{{"videos": [], "fps": 1{"0" * 400}, "question": "?"}}', 'line 2: "fps" must be a number above 0'),
    "image-token": ('{"images": ["0-0.png", "0-1.png"], "question": "<|image_pad|>"}', "line 2: a question must be"),
    "video-token": ('{"images": ["0-0.png", "0-1.png"], "question": "<|video_pad|>"}', "Got <|video_pad|> in it"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_calibrate_names_the_bad_line(line: str, message: str, checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prompts.parent, data)
    Image.new("RGB", (1, 300)).save(data / "thin.png")
    (data / "cut.png").write_bytes((data / "0-0.png").read_bytes()[:200])
    good = prompts.read_text().splitlines()[0]
    (data / "bad.jsonl").write_bytes(f"{good}\n{line}\n".encode(errors="surrogateescape"))
    result = blindsight("calibrate", checkpoint, data / "bad.jsonl", "--out", tmp_path / "p.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr and "bad.jsonl" in result.stderr
    assert not (tmp_path / "p.json").exists()


def test_answers_are_looked_at_only_where_they_are_asked_for(prompts: Path) -> None:
    path = prompts.with_name("answers.jsonl")
    path.write_text(' \r\n{"images": ["0-0.png"], "question": " ? ", "answer": 3, "options": "x"}\n')
    assert read_prompts(path) == read_prompts(path, 1) == [Prompt(2, (path.with_name("0-0.png"),), " ? ")]
    with pytest.raises(ValueError, match='line 2 must have an "answer", a text'):
        read_prompts(path, answered=True)


def test_run_names_the_question_that_a_processor_refuses(checkpoint: Path, prompts: Path) -> None:
    picture = prompts.parent / "0-0.png"
    for question, message in (
        ("<|image_pad|>?", "a question must"),
        ("half \udcff", "the checkpoint's processor must"),
    ):
        result = blindsight("run", checkpoint, "--image", picture, "--question", question)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"--question, --image and --video: {message}" in result.stderr


def test_eval_names_the_line_that_a_processor_refuses(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prompts.parent, data)
    line = '{"images": ["0-0.png", "0-1.png"], "question": "QUESTION", "answer": "yes"}\n'
    (data / "items.jsonl").write_text(line.replace("QUESTION", "?") + line.replace("QUESTION", "<|image_pad|>"))
    Profile.uniform(Category.SINK, fingerprint(load_model(checkpoint))).save(tmp_path / "p.json")
    where = ("--profile", tmp_path / "p.json", "--out", tmp_path / "r.json")
    result = blindsight("eval", checkpoint, data / "items.jsonl", *where)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "items.jsonl, line 2: a question must be without" in result.stderr
