"""`blindsight profile retune`: other categories from a profile's own statistics, with no new calibration.

a budget                   the cheapest measured point of the stored curve within it
a budget, prompts          the whole search again, measured on these prompts
thresholds                 what they give
thresholds, prompts        and what it costs, measured on these prompts

A curve is of one set of prompts: points that were measured on others give way to the new ones.
"""

from __future__ import annotations

from pathlib import Path

from blindsight_cli.backends import BackendName, load_backend
from blindsight_cli.commands.calibrate import spared, tell_choice
from blindsight_cli.commands.profile import category_table, print_curve
from blindsight_cli.errors import ExitCode
from blindsight_cli.folders import require_writable
from blindsight_cli.held_out import HeldOut
from blindsight_cli.loading import load_processor
from blindsight_cli.output import note, print_json, results
from blindsight_cli.prompt_file import PromptLoader, read_prompts
from shared_profiles.budget import Budget, chosen_point, processes_of, retune, retune_by_thresholds, tune, verify
from shared_profiles.classifier import Thresholds, check_quantile
from shared_profiles.path import check_split
from shared_profiles.profile import Profile


def run_retune(
    *,
    path: Path,
    how: float | Thresholds,
    ranking: str | None,
    tensor_parallel: int | None,
    verify_with: tuple[Path, Path] | None,
    out: Path | None,
    backend: BackendName,
    device: str | None,
    as_json: bool,
) -> int:
    """Retunes a profile and saves it.

    Args:
        path: the profile.
        how: a budget in nats, or thresholds.
        ranking: what orders the heads of a new search; default: what ordered them before, else the best there is.
        tensor_parallel: over how many processes a new search splits the heads; default: as before.
        verify_with: a checkpoint folder and a JSONL file of prompts that the profile was not made from.
        out: where the new profile goes; default: in place of the old one.
        backend, device: how the checkpoint is loaded.
        as_json: print a JSON document instead of tables.

    Returns:
        The exit code.

    Raises:
        ValueError, OSError: the profile has no such statistics or points, or the prompts cannot be used.
    """
    profile = Profile.load(path)
    out = out or path
    others = {} if verify_with is None else {"PROMPTS": verify_with[1]}
    require_writable("--out", out, others, kind="profile")
    if isinstance(how, Thresholds):
        check_quantile(how, "--quantile")
    else:
        Budget(how)  # refuses what is none, before the model is loaded
        check_split(profile.fingerprint.n_heads, tensor_parallel or 1)
    if (ranking or tensor_parallel) and (verify_with is None or not isinstance(how, float)):
        raise ValueError(
            "--ranking and --tensor-parallel order the heads of a new search: give --budget and --verify CHECKPOINT "
            "PROMPTS."
        )
    if verify_with is None:
        new = _stored(profile, how)
    else:
        new = _measured(profile, how, ranking, tensor_parallel, *verify_with, backend, device)
        out = spared(out, new)
    new.save(out)
    _tell(new, out, as_json=as_json)
    return ExitCode.OK


def _stored(profile: Profile, how: float | Thresholds) -> Profile:
    """The profile retuned by what it holds."""
    if isinstance(how, Thresholds):
        return retune_by_thresholds(profile, how)
    new = retune(profile, how)
    if not new.choice["reached"] and profile.categories.any():
        least = min(point.kl for point in profile.curve if point.kept < 1)
        raise ValueError(
            f"the curve must have a point within the budget of {how:g} nats at which some head is sparse. Its cheapest "
            f"costs {least:.2g} nats. Allow more, or measure others: --verify CHECKPOINT PROMPTS."
        )
    return new


def _measured(
    profile: Profile,
    how: float | Thresholds,
    ranking: str | None,
    tensor_parallel: int | None,
    checkpoint: Path,
    data: Path,
    backend: BackendName,
    device: str | None,
) -> Profile:
    """The profile retuned, and measured on the prompts of a file."""
    prompts = read_prompts(data)
    model = load_backend(backend, checkpoint, device=device)
    profile.require(model.facts.fingerprint)
    held = HeldOut(model, profile, PromptLoader(prompts, data, load_processor(checkpoint), model.device))
    if profile.provenance is not None and profile.provenance.dataset_hash == held.digest:
        raise ValueError(f"{data}: a profile must be verified on other prompts than it was made from. Name another.")
    if isinstance(how, Thresholds):
        return verify(retune_by_thresholds(profile, how), held, held_out=held.digest)
    budget = Budget(how, ranking or _ranking(profile), tensor_parallel or processes_of(profile))
    return tune(profile, budget, held, held_out=held.digest)


def _ranking(profile: Profile) -> str:
    """What ordered a profile's heads, else the best that its statistics have."""
    harm = {} if profile.summary is None else profile.summary.harm
    best = next((name for name in ("gradient", "residual") if name in harm), "error")
    return str(profile.choice.get("ranking", best))


def _tell(profile: Profile, out: Path, *, as_json: bool) -> None:
    """Says what was chosen, and which measured point stands behind it."""
    point = chosen_point(profile)
    if as_json:
        print_json(
            {
                "profile": str(out),
                "counts": {category.name: n for category, n in profile.counts().items()},
                "choice": profile.choice,
                "point": None if point is None else {k: v for k, v in vars(point).items() if k != "heads"},
            }
        )
        return
    console = results()
    console.print(category_table(profile))
    print_curve(console, profile)
    console.print(f"saved {out}", markup=False, soft_wrap=True)
    tell_choice(profile)
    if point is None:
        note("no measured point has these categories: measure them with --verify CHECKPOINT PROMPTS")
