"""What the categories look like on videos, with and without delimiters around every frame, on a small model.

PYTHONPATH=.:kernels:scripts python scripts/video_study.py

Writes `video.json` and `video.md`. The model never saw a video: `blindsight_study.video` says what it is shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from blindsight_cli.arguments import count
from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.folders import write_json
from blindsight_cli.smallvlm import evaluate
from blindsight_study import video
from blindsight_study.video_page import write_page
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measures, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_MODEL, help="with its profile beside it")
    parser.add_argument("--prompts", type=count, default=96, help="to calibrate on")
    parser.add_argument("--questions", type=count, default=240, help="about six pictures each")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    study = video.VideoStudy(asked.checkpoint, asked.prompts, asked.questions)
    results = {
        "about": f"`{asked.checkpoint.name}`, {asked.prompts} prompts of 2 to 6 pictures to calibrate on, "
        f"{asked.questions} other questions about 6 pictures.",
        "budget": evaluate.BUDGET,
        "answers": video.answers(study),
        "looks": video.looks(study),
        "categories": video.categories(study),
        "profiles": video.profiles(study, Profile.load(asked.checkpoint / FILE_NAME)),
        "long_video": video.long_video(),
    }
    write_json(asked.out / "video.json", results)
    write_page(results, asked.out / "video.md")


if __name__ == "__main__":
    main()
