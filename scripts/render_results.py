"""Writes the GPU figures of `docs/results/gpu-*.json` into the README and draws its plots; `--check` only looks.

PYTHONPATH=.:kernels:scripts python scripts/render_results.py [--check]
"""

import argparse
import sys
from pathlib import Path

from blindsight_gpu.plots import RATE, SPEED_UP, draw
from blindsight_gpu.tables import measured, render

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """0; with `--check` 1 where the README is out of date or a plot that it shows is missing."""
    parser = argparse.ArgumentParser(description="Renders the README's GPU section from the result files.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    asked = parser.parse_args()
    before = asked.readme.read_text(encoding="utf-8")
    try:
        after = render(before, asked.results)
    except ValueError as error:
        sys.exit(str(error))
    docs = asked.readme.parent / "docs"
    if asked.check:
        if after != before:
            sys.exit(f"{asked.readme} is out of date: run python scripts/render_results.py.")
        for name in (SPEED_UP, RATE):
            if (name in after) != (docs / name).exists():
                sys.exit(f"{docs / name} must be there just if {asked.readme} shows it: run scripts/render_results.py.")
    else:
        draw(measured(asked.results), docs)
        asked.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
