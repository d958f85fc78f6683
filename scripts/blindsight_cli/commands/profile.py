"""`blindsight profile`: show, validate and compare profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blindsight_cli.errors import ExitCode
from blindsight_cli.output import note, print_json, results, span
from shared_profiles import SPARSE, Category, profile_parts
from shared_profiles.budget import chosen_point
from shared_profiles.profile import Profile, diff
from shared_profiles.summary import Summary

STYLES = {
    Category.DENSE: "bright_black",
    Category.INTRA_IMAGE_SINK: "cyan",
    Category.INTRA_IMAGE: "green",
    Category.SINK: "magenta",
}
# One letter per head, so that the map reads without colours, too; the sparser the further right in its table.
LETTERS = {category: profile_parts.LETTERS[category] for category in STYLES}


def show(path: Path, *, as_json: bool) -> int:
    """Prints what a profile says: model, choice, origin, categories, statistics."""
    profile = Profile.load(path)
    if as_json:
        print_json(_document(path, profile))
        return ExitCode.OK
    console = results()
    console.print(_facts(path, profile))
    console.print()
    console.print(category_table(profile))
    if profile.summary is not None:
        console.print()
        console.print(_statistics_table(profile.summary))
    print_curve(console, profile)
    return ExitCode.OK


def validate(path: Path, checkpoint: Path | None, *, as_json: bool) -> int:
    """Checks a profile's file, and that it belongs to a checkpoint if one is given; errors say why not."""
    profile = Profile.load(path)
    if checkpoint is not None:
        from blindsight_cli.loading import load_model
        from torch_blindsight import fingerprint

        profile.require(fingerprint(load_model(checkpoint)))
    model = None if checkpoint is None else str(checkpoint)
    if as_json:
        print_json({"valid": True, "profile": str(path), "model": model})
    else:
        belongs = "" if model is None else f", and belongs to {model}"
        results().print(f"{path}: a whole, unedited profile{belongs}", markup=False, soft_wrap=True)
    return ExitCode.OK


def compare(before: Path, after: Path, *, as_json: bool) -> int:
    """Prints every difference of two profiles; the exit code says whether there is one."""
    found = diff(Profile.load(before), Profile.load(after))
    if as_json:
        heads = [
            {"layer": c.layer, "head": c.head, "before": c.before.name, "after": c.after.name} for c in found.heads
        ]
        fields = {name: list(values) for name, values in found.fields.items()}
        print_json({"same": not found, "heads": heads, "fields": fields})
    else:
        results().print(str(found), markup=False, soft_wrap=True)
        if found.heads:
            note(f"{len(found.heads)} heads changed category")
    return ExitCode.CHECK_FAILED if found else ExitCode.OK


def category_table(profile: Profile) -> Table:
    """Layers down, one letter per head, and the counts of every category."""
    table = Table(title="categories", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("heads", no_wrap=True)
    for category in LETTERS:
        table.add_column(Text(f"{LETTERS[category]} {category.name}", STYLES[category]), justify="right")
    group = profile.fingerprint.n_heads // profile.fingerprint.n_kv_heads
    for layer, row in enumerate(profile.categories):
        heads = Text()
        for head, category in enumerate(map(Category, row)):
            # A gap between the heads of one key/value head and the next.
            heads.append(" " if group > 1 and head and head % group == 0 else "")
            heads.append(LETTERS[category], STYLES[category])
        table.add_row(str(layer), heads, *(_count(int((row == category).sum()), category) for category in LETTERS))
    total = profile.counts()
    table.add_section()
    table.add_row("all", "", *(_count(total[category], category) for category in LETTERS))
    return table


def _count(number: int, category: Category) -> Text:
    return Text(str(number), STYLES[category]) if number else Text("·", "bright_black")


def _facts(path: Path, profile: Profile) -> Table:
    """Where the profile belongs, what its template is, how and from what it was made."""
    print_, template, provenance = profile.fingerprint, profile.template, profile.provenance
    rows = {
        "profile": str(path),
        "model": (
            f"{print_.family}, {print_.n_layers} layers of {print_.n_heads} heads "
            f"({print_.n_kv_heads} key/value), head size {print_.head_dim}"
        ),
        "digest": print_.digest,
        "sinks": (
            f"{_numbers(template.from_start)} from an image's start, {_numbers(template.from_end)} from its end; "
            f"local blocks of {template.local_block} tokens"
            + (f"; learned from {learned['prompts']} prompts" if (learned := profile.choice.get("sinks")) else "")
        ),
        "chosen by": ", ".join(
            str(value) if key == "method" else f"{key} {value}"
            for key, value in sorted(profile.choice.items(), key=lambda item: item[0] != "method")
            if key != "sinks"
        ),
    }
    if provenance is not None:
        rows["made from"] = f"{provenance.dataset}: {provenance.n_prompts} prompts, {provenance.n_tokens:,} tokens"
        rows["data hash"] = provenance.dataset_hash
        versions = ", ".join(f"{name} {version}" for name, version in sorted(provenance.versions.items()))
        rows["created"] = f"{provenance.created} with {versions}"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values)) or "none"


def _statistics_table(summary: Summary) -> Table:
    """What each sparse category would keep and change, over all heads."""
    title = f"if every head had this category ({summary.n_prompts} prompts)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("category", "kept pairs", "retained mass: median", "least head", "output error: median", "worst head"):
        table.add_column(name, justify="left" if name == "category" else "right")
    for category, row in _statistics(summary).items():
        style = STYLES[Category[category]]
        numbers = f"{row['kept']:.1%}", *(f"{row[name]:.3f}" for name in list(row)[1:])
        table.add_row(Text(category, style), *numbers)
    return table


def _statistics(summary: Summary) -> dict[str, dict[str, float]]:
    """Per sparse category the kept pairs, and means over prompts: median and worst over heads."""
    import numpy as np

    return {
        category.name: {
            "kept": summary.kept[category],
            "mass_median": float(np.median(summary.mass_mean[category])),
            "mass_least": float(summary.mass_mean[category].min()),
            "error_median": float(np.median(summary.error_mean[category])),
            "error_most": float(summary.error_mean[category].max()),
        }
        for category in SPARSE
    }


def print_curve(console: Console, profile: Profile) -> None:
    """The measured points of speed against accuracy, the chosen one marked."""
    if not profile.curve:
        return
    chosen = chosen_point(profile)
    title = "measured points" if chosen is None else "measured points (> chosen)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("", "kept pairs", "KL (nats)", "of images", "accuracy", "same token", "prompts"):
        table.add_column(name, justify="right")
    for point in profile.curve:
        accuracy, agreement = ("" if share is None else f"{share:.1%}" for share in (point.accuracy, point.agreement))
        n_prompts = "" if point.n_prompts is None else str(point.n_prompts)
        mark = ">" if point == chosen else ""
        worst_at = span(point.n_images)
        table.add_row(mark, f"{point.kept:.1%}", f"{point.kl:.2g}", worst_at, accuracy, agreement, n_prompts)
    console.print()
    console.print(table)


def _document(path: Path, profile: Profile) -> dict[str, Any]:
    """The profile in short, for other programs; the whole of it is the file itself."""
    provenance = profile.provenance
    return {
        "profile": str(path),
        "model": vars(profile.fingerprint),
        "template": vars(profile.template),
        "choice": profile.choice,
        "provenance": None if provenance is None else vars(provenance),
        "counts": {category.name: n for category, n in profile.counts().items()},
        "categories": [[Category(value).name for value in row] for row in profile.categories],
        "statistics": None if profile.summary is None else _statistics(profile.summary),
        "curve": [vars(point) for point in profile.curve],
    }
