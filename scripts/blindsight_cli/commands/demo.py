"""`blindsight demo`: the main job on the shipped small model: calibrate, patch, answer, compare, report."""

from __future__ import annotations

import base64
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blindsight_cli import report as reporting
from blindsight_cli.backends import Backend, BackendName, Prompt, load_backend
from blindsight_cli.folders import require_writable
from blindsight_cli.loading import load_processor
from blindsight_cli.output import print_json, results
from blindsight_cli.smallvlm import evaluate
from blindsight_cli.smallvlm.puzzles import Puzzle
from blindsight_cli.timing import describe_cpu, median_pair
from shared_profiles import Category, Layout, category_mask
from shared_profiles.budget import Budget
from shared_profiles.profile import Profile

SHIPPED_MODEL = Path(__file__).parents[1] / "models" / "blindsight-tiny-qwen2_5_vl"

# What the timings are taken on: images, and their side in pixels; and images where they are all of one size.
_LONG_PROMPT, _LONG_PROMPT_FIXED = (32, 256), 256


def run_demo(
    *,
    model: Path | None,
    out: Path,
    questions: int,
    calibration_prompts: int,
    seed: int,
    backend: BackendName,
    as_json: bool,
) -> int:
    """Runs the demonstration and writes the report.

    Args:
        model: a checkpoint folder; default: the shipped small model.
        out: where the HTML report goes.
        questions: questions asked per number of images.
        calibration_prompts: prompts to calibrate on; about a quarter of them is held out.
        seed: which held-out puzzles are drawn.
        backend: the framework that runs the model, on the CPU.
        as_json: print the figures as JSON instead of a table.

    Returns:
        The exit code: 0.
    """
    require_writable("--out", out, kind="page")
    console = results(stderr=as_json)
    folder = model or SHIPPED_MODEL
    vlm, processor = load_backend(backend, folder, device="cpu"), load_processor(folder)
    shape = vlm.facts.fingerprint
    console.print(f"[bold]{escape(folder.name)}[/]: {shape.n_layers} layers x {shape.n_heads} heads, {shape.family}")

    first = evaluate.CALIBRATION_SEEDS + seed * calibration_prompts
    puzzles = evaluate.make_mixed_puzzles(calibration_prompts, first)
    profile = vlm.calibrate(
        [evaluate.to_inputs(processor, [p]) for p in puzzles],
        dataset=f"synthetic puzzles {first}..{first + calibration_prompts - 1}",
        template=None,
        budget=Budget(evaluate.BUDGET),
    )
    counts = ", ".join(f"{n} {category.name}" for category, n in profile.counts().items())
    held_out = profile.choice["held_out_prompts"]
    console.print(
        f"calibrated on {calibration_prompts} prompts, a budget of {evaluate.BUDGET} nats measured on {held_out} of "
        f"them, held out: {counts}"
    )

    rows, examples = [], []
    for n_images in (2, 6):
        asked = evaluate.make_puzzles(n_images, questions, evaluate.EVALUATION_SEEDS + seed * questions)
        row, dense, sparse = evaluate.compare(vlm, processor, profile, asked)
        rows.append(row)
        examples = [_example(p, d, s) for p, d, s in zip(asked[:6], dense.answers, sparse.answers, strict=False)]
    timings = _timings(vlm, processor, profile, console)
    data = _assemble(folder, vlm, processor, profile, rows, timings, examples)
    if as_json:
        print_json(data.to_json())
    else:
        _print_tables(console, data)
    reporting.write_report(data, out)  # last: its disk may be full
    console.print(f"report: [bold]{escape(str(out))}[/]", soft_wrap=True)
    return 0


def _timings(vlm: Backend, processor: Any, profile: Profile, console: Console) -> reporting.Timings:
    """Prefill and attention, dense and sparse, on the questions' own short prompts and on a long one."""
    console.print("timing ...")

    def prefill(prompt: Prompt, what: str, n_images: int, repeats: int) -> reporting.TimingRow:
        seconds = median_pair(
            lambda: vlm.prefill_seconds(prompt, None), lambda: vlm.prefill_seconds(prompt, profile), repeats
        )
        return reporting.TimingRow(what, int(prompt["attention_mask"].sum()), n_images, *seconds, repeats=repeats)

    questions = evaluate.to_inputs(processor, evaluate.make_puzzles(6, 8, evaluate.EVALUATION_SEEDS))
    long_prompt = _long_prompt(processor)
    (layout,) = vlm.facts.layouts(long_prompt)
    n_images = layout.n_images
    seconds = median_pair(
        lambda: vlm.attention_seconds(layout, None), lambda: vlm.attention_seconds(layout, profile), repeats=3
    )
    rows = (
        prefill(questions, "prefill of eight questions at once", 6, repeats=5),
        prefill(long_prompt, "prefill", n_images, repeats=3),
        reporting.TimingRow("attention of all layers", layout.n_tokens, n_images, *seconds, repeats=3),
    )
    return reporting.Timings(rows, reporting.Machine(*describe_cpu(), vlm.version))


