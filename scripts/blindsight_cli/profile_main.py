"""The `blindsight profile` commands: what can be typed, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blindsight_cli.errors import guarded
from blindsight_cli.options import (
    AlphaFirst,
    AlphaLast,
    Backend,
    Device,
    GammaDense,
    GammaIntra,
    GammaSink,
    Json,
    ProfileFile,
    Quantile,
    Ranking,
    TensorParallel,
    ThresholdsOption,
    typed_thresholds,
)

app = typer.Typer(help="Show, validate, compare and retune profiles.", no_args_is_help=True)


@app.command()
@guarded
def show(file: ProfileFile, as_json: Json = False) -> int:
    """Show model, choice, categories and statistics of a profile."""
    from blindsight_cli.commands.profile import show as run_show

    return run_show(file, as_json=as_json)


@app.command()
@guarded
def validate(
    file: ProfileFile,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder that it must belong to."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check that a profile is whole and, with --model, that it belongs to that model."""
    from blindsight_cli.commands.profile import validate as run_validate

    return run_validate(file, model, as_json=as_json)


@app.command()
@guarded
def diff(before: ProfileFile, after: ProfileFile, as_json: Json = False) -> int:
    """List how two profiles differ; exit code 1 if they do."""
    from blindsight_cli.commands.profile import compare

    return compare(before, after, as_json=as_json)


@app.command()
@guarded
def retune(
    file: ProfileFile,
    budget: Annotated[
        float | None,
        typer.Option(help="Allowed KL divergence of the next token, in nats, for any number of images."),
    ] = None,
    thresholds: ThresholdsOption = False,
    gamma_sink: GammaSink = None,
    gamma_intra: GammaIntra = None,
    gamma_dense: GammaDense = None,
    alpha_first: AlphaFirst = None,
    alpha_last: AlphaLast = None,
    quantile: Quantile = None,
    verify: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="CHECKPOINT PROMPTS",
            help="Measure on these prompts, not those it was made from; points measured on others leave its curve.",
        ),
    ] = None,
    ranking: Annotated[
        Ranking | None,
        typer.Option(
            help="What orders the heads; with --budget and --verify.",
            show_default="what ordered them before, else the best there is",
        ),
    ] = None,
    tensor_parallel: TensorParallel = None,
    out: Annotated[Path | None, typer.Option(help="The new profile.", show_default="in place of the old one")] = None,
    backend: Backend = "torch",
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Choose categories again, by another budget or thresholds, with no new calibration."""
    gammas = typed_thresholds(thresholds, gamma_sink, gamma_intra, gamma_dense, alpha_first, alpha_last, quantile)
    how = gammas if budget is None else budget
    if how is None or (gammas is not None and budget is not None):
        raise typer.BadParameter("choose by --budget or by thresholds: give one of them.")
    from blindsight_cli.commands.retune import run_retune

    return run_retune(
        path=file,
        how=how,
        ranking=ranking,
        tensor_parallel=tensor_parallel,
        verify_with=verify,
        out=out,
        backend=backend,
        device=device,
        as_json=as_json,
    )
