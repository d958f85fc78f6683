"""Golden files: a few layouts, plans and attention outputs as they must stay, small enough to read.

    tests/golden/layouts.json     token ids, and where text, images, delimiters and sinks stand
    tests/golden/plans.json       plans, array by array with checksums, and the masks that they mean
    tests/golden/attention.npz    inputs, and the definition's outputs and log-sum-exps
    tests/golden/SHA256SUMS       of the three

They change when a meaning changes, and then on purpose: `python scripts/parity_report.py --write-golden`.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from parity_attention import Case
from parity_plan import plan_arrays
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.families import FAMILIES
from shared_profiles.plan import build_plan

FOLDER = Path(__file__).parent / "golden"
SUMS = "SHA256SUMS"
TEMPLATE = SinkTemplate((0, 1), (1, 2), 16)
_SMALL = Layout(17, 1, 17, np.array([(3, 4, 8, 9), (10, 11, 15, 16)]))


def special_tokens(family: str) -> Any:
    """Ids as in the golden prompts: 3 opens an image, 5 is one of its tokens, 6 one of a video's, 4 closes either."""
    settings = dict(
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
        image_token_index=5, boi_token_index=3, eoi_token_index=4,
    )  # fmt: skip
    return FAMILIES[family].special_tokens(settings)


PROMPTS: dict[str, dict[str, Any]] = {
    "two images": dict(family="qwen2_5_vl", ids=[1, 10, 3, *[5] * 5, 4, 11, 3, *[5] * 3, 4, 12]),
    "adjacent images, padding on the left": dict(
        family="gemma3", ids=[0, 0, 1, 3, *[5] * 4, 4, 3, *[5] * 4, 4, 7], valid=[0, 0, *[1] * 14]
    ),
    "a video of three frames, padding on the right": dict(
        family="qwen2_vl", ids=[1, 3, *[6] * 6, 4, 9, 3, *[5] * 2, 4, 0], valid=[*[1] * 14, 0], frames=[3]
    ),
    "text alone": dict(family="qwen2_vl", ids=[1, 2, 7, 8]),
    "delimiters in the text": dict(family="qwen2_5_vl", ids=[1, 3, 4, 9, 3, *[5] * 2, 4, 4]),
}
PLANS: dict[str, dict[str, Any]] = {
    "small": dict(layout=_SMALL, tile_rows=8),
    "window, images both ways": dict(
        layout=Layout(60, 0, 58, np.array([(4, 5, 25, 26), (26, 27, 50, 51)]), True), tile_rows=8, window=12
    ),
    "chunk, text in parts": dict(
        layout=Layout(90, 2, 90, np.array([(5, 6, 40, 41), (60, 61, 80, 80)])), tile_rows=16, q_start=38, max_keys=20
    ),
}


def layouts_document() -> dict[str, Any]:
    """What `layouts.json` holds."""
    document = {}
    for name, prompt in PROMPTS.items():
        given = dict(prompt)
        family = given.pop("family")
        both_ways = FAMILIES[family].bidirectional
        layout = Layout.from_ids(given.pop("ids"), special_tokens(family), bidirectional=both_ways, **given)
        document[name] = prompt | dict(
            n_tokens=layout.n_tokens,
            span=[layout.start, layout.stop],
            bidirectional=layout.bidirectional,
            images=layout.images.tolist(),
            text=layout.text.tolist(),
            textual_rows=layout.textual_rows.tolist(),
            sinks=layout.sinks(TEMPLATE).tolist(),
        )
    return document


def plans_document() -> dict[str, Any]:
    """What `plans.json` holds."""
    document = {}
    for name, given in PLANS.items():
        layout, options = given["layout"], {key: value for key, value in given.items() if key != "layout"}
        plan = build_plan(layout, TEMPLATE, **options)
        arrays = plan_arrays(plan)
        where = {key: options[key] for key in ("window", "q_start") if key in options}
        document[name] = dict(
            layout=[layout.n_tokens, layout.start, layout.stop, layout.images.tolist(), layout.bidirectional],
            options=options,
            n_image_tiles=plan.n_image_tiles,
            arrays={key: x.tolist() for key, x in arrays.items()},
            sha256={
                key: hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()
                for key, x in arrays.items()
            },
        )
        if name == "small":
            document[name]["masks"] = {
                category.name: drawn(category_mask(layout, category, TEMPLATE, **where)) for category in Category
            }
    return document


