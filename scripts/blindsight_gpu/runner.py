"""Runs the parts, each in a process of its own with a time limit, and prints a short table at the end."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from blindsight_gpu.machine import ROOT
from blindsight_gpu.results import read
from blindsight_gpu.tables import summary

# Seconds a part may take on an H200; `tune` runs only if it is asked for.
LIMITS = {"correctness": 120, "bounds": 80, "attention": 180, "model": 150, "calibration": 40}
OPTIONAL = {"tune": 240}
_GRACE = 20  # a part that begins no new row after its limit may still finish one


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 where every part that was asked for is complete."""
    asked = _parse(arguments)
    out = asked.out.absolute()
    begun = time.monotonic()
    complete = {}
    for part in asked.part:
        left = asked.budget_seconds - (time.monotonic() - begun)
        if left < _GRACE:
            print(f"== {part}: not begun, the budget of {asked.budget_seconds:.0f} s is spent; run again with --resume")
            complete[part] = False
            continue
        # A dry run is short where nothing else runs, and what slows it down proves nothing about the script.
        seconds = left if asked.dry_run else min((LIMITS | OPTIONAL)[part], left - _GRACE / 2)
        complete[part] = _run(part, out / f"gpu-{part}.json", seconds, asked)
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    for part, done in complete.items():
        document = read(out / f"gpu-{part}.json")
        print(summary(part, document) if document else f"== {part}: no result")
        if not done:
            print("   incomplete: run again with --resume")
    return 0 if all(complete.values()) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description="Checks and measures the kernels on a GPU, part by part."
    )

    def parts(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - {*LIMITS, *OPTIONAL}:
            raise argparse.ArgumentTypeError(
                f"parts must be among {', '.join(LIMITS | OPTIONAL)}. Got {', '.join(sorted(unknown))}."
            )
        return names

    parser.add_argument("--out", type=Path, required=True, help="folder of the result files, gpu-PART.json")
    parser.add_argument(
        "--part", type=parts, default=list(LIMITS), help=f"some of {','.join(LIMITS | OPTIONAL)}; default all but tune"
    )
    parser.add_argument("--resume", action="store_true", help="keep rows of this source, GPU and versions")
    parser.add_argument("--budget-seconds", type=float, default=570, help="for all parts together (default 570)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at toy size, to test this script")
    return parser.parse_args(arguments)


def _run(part: str, path: Path, seconds: float, asked: argparse.Namespace) -> bool:
    """Runs one part to its end or its limit; whether it is complete."""
    print(f"== {part}, at most {seconds:.0f} s", flush=True)
    flags = ["--resume"] * asked.resume + ["--dry-run"] * asked.dry_run
    source_roots = [str(ROOT / folder) for folder in (".", "kernels", "scripts")]
    earlier = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*source_roots, *earlier]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "blindsight_gpu", part, str(path), str(seconds), *flags]
    try:
        done = subprocess.run(command, env=environment, timeout=seconds + _GRACE, check=False)
    except subprocess.TimeoutExpired:
        print(f"== {part}: stopped after {seconds + _GRACE:.0f} s; rows measured so far are kept")
        return False
    if done.returncode < 0 or done.returncode > 1:
        print(f"== {part}: ended with {done.returncode}; rows measured so far are kept")
    return done.returncode == 0
