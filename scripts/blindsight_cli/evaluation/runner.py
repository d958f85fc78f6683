"""Asking every item dense and sparse, in turns, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blindsight_cli.backends import Answer, Backend, Prompt
from blindsight_cli.evaluation.items import Item, about, digest
from blindsight_cli.evaluation.overlap import Overlap
from blindsight_cli.evaluation.samples import Arm, Sample, SampleFile
from blindsight_cli.prompt_file import as_inputs, open_images
from shared_profiles import Layout
from shared_profiles.measured import divergence_of_one
from shared_profiles.profile import Profile


@dataclass(frozen=True)
class Asking:
    """How items are asked.

    Attributes:
        letters: append the options with their letters, and ask for a letter.
        max_new_tokens: length limit of an answer.
        timed: of how many items, spread over the file, prefills are timed as well.
    """

    letters: bool
    max_new_tokens: int
    timed: int


def evaluate(
    model: Backend,
    processor: Any,
    items: Sequence[Item],
    data: Path,
    profile: Profile,
    asking: Asking,
    overlap: Overlap,
    file: SampleFile,
) -> None:
    """Asks the items that the per-sample file does not hold yet, and writes each there.

    Args:
        model: the checkpoint, in a framework.
        processor: its processor.
        items: the items, of the file `data`.
        data: for messages.
        profile: of the sparse arm.
        asking: how.
        overlap: knows the pictures that were calibrated on.
        file: where the samples go.

    Raises:
        ValueError: a file cannot be read, a prompt does not suit the model, or it gives no probabilities; the
            message names the line.
    """
    timed = set(np.linspace(0, len(items) - 1, min(asking.timed, len(items))).round().astype(int).tolist())
    session = _Session(model, processor, profile, asking, overlap)
    todo = [(i, item) for i, item in enumerate(items) if item.prompt.line not in file.samples]
    for i, item in tqdm(todo, desc="evaluating", unit="item", disable=None):
        try:
            file.add(session.sample(item, data, sparse_first=i % 2 == 1, timed=i in timed))
        except ValueError as error:
            where = f"{data}, line {item.prompt.line}: "
            raise ValueError(where + str(error).removeprefix(where)) from error


class _Session:
    """A model with everything that stays the same from item to item."""

    def __init__(self, model: Backend, processor: Any, profile: Profile, asking: Asking, overlap: Overlap) -> None:
        self.model, self.processor, self.profile = model, processor, profile
        self.asking, self.overlap = asking, overlap

    def sample(self, item: Item, data: Path, *, sparse_first: bool, timed: bool) -> Sample:
        """One item, answered by both arms in the given order."""
        images = open_images(item.prompt, data)
        question = item.question(self.asking.letters)
        inputs = as_inputs(item.prompt, data, images, question, self.processor, self.model.device)
        (layout,) = self.model.facts.layouts(inputs)
        order = [self.profile, None] if sparse_first else [None, self.profile]
        answers = {p is None: self.model.answer(inputs, p, self.asking.max_new_tokens) for p in order}
        dense, sparse = answers[True], answers[False]
        parts = about(item.prompt, images)
        return Sample(
            line=item.prompt.line,
            digest=digest(item.prompt, parts),
            expected=item.expected,
            n_tokens=layout.n_tokens,
            n_images=layout.n_images,
            dense=self._arm(item, dense, layout, None),
            sparse=self._arm(item, sparse, layout, self.profile if sparse.ran == "sparse" else None),
            kl=divergence_of_one(dense.log_probs, sparse.log_probs),
            n_seen=self.overlap.n_seen(parts),
            seconds=self._seconds(inputs, order) if timed else (),
        )

    def _arm(self, item: Item, answer: Answer, layout: Layout, profile: Profile | None) -> Arm:
        text = self.processor.batch_decode([answer.ids], skip_special_tokens=True)[0].strip()
        verdict = item.verdict(text)
        pairs = self.model.facts.pairs(layout, profile)
        return Arm(text, verdict, int(verdict == item.expected), answer.ran, pairs.total, pairs.inter)

    def _seconds(self, inputs: Prompt, order: Sequence[Profile | None]) -> tuple[float, float]:
        """Seconds of a dense and of a sparse prefill, both just used, in the given order."""
        seconds = {p is None: self.model.prefill_seconds(inputs, p) for p in order}
        return seconds[True], seconds[False]
