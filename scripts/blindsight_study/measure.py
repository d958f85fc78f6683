"""A small model, the statistics it was calibrated with, and what a choice of categories does to its answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blindsight_cli.backends import Backend, load_backend
from blindsight_cli.held_out import HeldOut
from blindsight_cli.loading import load_processor
from blindsight_cli.smallvlm import evaluate
from blindsight_cli.smallvlm.puzzles import Puzzle
from blindsight_study.page import effect
from shared_profiles import Category, SinkTemplate, count_model_pairs
from shared_profiles._atomic import write_atomically
from shared_profiles.budget import Budget
from shared_profiles.profile import Profile
from shared_profiles.profile_parts import heads_of
from shared_profiles.provenance import prompt_digest
from shared_profiles.statistics import Statistics
from shared_profiles.summary import Summary

TEMPLATE, BATCH = SinkTemplate(), 32
# Of the prompts that a budget is measured on, by turns. What is rare takes many prompts to be seen, and most of what
# sparse heads do wrong they do wrong about six images.
HELD_OUT_IMAGES = (2, 3, 4, 5, 6, 6, 6)


@dataclass(frozen=True)
class Asked:
    """Questions of one sort, and what the dense model answers."""

    puzzles: list[Puzzle]
    held: HeldOut
    expected: np.ndarray  # [N] token ids
    layouts: list[Any]


class Study:
    """One model's calibration and the measurements so far.

    Args:
        checkpoint: the model's folder.
        n_prompts: prompts to calibrate on, of two to six images.
        n_held_out: others, of `HELD_OUT_IMAGES`, to measure the budget on.
        state: file of their statistics. Beside it lie the profile they gave, as `.json`, and what was measured, as
            `.measured.json`: what is there is not done again.

    Raises:
        ProfileError, ValueError: these files are of another model, or of other prompts; or the profile would be saved
            over the statistics.
    """

    def __init__(self, checkpoint: Path, n_prompts: int, n_held_out: int, state: Path) -> None:
        made = state.with_suffix(".json")
        if made == state:
            raise ValueError(f"the state must not end in .json: the profile lies there. Got {state}. Try .npz.")
        self.model: Backend = load_backend("torch", checkpoint)
        self.processor = load_processor(checkpoint)
        self._file = state.with_suffix(".measured.json")
        self._measured: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}
        first, first_held_out = evaluate.CALIBRATION_SEEDS, evaluate.HELD_OUT_SEEDS
        puzzles = evaluate.make_mixed_puzzles(n_prompts, first)
        prompts = [evaluate.to_inputs(self.processor, [puzzle]) for puzzle in puzzles]
        if not made.exists():
            others = evaluate.make_mixed_puzzles(n_held_out, first_held_out, HELD_OUT_IMAGES)
            self.model.calibrate(
                prompts,
                dataset=f"synthetic puzzles {first}..{first + n_prompts - 1}, "
                f"held out {first_held_out}..{first_held_out + n_held_out - 1}",
                template=TEMPLATE,
                budget=Budget(evaluate.BUDGET),
                held_out=[evaluate.to_inputs(self.processor, [puzzle]) for puzzle in others],
                state=state,
            ).save(made)
        self.profile = Profile.load(made)
        self.profile.require(self.model.facts.fingerprint)
        self.statistics = Statistics.load(state)
        ids = [prompt_digest({name: x.numpy() for name, x in prompt.items()}) for prompt in prompts]
        self._puzzle_of = dict(zip(ids, puzzles, strict=True))
        n_before = self.profile.choice["held_out_prompts"]
        if set(ids) != set(self.statistics.prompt_ids) or n_before != n_held_out:
            raise ValueError(
                f"{state} must be of {n_prompts} prompts, and {made} of {n_held_out} held-out ones. Got "
                f"{len(self.statistics)} and {n_before}. Ask for as many, or name another --state."
            )
        digest = self.model.facts.fingerprint.digest
        if self._measured.setdefault("model", digest) != digest:
            raise ValueError(f"{self._file} must be of this model. Got another one's. Name another --state.")

    def subset(self, ids: Sequence[str]) -> Summary:
        """The statistics of some of the prompts."""
        with_ids = Statistics(
            self.statistics.n_layers,
            self.statistics.n_heads,
            origin=self.statistics.origin,
            rankings=self.statistics.rankings,
        )
        for i, prompt_id in enumerate(ids):  # one drawn twice counts twice
            with_ids.add(f"{prompt_id}-{i}", self.statistics[prompt_id])
        return with_ids.summarize()

    def chosen(self, wanted: Callable[[Puzzle], bool]) -> list[str]:
        """The calibration prompts whose puzzles are wanted."""
        return [i for i in self.statistics.prompt_ids if wanted(self._puzzle_of[i])]

    def ask(self, puzzles: list[Puzzle], side: int | None = None) -> Asked:
        """Asks questions densely; `side` pixels of a picture instead of the processor's own size."""
        size = self.processor.image_processor.size
        if side is not None:
            self.processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
        batches = [evaluate.to_inputs(self.processor, puzzles[i : i + BATCH]) for i in range(0, len(puzzles), BATCH)]
        self.processor.image_processor.size = size
        words = [puzzle.question.answer for puzzle in puzzles]
        expected = np.array(self.processor.tokenizer.convert_tokens_to_ids(words))
        layouts = self.model.facts.layouts(batches[0])
        return Asked(puzzles, HeldOut(self.model, self.profile, batches), expected, layouts)

    def measure(
        self, name: str, asked: Asked, categories: np.ndarray, template: SinkTemplate = TEMPLATE
    ) -> dict[str, Any]:
        """The figures of one choice on the questions called `name`, measured now unless they are known."""
        key = f"{name} {len(asked.puzzles)} {'/'.join(heads_of(categories))}"
        if template != TEMPLATE:
            key += f" {template}"
        if key not in self._measured:
            sparse = asked.held.log_probs(categories, template)
            counts = [
                [count_model_pairs(x, c, template, windows=self.model.facts.windows) for x in asked.layouts]
                for c in (categories, np.zeros_like(categories))
            ]
            inter, total = ([sum(getattr(p, k) for p in some) for some in counts] for k in ("inter", "total"))
            self._measured[key] = {
                "kept": total[0] / total[1],
                "inter_kept": inter[0] / inter[1],
                "dense_heads": int((categories == Category.DENSE).sum()),
            } | effect(asked.held.dense, sparse, asked.expected)
            write_atomically(self._file, json.dumps(self._measured).encode())
        return dict(self._measured[key])
