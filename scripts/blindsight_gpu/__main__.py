"""One part in a process of its own: `python -m blindsight_gpu PART FILE SECONDS [--resume|--go-on] [--dry-run]`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

# Seconds after which a row of a part ends the part's process, which begins anew behind it. Whole models compile long in
# JAX; pytest has the part's time.
ROW_SECONDS = {"correctness": None, "model": 150, "jax_model": 240}
_ROW_SECONDS = 90


def main() -> int:
    """Runs the part; 0 where it is complete, 1 where a case failed or was left out for want of time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--go-on", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    if asked.dry_run:
        # Before Triton and JAX are imported; the simulator of Pallas kernels runs its warpgroups as threads of XLA.
        os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "NPROC": "16"}
    import torch

    from blindsight_gpu.machine import describe
    from blindsight_gpu.measure import Place
    from blindsight_gpu.results import Results

    if not asked.dry_run and not torch.cuda.is_available():
        print("a CUDA GPU must be there. torch.cuda.is_available() is False: use --dry-run to test the script itself.")
        return 1
    torch.manual_seed(0)
    machine = describe(asked.dry_run)
    limit = None if asked.dry_run else ROW_SECONDS.get(asked.part, _ROW_SECONDS)
    results = Results(asked.file, asked.part, machine, dry_run=asked.dry_run, seconds=asked.seconds, row_seconds=limit)
    if asked.go_on:
        results.go_on()
    elif asked.resume:
        results.resume()
    results.write()
    with torch.no_grad():
        import_module(f"blindsight_gpu.{asked.part}").run(results, Place(asked.dry_run))
    results.finish()
    return 0 if results.document["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
