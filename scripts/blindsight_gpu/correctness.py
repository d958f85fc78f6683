"""Part `correctness`: the tests marked `gpu`, run by pytest, and what they found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from blindsight_gpu.machine import ROOT
from blindsight_gpu.measure import Place
from blindsight_gpu.results import Results, Row


def run(results: Results, place: Place) -> None:
    """Runs the suite as one case."""
    results.measure("pytest -m gpu", partial(_suite, results, place))


def _suite(results: Results, place: Place) -> Row:
    """Counts of passed, failed and skipped tests; the names of those that failed.

    Raises:
        RuntimeError: pytest wrote no report, a test failed, or, on a GPU, none ran.
    """
    report = results.path.with_suffix(".xml").absolute()
    report.unlink(missing_ok=True)
    tests = ["tests/test_kernels_triton.py"] if place.dry_run else ["tests"]
    parallel = [] if place.dry_run or find_spec("xdist") is None else ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *parallel, *tests]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX would take the memory from the other workers
    left = max(results.deadline - time.monotonic(), 1)
    try:
        done = subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=left,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        raise RuntimeError(f"pytest did not end in {left:.0f} s: {said[-400:]}") from None
    if not report.exists():
        raise RuntimeError(f"pytest ended with {done.returncode} and no report: {(done.stdout + done.stderr)[-400:]}")
    counts = read_junit(report)
    report.unlink()
    print(done.stdout[-3000:])
    if counts["failed"] or (not counts["passed"] and not place.dry_run):
        raise RuntimeError(f"{counts}: {done.stdout[-400:]}")
    return {"command": " ".join(command[1:]), **counts}


def read_junit(path: Path) -> Row:
    """Counts from pytest's JUnit report; names of failed tests."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failed_tests": failed,
    }
