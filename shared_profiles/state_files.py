"""The files in which a calibration keeps its statistics, so that it can be killed, resumed and merged.

    calib.npz          the state: written by a run of one process as it goes, by a run of several at its end
    calib.rank0.npz    what each process of a run of several has so far; gone once calib.npz has all of it
    calib.rank1.npz
    calib.npz.lock     held by the run that writes these; gone when it ends, or left there by one that was killed
    other.npz          states of other machines, to be merged; only ever read

A run begins with the union of all it finds, whatever number of processes wrote it. Prompts are known by their content,
so none is counted twice, and a file that is read again after it was merged changes nothing.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared_profiles._lock import try_lock
from shared_profiles.processes import ALONE, Processes
from shared_profiles.profile_parts import Fingerprint
from shared_profiles.statistics import Statistics
from shared_profiles.template import SinkTemplate

_ORIGIN = re.compile(r"(\S+) \(([\d, ]*)\) \(([\d, ]*)\) (\d+)")


def origin_of(digest: str, template: SinkTemplate) -> str:
    """What statistics were measured on: the model, and the template that decides what a category keeps."""
    return f"{digest} {template.from_start} {template.from_end} {template.local_block}"


def read_origin(origin: str) -> tuple[str, SinkTemplate]:
    """The digest and the template that `origin_of` was given.

    Raises:
        ValueError: it is not such a line.
    """
    if (found := _ORIGIN.fullmatch(origin)) is None:
        raise ValueError(f"the origin must be a model's digest and a sink template. Got {origin!r}.")
    from_start, from_end = (tuple(int(x) for x in re.findall(r"\d+", text)) for text in found.group(2, 3))
    return found[1], SinkTemplate(from_start, from_end, int(found[4]))


@contextmanager
def one_writer(state: str | Path | None, processes: Processes = ALONE) -> Iterator[None]:
    """In this context no other run writes the state: what two of them measured, the later one would overwrite.

    The first process holds the lock for all of its run. Without effect on Windows, which has no such lock.

    Args:
        state: the state; None keeps nothing.
        processes: those of this run.

    Raises:
        ValueError: another run writes it.
        OSError: its folder is missing or cannot be written.
    """
    if state is None or processes.rank > 0 or sys.platform == "win32":
        yield
        return
    path = Path(state).resolve()
    path = path.with_name(f"{path.name}.lock")
    with open(path, "ab") as file:
        # A run that ends removes the file: who had opened it before holds a lock that nobody else can see.
        if not try_lock(file) or not path.exists() or not os.path.samefile(file.fileno(), path):
            raise ValueError(
                f"a state must have one writer. Another run writes {state}. Wait for it, or name another state and "
                "merge the two."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class StateFiles:
    """The state files of one run, read when it begins.

    Args:
        state: the state; None keeps nothing.
        merge: states of other machines.
        processes: those that run; each must make one of these.

    Raises:
        ValueError: a file is no whole state, or `merge` is one path instead of several.
        OSError: one to be merged cannot be read.
    """

    def __init__(self, state: str | Path | None, merge: Iterable[str | Path], processes: Processes) -> None:
        if isinstance(merge, str | os.PathLike):
            raise ValueError(f"states to merge must be a list of paths. Got {os.fspath(merge)!r}. Put it in a list.")
        self._state = None if state is None else Path(state)
        self._processes = processes
        self._old = [] if self._state is None else state_files(self._state)
        paths = (*self._old, *merge)
        self._found = [(str(path), Statistics.load(path)) for path in paths]
        # On one disk all have read the same: each would be sent all of it n times.
        if processes.n > 1 and len(set(processes.gather(tuple(map(_content, paths))))) > 1:
            self._found = [each for theirs in processes.gather(self._found) for each in theirs]

    @property
    def template(self) -> SinkTemplate | None:
        """The template of the statistics that were found; None where none were.

        Raises:
            ValueError: they are not of a calibration.
        """
        return read_origin(self._found[0][1].origin)[1] if self._found else None

    def require_none(self, held_out: Callable[[str], bool]) -> None:
        """Refuses statistics, and sinks, of prompts that are held out now; `held_out` tells which.

        Raises:
            ValueError: a file has such a prompt.
        """
        for path, part in self._found:
            for prompt_id in (*part.prompt_ids, *part.sinks):
                if held_out(prompt_id):
                    raise ValueError(
                        f"held-out prompts must not be calibrated on. {path} has prompt {prompt_id}: it was begun "
                        "without this split. Begin another state, or hold out as it did."
                    )

    def begin(self, fingerprint: Fingerprint, template: SinkTemplate, rankings: Iterable[str]) -> Statistics:
        """All that was found, as one state.

        Raises:
            ValueError: a file has statistics of another model, template or rankings, or two disagree about a prompt.
        """
        origin = origin_of(fingerprint.digest, template)
        whole = Statistics(fingerprint.n_layers, fingerprint.n_heads, origin=origin, rankings=tuple(rankings))
        for path, part in self._found:
            _require(path, part, fingerprint, template, whole.rankings)
            try:
                whole = whole.merge(part)
            except ValueError as error:  # they disagree about a prompt
                raise ValueError(f"{path}: {error}") from error
        return whole

    def save(self, statistics: Statistics) -> None:
        """Writes what this process has so far; keeps nothing where no state was named."""
        if self._state is not None:
            statistics.save(self._state if self._processes.n == 1 else _part_of(self._state, self._processes.rank))

    def finish(self, statistics: Statistics) -> None:
        """Writes the state, once all processes have given theirs, and removes the files of single processes."""
        if self._state is None:
            return
        if self._processes.rank == 0:
            statistics.save(self._state)
        self._processes.gather(None)  # no part goes before the whole is on the disk
        for path in {*self._old, _part_of(self._state, self._processes.rank)} - {self._state}:
            path.unlink(missing_ok=True)


def _content(path: str | Path) -> bytes:
    """What tells a file's content from others'."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _part_of(state: Path, rank: int) -> Path:
    return state.with_name(f"{state.stem}.rank{rank}{state.suffix}")


def state_files(state: Path) -> list[Path]:
    """The files of a state that there are: its own, and those that processes of earlier runs have left."""
    name = re.compile(rf"{re.escape(state.stem)}(\.rank\d+)?{re.escape(state.suffix)}")
    return sorted(path for path in state.parent.glob(f"{glob.escape(state.stem)}*") if name.fullmatch(path.name))


def _require(
    path: str, part: Statistics, fingerprint: Fingerprint, template: SinkTemplate, rankings: tuple[str, ...]
) -> None:
    """Refuses what belongs to another run."""
    try:
        digest, its_template = read_origin(part.origin)
    except ValueError as error:
        raise ValueError(f"{path} must hold the statistics of a calibration. {error} Name another file.") from error
    given = f"SinkTemplate({template.from_start}, {template.from_end}, {template.local_block})"
    its = f"SinkTemplate({its_template.from_start}, {its_template.from_end}, {its_template.local_block})"
    for what, wanted, got, advice in (
        ("model", fingerprint.digest, digest, "Calibrate that one with it"),
        ("template", given, its, "Calibrate every part with one and the same"),
        ("rankings", rankings, part.rankings, "Choose categories as that run did, by a budget or by thresholds"),
    ):
        if wanted != got:
            raise ValueError(
                f"{path} must have been measured with this {what}: {wanted}. Got {got}. {advice}, or name another file."
            )
