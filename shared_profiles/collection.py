"""Measuring a data set, the same in every framework: interrupted, resumed, or dealt out to several processes.

prompts ──► known already? ──► held out? ──► my turn? ──► measure ──► Statistics ──► state file

A sink template can be learned first, from the first few prompts that are calibrated on: these are then read twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np

from shared_profiles.processes import ALONE, Processes
from shared_profiles.profile_parts import Fingerprint
from shared_profiles.provenance import prompt_digest
from shared_profiles.sink_statistics import LEARN_FROM, SinkMass, learn_template
from shared_profiles.split import Split
from shared_profiles.state_files import StateFiles
from shared_profiles.statistics import PromptStatistics, Statistics
from shared_profiles.template import SinkTemplate


class Collector[P]:
    """Collects the statistics of prompts, with those that state files hold already.

    Args:
        prompts: a framework's prompts, one at a time; the same in the same order for every process.
        arrays: gives a prompt in NumPy, by whose content it is recognized; refuses what is no prompt.
        fingerprint: the model.
        rankings: which harm is measured.
        state: file in which the statistics are kept, written every `save_every` prompts and on interruption; see
            `StateFiles` for what several processes write.
        merge: states of other machines, whose statistics count, too.
        save_every: how often.
        split: takes the held-out prompts, which are not measured here; default: none are held out.
        processes: those that share the work.

    Raises:
        ValueError: a state is damaged, or holds a prompt that is now held out.
        OSError: a state cannot be read.

    What is wrong with a prompt is told with its number among the prompts, from 0, and its digest.
    """

    def __init__(
        self,
        prompts: Iterable[P],
        arrays: Callable[[P], Mapping[str, np.ndarray]],
        fingerprint: Fingerprint,
        *,
        rankings: Collection[str] = (),
        state: str | Path | None = None,
        merge: Iterable[str | Path] = (),
        save_every: int = 8,
        split: Split[P] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._fingerprint, self._rankings, self._save_every = fingerprint, rankings, save_every
        self._split, self._processes = split, processes
        self._files = StateFiles(state, merge, processes)
        if split is not None:
            self._files.require_none(split.claims)
        # A prompt that was found to show nothing is None.
        self._stream: Iterator[tuple[str, P | None]] = self._read(prompts, arrays)
        self._names: dict[str, str] = {}
        self._sinks: dict[str, SinkMass] = {}

    def _read(self, prompts: Iterable[P], arrays: Callable[[P], Mapping[str, np.ndarray]]) -> Iterator[tuple[str, P]]:
        for number, prompt in enumerate(prompts):
            with of_prompt(f"prompt {number}"):
                prompt_id = prompt_digest(arrays(prompt))
            self._names.setdefault(prompt_id, f"prompt {number} ({prompt_id})")
            yield prompt_id, prompt

    def learn(self, measure: Callable[[P], SinkMass | None], local_block: int | None) -> SinkTemplate:
        """The sink template of the statistics in the state files; where there are none yet, a learned one.

        It is what the first `LEARN_FROM` prompts lead to, held-out ones excepted. One process measures for all. Call it
        before `collect`.

        Args:
            measure: gives what a prompt's image rows look at, None if it has fewer than two images.
            local_block: see `SinkTemplate`; None for that of the stored template, or the default.
        """
        if (stored := self._files.template) is not None:
            return stored if local_block is None else replace(stored, local_block=local_block)
        if local_block is None:
            local_block = SinkTemplate.local_block
        if self._processes.rank == 0:
            self._read_sinks(measure)
        self._sinks = self._processes.gather(self._sinks)[0]
        if not self._sinks:
            return SinkTemplate(local_block=local_block)  # `collect` will say that there is no prompt
        return learn_template(SinkMass.mean(self._sinks[prompt_id] for prompt_id in sorted(self._sinks)), local_block)

    def _read_sinks(self, measure: Callable[[P], SinkMass | None]) -> None:
        read: list[tuple[str, P | None]] = []
        for prompt_id, prompt in self._stream:
            assert prompt is not None
            read.append((prompt_id, prompt))
            if self._holds_out(prompt_id, prompt):
                assert self._split is not None
                read[-1] = prompt_id, self._split.prompts[prompt_id]  # which may lie elsewhere than on the GPU
                continue
            if prompt_id in self._sinks:
                continue
            with of_prompt(self._names[prompt_id]):
                mass = measure(prompt)
            if mass is None:
                read[-1] = prompt_id, None  # keeps no pictures
                continue
            self._sinks[prompt_id] = mass
            if len(self._sinks) == LEARN_FROM:
                break
        self._stream = itertools.chain(read, self._stream)

    def _holds_out(self, prompt_id: str, prompt: P) -> bool:
        if self._split is None:
            return False
        with of_prompt(self._names[prompt_id]):
            return self._split.holds_out(prompt_id, prompt)

    def collect(self, measure: Callable[[P], PromptStatistics | None], template: SinkTemplate) -> Statistics:
        """Measures what is not known yet, and ends with the statistics of all, the same in every process.

        Args:
            measure: gives a prompt's record, None if it has fewer than two images.
            template: what it is measured with.

        Raises:
            ValueError: no prompt shows anything; a state is of another model, template or rankings; a prompt is among
                the given held-out ones; or processes were given different prompts.
            OSError: the state cannot be written.
        """
        statistics = self._files.begin(self._fingerprint, template, self._rankings)
        for prompt_id, mass in self._sinks.items():
            statistics.add_sinks(prompt_id, mass)
        met = set(statistics.prompt_ids)
        given = hashlib.sha256(self._split.rule.encode() if self._split is not None else b"")
        unsaved = skipped = held_out = turn = 0
        try:
            for prompt_id, prompt in self._stream:
                given.update(prompt_id.encode())
                if prompt is not None and self._holds_out(prompt_id, prompt):
                    held_out += 1
                    continue
                if prompt_id in met:
                    continue
                met.add(prompt_id)
                turn += 1
                if not self._processes.is_mine(turn - 1):
                    continue
                with of_prompt(self._names[prompt_id]):
                    record = None if prompt is None else measure(prompt)
                    if record is not None:
                        statistics.add(prompt_id, record)
                if record is None:
                    skipped += 1
                    continue
                unsaved += 1
                if unsaved >= self._save_every:
                    self._files.save(statistics)
                    unsaved = 0
        finally:
            if unsaved:
                self._files.save(statistics)
        parts, skips, kinds = zip(*self._processes.gather((statistics, skipped, given.hexdigest())), strict=True)
        if len(set(kinds)) > 1:
            raise ValueError(
                "every process must be given the same prompts in the same order, and the same held-out ones. "
                f"Got {len(set(kinds))} kinds of them in {self._processes.n} processes. Give all of them all prompts: "
                "the work is dealt out here."
            )
        whole = reduce(Statistics.merge, parts)
        if not len(whole):
            raise ValueError(
                f"calibration needs prompts with at least two images. Got none ({sum(skips)} prompts with fewer"
                f"{f', {held_out} held out' if held_out else ''}). Pass multi-image prompts like those you serve."
            )
        self._files.finish(whole)
        return whole


@contextmanager
def of_prompt(name: str) -> Iterator[None]:
    """In this context a ValueError names the prompt that it is about; a note to any other error does."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:
        error.add_note(f"in {name}")
        raise


def check_dataset(name: str) -> None:
    """Refuses, before all is measured, a name that no provenance can have.

    Raises:
        ValueError: it is no text, or empty.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"dataset must be the data's name, a string that is not empty. Got {name!r}.")


def check_local_block(template: SinkTemplate | None, local_block: int | None) -> None:
    """Refuses a width of local blocks beside a template, which has its own, or one that no template can have.

    Raises:
        ValueError: it is.
    """
    if local_block is not None:
        if template is not None:
            raise ValueError("local_block must be left out where a template is given, which has its own. Got both.")
        SinkTemplate(local_block=local_block)
