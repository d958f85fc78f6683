"""Runs the parts, each in a process of its own with a time limit, and prints a short table at the end."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from blindsight_gpu.machine import ROOT
from blindsight_gpu.results import POISONED, read
from blindsight_gpu.tables import summary

# How the time is dealt out, in seconds of the default budget; what a part leaves goes to those after it. `tune` runs
# only if it is asked for.
SHARES = {
    "correctness": 110,
    "bounds": 60,
    "attention": 110,
    "pallas": 90,
    "model": 100,
    "jax_model": 70,
    "calibration": 30,
    "sanitizer": 40,
}
OPTIONAL = {"tune": 240}
_LEAST = 5  # seconds for which no part is begun
_GRACE = 15  # a part that begins no new row after its time may still finish one


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 where every part that was asked for is complete."""
    asked = _parse(arguments)
    out = asked.out.absolute()
    begun = time.monotonic()
    complete = {}
    for i, part in enumerate(asked.part):
        left = asked.budget_seconds - (time.monotonic() - begun)
        # A dry run is short where nothing else runs, and what slows it down proves nothing about the script.
        seconds = left if asked.dry_run else _share(asked.part[i:], left) - _GRACE
        if min(left, seconds) < _LEAST:
            print(f"== {part}: not begun, the budget of {asked.budget_seconds:.0f} s is spent; run again with --resume")
            complete[part] = False
            continue
        complete[part] = _run(part, out / f"gpu-{part}.json", seconds, asked)
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    for part, done in complete.items():
        document = read(out / f"gpu-{part}.json")
        print(summary(part, document) if document else f"== {part}: no result")
        if not done:
            print("   incomplete: run again with --resume")
    return 0 if all(complete.values()) else 1


def _share(parts: list[str], left: float) -> float:
    """Seconds of the first of the parts that are still to run, its last row's included."""
    weights = [(SHARES | OPTIONAL)[part] for part in parts]
    return left * weights[0] / sum(weights)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description="Checks and measures the kernels on a GPU, part by part."
    )

    def parts(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - {*SHARES, *OPTIONAL}:
            raise argparse.ArgumentTypeError(
                f"parts must be among {', '.join(SHARES | OPTIONAL)}. Got {', '.join(sorted(unknown))}."
            )
        return names

    parser.add_argument("--out", type=Path, required=True, help="folder of the result files, gpu-PART.json")
    parser.add_argument(
        "--part", type=parts, default=list(SHARES), help=f"some of {','.join(SHARES | OPTIONAL)}; default all but tune"
    )
    parser.add_argument("--resume", action="store_true", help="keep rows of this source, GPU and versions")
    parser.add_argument("--budget-seconds", type=float, default=570, help="for all parts together (default 570)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at toy size, to test this script")
    return parser.parse_args(arguments)


def _run(part: str, path: Path, seconds: float, asked: argparse.Namespace) -> bool:
    """Runs one part to its end or its limit, in as many processes as that takes; whether it is complete."""
    print(f"== {part}, at most {seconds:.0f} s", flush=True)
    end = time.monotonic() + seconds
    flags = ["--resume"] * asked.resume
    while (left := end - time.monotonic()) > 0:
        before = read(path)
        status = _process(part, path, left, [*flags, *["--dry-run"] * asked.dry_run])
        if status is None:
            print(f"== {part}: stopped at its limit; rows measured so far are kept")
            return False
        after = read(path)
        broken = after is not None and after != before and (after["running"] is not None or status == POISONED)
        if not broken:
            return status == 0
        print(f"== {part}: its process ended with {status}; it begins anew behind that row")
        flags = ["--go-on"]
    return False


def _process(part: str, path: Path, seconds: float, flags: list[str]) -> int | None:
    """The exit status of one process of a part; None where it was stopped at its limit."""
    source_roots = [str(ROOT / folder) for folder in (".", "kernels", "scripts")]
    earlier = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*source_roots, *earlier]), "HF_HUB_OFFLINE": "1"}
    # JAX takes memory as it needs it, beside torch in one process.
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    command = [sys.executable, "-m", "blindsight_gpu", part, str(path), str(seconds), *flags]
    try:
        return subprocess.run(command, env=environment, timeout=seconds + _GRACE, check=False).returncode
    except subprocess.TimeoutExpired:
        return None
