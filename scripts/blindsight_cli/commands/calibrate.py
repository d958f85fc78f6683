"""`blindsight calibrate`: measures a checkpoint on prompts and writes its profile.

    torchrun --nproc-per-node 8 -m blindsight_cli.main calibrate CHECKPOINT PROMPTS --state FILE

deals the prompts out; the first process writes the profile and does the talking.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from blindsight_cli.backends import BackendName, load_backend
from blindsight_cli.commands.profile import category_table
from blindsight_cli.errors import ExitCode
from blindsight_cli.evaluation.statistics import least_agreement
from blindsight_cli.folders import check_family, require_writable
from blindsight_cli.launched import launched
from blindsight_cli.loading import load_processor
from blindsight_cli.output import note, print_json, results, span
from blindsight_cli.prompt_file import PromptLoader, read_prompts
from shared_profiles import SinkTemplate
from shared_profiles.budget import Budget, chosen_point
from shared_profiles.classifier import Thresholds, check_quantile
from shared_profiles.collection import check_local_block
from shared_profiles.lookup import FILE_NAME, cache_path
from shared_profiles.profile import Profile
from shared_profiles.state_files import state_files

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it."""

# A profile of which fewer prompts than this surely keep their next token comes with a warning.
_SURE = 0.95


def run_calibrate(
    *,
    checkpoint: Path,
    data: Path,
    out: Path | None,
    state: Path | None,
    merge: list[Path],
    limit: int | None,
    how: Budget | Thresholds,
    held_out: float,
    sinks: str | None,
    local_block: int | None,
    backend: BackendName,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> int:
    """Calibrates; whatever can be wrong with the arguments is said before the first prompt is measured.

    Args:
        checkpoint: a checkpoint folder.
        data: JSONL file of prompts.
        out: where the profile goes; default: beside the checkpoint, where `patch` looks first. One that makes all heads
            Dense replaces no other: it goes beside it, as `NAME.dense.json`.
        state: file of the statistics, to go on after an interruption.
        merge: such files of other machines, to be counted, too.
        limit: how many prompts to take.
        how: a budget or thresholds, by which categories are chosen.
        held_out: share of the prompts that a budget is measured on.
        sinks: offsets of the sinks, as typed; default: those of the states, else learned.
        local_block: width of local blocks; default: 128.
        backend, dtype, device: how the model is loaded.
        as_json: print a JSON document instead of a table.

    Returns:
        The exit code.

    Raises:
        ValueError, OSError: see `load_backend`, `read_prompts` and the `calibrate` of either library.
        OSError: the profile cannot be saved there; the message says where it is kept instead.
    """
    if isinstance(how, Thresholds):
        check_quantile(how, "--quantile")
    template = None if sinks is None else read_sinks(sinks, local_block)
    check_local_block(None, local_block)
    check_family(checkpoint)
    out = out or checkpoint / FILE_NAME
    _check_files(data, out, state, merge)
    prompts = read_prompts(data, limit)
    telling = [prompt for prompt in prompts if prompt.multi_image]
    if not telling:
        raise ValueError(
            f"{data}: calibration needs prompts with at least two images. Got {len(prompts)} with fewer. "
            "Take multi-image prompts like those you serve."
        )
    skipped = len(prompts) - len(telling)
    with launched(backend) as place:
        if skipped and place.is_first:
            note(f"{skipped} of {len(prompts)} prompts have fewer than two images and are skipped: they show nothing")
        model = load_backend(backend, checkpoint, dtype=dtype, device=device or place.device)
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
                local_block=local_block if template is None else None,
                state=state,
                merge=merge,
            )
        except KeyboardInterrupt:
            kept = state is not None and state_files(state)
            where = f"what was measured is in {state}; the same command goes on from there"
            note(f"interrupted: {where if kept else 'nothing was kept'}")
            return INTERRUPTED
        seconds = time.perf_counter() - begun
        if place.is_first:
            out = spared(out, profile)
            replaced = out.exists()
            save_or_keep(profile, out)
            _tell(profile, checkpoint, out, replaced, skipped, seconds, as_json=as_json)
    return ExitCode.OK


