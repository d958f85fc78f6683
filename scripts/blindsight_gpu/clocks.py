"""Clocks, power and throttling of the GPU while a row is measured, read by `nvidia-smi` beside it; never set."""

from __future__ import annotations

import subprocess
import threading
import time

from blindsight_gpu.results import Row

_EVERY_MS = 250
_FIELDS = "utilization.gpu,clocks.sm,power.draw,clocks_event_reasons.active"
_BUSY = 50  # percent: what an idle GPU reads says nothing about the row


class Clocks:
    """Samples as long as the process lives: `nvidia-smi` ends when nobody reads it any more."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float, float, int]] = []
        self._said = "nvidia-smi said nothing yet"
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits", "--id=0"]
        try:
            process = subprocess.Popen(
                [*command, f"--loop-ms={_EVERY_MS}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except OSError as error:
            self._said = str(error)
            return
        with process:
            for line in process.stdout or ():
                self._said = line.strip()
                try:
                    busy, clock, power, reasons = self._said.split(", ")
                    self._samples.append((time.monotonic(), float(busy), float(clock), float(power), int(reasons, 16)))
                except ValueError:
                    continue  # kept in `_said`, for the note

    def since(self, begun: float) -> Row:
        """Least and most under load since then, and every reason to throttle that was active; or why there is none."""
        seen = [sample for sample in self._samples.copy() if sample[0] >= begun]
        busy = [sample for sample in seen if sample[1] >= _BUSY]
        if not seen:
            return {"clocks_note": f"no sample: {self._said[:200]}"}
        if not busy:
            return {"clocks_note": "no sample under load"}
        _, _, clocks, powers, reasons = zip(*busy, strict=True)
        throttle = 0
        for reason in reasons:
            throttle |= reason
        return {
            "sm_mhz": [min(clocks), max(clocks)],
            "watts": [min(powers), max(powers)],
            "throttle": f"{throttle:#x}",
        }
