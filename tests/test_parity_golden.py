"""The golden files: what layouts, plans and the attention mean must not change unseen."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest

import parity_golden
from parity_attention import compare, jax_attend, portable
from parity_golden import FOLDER, SUMS, as_text, attention_arrays, cases, drawn, layouts_document, plans_document, sums
from parity_plan import READERS, Prompts
from shared_profiles import Category

HOW = "if this is meant, write the files anew: python scripts/parity_report.py --write-golden"


def test_files_are_whole_and_small():
    assert sums() == (FOLDER / SUMS).read_text(), HOW
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 200_000


@pytest.mark.parametrize(("name", "document"), [("layouts.json", layouts_document), ("plans.json", plans_document)])
def test_layouts_and_plans_are_the_same(name, document):
    stored = json.loads((FOLDER / name).read_text())
    computed = json.loads(as_text(document()))
    assert computed.keys() == stored.keys()
    for prompt, values in stored.items():
        for key, value in values.items():
            assert computed[prompt][key] == value, f"{name}, {prompt}, {key}: {HOW}"
        assert computed[prompt].keys() == values.keys()


def test_attention_is_the_same():
    """The definition to 1e-12, whatever multiplies matrices; portable torch, and once XLA, as every pair must be."""
    with np.load(FOLDER / "attention.npz") as stored:
        held = {name: stored[name] for name in stored.files}
    computed = attention_arrays(held)
    assert computed.keys() == held.keys()
    for name, x in held.items():
        np.testing.assert_allclose(computed[name], x, rtol=0, atol=1e-12, err_msg=f"{name}: {HOW}")
    for i, case in enumerate(cases(held)):
        attends = {"portable": portable} | ({"xla": partial(jax_attend, "portable")} if i == 0 else {})
        differences = compare(case, {name: attend(case) for name, attend in attends.items()})
        assert not (wrong := [str(x) for x in differences if not x.equal]), "\n".join(wrong)


def test_work_lists_mean_the_golden_masks():
    layout = parity_golden.PLANS["small"]["layout"]
    prompts = Prompts((layout,), parity_golden.TEMPLATE)
    masks = json.loads((FOLDER / "plans.json").read_text())["small"]["masks"]
    for name, read in READERS.items():
        for category in Category:
            assert drawn(read(prompts, category)[0]) == masks[category.name], f"{name}: {category.name}"


def test_a_changed_meaning_is_seen(monkeypatch, tmp_path):
    """A sink too few in the template changes every file; writing them anew says which are new."""
    assert parity_golden.write(tmp_path) == ["layouts.json", "plans.json", "attention.npz"]
    assert parity_golden.write(tmp_path) == []
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    assert parity_golden.write(tmp_path) == [], "also on another CPU"
    assert sums(tmp_path) == (FOLDER / SUMS).read_text()
    other = dataclasses.replace(parity_golden.TEMPLATE, from_end=(1,))
    monkeypatch.setattr(parity_golden, "TEMPLATE", other)
    assert parity_golden.write(tmp_path) == ["layouts.json", "plans.json", "attention.npz"]
    stored = json.loads((FOLDER / "plans.json").read_text())["small"]["sha256"]
    changed = plans_document()["small"]["sha256"]
    assert {name for name in stored if stored[name] != changed[name]} == {"packed_sinks", "packed_stop"}
