"""Which criterion ranks heads best? Kept FLOPs against divergence and accuracy, on a small model.

PYTHONPATH=.:kernels:scripts python scripts/compare_criteria.py --checkpoint DIR --state criteria.npz

Every criterion gives a harm per head and category, and that a path from all-Dense to all-cheapest
(`shared_profiles.path`); points of each path are measured on the same questions. Then: what the budget's own choice is
worth on many questions, how stable the gradient's choice is over prompts, what it is worth on questions unlike those
it was calibrated on, what the thresholds do instead, and what further sinks are worth. Writes `criteria/NAME.json`,
then `criteria.md` and `../criteria.svg` of all models that have such a file; what was measured already is in the state
and not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from blindsight_cli.arguments import count
from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.folders import write_json
from blindsight_cli.smallvlm import evaluate
from blindsight_study import criteria
from blindsight_study.criteria_page import draw, read_studies, write_page
from blindsight_study.measure import Study

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["criteria", "target", "stability", "transfer", "knobs", "sinks"]


def main() -> None:
    """Measures what is asked for and renders everything that is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--name", help="of the study; default: the checkpoint's folder")
    parser.add_argument("--state", type=Path, required=True, help="statistics of the calibration prompts")
    parser.add_argument("--prompts", type=count, default=576, help="to calibrate on")
    parser.add_argument("--held-out", type=count, default=840, help="other prompts, to measure the budget on")
    parser.add_argument("--questions", type=count, default=240, help="per measured point")
    parser.add_argument("--target-questions", type=count, default=4200, help="for the budget's own choice")
    parser.add_argument("--random", type=int, default=1, help="random rankings")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none: only render what is known")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    asked = parser.parse_args()
    name = asked.name or asked.checkpoint.name
    path = asked.out / "criteria" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    if asked.parts:
        study = Study(asked.checkpoint, asked.prompts, asked.held_out, asked.state)
        shape, choice = study.profile.fingerprint, study.profile.choice
        about = (
            f"{shape.n_layers} layers of {shape.n_heads} heads, calibrated on {len(study.statistics)} prompts of two "
            f"to six images with a budget of {choice['budget']:g} nats on {choice['held_out_prompts']} others; "
            f"{asked.questions} further questions a point, six images unless said otherwise."
        )
        if results.setdefault("about", about) != about:
            parser.error(f"{path} must be of such a study. It says: {results['about']} Name another --out or --name.")
        six = study.ask(evaluate.make_puzzles(6, asked.questions, evaluate.EVALUATION_SEEDS))
        for part in asked.parts:
            results[part] = {
                "criteria": lambda: criteria.compare(study, six, asked.random),
                "target": lambda: criteria.target(study, asked.target_questions),
                "stability": lambda: criteria.stability(study, six),
                "transfer": lambda: criteria.transfer(study, asked.questions),
                "knobs": lambda: criteria.knobs(study, six),
                "sinks": lambda: criteria.sinks(study, six),
            }[part]()
            write_json(path, results)
    studies = read_studies(path.parent)
    write_page(studies, asked.out / "criteria.md", "../criteria.svg")
    draw(studies, asked.out.parent / "criteria.svg")


if __name__ == "__main__":
    main()
