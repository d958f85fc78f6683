"""A part's result file, written before and after every row: a crash, a hang or a time limit costs one row and no other.

A row that takes longer than its limit ends the process, and so does one that leaves the GPU unusable for it: after an
illegal access every later call fails. The file then names the row in `running`; in a fresh process `go_on` turns it
into a failure and continues behind it.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from blindsight_gpu.machine import same

Row = dict[str, Any]
POISONED = 3  # the exit status of a part whose process can use the GPU no more
# What the errors say after which a process must end: torch's and JAX's words for a failed launch.
_STICKY = (
    "CUDA error",
    "CUDA_ERROR_ILLEGAL",
    "CUDA_ERROR_LAUNCH",
    "illegal memory access",
    "unspecified launch failure",
)


class Results:
    """The rows of one part, by the name of their case.

    Attributes:
        path: the JSON file.
        document: what it holds: `part`, `dry_run`, `complete`, `machine`, `command`, `time`, `rows`, `left_out`,
            and the case that is `running`.
        deadline: `time.monotonic()` after which no further row is begun.
        row_seconds: after which a row ends the process; None for no limit.
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
    ) -> None:
        self.path, self.row_seconds = path, row_seconds
        self.deadline = time.monotonic() + seconds
        self.document: dict[str, Any] = {
            "part": part,
            "dry_run": dry_run,
            "complete": False,
            "machine": machine,
            "command": " ".join(sys.argv),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows": [],
            "left_out": [],
            "running": None,
        }

    def resume(self) -> None:
        """Takes over the rows of the file that did not fail, if they are of the same machine and source."""
        earlier = read(self.path)
        if earlier is None or earlier["dry_run"] != self.document["dry_run"]:
            return
        if same(earlier["machine"], self.document["machine"]):
            self.document["rows"] = [row for row in earlier["rows"] if "failure" not in row]

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

    def measure(self, case: str, function: Callable[[], Row]) -> Row | None:
        """Runs one case unless there is a row of it; its result is on disk when this returns.

        An exception becomes the row's `failure`: one failing case must not cost the others.

        Returns:
            The row; None where time is up or the case failed.
        """
        if (row := self.get(case)) is not None:
            return row if "failure" not in row else None
        if self.over:
            self.leave_out([case])
            return None
        begun = time.monotonic()
        self.document["running"] = case
        self.write()
        if self.row_seconds is not None:
            faulthandler.dump_traceback_later(self.row_seconds, exit=True)
        try:
            row = {"case": case, **function()}
        except Exception as error:  # reported in the row, and by the part's exit code
            traceback.print_exc()
            row = {"case": case, "failure": f"{type(error).__name__}: {str(error)[:500]}"}
        finally:
            faulthandler.cancel_dump_traceback_later()
        row["row_seconds"] = round(time.monotonic() - begun, 2)
        self.document["rows"].append(row)
        self.document["running"] = None
        self.write()
        print(f"  {case}: {row.get('failure') or f'{row["row_seconds"]} s'}", flush=True)
        if any(words in row.get("failure", "") for words in _STICKY):
            sys.exit(POISONED)
        return row if "failure" not in row else None

    @property
    def over(self) -> bool:
        """Whether time is up: no further case is begun."""
        return time.monotonic() > self.deadline

    def leave_out(self, cases: Iterable[str]) -> None:
        """Notes those of the cases that have no row."""
        self.document["left_out"] += [case for case in cases if self.get(case) is None]

    @property
    def failed(self) -> list[Row]:
        """Rows of cases that failed."""
        return [row for row in self.document["rows"] if "failure" in row]

    def finish(self) -> None:
        """Marks the part complete unless something failed or was left out, and writes it."""
        self.document["complete"] = not self.failed and not self.document["left_out"]
        self.write()

    def write(self) -> None:
        """Writes the file in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)


def read(path: Path) -> dict[str, Any] | None:
    """A result file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
