"""`blindsight eval`: the same questions, answered dense and sparse in one run."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blindsight_cli.backends import Backend, BackendName, load_backend
from blindsight_cli.commands.calibrate import INTERRUPTED
from blindsight_cli.errors import ExitCode
from blindsight_cli.evaluation.items import Item, file_digest, read_items
from blindsight_cli.evaluation.overlap import check_overlap
from blindsight_cli.evaluation.result import FORMAT, VERSION, check_unused, print_summary, summarize
from blindsight_cli.evaluation.runner import Asking, evaluate
from blindsight_cli.evaluation.samples import SampleFile
from blindsight_cli.folders import check_family, named_or_found, require_writable, write_json
from blindsight_cli.loading import load_processor
from blindsight_cli.output import note, print_json
from blindsight_cli.timing import describe_cpu
from shared_profiles.profile import Profile
from shared_profiles.provenance import DISTRIBUTION, installed


def run_eval(
    *,
    checkpoint: Path,
    data: Path,
    profile: Path | None,
    calibration: Path | None,
    out: Path,
    limit: int | None,
    asking: Asking,
    backend: BackendName,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> int:
    """Evaluates; goes on from the per-sample file of the same run, if there is one.

    Args:
        checkpoint: a checkpoint folder.
        data: JSONL file of questions with answers.
        profile: the profile to judge; default: the one that the library finds.
        calibration: the file that the profile was made from, to compare with.
        out: where the result goes; the samples go beside it.
        limit: how many items to take.
        asking: how they are asked.
        backend, dtype, device: how the model is loaded.
        as_json: print the result instead of a table.

    Returns:
        The exit code; `CHECK_FAILED` where the result is marked as saying nothing.

    Raises:
        ValueError, OSError: a file or an option is wrong, there is no profile, or items were calibrated on.
        IncompatibleError, ProfileError: model, profile and versions do not go together.
    """
    check_family(checkpoint)
    require_writable("--out", out, {"ITEMS": data, "--profile": profile})
    items = read_items(data, limit)
    given = None if profile is None else Profile.load(profile)
    model = load_backend(backend, checkpoint, dtype=dtype, device=device)
    processor = load_processor(checkpoint)
    judged, path = _profile(model, checkpoint, given, profile)
    run = _identity(model, items, data, judged, calibration, asking, backend, dtype)
    check_unused(out, run)
    overlap = check_overlap(items, data, calibration, judged, processor)
    if not overlap.checked:
        note(f"whether items were calibrated on was not checked: {overlap.told}", style="yellow")
    with SampleFile(out.with_suffix(".samples.jsonl"), run) as file:
        if file.samples:
            note(f"going on from {file.path}: {len(file.samples)} of {len(items)} items are there")
        try:
            evaluate(model, processor, items, data, judged, asking, overlap, file)
        except KeyboardInterrupt:
            note(f"interrupted: {len(file.samples)} items are in {file.path}; the same command goes on from there")
            return INTERRUPTED
        samples = [file.samples[item.prompt.line] for item in items]
    figures = summarize(samples)
    document = {
        "format": FORMAT,
        "version": VERSION,
        **figures,
        "overlap": {"checked": overlap.checked, "told": overlap.told},
        "run": run,
        "provenance": _provenance(model, checkpoint, data, judged, path),
        "samples": file.path.name,
    }
    write_json(out, document)
    if as_json:
        print_json(document)
    else:
        print_summary(figures)
    if repeated := figures["n_repeated"]:
        note(f"{repeated} of {len(items)} items repeat others: the interval is too narrow", style="yellow")
    for mark in figures["marks"]:
        note(mark, style="red")
    note(f"saved {out} and {file.path}")
    return ExitCode.CHECK_FAILED if figures["marks"] else ExitCode.OK


def _profile(model: Backend, checkpoint: Path, given: Profile | None, path: Path | None) -> tuple[Profile, Path | None]:
    """The profile to judge, and its file."""
    judged, file = named_or_found(given, path, model.facts.fingerprint, checkpoint)
    if judged is None:
        raise ValueError(
            f"eval needs a profile of this model. Found none. Run `blindsight calibrate {checkpoint} DATA`, or name "
            "one with --profile."
        )
    return judged, file


def _identity(
    model: Backend,
    items: Sequence[Item],
    data: Path,
    profile: Profile,
    calibration: Path | None,
    asking: Asking,
    backend: BackendName,
    dtype: str,
) -> dict[str, Any]:
    """What samples of one run have in common, as JSON values."""
    files = {file for item in items for file in (*item.prompt.images, *item.prompt.videos)}
    digests = {file: file_digest(file) for file in files}

    def named(files: Sequence[Path]) -> list[list[str]]:
        return [[os.path.relpath(file, data.parent), digests[file]] for file in files]

    asked = [
        [
            item.prompt.line,
            item.question(asking.letters),
            item.expected,
            named(item.prompt.images),
            named(item.prompt.videos),
            item.prompt.fps,
        ]
        for item in items
    ]
    return {
        "items": _sha256(json.dumps(asked).encode()),
        "n_items": len(items),
        "fingerprint": asdict(model.facts.fingerprint),
        "profile": _sha256(profile.to_json().encode()),
        "calibration": None if calibration is None else _sha256(calibration.read_bytes()),
        "backend": backend,
        "dtype": dtype,
        "device": model.device,
        **asdict(asking),
        "versions": {name: installed(name) for name in (DISTRIBUTION, backend, "transformers", "numpy")},
    }


def _provenance(model: Backend, checkpoint: Path, data: Path, profile: Profile, path: Path | None) -> dict[str, Any]:
    """Where the figures come from, beyond what tells runs apart."""
    source = profile.provenance
    return {
        "checkpoint": str(checkpoint.resolve()),
        "data": str(data.resolve()),
        "dense": "the checkpoint, all heads dense",
        "sparse": {
            "profile": None if path is None else str(path.resolve()),
            "choice": profile.choice,
            "calibration": None if source is None else asdict(source),
        },
        "framework": model.version,
        "hardware": model.hardware,
        "cores": describe_cpu()[1],
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
