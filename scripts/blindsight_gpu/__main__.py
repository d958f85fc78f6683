"""One part in a process of its own: `python -m blindsight_gpu PART FILE END [--resume|--go-on] [--dry-run]`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path

# Seconds after which a row of a part ends the part's process, which begins anew behind it. Whole models compile long in
# JAX; what starts processes of its own ends them in the part's time.
ROW_SECONDS = {"correctness": None, "sanitizer": None, "profile": None, "model": 200, "jax_model": 240}
_ROW_SECONDS = 90
# JAX counts peak memory by process: there every row has its own.
ALONE = ("jax_model",)


def main() -> int:
    """Runs the part; 0 where it is complete, 1 where a case failed or was left out for want of time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("end", type=float, help="time.monotonic() after which no row is begun")
    parser.add_argument("--command", required=True, help="what the user typed")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--go-on", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    if asked.dry_run:
        # Before Triton and JAX are imported; the simulator of Pallas kernels runs its warpgroups as threads of XLA.
        os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "NPROC": "16"}
    import torch

    from blindsight_gpu.clocks import Clocks
    from blindsight_gpu.machine import describe
    from blindsight_gpu.measure import Place
    from blindsight_gpu.results import Results

    if not asked.dry_run and not torch.cuda.is_available():
        print("a CUDA GPU must be there. torch.cuda.is_available() is False: use --dry-run to test the script itself.")
        return 1
    torch.manual_seed(0)
    results = Results(
        asked.file,
        asked.part,
        describe(asked.dry_run),
        dry_run=asked.dry_run,
        seconds=asked.end - time.monotonic(),
        row_seconds=None if asked.dry_run else ROW_SECONDS.get(asked.part, _ROW_SECONDS),
        alone=asked.part in ALONE and not asked.dry_run,
        watch=(lambda begun: {}) if asked.dry_run else Clocks().since,
        command=asked.command,
    )
    if asked.go_on:
        results.go_on()
    else:
        results.begin(resume=asked.resume)
    results.write()
    with torch.no_grad():
        import_module(f"blindsight_gpu.{asked.part}").run(results, Place(asked.dry_run))
    results.finish()
    return 0 if results.document["complete"] else 1


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as end:  # behind a row, or the arguments were wrong
        status = int(end.code or 0)
    # At once: all is saved, and what torch and JAX do at a process's end, in threads of their own, may crash or hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
