"""Arguments and options of the commands: those that several share, and the long ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from shared_profiles.classifier import Thresholds

Checkpoint = Annotated[Path, typer.Argument(help="Folder of a Qwen2-VL, Qwen2.5-VL or Gemma 3 checkpoint.")]
ProfileFile = Annotated[Path, typer.Argument(help="A profile.", exists=True, dir_okay=False)]
ProfileOption = Annotated[
    Path | None,
    typer.Option(help="The profile.", exists=True, dir_okay=False, show_default="the one that patch() finds"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: the checkpoint's own.")
]
Backend = Annotated[Literal["torch", "jax"], typer.Option(help="The framework that runs the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one")]
Benchmark = Literal[
    "attention",
    "prefill",
    "plan",
    "memory",
    "jax-convert",
    "jax-attention",
    "jax-prefill",
    "jax-decode",
    "jax-compile",
    "all",
]
Images = Annotated[
    list[Path] | None, typer.Option("--image", help="A picture; repeat for more.", exists=True, dir_okay=False)
]
Videos = Annotated[
    list[Path] | None, typer.Option("--video", help="A video; repeat for more.", exists=True, dir_okay=False)
]
Fps = Annotated[
    float | None,
    typer.Option(help="Frames taken of a second of video.", min=0.01, show_default="the checkpoint's own, else 2"),
]
Ranking = Literal["gradient", "residual", "error"]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        help="Over how many GPUs the model that is served splits its heads: all of them get equally much to do.", min=1
    ),
]
ThresholdsOption = Annotated[
    bool,
    typer.Option("--thresholds", help="Choose by retained mass instead; so do the gammas, alphas and the quantile."),
]
GammaSink = Annotated[float | None, typer.Option(help="Mass that SINK must retain.", min=0, max=1, show_default="0.95")]
GammaIntra = Annotated[
    float | None, typer.Option(help="Mass that INTRA_IMAGE must retain.", min=0, max=1, show_default="0.95")
]
GammaDense = Annotated[
    float | None,
    typer.Option(
        help="Mass that INTRA_IMAGE_SINK must retain, or the head stays DENSE.", min=0, max=1, show_default="0.9"
    ),
]
AlphaFirst = Annotated[
    float | None, typer.Option(help="Scale of the gammas in the first layer.", min=0, show_default="1")
]
AlphaLast = Annotated[
    float | None, typer.Option(help="Scale in the last layer; linear between.", min=0, show_default="1")
]
Quantile = Annotated[
    float | None,
    typer.Option(help="Quantile over prompts that must pass; smaller is stricter.", min=0, max=1, show_default="0.5"),
]


def typed_thresholds(
    asked: bool,
    gamma_sink: float | None,
    gamma_intra: float | None,
    gamma_dense: float | None,
    alpha_first: float | None,
    alpha_last: float | None,
    quantile: float | None,
) -> Thresholds | None:
    """The thresholds that were typed; None if none was and `--thresholds` neither."""
    from shared_profiles.classifier import Thresholds

    names = ("gamma_sink", "gamma_intra", "gamma_dense", "alpha_first", "alpha_last", "quantile")
    values = (gamma_sink, gamma_intra, gamma_dense, alpha_first, alpha_last, quantile)
    typed = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    return Thresholds(**typed) if typed or asked else None
