"""A budget in JAX: the search that torch runs, on this backend's own measurements."""

from __future__ import annotations

import numpy as np
import pytest

import jax_blindsight
import torch_blindsight
from shared_profiles import SinkTemplate
from shared_profiles.budget import Budget, chosen_point
from shared_profiles.classifier import Thresholds
from tiny_jax import in_numpy, twin
from tiny_models import make_ids, make_inputs

TEMPLATE = SinkTemplate((0, 1), (1, 2), 8)
QUIET = dict(template=TEMPLATE, progress=False)


def test_both_backends_find_the_same():
    """Equal statistics and equal divergences, so equal points; one compiled program a point."""
    model = twin("qwen2_5_vl")
    prompts = [make_inputs("qwen2_5_vl", [make_ids(2, seed=i)], seed=i) for i in range(5)]
    budget = Budget(0.05, "error")
    theirs = torch_blindsight.calibrate(model.single, prompts[:3], budget=budget, held_out=prompts[3:], **QUIET)
    inputs = [in_numpy(x) for x in prompts]
    ours = jax_blindsight.calibrate(model.params, inputs[:3], budget=budget, held_out=inputs[3:], **QUIET)
    np.testing.assert_array_equal(ours.categories, theirs.categories)
    assert [point.heads for point in ours.curve] == [point.heads for point in theirs.curve]
    for mine, other in zip(ours.curve, theirs.curve, strict=True):
        assert mine.kl == pytest.approx(other.kl, rel=2e-3, abs=1e-6)
        assert (mine.kept, mine.agreement, mine.n_prompts) == (other.kept, other.agreement, 2)
    assert ours.choice["held_out"] == theirs.choice["held_out"]
    assert ours.provenance.n_prompts == 5 and chosen_point(ours).kl <= 0.05


def test_what_it_cannot_rank_by_is_said():
    params = twin("qwen2_5_vl").params
    with pytest.raises(NotImplementedError, match=r"ranks heads by 'error'\. Got 'gradient'.*torch_blindsight"):
        jax_blindsight.calibrate(params, [], budget=Budget(0.1), **QUIET)
    with pytest.raises(ValueError, match=r"by a budget or by thresholds\. Got both"):
        jax_blindsight.calibrate(params, [], budget=Budget(0.1, "error"), thresholds=Thresholds(), **QUIET)
