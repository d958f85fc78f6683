"""Part `correctness`: the tests marked `gpu`, run by pytest, whose output goes to `gpu-correctness.log`.

XLA's autotuning, which takes longer than these small programs, is off here and nowhere else.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from blindsight_gpu.machine import ROOT
from blindsight_gpu.measure import Place
from blindsight_gpu.processes import Logged
from blindsight_gpu.results import Results, Row

_TEST_SECONDS = 150  # one of JAX compiles some sixty programs


def run(results: Results, place: Place) -> None:
    """Runs the suite as one case."""
    results.run({"pytest -m gpu": partial(_suite, results, place)})


def marked_files(folder: Path) -> list[Path]:
    """The test files that may hold `gpu` tests: those that name the marker, or import a module that does."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    found = {path for path, source in sources.items() if "mark.gpu" in source}
    while True:
        modules = "|".join(sorted(path.stem for path in found))
        imports = re.compile(rf"^\s*(?:from|import) (?:{modules})\b", re.M)
        more = {path for path, source in sources.items() if imports.search(source)} - found
        if not found or not more:
            return [path for path in sources if path in found and path.stem.startswith("test_")]
        found |= more


def _suite(results: Results, place: Place) -> Row:
    """Counts of passed, failed and skipped tests; the names of those that failed, and why others were skipped.

    A `failure` is in the row, beside the counts, where a test failed, pytest was stopped or, on a GPU, none passed.
    """
    log = results.path.with_suffix(".log")
    log.unlink(missing_ok=True)
    files = [ROOT / "tests" / "test_kernels_triton.py"] if place.dry_run else marked_files(ROOT / "tests")
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [f"--timeout={_TEST_SECONDS}", "--timeout-method=thread"]
    if not place.dry_run and find_spec("xdist") is not None:
        # By file, as the suite's own groups are: pytest 9.2 loses those, and every worker would compile everything.
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    command += [str(path.relative_to(ROOT)) for path in files]
    # Nor JAX's cache: the files share next to no programs, and one that a worker is writing reads as a warning.
    without = ("TRITON_INTERPRET", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    status = Logged(command, log, environment).wait(results.deadline)
    row = {"command": " ".join(command[1:]), **read_log(log.read_text(encoding="utf-8", errors="replace"))}
    if status is None:
        row["failure"] = f"pytest did not end in time: {_counts(row)}"
    elif row["failed"] or status not in (0, 5):  # 5: all were deselected
        row["failure"] = f"pytest ended with {status}: {_counts(row)}"
    elif not row["passed"] and not place.dry_run:
        row["failure"] = f"no test ran: {_counts(row)}"
    return row


def _counts(row: Mapping[str, object]) -> str:
    return ", ".join(f"{row[what]} {what}" for what in ("passed", "failed", "skipped")) + f"; {row['failed_tests']}"


def read_log(said: str) -> Row:
    """Counts from the lines that `pytest -v` writes, one a test, with xdist's workers or without."""
    before = re.compile(r"^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)", re.M)
    after = re.compile(r"^\[gw\d+\] .*?(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)", re.M)
    ends = {name: end for name, end in before.findall(said)} | {name: end for end, name in after.findall(said)}
    # A test that ends its worker has no such line.
    crashed = re.findall(r"worker '?gw\d+'? crashed while running '([^']+)'", said)
    failed = sorted({name for name, end in ends.items() if end in ("FAILED", "ERROR")} | set(crashed))
    return {
        "passed": sum(end == "PASSED" and name not in failed for name, end in ends.items()),
        "failed": len(failed),
        "skipped": sum(end == "SKIPPED" for end in ends.values()),
        "failed_tests": failed,
        "skipped_for": sorted(set(re.findall(r"^SKIPPED \[\d+\] \S+ (.+)", said, re.M))),  # pytest's summary, by -ra
    }
