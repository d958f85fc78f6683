"""The `blindsight` command: what can be typed, and nothing else; each command's work is a module of `commands`.

Heavy packages are imported inside the command that needs them, so that help and mistakes answer at once.
"""

from __future__ import annotations

import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:  # an install without extras brings this command, but not what it needs
    print(
        "error: this command needs typer, which is not installed. In BlindSight's source folder: pip install '.[cli]'",
        file=sys.stderr,
    )
    raise SystemExit(3) from None

from blindsight_cli.errors import guarded
from blindsight_cli.options import (
    AlphaFirst,
    AlphaLast,
    Backend,
    Benchmark,
    Checkpoint,
    Device,
    Dtype,
    Fps,
    GammaDense,
    GammaIntra,
    GammaSink,
    Images,
    Json,
    ProfileOption,
    Quantile,
    Ranking,
    TensorParallel,
    ThresholdsOption,
    Videos,
    typed_thresholds,
)
from blindsight_cli.output import never_fail_on_signs
from blindsight_cli.profile_main import app as profile_app

_EPILOG = (
    "Exit codes: 0 fine; 1 a check failed or a difference was found; 2 wrong input; 3 profile, model and versions do "
    "not go together. Everything runs locally: no hub is asked."
)

app = typer.Typer(
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected error keeps its plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(profile_app, name="profile")


def _version(asked: bool) -> None:
    if asked:
        from shared_profiles.provenance import DISTRIBUTION

        try:
            print(f"blindsight {version(DISTRIBUTION)}")
        except PackageNotFoundError:
            print("blindsight, run from its source tree")
        raise typer.Exit


@app.callback()
def _options(
    asked: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Sparse prefill for multi-image vision-language models: calibrate once, then answer faster."""


@app.command()
@guarded
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder.", show_default="the shipped model"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The report.")] = Path("report.html"),
    questions: Annotated[int, typer.Option(help="Questions per number of images.", min=1)] = 200,
    calibration_prompts: Annotated[int, typer.Option(help="Prompts to calibrate on, at least 16.", min=16)] = 96,
    seed: Annotated[int, typer.Option(help="Which held-out questions are asked.", min=0)] = 0,
    backend: Backend = "torch",
    as_json: Json = False,
) -> int:
    """Calibrate, patch and question the shipped small model; write a report."""
    from blindsight_cli.commands.demo import run_demo

    return run_demo(
        model=model,
        out=out,
        questions=questions,
        calibration_prompts=calibration_prompts,
        seed=seed,
        backend=backend,
        as_json=as_json,
    )


@app.command()
@guarded
def doctor(
    checkpoint: Annotated[Path | None, typer.Argument(help="Also look at this checkpoint folder.")] = None,
    as_json: Json = False,
) -> int:
    """Check this installation, and say what to do where something fails."""
    from blindsight_cli.commands.doctor import run_doctor

    return run_doctor(checkpoint, as_json=as_json)


@app.command()
@guarded
def calibrate(
    checkpoint: Checkpoint,
    data: Annotated[
        Path,
        typer.Argument(
            help='JSONL, one prompt per line: {"images": ["a.png", "b.png"], "question": "..."}; relative file names. '
            '"videos": ["c.mp4"] and "fps": 2 beside the images or instead.',
            exists=True,
            dir_okay=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The profile.", show_default="CHECKPOINT/blindsight_profile.json, where patch() finds it"),
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Keep statistics here; a second run goes on from them.")] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="Count the statistics of another machine's --state, too; repeat for more.", dir_okay=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first prompts.", min=1)] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Allowed KL divergence of the next token, in nats, for any number of images; the default way.",
            show_default="0.01",
        ),
    ] = None,
    ranking: Annotated[
        Ranking | None,
        typer.Option(help="What orders the heads for a budget.", show_default="gradient (one backward pass a prompt)"),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Share of the prompts that the budget is measured on; the others are calibrated on.",
            show_default="0.25",
        ),
    ] = None,
    tensor_parallel: TensorParallel = None,
    thresholds: ThresholdsOption = False,
    gamma_sink: GammaSink = None,
    gamma_intra: GammaIntra = None,
    gamma_dense: GammaDense = None,
    alpha_first: AlphaFirst = None,
    alpha_last: AlphaLast = None,
    quantile: Quantile = None,
    sinks: Annotated[
        str | None,
        typer.Option(
            metavar="START:END",
            help="Sinks, as offsets from an image's start and back from its end, delimiters included, like 0,1:1,2.",
            show_default="those of --state, else learned",
        ),
    ] = None,
    local_block: Annotated[
        int | None, typer.Option(help="Tokens of a local block of SINK, a multiple of 8.", min=8, show_default="128")
    ] = None,
    backend: Backend = "torch",
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Measure a checkpoint on your prompts and write its profile."""
    from blindsight_cli.commands.calibrate import run_calibrate
    from shared_profiles.budget import Budget
    from shared_profiles.split import HELD_OUT

    gammas = typed_thresholds(thresholds, gamma_sink, gamma_intra, gamma_dense, alpha_first, alpha_last, quantile)
    if gammas is not None and any(option is not None for option in (budget, ranking, tensor_parallel)):
        raise typer.BadParameter("choose by --budget or by thresholds: leave out the others.")
    if gammas is not None and held_out is not None:
        raise typer.BadParameter("--held-out is for budgets: with thresholds nothing is held out. Leave it out.")
    found_by = gammas or Budget(
        Budget.kl if budget is None else budget, ranking or Budget.ranking, tensor_parallel or Budget.processes
    )
    return run_calibrate(
        checkpoint=checkpoint,
        data=data,
        out=out,
        state=state,
        merge=merge or [],
        limit=limit,
        how=found_by,
        held_out=HELD_OUT if held_out is None else held_out,
        sinks=sinks,
        local_block=local_block,
        backend=backend,
        dtype=dtype,
        device=device,
        as_json=as_json,
    )


@app.command()
@guarded
def run(
    checkpoint: Checkpoint,
    question: Annotated[str, typer.Option(help="What to ask about the pictures or videos.")],
    image: Images = None,
    video: Videos = None,
    fps: Fps = None,
    profile: ProfileOption = None,
    dense: Annotated[bool, typer.Option("--dense", help="Leave the model unpatched.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer both ways and compare.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.", min=1)] = 64,
    backend: Backend = "torch",
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Ask a checkpoint one question about some pictures or videos."""
    if dense and (compare or profile is not None):
        raise typer.BadParameter("--dense uses no profile: leave out --compare and --profile, or --dense.")
    from blindsight_cli.commands.run import run_question

    return run_question(
        checkpoint=checkpoint,
        images=image or [],
        videos=video or [],
        fps=fps,
        question=question,
        profile=profile,
        dense=dense,
        compare=compare,
        max_new_tokens=max_new_tokens,
        backend=backend,
        dtype=dtype,
        device=device,
        as_json=as_json,
    )


@app.command("eval")
@guarded
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="ITEMS",
            help='JSONL, one item per line: {"images": [...], "question": "...", "answer": "yes", "options": ["yes", '
            '"no"]}; options may be left out.',
            exists=True,
            dir_okay=False,
        ),
    ],
    profile: ProfileOption = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="What it was calibrated on; no item may be there.", exists=True, dir_okay=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="The result; the samples go beside it.")] = Path("eval.json"),
    limit: Annotated[int | None, typer.Option(help="Take only the first items.", min=1)] = None,
    letters: Annotated[
        bool, typer.Option("--letters", help="List the options with letters after the question, ask for a letter.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of an answer.", min=1)] = 16,
    timed: Annotated[int, typer.Option(help="Time the prefills of so many items.", min=0)] = 32,
    backend: Backend = "torch",
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Answer questions dense and sparse; compare accuracy, in pairs."""
    from blindsight_cli.commands.evaluate import run_eval
    from blindsight_cli.evaluation.runner import Asking

    return run_eval(
        checkpoint=checkpoint,
        data=data,
        profile=profile,
        calibration=calibration,
        out=out,
        limit=limit,
        asking=Asking(letters, max_new_tokens, timed),
        backend=backend,
        dtype=dtype,
        device=device,
        as_json=as_json,
    )


@app.command()
@guarded
def analyze(
    checkpoint: Checkpoint,
    data: Annotated[
        Path | None,
        typer.Argument(metavar="PROMPTS", help="JSONL of prompts, as for calibrate.", exists=True, dir_okay=False),
    ] = None,
    puzzles: Annotated[int | None, typer.Option(help="Take so many synthetic puzzles instead.", min=1)] = None,
    profile: ProfileOption = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("analysis.html"),
    limit: Annotated[int | None, typer.Option(help="Take only the first prompts.", min=1)] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Draw where heads look, which tokens are sinks, and what delimiters do."""
    from blindsight_cli.commands.analyze import run_analyze

    return run_analyze(
        checkpoint=checkpoint,
        data=data,
        puzzles=puzzles,
        profile=profile,
        out=out,
        limit=limit,
        dtype=dtype,
        device=device,
        as_json=as_json,
    )


@app.command()
@guarded
def convert(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The new folder, for jax_blindsight.load.")],
    dtype: Dtype = "auto",
    profile: Annotated[
        Path | None,
        typer.Option(help="The profile.", exists=True, dir_okay=False, show_default="the one that load finds"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Convert a checkpoint's weights for the JAX backend."""
    from blindsight_cli.commands.convert import run_convert

    return run_convert(checkpoint=checkpoint, out=out, dtype=dtype, profile=profile, as_json=as_json)


@app.command()
@guarded
def bench(
    what: Annotated[
        Benchmark,
        typer.Argument(help="What to measure."),
    ] = "all",
    out: Annotated[Path | None, typer.Option(help="Also write the results here, as JSON.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each; medians are reported.", min=1)] = 5,
    as_json: Json = False,
) -> int:
    """Time sparse against dense on this machine."""
    from blindsight_cli.commands.bench import run_bench

    return run_bench(what=what, out=out, repeats=repeats, as_json=as_json)


@app.command()
@guarded
def report(
    data: Annotated[Path, typer.Argument(help="What `demo --json` printed.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    as_json: Json = False,
) -> int:
    """Render saved results as an HTML page."""
    from blindsight_cli.commands.report import run_report

    return run_report(data, out, as_json=as_json)


def main() -> None:
    """Runs the command line. SIGTERM, a scheduler's word, ends it as Ctrl-C does: what was measured is kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    never_fail_on_signs()
    app(prog_name="blindsight")


if __name__ == "__main__":
    main()
