"""`scripts/gpu_check.py --dry-run` with all of its parts in one process, which imports torch and JAX once.

`python tests/gpu_dry_run.py --out FOLDER --part PARTS`, with the script's source roots on the path.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "NPROC": "16"}  # before Triton and JAX: as a part does

import interpreted
import simulated
from blindsight_gpu import __main__ as process
from blindsight_gpu import runner


def _here(part: str, path: Path, end: float, flags: list[str], environment: dict[str, str]) -> int:
    """What `runner` starts a process for."""
    if part in ("bounds", "pallas"):
        simulated.speed_up()
    sys.argv[1:] = [part, str(path), str(end), *flags]
    return process.main()


if __name__ == "__main__":
    interpreted.speed_up()
    runner._process = _here
    sys.exit(runner.main(["--dry-run", *sys.argv[1:]]))
