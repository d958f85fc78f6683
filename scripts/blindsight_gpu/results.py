"""A part's result file, written again after every row: what was measured before a crash or a time limit is kept."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blindsight_gpu.machine import same

Row = dict[str, Any]


class Results:
    """The rows of one part, by the name of their case.

    Attributes:
        path: the JSON file.
        document: what it holds: `part`, `dry_run`, `complete`, `machine`, `command`, `time`, `rows`, `left_out`.
        deadline: `time.monotonic()` after which no further row is begun.
    """

    def __init__(self, path: Path, part: str, machine: dict[str, Any], *, dry_run: bool, seconds: float) -> None:
        self.path = path
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
        }

    def resume(self) -> None:
        """Takes over the rows of the file, if it was measured on the same machine from the same source."""
        earlier = read(self.path)
        if earlier is None or earlier["dry_run"] != self.document["dry_run"]:
            return
        if same(earlier["machine"], self.document["machine"]):
            self.document["rows"] = [row for row in earlier["rows"] if "failure" not in row]

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
        if time.monotonic() > self.deadline:
            self.document["left_out"].append(case)
            return None
        begun = time.monotonic()
        try:
            row = {"case": case, **function()}
        except Exception as error:  # reported in the row, and by the part's exit code
            traceback.print_exc()
            row = {"case": case, "failure": f"{type(error).__name__}: {str(error)[:500]}"}
        row["row_seconds"] = round(time.monotonic() - begun, 2)
        self.document["rows"].append(row)
        self.write()
        print(f"  {case}: {row.get('failure') or f'{row["row_seconds"]} s'}", flush=True)
        return row if "failure" not in row else None

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
