"""Result files as text: a short summary for a terminal, and the README's section."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from blindsight_gpu.parts import COMMANDS, SECONDS
from blindsight_gpu.plots import RATE, SPEED_UP
from blindsight_gpu.results import Row, good_rows, read

BEGIN, END = "<!-- gpu-results:begin -->", "<!-- gpu-results:end -->"
COMMAND = "PYTHONPATH=.:kernels:scripts python scripts/gpu_check.py --out docs/results"
_ALL = "\n".join(f"{COMMAND} --part {','.join(parts)}" for parts in COMMANDS)
_NOT_YET = f"""Not yet measured on a GPU. On one, these take at most ten minutes each:
```
{_ALL}
```
then `python scripts/render_results.py`."""
_SHOWN = (
    *("ours_ms", "pallas_ms", "triton_ms", "dense_ms", "flex_ms", "varlen_ms", "tokamax_ms", "speed_up"),
    *("against_triton", "useful_tflops", "predicted_ms", "plan_ms", "work_ms", "pack_ms", "launch_ms", "dense_s"),
    *(
        "first_ms",
        "vendor_ms",
        "sparse_s",
        "attention_share",
        "beside_share",
        "seconds_per_image",
        "seconds",
        "compile_s",
        "peak_gib",
        "passed",
        "failed",
    ),
    "largest_error",
)


def summary(part: str, document: dict[str, Any]) -> str:
    """A part's rows, one line each."""
    rows = document["rows"]
    failed = sum("failure" in row for row in rows)
    title = f"== {part}: {len(rows)} rows, {failed} failed, {len(document['left_out'])} left out"
    return "\n".join([title + " (DRY RUN)" * document["dry_run"], *map(_line, rows)])


def _line(row: Row) -> str:
    if "failure" in row:
        return f"   {row['case']}: FAILED: {row['failure'][:160]}"
    shown = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return f"   {row['case']}: " + ", ".join(f"{name} {shown[name]:.4g}" for name in _SHOWN if name in shown)


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of a folder, by part.

    Raises:
        ValueError: a result is from a dry run, or the results are of different GPUs.
    """
    found = {part: read(folder / f"gpu-{part}.json") for part in SECONDS}
    documents = {part: document for part, document in found.items() if document is not None}
    for part, document in documents.items():
        if document["dry_run"]:
            raise ValueError(
                f"results must be measured on a GPU. Got a dry run in {folder / f'gpu-{part}.json'}: delete it, or run "
                f"{COMMAND} on a GPU."
            )
    names = {document["machine"]["gpu"]["name"] for document in documents.values()}
    if len(names) > 1:
        raise ValueError(f"all results must be of one GPU. Got {', '.join(sorted(names))}: measure them all on one.")
    return documents


def section(folder: Path) -> str:
    """The README's section: tables of what is measured, or one sentence where nothing is.

    Raises:
        ValueError: as `measured`.
    """
    documents = measured(folder)
    if not documents:
        return _NOT_YET
    rows = {part: good_rows(document) for part, document in documents.items()}
    if more := rows.pop("attention_more", []):
        rows["attention"] = rows.get("attention", []) + more
    makers = {"correctness": _correctness, "bounds": _bounds, "attention": _attention, "pallas": _pallas}
    makers |= {"model": _model, "jax_model": _jax_model, "calibration": _calibration, "sanitizer": _sanitizer}
    makers |= {"profile": _profile}
    parts = [_machine(documents), *(makers[part](rows[part]) for part in makers if part in rows)]
    if any("speed_up" in row for part in ("attention", "pallas") for row in rows.get(part, [])):
        parts.insert(1, f"![speed-up against length](docs/{SPEED_UP})\n![useful TFLOP/s and the bound](docs/{RATE})")
    return "\n\n".join(filter(None, [*parts, _missing(documents)]))


def render(readme: str, folder: Path) -> str:
    """The README with the section between its markers renewed.

    Raises:
        ValueError: it has not both markers, once each and in order; or as `section`.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README must hold {BEGIN} and then {END}, once each. Add them where the table belongs.")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{section(folder)}\n{END}{rest.split(END)[1]}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """On one line and without bars: compilers' errors, which are notes, have many of both."""
    return _on_one_line(text).replace("|", "\\|")


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _number(row: Row, name: str, form: str = "{:.2f}", note: str = "") -> str:
    """A cell; a dash with the reason where the row has none."""
    return form.format(row[name]) if row.get(name) is not None else f"– {note}".strip()


