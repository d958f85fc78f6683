"""Five implementations of the attention on the same inputs: every pair within what float64 allows, outputs and lse."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import parity_attention
from parity_attention import CASES, Case, Result, compare, implementations, run_all, to_jax
from parity_plan import alone
from parity_subjects import DEVICES, jax_on
from shared_profiles import SinkTemplate
from strategies import chunks, cut, layouts, templates


@pytest.fixture(scope="module", params=DEVICES)
def attends(request):
    """The implementations on a device, by name."""
    with jax_on(request.param), implementations(request.param) as attends:
        yield attends


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_pair_agrees(attends, case):
    differences = run_all(case, attends)
    assert len(differences) == (6 if case.dtype == "float32" else 10)
    assert not (wrong := [str(x) for x in differences if not x.equal]), "\n".join(wrong)


SIZES = (216, 256)  # T and S of the random layouts, so that XLA compiles once


@settings(max_examples=6, phases=[Phase.generate])  # interpreted, shrinking would take minutes
@given(st.data(), templates, st.integers(0, 1 << 31))
def test_every_pair_agrees_on_random_layouts(attends, data, template, seed):
    """Ragged batches, chunks, images of one token, without delimiters, at the ends; float32, all categories."""
    layout = data.draw(layouts(max_images=3, max_image=24))
    q_start, q_stop = data.draw(chunks(layout))
    if q_start == q_stop:
        return
    rows = tuple(cut(x, q_stop) for x in (layout, alone(layout)))
    template = SinkTemplate(template.from_start, template.from_end, 16)
    case = Case("random", rows, template, 64, "float32", q_start=q_start, seed=seed)
    runs = attends | {"xla": partial(attends["xla"], sizes=SIZES)}
    assert not (wrong := [str(x) for x in run_all(case, runs) if not x.equal]), "\n".join(wrong)


def test_inputs_are_shared_not_copied():
    """By DLPack, bfloat16 included: what torch writes later, JAX sees."""
    x = torch.randn(2, 8, 64).bfloat16()
    seen = to_jax(x)
    assert seen.dtype.name == "bfloat16" and seen.unsafe_buffer_pointer() == x.data_ptr()
    np.testing.assert_array_equal(np.asarray(seen, np.float32), x.float().numpy())


def truths(case: Case, **changes) -> Result:
    """What the definition gives for another case, as if an implementation had computed this one by it."""
    return replace(case, **changes).truth


WINDOWED = Case("window", CASES[0].layouts, CASES[0].template, 64, window=20)


@pytest.mark.parametrize(
    ("wrong", "shows"),
    [
        (lambda case: truths(case, window=None), "outputs"),
        (lambda case: truths(case, categories=(3, 0, 2, 2)), "outputs"),
        (lambda case: replace(case.truth, lse=case.truth.lse * np.log2(np.e)), "log-sum-exps"),
        (lambda case: replace(case.truth, lse=np.nan_to_num(case.truth.lse, neginf=-1e30)), "log-sum-exps"),
        (
            lambda case: replace(
                case.truth, out=np.where(np.isneginf(case.truth.lse).swapaxes(1, 2)[..., None], np.nan, case.truth.out)
            ),
            "outputs",
        ),
    ],
    ids=["dropped-window", "wrong-category", "lse-in-bits", "lse-of-padding", "nan-in-padding"],
)
def test_a_wrong_result_is_named(wrong, shows):
    """Against every other implementation; and those agree among one another."""
    case = WINDOWED
    fine, off = case.truth, wrong(case)
    differences = {x.pair: x for x in compare(case, {"fine": fine, "wrong": off})}
    assert differences["reference", "fine"].equal
    for pair in (("reference", "wrong"), ("fine", "wrong")):
        assert not differences[pair].equal
        assert "wrong" in str(differences[pair])
        x = differences[pair]
        assert (x.out > x.out_allowed) if shows == "outputs" else (x.lse > x.lse_allowed)


def test_the_bar_is_that_of_a_plain_computation():
    """bfloat16 may err where float32 may not; float32 stays near its last places."""
    allowed = {case.dtype: [case.allowed(name) for name in ("triton", "portable")] for case in CASES}
    for dtype, low, high in (("bfloat16", 1e-3, 0.1), ("float16", 1e-4, 0.02), ("float32", 0, 1e-5)):
        assert all(low < out < high for out, _ in allowed[dtype])
    assert all(triton[1] < 2e-5 and portable[1] < 5e-4 for triton, portable in allowed.values())
    assert CASES[0].allowed("reference") == (0, 0)


def test_what_pallas_does_not_serve_is_declared():
    left_out = [case.name for case in CASES if not parity_attention.serves("pallas", case)]
    assert left_out == ["D64 fp32, short runs of text, ragged batch, window"]
