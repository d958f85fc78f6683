"""The parity suite's measurements as one JSON document: what `scripts/parity_report.py` writes and shows.

Every number comes from the functions that the tests call; here they are only named and put in rows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from parity_attention import CASES, implementations, run_all
from parity_golden import PLANS
from parity_model import first_divergence, first_other_token
from parity_plan import READERS, Prompts, first_difference, keys_by_definition
from parity_profile import ABSOLUTE, RELATIVE, calibrate_both, largest_gaps, prompts_of
from parity_subjects import SHIPPED, Subject, lost_in_bfloat16, tiny, trained
from shared_profiles import Category, SinkTemplate
from shared_profiles.classifier import Thresholds
from tiny_models import FAMILIES

Row = dict[str, Any]
_THRESHOLDS = Thresholds(gamma_sink=0.9, gamma_intra=0.6, gamma_dense=0.5)


def plain(difference: Any) -> Row:
    """A difference as JSON values: an infinite one, of something that is not a number, as the largest number."""
    row = {name: min(x, sys.float_info.max) if isinstance(x, float) else x for name, x in asdict(difference).items()}
    return row | dict(equal=difference.equal)


def plan_part(device: str) -> list[Row]:
    """The work list of every kernel, read back and compared with the definition, key by key."""
    template = SinkTemplate((0, 1), (1, 2), 16)
    prompts = {
        name: Prompts((plan["layout"],), template, plan.get("window"), plan.get("q_start", 0), plan.get("max_keys"))
        for name, plan in PLANS.items()
    }
    prompts |= {
        case.name: Prompts(case.layouts, case.template, case.window, case.q_start, case.max_keys) for case in CASES
    }
    rows = []
    for name, prompt in prompts.items():
        wanted = {category: keys_by_definition(prompt, category) for category in Category}
        different = {
            kernel: next(filter(None, (_said(read, prompt, c, want) for c, want in wanted.items())), None)
            for kernel, read in READERS.items()
        }
        keys = int(sum(want.sum() for want in wanted.values()))
        equal = not any(different.values())
        rows.append(dict(prompt=name, keys=keys, difference=different, equal=equal))
    return rows


def _said(read: Callable, prompts: Prompts, category: Category, want: np.ndarray) -> str | None:
    difference = first_difference(read(prompts, category), want, prompts)
    return None if difference is None else f"{category.name}: {difference}"


def kernel_part(device: str) -> list[Row]:
    """Every implementation of the attention against every other, case by case."""
    rows = []
    with implementations(device) as attends:
        for case in CASES:
            pairs = [plain(x) for x in run_all(case, attends)]
            rows.append(dict(case=case.name, pairs=pairs, equal=all(x["equal"] for x in pairs)))
    return rows


def model_part(device: str) -> list[Row]:
    """Whole models, point by point, and the tokens they write."""
    return [
        dict(model=name, n_tokens=int(subject.inputs["attention_mask"].sum()), runs=list(runs_of(subject)))
        for name, subject in _subjects(device)
    ]


def _subjects(device: str) -> Iterator[tuple[str, Subject]]:
    yield from ((f"random {family}", tiny(family, device)) for family in FAMILIES)
    yield from ((folder.name, trained(folder, device)) for folder in SHIPPED)


def runs_of(subject: Subject) -> Iterator[Row]:
    """A model's runs, dense and sparse: every pair at every point, and the tokens."""
    for sparse, bar in subject.bars.items():
        ours, theirs = (subject.traces[name, sparse] for name in ("jax", "torch"))
        gaps = {
            ("float64", "transformers"): bar.gaps(theirs),
            ("float64", "jax"): bar.gaps(ours),
            ("transformers", "jax"): bar.gaps(ours, theirs),
        }
        pairs = [
            dict(pair=list(pair), points=[plain(x) for x in found], divergence=first_divergence(found))
            for pair, found in gaps.items()
        ]
        tokens = first_other_token(ours.tokens, theirs.tokens)
        yield dict(
            sparse=sparse,
            impl=dict(transformers=theirs.impl, jax=ours.impl),
            pairs=pairs,
            n_new=int(ours.tokens.shape[1]),
            tokens=tokens,
            equal=tokens is None and all(pair["divergence"] is None for pair in pairs),
        )


def bfloat16_part(device: str) -> list[Row]:
    """What bfloat16 costs, against what it costs transformers."""
    rows = []
    for family in FAMILIES:
        lost = {name: asdict(x) for name, x in lost_in_bfloat16(family, device).items()}
        bar = 2 * lost["transformers"]["kl"]
        rows.append(dict(family=family, lost=lost, allowed=bar, equal=all(x["kl"] <= bar for x in lost.values())))
    return rows


def profile_part(device: str) -> list[Row]:
    """Calibration in both frameworks."""
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            both = calibrate_both(tiny(family, device), prompts_of(family, 4), Path(folder), thresholds=_THRESHOLDS)
        a, b = (both[name] for name in ("jax", "torch"))
        close = all(
            np.allclose(a.records[name], b.records[name], rtol=RELATIVE[device], atol=ABSOLUTE)
            for name in ("mass", "error")
        )
        same = bool((a.profile.categories == b.profile.categories).all())
        gaps = {name: dict(zip(("error", "relative"), gap, strict=True)) for name, gap in largest_gaps(both).items()}
        rows.append(dict(family=family, prompts=4, gaps=gaps, categories=same, equal=close and same))
    return rows


PARTS: dict[str, Callable[[str], list[Row]]] = {
    "plan": plan_part,
    "kernel": kernel_part,
    "model": model_part,
    "bfloat16": bfloat16_part,
    "profile": profile_part,
}


def count(document: Row) -> tuple[int, int]:
    """How many comparisons the parts of a document hold, and how many of them are within what is allowed."""
    verdicts: list[bool] = []
    for row in document.get("plan", []):
        verdicts += [x is None for x in row["difference"].values()]
    for row in document.get("kernel", []):
        verdicts += [x["equal"] for x in row["pairs"]]
    for run in (run for row in document.get("model", []) for run in row["runs"]):
        verdicts += [point["equal"] for pair in run["pairs"] for point in pair["points"]]
        verdicts.append(run["tokens"] is None)
    for row in document.get("bfloat16", []):
        verdicts += [x["kl"] <= row["allowed"] for name, x in row["lost"].items() if name != "transformers"]
    verdicts += [row["equal"] for row in document.get("profile", [])]
    return len(verdicts), sum(verdicts)