def _machine(documents: dict[str, dict[str, Any]]) -> str:
    machine = next(iter(documents.values()))["machine"]
    gpu, versions = machine["gpu"], machine["versions"]
    sources: dict[tuple[str, str], list[str]] = {}
    for part, document in documents.items():
        one = document["machine"]
        sources.setdefault((str(one["commit"])[:12], one["source"]), []).append(part)
    measured_at = "; ".join(
        f"commit `{commit}`, source `{source}`{f': {", ".join(parts)}' if len(sources) > 1 else ''}"
        for (commit, source), parts in sources.items()
    )
    loaded = [row for document in documents.values() for row in document["rows"] if "sm_mhz" in row]
    clocks = ""
    if loaded:
        low, high = min(row["sm_mhz"][0] for row in loaded), max(row["sm_mhz"][1] for row in loaded)
        reasons = ", ".join(sorted({row["throttle"] for row in loaded}))
        clocks = f"; under load {low:.0f} to {high:.0f} MHz, reasons to throttle {reasons}"
    return (
        f"Measured on one {gpu['name']} (driver {gpu.get('driver_version', 'unknown')}, SM clock at most "
        f"{gpu.get('clocks.max.sm', 'unknown')}{clocks}), torch {versions['torch']}, triton {versions['triton']}, "
        f"cuDNN {versions['cudnn']}, jax {versions.get('jax')}; {measured_at}; medians, by CUDA events in torch and by "
        "bursts of launches in JAX. Result files: `docs/results/gpu-*.json`."
    )


def _correctness(rows: list[Row]) -> str:
    counts = "`pytest -m gpu`: {passed} passed, {skipped} skipped{why}."
    return "\n".join(
        counts.format(**row, why=f" ({'; '.join(row['skipped_for'])})" if row["skipped"] else "") for row in rows
    )


def _bounds(rows: list[Row]) -> str:
    launches = [row for row in rows if "largest_error" in row]
    body = [
        [
            row["case"],
            f"{row['tokens']:,}",
            f"{row['largest_offset']:,}",
            f"{row['largest_error']:.1e}",
            f"{row['plain_error']:.1e}",
        ]
        for row in launches
    ]
    return _table(["launch, against float64", "tokens", "largest offset", "error", "plain attention's"], body)


def _attention(rows: list[Row]) -> str:
    body = []
    for row in rows:
        if "profile" not in row:
            continue
        body.append(
            [
                f"{row['shape']} {row['heads']}, {row['tokens']:,}: {row['profile']}",
                _number(row, "ours_ms"),
                f"{row['ours_ms'] * row['speed_up']:.2f}" if "speed_up" in row else "–",
                _number(row, "speed_up", "{:.2f}x"),
                _number(row, "bound_ms"),
                _number(row, "flex_ms", note=row.get("flex_note", "")),
                _number(row, "varlen_ms", note=row.get("varlen_note", "")),
                _number(row, "useful_tflops", "{:.0f}"),
            ]
        )
    denominators = sorted({row["denominator"] for row in rows if "denominator" in row})
    head = ["one layer (ms)", "ours", "dense", "speed-up", "bound", "FlexAttention", "varlen", "TFLOP/s"]
    said = "No dense kernel was measured beside these: there is no speed-up, and no bound."
    if denominators:
        said = f"Dense, the denominator, is {'; '.join(denominators)}."
        said += " The bound is kept pairs at the dense kernel's rate."
    text = f"{_table(head, body)}\n\n{said}"
    costs = [
        f"{row['case'].removesuffix(': plan')}: {row['plan_ms']:.2f} + {row['work_ms']:.2f} a prompt, "
        f"{row['pack_ms']:.2f} + {row['launch_ms']:.2f} a layer"
        for row in rows
        if "pack_ms" in row
    ]
    if costs:
        text += f"\n\nBeside the kernel (ms; plan + work list, packing + launch): {'; '.join(costs)}."
    vendor = [
        f"{row['case']}: {row['first_ms']:.2f}, then {row.get('ours_ms', row.get('dense_ms')):.2f}"
        for row in rows
        if "vendor" in row["case"] or "kernel" in row
    ]
    return (
        f"{text}\n\nThe vendor's kernel, first call at a length and later ones (ms): {'; '.join(vendor)}."
        if vendor
        else text
    )


