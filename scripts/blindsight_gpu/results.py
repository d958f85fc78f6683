"""A part's result file, written before and after every row: a crash, a hang or a time limit costs one row and no other.

A row that takes longer than its limit ends the process, and so does one that leaves the GPU unusable for it: after an
illegal access every later call fails. The file then names the row in `running`; in a fresh process `go_on` turns it
into a failure and continues behind it.
"""

from __future__ import annotations

import faulthandler
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blindsight_gpu.machine import same
from shared_profiles._atomic import write_atomically

Row = dict[str, Any]
Cases = dict[str, Callable[[], Row]]
# The exit status of a part whose process can use the GPU no more, and of one that has measured its one row.
POISONED, NEXT = 3, 4
# Errors after which CUDA wants a new process: torch's first words, JAX's codes, the driver's text as Triton gives it.
_STICKY = re.compile(
    "CUDA error|CUDA_ERROR_(ASSERT|HARDWARE|ILLEGAL|INVALID_(ADDRESS_SPACE|PC)|LAUNCH_(FAILED|TIMEOUT)|MISALIGNED)"
    "|device-side assert|hardware stack error|illegal instruction|illegal memory access|invalid program counter"
    "|launch timed out|misaligned address|on global/shared address space|uncorrectable|unspecified launch failure"
)


def is_sticky(said: str) -> bool:
    """Whether an error says that this process can use the GPU no more."""
    return _STICKY.search(said) is not None


def note_of(error: Exception) -> str:
    """What the row says of a peer that broke: a finding about the peer.

    Raises:
        Exception: the error itself where it has left the GPU unusable, so that no later row is blamed.
    """
    if is_sticky(str(error)):
        raise error
    return f"failed: {type(error).__name__}: {str(error)[:200]}"


class Results:
    """The rows of one part, by the name of their case.

    Attributes:
        path: the JSON file.
        document: what it holds: `part`, `dry_run`, `complete`, `machine`, `command`, `time`, `rows`, `left_out`,
            and the case that is `running`.
        deadline: `time.monotonic()` after which no further row is begun.
        row_seconds: after which a row ends the process; None for no limit.
        alone: whether the process ends after one row, for what is counted by process.
        watch: the columns of what was seen of the GPU since a `time.monotonic()`.
    """

    def __init__(
        self,
        path: Path,
        part: str,
        machine: dict[str, Any],
        *,
        dry_run: bool,
        seconds: float,
        row_seconds: float | None = None,
        alone: bool = False,
        watch: Callable[[float], Row] = lambda begun: {},
        command: str = "",
    ) -> None:
        self.path, self.row_seconds, self.alone, self.watch = path, row_seconds, alone, watch
        self.deadline = time.monotonic() + seconds
        self.document: dict[str, Any] = {
            "part": part,
            "dry_run": dry_run,
            "complete": False,
            "machine": machine,
            "command": command,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows": [],
            "left_out": [],
            "running": None,
        }

    def begin(self, *, resume: bool) -> None:
        """Takes over the rows of an earlier file that did not fail, or sets that file aside under its time's name.

        Args:
            resume: take over, if they are of the same machine and source.
        """
        earlier = read(self.path)
        if earlier is None:
            return
        kind = earlier["dry_run"] == self.document["dry_run"]
        if resume and kind and same(earlier["machine"], self.document["machine"]):
            self.document["rows"] = good_rows(earlier)
        else:
            aside = self.path.with_stem(f"{self.path.stem}-{earlier['time'].replace(':', '')}")
            self.path.rename(aside)
            print(f"  earlier results are kept in {aside}", flush=True)

    def go_on(self) -> None:
        """Takes over all rows of the file, failures too, and makes one of the case that ended the process."""
        earlier = read(self.path)
        if earlier is None:
            return
        self.document["rows"] = earlier["rows"]
        if earlier["running"] is not None:
            limit = "" if self.row_seconds is None else f", or took more than {self.row_seconds:.0f} s"
            failure = f"ended its process{limit}"
            self.document["rows"].append({"case": earlier["running"], "failure": failure})

    def get(self, case: str) -> Row | None:
        """The row of a case that has been measured, or None."""
        return next((row for row in self.document["rows"] if row["case"] == case), None)

    def good(self, case: str) -> Row | None:
        """The same, and None for one that failed."""
        row = self.get(case)
        return None if row is None or "failure" in row else row

    def run(self, cases: Mapping[str, Callable[[], Row]]) -> None:
        """Runs the cases that have no row, in their order; those that are not begun in time stay in `left_out`."""
        self.document["left_out"] = [case for case in cases if self.get(case) is None]
        for case in self.document["left_out"].copy():
            if time.monotonic() > self.deadline:
                break
            self._measure(case, cases[case])
            if self.alone and self.document["left_out"]:
                sys.exit(NEXT)

    def _measure(self, case: str, function: Callable[[], Row]) -> None:
        """Runs one case; its result is on disk when this returns.

        An exception becomes the row's `failure`: one failing case must not cost the others. Only an exception can say
        that the GPU is lost to this process: a `failure` that the case returns is of a program that it started.
        """
        begun, said = time.monotonic(), ""
        self.document["left_out"].remove(case)
        self.document["running"] = case
        self.write()
        if self.row_seconds is not None:
            faulthandler.dump_traceback_later(self.row_seconds, exit=True)
        try:
            row = {"case": case, **function()}
        except Exception as error:  # reported in the row, and by the part's exit code
            traceback.print_exc()
            said = str(error)
            row = {"case": case, "failure": f"{type(error).__name__}: {said[:500]}"}
        finally:
            faulthandler.cancel_dump_traceback_later()
        row |= {"row_seconds": round(time.monotonic() - begun, 2), **self.watch(begun)}
        self.document["rows"].append(row)
        self.document["running"] = None
        self.write()
        print(f"  {case}: {row.get('failure') or f'{row["row_seconds"]} s'}", flush=True)
        if is_sticky(said):
            sys.exit(POISONED)

    @property
    def failed(self) -> list[Row]:
        """Rows of cases that failed."""
        return [row for row in self.document["rows"] if "failure" in row]

    def finish(self) -> None:
        """Marks the part complete unless something failed or was left out, and writes it."""
        self.document["complete"] = not self.failed and not self.document["left_out"]
        self.write()

    def write(self) -> None:
        """Writes the file."""
        write(self.path, self.document)


def read(path: Path) -> dict[str, Any] | None:
    """A result file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def good_rows(document: dict[str, Any]) -> list[Row]:
    """The rows that did not fail."""
    return [row for row in document["rows"] if "failure" not in row]


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a result file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def stop(path: Path, why: str) -> None:
    """Makes a failure of the case during which a part was stopped from outside."""
    document = read(path)
    if document is not None and document["running"] is not None:
        document["rows"].append({"case": document["running"], "failure": why})
        document["running"] = None
        write(path, document)
