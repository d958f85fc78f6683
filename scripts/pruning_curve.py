"""Token pruning and sparse heads together: accuracy against query-key pairs, on a small model.

PYTHONPATH=.:kernels:scripts python scripts/pruning_curve.py

Two published pruners (`torch_blindsight.pruners`) at several shares of the image tokens, each with all heads dense and
with the profile's categories, on the same questions about six images. Writes `pruning.json`, `pruning.md` and
`../pruning.svg`; points that are in `pruning.json` already are not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from blindsight_cli.arguments import count
from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_study.pruning import PruningStudy
from blindsight_study.pruning_page import draw, write_page

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measures what is missing and renders it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_MODEL, help="a folder with a profile in it")
    parser.add_argument("--questions", type=count, default=240, help="per point")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    study = PruningStudy(asked.checkpoint, asked.questions, asked.out / "pruning.json")
    study.measure_all()
    write_page(study.results, asked.out / "pruning.md", "../pruning.svg")
    draw(study.results, asked.out.parent / "pruning.svg")


if __name__ == "__main__":
    main()