def _pallas(rows: list[Row]) -> str:
    body = [
        [
            f"{row['shape']} {row['heads']}, {row['tokens']:,}: {row['profile']}",
            _number(row, "pallas_ms"),
            _number(row, "triton_ms", note=row.get("triton_note", "")),
            _number(row, "against_triton", "{:.2f}x"),
            _number(row, "speed_up", "{:.2f}x"),
            _number(row, "bound_ms"),
            _number(row, "tokamax_ms", note=row.get("tokamax_note", "")),
            _number(row, "useful_tflops", "{:.0f}"),
            _number(row, "compile_s", "{:.1f}"),
        ]
        for row in rows
        if "pallas_ms" in row
    ]
    head = ["one layer in JAX (ms)", "Pallas", "Triton, same inputs", "of Triton", "over cuDNN in JAX", "bound"]
    return _table([*head, "tokamax", "TFLOP/s", "compile s"], body)


def _model(rows: list[Row]) -> str:
    body = [
        [
            f"{row['case']}, {row['tokens']:,} tokens",
            _number(row, "dense_s", note=row.get("dense_note", "")),
            _number(row, "sparse_s", note=row.get("sparse_note", "")),
            _number(row, "speed_up", "{:.2f}x"),
            _number(row, "attention_share", "{:.0%}"),
            _number(row, "beside_share", "{:.1%}"),
            _number(row, "tower_s"),
            _number(row, "ttft_speed_up", "{:.2f}x"),
            _number(row, "dense_peak_gib", "{:.0f}"),
            _number(row, "sparse_peak_gib", "{:.0f}"),
        ]
        for row in rows
        if "forwards" in row
    ]
    head = [
        "language model, random weights (s)",
        "dense",
        "sparse",
        "speed-up",
        "attention's share",
        "planning, packing, launching",
    ]
    return _table([*head, "vision tower", "with tower", "peak GiB dense", "sparse"], body)


def _jax_model(rows: list[Row]) -> str:
    sides: dict[str, dict[str, Row]] = {}
    for row in rows:
        name, _, side = row["case"].rpartition(", ")
        sides.setdefault(name, {})[side] = row
    body = []
    for name, found in sides.items():
        dense, sparse = found.get("dense", {}), found.get("sparse", {})
        both = {"ratio": dense["seconds"] / sparse["seconds"]} if "seconds" in dense and "seconds" in sparse else {}
        body.append(
            [
                f"{name}, {next(iter(found.values()))['tokens']:,} tokens",
                _number(dense, "seconds", note=dense.get("note", "")),
                _number(sparse, "seconds", note=sparse.get("note", "")),
                _number(both, "ratio", "{:.2f}x"),
                _number(sparse, "attention_share", "{:.0%}", note=sparse.get("attention_note", "")),
                _number(sparse, "compile_s", "{:.0f}"),
                _number(sparse, "peak_gib", "{:.0f}"),
                _number(found.get("calibration", {}), "seconds"),
                _number(found.get("gradient", {}), "seconds"),
            ]
        )
    head = ["the same in JAX, no vision tower (s)", "dense", "sparse", "speed-up", "attention's share"]
    return _table([*head, "compile, once a bucket", "peak GiB sparse", "calibrating it", "by the gradient"], body)


def _sanitizer(rows: list[Row]) -> str:
    said = [f"{row['case']}: {row.get('note') or row[row['case'].split(':')[0]]}" for row in rows]
    return f"Sanitizer: {'; '.join(said)}." if said else ""


def _calibration(rows: list[Row]) -> str:
    body = [[row["case"], _number(row, "seconds"), _number(row, "peak_gib", "{:.0f}")] for row in rows]
    return _table(["calibrating one prompt", "seconds", "peak GiB"], body)


def _profile(rows: list[Row]) -> str:
    body = []
    for row in rows:
        spent = {name: f"{us:.1f} µs" for name, us in row.get("kernels_us", {}).items()}
        said = row.get("metrics") or spent | row["uses"]
        note = f" ({row['ncu_note']})" if "ncu_note" in row else ""
        body.append([f"{row['case']}{note}", "; ".join(f"{name}: {value}" for name, value in said.items())])
    return _table(["one launch, 100K tokens", "what limits it"], body)


def _missing(documents: dict[str, dict[str, Any]]) -> str:
    """What was asked for and has no figure: misses are published too."""
    failed = [row for d in documents.values() for row in d["rows"] if "failure" in row]
    lines = [f"- {row['case']}: {_on_one_line(row['failure'])}" for row in failed]
    lines += [f"- {d['running']}: did not end" for d in documents.values() if d["running"] is not None]
    lines += [f"- {case}: left out for want of time" for d in documents.values() for case in d["left_out"]]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""
