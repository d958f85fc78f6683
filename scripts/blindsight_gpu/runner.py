"""Runs the parts, each in a process of its own with a time limit, and prints a short table at the end."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from blindsight_gpu.machine import ROOT
from blindsight_gpu.parts import BUDGET, SECONDS, some_of
from blindsight_gpu.results import NEXT, POISONED, read, stop
from blindsight_gpu.tables import summary

_LEAST = 5  # seconds for which no part is begun
_GRACE = 15  # a part that begins no new row after its time may still finish one


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 where every part that was asked for is complete."""
    asked = _parse(arguments)
    out = asked.out.absolute()
    begun = time.monotonic()
    complete = {}
    estimates = ", ".join(f"{part} {SECONDS[part]} s" for part in asked.part)
    print(f"estimated: {estimates}; {sum(SECONDS[part] for part in asked.part)} s of {asked.budget_seconds:.0f} s")
    with tempfile.TemporaryDirectory(prefix="blindsight-jax-") as cache:
        for i, part in enumerate(asked.part):
            left = asked.budget_seconds - (time.monotonic() - begun)
            # A dry run is short where nothing else runs, and what slows it down proves nothing about the script.
            seconds = left if asked.dry_run else _share(asked.part[i:], left) - _GRACE
            if min(left, seconds) < _LEAST:
                print(f"== {part}: not begun, the {asked.budget_seconds:.0f} s are spent; run again with --resume")
                complete[part] = False
                continue
            complete[part] = _run(part, out / f"gpu-{part}.json", seconds, asked, _environment(cache))
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    for part, done in complete.items():
        document = read(out / f"gpu-{part}.json")
        print(summary(part, document) if document else f"== {part}: no result")
        if not done:
            print("   incomplete: run again with --resume")
    return 0 if all(complete.values()) else 1


def _share(parts: list[str], left: float) -> float:
    """Seconds of the first of the parts that are still to run, its last row's included."""
    weights = [SECONDS[part] for part in parts]
    return left * weights[0] / sum(weights)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description="Checks and measures the kernels on a GPU, part by part."
    )

    def seconds(text: str) -> float:
        value = float(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"seconds must be finite and above 0. Got {text}.")
        return value

    parser.add_argument("--out", type=Path, required=True, help="folder of the result files, gpu-PART.json")
    parser.add_argument("--part", type=some_of(SECONDS), required=True, help=f"some of {','.join(SECONDS)}")
    parser.add_argument("--resume", action="store_true", help="keep rows of this source, GPU and versions")
    parser.add_argument(
        "--budget-seconds", type=seconds, default=BUDGET, help=f"for all parts together (default {BUDGET})"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at toy size, to test this script")
    asked = parser.parse_args(arguments)
    asked.command = shlex.join(["gpu_check.py", *(sys.argv[1:] if arguments is None else arguments)])
    return asked


def _environment(cache: str) -> dict[str, str]:
    """What a part's process gets: the source roots, and a cache of JAX's programs that lasts as long as this run."""
    source_roots = [str(ROOT / folder) for folder in (".", "kernels", "scripts")]
    earlier = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*source_roots, *earlier]),
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # JAX takes memory as it needs it, beside torch in one process.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    }


def _run(part: str, path: Path, seconds: float, asked: argparse.Namespace, environment: dict[str, str]) -> bool:
    """Runs one part to its end or its limit, in as many processes as that takes; whether it is complete."""
    print(f"== {part}, estimated {SECONDS.get(part, 0)} s, at most {seconds:.0f} s", flush=True)
    end = time.monotonic() + seconds
    flags = ["--resume"] * asked.resume
    always = ["--command", asked.command, *["--dry-run"] * asked.dry_run]
    while time.monotonic() < end:
        before = read(path)
        status = _process(part, path, end, [*flags, *always], environment)
        if status is None:
            stop(path, f"was stopped at the limit of its part, {seconds:.0f} s")
            print(f"== {part}: stopped at its limit; rows measured so far are kept")
            return False
        after = read(path)
        if after is None or after == before or (after["running"] is None and status not in (POISONED, NEXT)):
            return status == 0
        if status != NEXT:
            print(f"== {part}: its process ended with {status}; it begins anew behind that row")
        flags = ["--go-on"]
    return False


def _process(part: str, path: Path, end: float, flags: list[str], environment: dict[str, str]) -> int | None:
    """The exit status of one process of a part; None where it was stopped at its limit."""
    command = [sys.executable, "-m", "blindsight_gpu", part, str(path), str(end), *flags]
    limit = end + _GRACE - time.monotonic()
    try:
        return subprocess.run(command, env=environment, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return None