def save_or_keep(profile: Profile, out: Path) -> None:
    """Saves a profile that took long to make; where that fails, it is kept in the user's cache or a temporary folder.

    Raises:
        OSError: it is not at `out`; the message says why, and where it is.
    """
    try:
        profile.save(out)
        return
    except OSError as error:
        failed = error

    def in_cache() -> Path:
        path = cache_path(profile.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        return spared(path, profile)

    def in_temporary() -> Path:
        return Path(tempfile.mkdtemp(prefix="blindsight-")) / FILE_NAME

    reasons = [str(failed)]
    for place in (in_cache, in_temporary):
        try:
            profile.save(kept := place())
        except OSError as error:
            reasons.append(str(error))
        else:
            raise OSError(
                f"the profile could not be saved: {'; '.join(reasons)}. It is kept in {kept}: copy it from there."
            ) from failed
    raise OSError(
        f"the profile could be saved nowhere and is lost: {'; '.join(reasons)}. Make room and run the same command "
        "again; with --state it has nothing to measure anew."
    ) from failed


def spared(out: Path, profile: Profile) -> Path:
    """Where to save a profile: beside a file that is there, if it would make every head Dense."""
    if not out.exists() or profile.categories.any():
        return out
    beside = out.with_name(f"{out.stem}.dense{out.suffix}")
    note(f"{out} stays as it was: what was found now would make every head Dense, and is in {beside}")
    return beside


def read_sinks(text: str, local_block: int | None) -> SinkTemplate:
    """The template whose sinks were typed, as START:END.

    Raises:
        ValueError: it is no such text, or an offset cannot be.
    """
    if not re.fullmatch(r"(\d+(,\d+)*)?:(\d+(,\d+)*)?", text):
        raise ValueError(f"--sinks must be offsets from an image's start and end, such as 0,1:1,2. Got {text!r}.")
    from_start, from_end = (tuple(int(x) for x in re.findall(r"\d+", part)) for part in text.split(":"))
    return SinkTemplate(from_start, from_end, SinkTemplate.local_block if local_block is None else local_block)


def _check_files(data: Path, out: Path, state: Path | None, merge: list[Path]) -> None:
    """Refuses, before the work, files that could not be written after it or would overwrite one another."""
    read = {"PROMPTS": data, **{f"--merge {file}": file for file in merge}}
    require_writable("--out", out, {**read, "--state": state}, kind="profile")
    if state is not None:
        require_writable("--state", state, read)
    for file in merge:
        if not file.is_file():
            raise ValueError(f"--merge must name a state, as --state writes it. There is no {file}.")


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
        assert point.agreement is not None
        assert point.n_prompts is not None
        low = least_agreement(point.agreement, point.n_prompts)
        processes, busiest = profile.choice.get("processes"), profile.choice.get("busiest", 0.0)
        split = f" ({busiest:.1%} by the busiest of {processes} processes)" if processes else ""
        note(
            f"measured on {point.n_prompts} held-out prompts: KL {point.kl:.2g} of the {profile.choice['budget']:g} "
            f"nats allowed (worst with {span(point.n_images)} images), {point.kept:.1%} of the pairs kept{split}, "
            f"{point.agreement:.1%} of the next tokens the same (95% interval: at least {low:.1%})"
        )
        if low < _SURE:
            few = least_agreement(1.0, point.n_prompts) < _SURE  # even if none had changed
            doubt = "so few prompts hide what is rare: hold out more, or" if few else "these are many that changed:"
            note(f"{doubt} run `blindsight eval` before you rely on it")
    elif not profile.categories.any():
        note("no head passed the thresholds: every prefill will run dense. Lower --gamma-dense, or --alpha-last.")


def told_sinks(profile: Profile) -> str:
    """A line on the sinks: where they are, and, where they were learned, the mass that they receive."""
    template, learned = profile.template, profile.choice.get("sinks")

    def told(offsets: tuple[int, ...], received: list[float | None] | None) -> str:
        each = [str(offset) for offset in offsets]
        if received is not None:
            shares = ["" if mass is None else f" ({mass:.2%})" for mass in received]
            each = [f"{offset}{share}" for offset, share in zip(each, shares, strict=True)]
        return ", ".join(each) or "none"

    ends = ("from_start", "from_end")
    start, end = (told(getattr(template, name), learned and learned[name]) for name in ends)
    source = (
        f"learned from {learned['prompts']} prompts, with their share of what image rows look at"
        if learned
        else "not learned"
    )
    return f"sinks: {start} from an image's start, {end} from its end; {source}"


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
                "template": asdict(profile.template),
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
    console.print(told_sinks(profile), markup=False, soft_wrap=True)
    console.print(f"{'replaced' if replaced else 'saved'} {out}", markup=False, soft_wrap=True)
    tell_choice(profile)
    if not profile.categories.any():
        return
    if out == checkpoint / FILE_NAME:
        note("patch() and `blindsight run` find it there by themselves")
    else:
        note(f"use it with `blindsight run --profile {out}` or patch(model, {str(out)!r})")
