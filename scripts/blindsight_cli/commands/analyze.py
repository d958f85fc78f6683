"""`blindsight analyze`: where a checkpoint's heads look, which tokens are sinks, and what the delimiters do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from blindsight_cli import report
from blindsight_cli.analysis import Analysis, analyze, write_page
from blindsight_cli.analysis.page import strongest
from blindsight_cli.analysis.pictures import PARTS, layer_strength, offset_label, parts
from blindsight_cli.errors import ExitCode
from blindsight_cli.folders import check_family, named_or_found, require_for_torch, require_writable
from blindsight_cli.loading import load_model, load_processor, pick_device
from blindsight_cli.output import note, print_json, results
from blindsight_cli.prompt_file import PromptLoader, read_prompts
from blindsight_cli.smallvlm.evaluate import CALIBRATION_SEEDS, make_mixed_puzzles, to_inputs
from shared_profiles.profile import Profile
from torch_blindsight import fingerprint


def run_analyze(
    *,
    checkpoint: Path,
    data: Path | None,
    puzzles: int | None,
    profile: Path | None,
    out: Path,
    limit: int | None,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> int:
    """Measures, and writes the page.

    Args:
        checkpoint: a checkpoint folder.
        data: JSONL file of prompts, or None.
        puzzles: how many synthetic puzzles to take instead, or None.
        profile: whose categories are drawn; default: the one that `patch` finds, else none.
        out: the page.
        limit: how many prompts of the file to take.
        dtype, device: how the model is loaded.
        as_json: print a JSON document instead of a table.

    Returns:
        The exit code.

    Raises:
        ValueError: neither file nor puzzles or both, a limit without a file, weights for JAX, or what `read_prompts`,
            `load_model` and `analyze` refuse.
        ProfileError: the profile is damaged or belongs to another model.
        OSError: a file cannot be read or written.
    """
    if (data is None) == (puzzles is None):
        raise ValueError("an analysis needs prompts: name a JSONL file, or ask for --puzzles. Give one of them.")
    if data is None and limit is not None:
        raise ValueError("--limit takes the first prompts of a file: leave it out, or ask for fewer --puzzles.")
    check_family(checkpoint)
    require_for_torch(checkpoint)
    require_writable("--out", out, {"PROMPTS": data, "--profile": profile}, kind="page")
    lines = None if data is None else [p for p in read_prompts(data, limit) if p.multi_image]
    if lines is not None and not lines:
        raise ValueError(f"{data}: an analysis needs prompts with at least two images. Got none.")
    model = load_model(checkpoint, dtype=dtype, device=pick_device(device))
    processor = load_processor(checkpoint)
    print_ = fingerprint(model)
    chosen, _ = named_or_found(None if profile is None else Profile.load(profile), profile, print_, checkpoint)
    if chosen is None:
        note("no profile of this model was found: maps are drawn as if every head were INTRA_IMAGE_SINK")
    prompts: Any
    answers = None
    if data is not None and lines is not None:
        prompts, named = PromptLoader(lines, data, processor, str(model.device)), data.name
    else:
        asked = make_mixed_puzzles(puzzles or 0, CALIBRATION_SEEDS)
        prompts = [{k: v.to(model.device) for k, v in to_inputs(processor, [p]).items()} for p in asked]
        answers, named = processor.tokenizer.convert_tokens_to_ids([p.question.answer for p in asked]), "puzzles"
    analysis = analyze(model, prompts, chosen, answers)
    shape = (print_.n_layers, print_.n_heads, print_.n_kv_heads, print_.head_dim)
    about = report.ModelInfo(
        checkpoint.resolve().name, print_.family, *shape, sum(p.numel() for p in model.parameters())
    )
    write_page(analysis, about, named, out)
    _tell(analysis, out, as_json=as_json)
    return ExitCode.OK


def _tell(analysis: Analysis, out: Path, *, as_json: bool) -> None:
    """Prints the figures."""
    shares = [parts(mass).mean(0).tolist() for mass in (analysis.mass, analysis.ablated)]
    if as_json:
        reach = analysis.mass.reach
        print_json(
            {
                "page": str(out),
                "n_prompts": analysis.n_prompts,
                "shares": dict(zip(PARTS, shares[0], strict=True)),
                "shares_without_delimiters": dict(zip(PARTS, shares[1], strict=True)),
                "offsets": [offset_label(b, reach) for b in range(2 * reach + 1)],
                "strength": layer_strength(analysis.mass).tolist(),
                "strength_without_delimiters": layer_strength(analysis.ablated).tolist(),
                "learned": {"from_start": analysis.learned.from_start, "from_end": analysis.learned.from_end},
                "kl": analysis.kl,
                "same_answer": analysis.same_answer,
                "right": analysis.right,
            }
        )
        return
    console = results()
    table = Table(title=f"attention of image rows, {analysis.n_prompts} prompts")
    for name in ("on", "with delimiters", "without"):
        table.add_column(name, justify="left" if name == "on" else "right")
    for label, *values in zip(PARTS.values(), *shares, strict=True):
        table.add_row(label, *(f"{value:.1%}" for value in values))
    console.print(table)
    table = Table(title="strongest offsets: mass of a token there over that of an average token of other images")
    for name in ("offset", "layer", "strength", "without delimiters"):
        table.add_column(name, justify="right")
    for row in strongest(analysis):
        table.add_row(row["offset"], str(row["layer"]), f"{row['strength']:.2f}x", f"{row['without']:.2f}x")
    console.print(table)
    right = "" if analysis.right is None else f", right {analysis.right[0]:.1%} -> {analysis.right[1]:.1%}"
    console.print(
        f"without delimiters: KL {analysis.kl:.4f} nats, same answer on {analysis.same_answer:.1%}{right}", markup=False
    )
    learned = analysis.learned
    console.print(f"learned sinks: from_start {learned.from_start}, from_end {learned.from_end}", markup=False)
    console.print(f"saved {out}", markup=False, soft_wrap=True)
