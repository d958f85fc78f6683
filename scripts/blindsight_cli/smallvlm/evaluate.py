"""Dense against sparse on the same held-out puzzles: accuracy, agreement, KL, kept FLOPs.

`python -m blindsight_cli.smallvlm.evaluate CHECKPOINT` prints the figures of a checkpoint's README.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blindsight_cli.arguments import count
from blindsight_cli.backends import Backend, Prompt, load_backend, next_tokens
from blindsight_cli.loading import load_processor
from blindsight_cli.report import AccuracyRow, KindAccuracy
from blindsight_cli.smallvlm.puzzles import KINDS, Puzzle, make_puzzle
from shared_profiles import Category
from shared_profiles.lookup import FILE_NAME
from shared_profiles.measured import divergence
from shared_profiles.profile import Profile

# Seeds of puzzles, apart from one another so that nothing is measured on what it was chosen on.
EVALUATION_SEEDS, CALIBRATION_SEEDS, HELD_OUT_SEEDS = 1_000_000, 2_000_000, 3_000_000

# Nats. The small models are sure of nearly every answer, so a small divergence is already a changed mind.
BUDGET = 0.004


def make_puzzles(n_images: int, count: int, first_seed: int) -> list[Puzzle]:
    """`count` puzzles of consecutive seeds, the kinds of question in turn."""
    return [make_puzzle(n_images, first_seed + i, KINDS[i % len(KINDS)]) for i in range(count)]


def make_mixed_puzzles(count: int, first_seed: int, images: Sequence[int] = (2, 3, 4, 5, 6)) -> list[Puzzle]:
    """`count` puzzles of consecutive seeds, numbers of pictures and kinds of question in turn."""
    return [make_puzzle(images[i % len(images)], first_seed + i, KINDS[i % len(KINDS)]) for i in range(count)]


def to_messages(puzzle: Puzzle) -> list[dict[str, Any]]:
    """The puzzle as a chat, pictures first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in puzzle.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": puzzle.question.text}]}]


def to_inputs(processor: Any, puzzles: Sequence[Puzzle]) -> dict[str, Tensor]:
    """What the model takes, padded on the left, so that the answer follows every prompt's last token."""
    return dict(
        processor.apply_chat_template(
            [to_messages(puzzle) for puzzle in puzzles],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(padding=True, padding_side="left"),
        )
    )


@dataclass(frozen=True)
class Run:
    """Log-probabilities of the next token after each puzzle, `[n, vocabulary]` float32, and the answers they give."""

    log_probs: np.ndarray
    answers: tuple[str, ...]


def answer(model: Backend, processor: Any, batches: Sequence[Prompt], profile: Profile | None) -> Run:
    """Asks every question of the batches; without a profile dense.

    Raises:
        RuntimeError: a forward that should have run sparse did not.
    """
    log_probs = next_tokens(model, batches, profile)
    return Run(log_probs, tuple(processor.tokenizer.convert_ids_to_tokens(log_probs.argmax(-1).tolist())))


def compare(
    model: Backend, processor: Any, profile: Profile, puzzles: Sequence[Puzzle], *, batch_size: int = 32
) -> tuple[AccuracyRow, Run, Run]:
    """Asks every question dense and sparse.

    Args:
        model: the model.
        processor: its processor.
        profile: the profile to judge.
        puzzles: the questions, all with the same number of images.
        batch_size: prompts of one forward.

    Returns:
        The figures, and both runs.

    Raises:
        ValueError: no puzzles, or of different numbers of images.
        RuntimeError: a forward that should have run sparse did not.
    """
    counts = {len(puzzle.images) for puzzle in puzzles}
    if len(counts) != 1:
        raise ValueError(
            f"puzzles must all have the same number of images, and there must be some. Got {sorted(counts)}."
        )
    batches = [to_inputs(processor, puzzles[i : i + batch_size]) for i in range(0, len(puzzles), batch_size)]
    dense, sparse = (answer(model, processor, batches, way) for way in (None, profile))
    expected = [puzzle.question.answer for puzzle in puzzles]
    right = np.array([[a == e for a, e in zip(run.answers, expected, strict=True)] for run in (dense, sparse)])
    kinds = np.array([puzzle.question.kind for puzzle in puzzles])
    kl, agree = divergence(dense.log_probs, sparse.log_probs)
    layouts = [layout for batch in batches for layout in model.facts.layouts(batch)]
    kept, pairs = (sum(model.facts.pairs(layout, way).total for layout in layouts) for way in (profile, None))
    row = AccuracyRow(
        n_images=counts.pop(),
        n_questions=len(puzzles),
        dense=float(right[0].mean()),
        sparse=float(right[1].mean()),
        agreement=float(agree.mean()),
        kl=max(0.0, float(kl.mean())),
        kept_flops=kept / pairs,
        by_kind=tuple(
            KindAccuracy(kind, int((kinds == kind).sum()), *(float(r[kinds == kind].mean()) for r in right))
            for kind in KINDS
            if (kinds == kind).any()
        ),
    )
    return row, dense, sparse


def main() -> None:
    """Reads the command line, evaluates, prints one line per number of images and kind of question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=count, default=2000, help="per number of images")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--first-seed", type=int, default=EVALUATION_SEEDS, help="of the puzzles")
    parser.add_argument("--profile", type=Path, help="default: the one beside the checkpoint, else all heads Dense")
    args = parser.parse_args()
    model, processor = load_backend("torch", args.checkpoint, device="cpu"), load_processor(args.checkpoint)
    path = args.profile or args.checkpoint / FILE_NAME
    found = path.exists() or args.profile is not None
    profile = Profile.load(path) if found else Profile.uniform(Category.DENSE, model.facts.fingerprint)
    for n_images in args.images:
        row, _, _ = compare(model, processor, profile, make_puzzles(n_images, args.questions, args.first_seed))
        print(
            f"{n_images} images, {row.n_questions} questions: dense {row.dense:.2%}, sparse {row.sparse:.2%}, "
            f"agreement {row.agreement:.2%}, KL {row.kl:.5f} nats, kept FLOPs {row.kept_flops:.1%}"
        )
        for kind in row.by_kind:
            print(f"  {kind.kind:<11} {kind.n_questions:>5}  dense {kind.dense:.2%}  sparse {kind.sparse:.2%}")


if __name__ == "__main__":
    main()