def _long_prompt(processor: Any) -> Prompt:
    """One prompt of many larger pictures, or of very many; the questions have no such prompts: timed, not graded."""
    size = processor.image_processor.size
    if "shortest_edge" not in size:
        return evaluate.to_inputs(processor, evaluate.make_puzzles(_LONG_PROMPT_FIXED, 1, evaluate.EVALUATION_SEEDS))
    n_images, side = _LONG_PROMPT
    puzzles = evaluate.make_puzzles(n_images, 1, evaluate.EVALUATION_SEEDS)
    processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
    try:
        return evaluate.to_inputs(processor, puzzles)
    finally:
        processor.image_processor.size = size


def _assemble(
    folder: Path,
    vlm: Backend,
    processor: Any,
    profile: Profile,
    rows: Sequence[reporting.AccuracyRow],
    timings: reporting.Timings,
    examples: Sequence[reporting.Example],
) -> reporting.ReportData:
    """Everything the report shows."""
    print_ = profile.fingerprint
    provenance = profile.provenance
    assert provenance is not None and profile.summary is not None
    return reporting.ReportData(
        model=reporting.ModelInfo(
            folder.name,
            print_.family,
            print_.n_layers,
            print_.n_heads,
            print_.n_kv_heads,
            print_.head_dim,
            vlm.facts.n_parameters,
        ),
        categories=tuple(tuple(Category(int(c)).name for c in layer) for layer in profile.categories),
        template=reporting.TemplateInfo(
            profile.template.from_start, profile.template.from_end, profile.template.local_block
        ),
        statistics=reporting.statistics_from_summary(profile.summary),
        accuracy=tuple(rows),
        timings=timings,
        flops=tuple(_flops(vlm, processor, profile, n) for n in (1, 2, 3, 4, 6, 8, 10, 12)),
        masks=_masks(vlm, processor, profile),
        examples=tuple(examples),
        provenance=reporting.ReportProvenance(
            provenance.dataset,
            provenance.dataset_hash,
            provenance.n_prompts,
            provenance.n_tokens,
            print_.digest,
            provenance.versions,
            provenance.created,
            shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        ),
        chosen_by=reporting.chosen_by(profile),
        curve=reporting.curve_from_profile(profile),
        budget=reporting.budget_of(profile),
    )


def _layout(vlm: Backend, processor: Any, n_images: int) -> Layout:
    """The layout of a question about `n_images` images."""
    puzzle = evaluate.make_puzzles(max(n_images, 2), 1, evaluate.EVALUATION_SEEDS)[0]
    puzzle = Puzzle(puzzle.images[:n_images], puzzle.question, puzzle.colors, puzzle.shapes)
    return vlm.facts.layouts(evaluate.to_inputs(processor, [puzzle]))[0]


def _flops(vlm: Backend, processor: Any, profile: Profile, n_images: int) -> reporting.FlopsPoint:
    layout = _layout(vlm, processor, n_images)
    dense, kept = (vlm.facts.pairs(layout, way) for way in (None, profile))
    return reporting.FlopsPoint(
        n_images,
        layout.n_tokens,
        *(x for pairs in (dense, kept) for x in (pairs.intra, pairs.inter, pairs.text_rows + pairs.image_text)),
    )


def _masks(vlm: Backend, processor: Any, profile: Profile) -> reporting.MaskExample:
    """The masks of a question about four images."""
    layout = _layout(vlm, processor, 4)
    segments: list[reporting.Segment] = []

    def add(kind: str, length: int) -> None:
        if length:
            segments.append(reporting.Segment(kind, int(length)))

    position = 0
    for begin, first, last, end in layout.images.tolist():
        add("text", begin - position)
        add("delimiter", first - begin)
        add("image", last - first)
        add("delimiter", end - last)
        position = end
    add("text", layout.n_tokens - position)
    masks = {
        category.name: tuple(
            "".join("01"[int(x)] for x in row) for row in category_mask(layout, category, profile.template)
        )
        for category in Category
    }
    return reporting.MaskExample(tuple(segments), masks)


def _example(puzzle: Puzzle, dense: str, sparse: str) -> reporting.Example:
    return reporting.Example(
        tuple(_thumbnail(image) for image in puzzle.images), puzzle.question.text, puzzle.question.answer, dense, sparse
    )


def _thumbnail(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.quantize(32).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _print_tables(console: Console, data: reporting.ReportData) -> None:
    table = Table(title="dense against sparse, the same held-out questions")
    for name in ("images", "questions", "accuracy dense", "sparse", "agreement", "KL (nats)", "kept attention FLOPs"):
        table.add_column(name, justify="right")
    for row in data.accuracy:
        shares = (f"{x:.1%}" for x in (row.dense, row.sparse, row.agreement))
        table.add_row(str(row.n_images), str(row.n_questions), *shares, f"{row.kl:.4f}", f"{row.kept_flops:.1%}")
    console.print(table)
    assert data.timings is not None
    table = Table(
        title=f"median times on {data.timings.machine.cpu}, {data.timings.machine.cores} cores; read the ratios"
    )
    for name in ("what", "tokens", "images", "dense (s)", "sparse (s)", "dense / sparse"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for timing in data.timings.rows:
        seconds = f"{timing.dense_seconds:.3f}", f"{timing.sparse_seconds:.3f}"
        table.add_row(timing.what, str(timing.n_tokens), str(timing.n_images), *seconds, f"{timing.ratio:.2f}x")
    console.print(table)
