"""From statistics to a profile that says where they came from: digests of prompts, library versions, time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from shared_profiles.classifier import Thresholds, classify
from shared_profiles.profile import Fingerprint, Profile, Provenance
from shared_profiles.sink_statistics import learned_from
from shared_profiles.statistics import Statistics
from shared_profiles.template import SinkTemplate

DISTRIBUTION = "blindsight-vlm"
"""What all packages of this project are installed as."""


def prompt_digest(inputs: Mapping[str, np.ndarray]) -> str:
    """A hash of what a processor returned for one prompt, whatever its order, memory layout and integer type.

    Raises:
        ValueError: an array holds Python objects, which have no bytes that are the same in another process.
    """
    digest = hashlib.sha256()
    for name in sorted(inputs):
        array = np.ascontiguousarray(inputs[name])
        if array.dtype.hasobject:
            raise ValueError(
                f"a prompt must hold numbers or texts, to be known again by them. Got Python objects in {name}. Leave "
                "it out, or make it an array of numbers."
            )
        if array.dtype.kind in "iu":
            array = array.astype(np.int64)
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def dataset_hash(prompt_ids: Iterable[str]) -> str:
    """The hash of a data set: of the digests of its prompts, whatever their order."""
    return "sha256:" + hashlib.sha256("\n".join(sorted(prompt_ids)).encode()).hexdigest()


def make_profile(
    statistics: Statistics,
    thresholds: Thresholds,
    template: SinkTemplate,
    fingerprint: Fingerprint,
    dataset: str,
    packages: Iterable[str],
) -> Profile:
    """The profile that thresholds choose from statistics measured with `template` on `dataset`, by these packages.

    Raises:
        ValueError: no prompt was measured, or the summary does not have the thresholds' quantile.
    """
    summary = statistics.summarize()
    choice = thresholds.to_choice()
    if statistics.sinks:
        choice["sinks"] = learned_from(statistics.sinks, template)
    return Profile(
        categories=classify(summary, thresholds),
        template=template,
        fingerprint=fingerprint,
        summary=summary,
        choice=choice,
        provenance=make_provenance(dataset, statistics, packages),
    )


def make_provenance(
    dataset: str, statistics: Statistics, packages: Iterable[str], held_out: Mapping[str, int] | None = None
) -> Provenance:
    """The provenance of a profile made now from these statistics; the data set's hash is that of its prompts.

    Args:
        dataset: its name.
        statistics: of the prompts that were calibrated on.
        packages: whose versions count.
        held_out: the prompts that a budget was measured on, with their numbers of tokens; part of the data set.
    """
    held_out = held_out or {}
    ids = {*statistics.prompt_ids, *held_out}
    return Provenance(
        dataset=dataset,
        dataset_hash=dataset_hash(ids),
        n_prompts=len(ids),
        n_tokens=statistics.n_tokens + sum(held_out.values()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: installed(name) for name in (DISTRIBUTION, *packages, "numpy")},
    )


def installed(package: str) -> str:
    """The installed version of a package; "source tree" for ourselves when run without installing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "source tree"
