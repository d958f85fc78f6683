"""Measuring a data set, the same in every framework: a run can be interrupted, and goes on where it stopped.

prompts ──► known already? ──► measure ──► Statistics ──► state file
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from shared_profiles.profile_parts import Fingerprint
from shared_profiles.provenance import prompt_digest
from shared_profiles.split import Split
from shared_profiles.statistics import PromptStatistics, Statistics
from shared_profiles.template import SinkTemplate


def collect[P](
    prompts: Iterable[P],
    measure: Callable[[P], PromptStatistics | None],
    arrays: Callable[[P], Mapping[str, np.ndarray]],
    fingerprint: Fingerprint,
    template: SinkTemplate,
    *,
    state: str | Path | None = None,
    save_every: int = 8,
    rankings: Collection[str] = (),
    split: Split[P] | None = None,
) -> Statistics:
    """The statistics of prompts, with those that a state file holds already.

    Args:
        prompts: a framework's prompts, one at a time.
        measure: gives a prompt's record, None if it shows nothing.
        arrays: gives a prompt in NumPy, by whose content it is recognized; refuses what is no prompt.
        fingerprint: the model.
        template: what it is measured with.
        state: file in which the statistics are kept, written every `save_every` prompts and on interruption.
        save_every: how often.
        rankings: which harm `measure` gives.
        split: takes the held-out prompts, which are not measured here; default: none are held out.

    Raises:
        ValueError: no prompt shows anything; the state is damaged, of another model, template or rankings; or it holds
            a prompt that is now held out.
        OSError: the state cannot be written.
    """
    # What statistics were measured on: the model, and the template that decides what a category keeps.
    origin = f"{fingerprint.digest} {template.from_start} {template.from_end} {template.local_block}"
    statistics = Statistics(fingerprint.n_layers, fingerprint.n_heads, origin=origin, rankings=rankings)
    if state is not None and Path(state).exists():
        statistics = statistics.merge(Statistics.load(state))
    unsaved = skipped = held_out = 0
    try:
        for prompt in prompts:
            prompt_id = prompt_digest(arrays(prompt))
            known = prompt_id in statistics
            if split is not None and split.holds_out(prompt_id, prompt):
                if known:
                    raise ValueError(
                        f"held-out prompts must not be calibrated on. The state {state} has prompt {prompt_id}: it was "
                        "begun without this split. Begin another."
                    )
                held_out += 1
                continue
            if known:
                continue
            record = measure(prompt)
            if record is None:
                skipped += 1
                continue
            statistics.add(prompt_id, record)
            unsaved += 1
            if state is not None and unsaved >= save_every:
                statistics.save(state)
                unsaved = 0
    finally:
        if state is not None and unsaved:
            statistics.save(state)
    if not len(statistics):
        raise ValueError(
            f"calibration needs prompts with at least two images. Got none ({skipped} prompts with fewer"
            f"{f', {held_out} held out' if held_out else ''}). Pass multi-image prompts like those you serve."
        )
    return statistics
