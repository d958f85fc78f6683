"""The per-sample file: one line for the run, then one per item, written as each is done.

    {"format": "blindsight-eval-samples", "version": 1, "run": {...}}
    {"line": 1, "digest": "...", "dense": {...}, "sparse": {...}, ...}

A run that was killed goes on from it: what is there is not asked again. The lines of another run are refused, and two
processes never write one file. A last line that was cut by a kill is dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from blindsight_cli.folders import read_json
from blindsight_cli.report.codec import Record
from shared_profiles._lock import try_lock

FORMAT, VERSION = "blindsight-eval-samples", 1

_WANTED = f"a per-sample file of eval, {FORMAT} version {VERSION}"
_ADVICE = "Name another --out, or remove the file to begin anew."


@dataclass(frozen=True)
class Arm(Record):
    """One way of answering one item.

    Attributes:
        text: the answer.
        verdict: what it was taken for; None if it is invalid.
        right: 1 if that is what was expected, else 0.
        ran: what the prefill really was: "sparse", or "dense" and why.
        pairs: query-key pairs that the language model's attention computed, all layers and heads.
        inter: those of image tokens with other images.
    """

    text: str
    verdict: str | None
    right: int
    ran: str
    pairs: int
    inter: int


@dataclass(frozen=True)
class Sample(Record):
    """One item, asked both ways.

    Attributes:
        line: of the file of items.
        digest: of question, pictures and videos.
        expected: the right answer, in normal form.
        n_tokens, n_images: of the prompt.
        dense, sparse: the answers.
        kl: KL(dense || sparse) of the distribution of the answer's first token, in nats.
        n_seen: its pictures and videos that are among those of the calibration.
        seconds: of one dense and one sparse prefill; none where they were not timed.
    """

    line: int
    digest: str
    expected: str
    n_tokens: int
    n_images: int
    dense: Arm
    sparse: Arm
    kl: float
    n_seen: int
    seconds: tuple[float, ...] = ()


class SampleFile:
    """A per-sample file, open for one run. A context manager.

    Args:
        path: the file; made if it is missing.
        run: what tells this run from others, as JSON values.

    Raises:
        ValueError: the file is of another run or no such file, or another process writes it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  # closed by __exit__
        try:
            self._lock()
            self.samples = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, sample: Sample) -> None:
        """Writes one item, in one step."""
        self._write(_line(sample.to_json()))
        self.samples[sample.line] = sample

    def _lock(self) -> None:
        if not try_lock(self._file):
            raise ValueError(
                f"a per-sample file must have one writer. Another process writes {self.path}. Wait for it, or name "
                "another --out."
            )

    def _read(self) -> dict[int, Sample]:
        """The items already done, by line; a new file gets its first line."""
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if not end:
            head = _line({"format": FORMAT, "version": VERSION, "run": self.run})
            if not head.startswith(content):
                raise ValueError(f"{self.path} must be {_WANTED}. It has no line of one. {_ADVICE}")
            self._write(head[len(content) :])
            return {}
        first, *lines = content[:end].splitlines()
        self._check_run(first)
        self._file.truncate(end)
        samples: dict[int, Sample] = {}
        for number, line in enumerate(lines, start=2):
            try:
                sample = Sample(**read_json(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} must be an item of this run. Got: {error}.") from error
            if sample.line in samples:
                raise ValueError(f"{self.path}, line {number}: the item of line {sample.line} must be there once.")
            samples[sample.line] = sample
        return samples

    def _check_run(self, line: bytes) -> None:
        try:
            head = read_json(line)
            known, theirs = (head["format"], head["version"]) == (FORMAT, VERSION), dict(head["run"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} must be {_WANTED}. Its first line is not one's. {_ADVICE}") from error
        if not known:
            raise ValueError(f"{self.path} must be {_WANTED}. Got {head['format']!r}, {head['version']!r}. {_ADVICE}")
        if different := sorted(key for key in self.run | theirs if self.run.get(key) != theirs.get(key)):
            shown = "; ".join(
                f"{key}: there {theirs.get(key)!r:.90}, here {self.run.get(key)!r:.90}" for key in different
            )
            raise ValueError(f"{self.path} must be of this run, to go on from it. It is of another: {shown}. {_ADVICE}")

    def _write(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
        except OSError as error:  # which of itself names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if written != len(line):
            raise OSError(f"{self.path} could not be written whole. Is the disk full?")


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode() + b"\n"
