"""Programs that a part starts: their output goes to a log as it comes, and at their limit all of them are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from blindsight_gpu.machine import ROOT


class Logged:
    """A program in a session of its own, begun at once."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, end: float) -> int | None:
        """Its exit status; None where it did not end by `end`, a `time.monotonic()`, and was killed."""
        try:
            return self._process.wait(max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
