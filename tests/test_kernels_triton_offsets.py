"""Offsets past 2**31 elements: the Triton kernels give what they give for the same numbers close together.

All strides themselves fit 32 bits: Triton would pass larger ones as 64-bit numbers and so hide a narrow product.
"""

from __future__ import annotations

import numpy as np
import pytest

from far_tensors import DIM, HEADS, N, run
from interpreted import worker

FAR = 2**31 + 2**20  # elements


@pytest.fixture(scope="module")
def call():
    """Runs a function where Triton is interpreted."""
    with worker() as call:
        yield call


FAR_TENSORS = {
    "q-batch": dict(q=(FAR // 2, 1024, 16, 1)),
    "q-head": dict(q=(4096, FAR // 2, 16, 1)),
    "q-row": dict(q=(4096, 16, FAR // 32, 1)),
    "k-batch": dict(k=(FAR // 2, 1024, 16, 1)),
    "k-head": dict(k=(4096, FAR // 2, 16, 1)),
    "k-row": dict(k=(4096, 16, FAR // 16, 1)),
    "out-batch": dict(out=(FAR // (2 * HEADS * DIM), HEADS)),
    "out-row": dict(out=(N, FAR // (16 * DIM))),
    "lse-batch": dict(out=(FAR // (2 * HEADS), HEADS)),
    "parts-head": dict(parts=(FAR // (2 * 16 * DIM),)),
    "part-lse-head": dict(parts=(FAR // (2 * 16),)),
}


@pytest.fixture(scope="module")
def near(call) -> dict[bool, tuple[np.ndarray, np.ndarray]]:
    """Results of tensors that are not spread out; text rows computed whole (False) and in parts (True)."""
    return {split: call(run, {}, split) for split in (False, True)}


@pytest.mark.parametrize("far", FAR_TENSORS.values(), ids=FAR_TENSORS)
def test_far_offsets_are_computed_in_64_bits(call, near, far):
    split = "parts" in far or "out" in far  # these two the merge uses as well
    out, lse = call(run, far, split)
    assert np.isfinite(out).all()
    assert np.abs(out).min() > 0
    np.testing.assert_array_equal(out, near[split][0])
    np.testing.assert_array_equal(lse, near[split][1])


def test_heads_that_are_left_out_are_not_merged(call, near):
    out, lse = call(run, {}, True, skip_dense=True)
    assert not out[:, :, 0].any()  # as allocated
    assert not lse[:, 0].any()
    np.testing.assert_array_equal(out[:, :, 1:], near[True][0][:, :, 1:])