def _digest(x: np.ndarray) -> str:
    return hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest()


def drawn(mask: np.ndarray) -> list[str]:
    """A mask `[T, S]` as one line of 1 and . per query."""
    return ["".join(".1"[int(x)] for x in row) for row in mask]


def cases(arrays: Any = None) -> list[Case]:
    """The attention calls, on given inputs or, to write new files, on random ones."""
    calls = [
        Case("causal", (_SMALL, Layout(17, 0, 12, np.array([(1, 2, 10, 11)]))), TEMPLATE, 16, "float32"),
        Case("both-ways", (PLANS["window, images both ways"]["layout"],), TEMPLATE, 16, "float32", window=12),
        Case("chunk", (PLANS["chunk, text in parts"]["layout"],), TEMPLATE, 16, "float32", q_start=70, max_keys=20),
    ]
    filled = []
    for call in calls:
        if arrays is None:
            rng, last = np.random.default_rng(7), call.layouts[0].n_tokens
            shapes = [(len(call.layouts), heads, n, 16) for heads, n in ((4, call.n_queries), (2, last), (2, last))]
            given = [rng.standard_normal(shape, np.float32) for shape in shapes]
        else:
            given = [arrays[f"{call.name}/{x}"] for x in "qkv"]
        filled.append(Case(**{**vars(call), "given": tuple(given)}))
    return filled


def attention_arrays(arrays: Any = None) -> dict[str, np.ndarray]:
    """What `attention.npz` holds: of every case q, k, v, out `[B, T, H, D]` and lse `[B, H, T]`."""
    held = {}
    for case in cases(arrays):
        held |= {f"{case.name}/{name}": x for name, x in zip("qkv", case.given or (), strict=True)}
        held |= {f"{case.name}/out": case.truth.out, f"{case.name}/lse": case.truth.lse}
    return held


def as_text(document: dict[str, Any]) -> str:
    """Canonical JSON, a line for every array: the same document is always the same bytes."""
    text = json.dumps(document, indent=1, sort_keys=True)
    lines, inner = [], 0
    for line in text.splitlines():
        bare = line.strip()
        if inner:
            lines[-1] += bare + " " * bare.endswith(",")
        else:
            lines.append(line)
        inner += bare.endswith("[") - (bare.rstrip(",") == "]")
        if inner == 0:
            lines[-1] = lines[-1].rstrip()
    return "\n".join(lines) + "\n"


def sums(folder: Path = FOLDER) -> str:
    """The checksums of the files in a folder, as `sha256sum` writes them."""
    names = ("attention.npz", "layouts.json", "plans.json")
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def write(folder: Path = FOLDER) -> list[str]:
    """Writes the files anew; attention that differs by rounding alone, as from one CPU to another, stays.

    Returns:
        The names of those that are not what they were.
    """
    packed = io.BytesIO()
    np.savez_compressed(packed, **attention_arrays())
    files = {
        "layouts.json": as_text(layouts_document()).encode(),
        "plans.json": as_text(plans_document()).encode(),
        "attention.npz": packed.getvalue(),
    }
    changed = []
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if path.exists() and (path.read_bytes() == content or (name == "attention.npz" and _same_but_rounding(path))):
            continue
        changed.append(name)
        path.write_bytes(content)
    (folder / SUMS).write_text(sums(folder))
    return changed


def _same_but_rounding(path: Path) -> bool:
    """Whether a file holds today's attention to 1e-12."""
    computed = attention_arrays()
    with np.load(path) as held:
        return set(held.files) == set(computed) and all(
            x.shape == held[name].shape and np.allclose(x, held[name], rtol=0, atol=1e-12, equal_nan=True)
            for name, x in computed.items()
        )
