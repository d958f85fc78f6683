"""`blindsight calibrate`: measures a checkpoint on prompts and writes its profile."""

from __future__ import annotations

import time
from pathlib import Path

from blindsight_cli.backends import BackendName, load_backend
from blindsight_cli.commands.profile import category_table
from blindsight_cli.errors import ExitCode
from blindsight_cli.folders import require_writable
from blindsight_cli.loading import check_family, load_processor
from blindsight_cli.output import note, print_json, results
from blindsight_cli.prompt_file import PromptLoader, read_prompts
from shared_profiles import SinkTemplate
from shared_profiles.budget import Budget, chosen_point
from shared_profiles.classifier import Thresholds
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile
from shared_profiles.summary import LEVELS

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it."""


def run_calibrate(
    *,
    checkpoint: Path,
    data: Path,
    out: Path | None,
    state: Path | None,
    limit: int | None,
    how: Budget | Thresholds,
    held_out: float,
    template: SinkTemplate,
    backend: BackendName,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> int:
    """Calibrates; whatever can be wrong with the arguments is said before the first prompt is measured.

    Args:
        checkpoint: a checkpoint folder.
        data: JSONL file of prompts.
        out: where the profile goes; default: beside the checkpoint, where `patch` looks first.
        state: file of the statistics, to go on after an interruption.
        limit: how many prompts to take.
        how: a budget or thresholds, by which categories are chosen.
        held_out: share of the prompts that a budget is measured on.
        template: sinks and local blocks.
        backend, dtype, device: how the model is loaded.
        as_json: print a JSON document instead of a table.

    Returns:
        The exit code.

    Raises:
        ValueError, OSError: see `load_backend`, `read_prompts` and the `calibrate` of either library.
    """
    check_quantile(how)
    check_family(checkpoint)
    out = out or checkpoint / FILE_NAME
    for name, file in (("--out", out), ("--state", state)):
        if file is not None:
            require_writable(name, file)
    prompts = read_prompts(data, limit)
    telling = [prompt for prompt in prompts if len(prompt.images) >= 2]
    if not telling:
        raise ValueError(
            f"{data}: calibration needs prompts with at least two images. Got {len(prompts)} with fewer. "
            "Take multi-image prompts like those you serve."
        )
    if skipped := len(prompts) - len(telling):
        note(f"{skipped} of {len(prompts)} prompts have fewer than two images and are skipped: they show nothing")
    model = load_backend(backend, checkpoint, dtype=dtype, device=device)
    processor = load_processor(checkpoint)
    begun = time.perf_counter()
    try:
        profile = model.calibrate(
            PromptLoader(telling, data, processor, model.device),
            dataset=data.name,
            template=template,
            budget=how if isinstance(how, Budget) else None,
            thresholds=how if isinstance(how, Thresholds) else None,
            held_out=held_out,
            state=state,
        )
    except KeyboardInterrupt:
        kept = f"what was measured is in {state}; the same command goes on from there" if state else "nothing was kept"
        note(f"interrupted: {kept}")
        return INTERRUPTED
    seconds = time.perf_counter() - begun
    replaced = out.exists()
    profile.save(out)
    _tell(profile, checkpoint, out, replaced, skipped, seconds, as_json=as_json)
    return ExitCode.OK


def check_quantile(how: Budget | Thresholds) -> None:
    """Refuses a quantile that no statistics have."""
    if isinstance(how, Thresholds) and how.quantile not in LEVELS:
        raise ValueError(f"--quantile must be a multiple of 0.05 in [0, 1]. Got {how.quantile}.")


def tell_choice(profile: Profile) -> None:
    """Says what a budget bought, or that nothing could be had for it."""
    if profile.choice["method"] == "budget":
        if not profile.choice["reached"]:
            note(
                f"no head can be sparse for {profile.choice['budget']:g} nats: all are Dense, every prefill will run "
                "dense. Raise --budget."
            )
            return
        point = chosen_point(profile)
        assert point is not None
        note(
            f"measured on {point.n_prompts} held-out prompts: KL {point.kl:.2g} of the {profile.choice['budget']:g} "
            f"nats allowed, {point.agreement:.1%} of the next tokens the same, {point.kept:.1%} of the pairs kept"
        )
    elif not profile.categories.any():
        note("no head passed the thresholds: every prefill will run dense. Lower --gamma-dense, or --alpha-last.")


def _tell(
    profile: Profile, checkpoint: Path, out: Path, replaced: bool, skipped: int, seconds: float, *, as_json: bool
) -> None:
    """Says what was found, where it is, and how it is used."""
    provenance = profile.provenance
    assert provenance is not None
    if as_json:
        print_json(
            {
                "profile": str(out),
                "digest": profile.fingerprint.digest,
                "counts": {category.name: n for category, n in profile.counts().items()},
                "choice": profile.choice,
                "n_prompts": provenance.n_prompts,
                "n_skipped": skipped,
                "n_tokens": provenance.n_tokens,
                "dataset_hash": provenance.dataset_hash,
                "seconds": round(seconds, 3),
            }
        )
        return
    console = results()
    console.print(category_table(profile))
    console.print()
    measured = f"{provenance.n_prompts} prompts, {provenance.n_tokens:,} tokens"
    console.print(f"measured {measured} in {seconds:.1f} s", markup=False)
    console.print(f"{'replaced' if replaced else 'saved'} {out}", markup=False, soft_wrap=True)
    tell_choice(profile)
    if not profile.categories.any():
        return
    if out == checkpoint / FILE_NAME:
        note("patch() and `blindsight run` find it there by themselves")
    else:
        note(f"use it with `blindsight run --profile {out}` or patch(model, {str(out)!r})")
