"""One profile, two frameworks: calibrated in either, the same categories; used in either, the same answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import jax_blindsight
import torch_blindsight
from parity_profile import ABSOLUTE, MEASURED, RELATIVE, TEMPLATE, calibrate_both, prompts_of, records
from parity_subjects import DEVICES, Subject, differing, tiny
from shared_profiles import SinkTemplate, measured
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.profile import Profile
from shared_profiles.statistics import Statistics
from tiny_jax import in_numpy
from tiny_models import FAMILIES

QUIET = dict(template=TEMPLATE, progress=False)
THRESHOLDS = Thresholds(gamma_sink=0.9, gamma_intra=0.6, gamma_dense=0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_frameworks_measure_the_same(family, device, tmp_path):
    """Prompt by prompt, within the rounding of float32; so they choose the same categories by any thresholds."""
    both = calibrate_both(tiny(family, device), prompts_of(family, 4), tmp_path, thresholds=THRESHOLDS)
    ours, theirs = both["jax"], both["torch"]
    assert ours.records.keys() == theirs.records.keys() >= {"prompt_ids", "counts", *MEASURED}
    for name, values in theirs.records.items():
        if name in MEASURED:
            np.testing.assert_allclose(ours.records[name], values, rtol=RELATIVE[device], atol=ABSOLUTE, err_msg=name)
        else:
            np.testing.assert_array_equal(ours.records[name], values, name)
    a, b = ours.profile, theirs.profile
    np.testing.assert_array_equal(a.categories, b.categories)
    np.testing.assert_array_equal(a.categories, classify(a.summary, THRESHOLDS))
    chosen = set()
    for gamma in np.linspace(0.1, 0.99, 30):
        by_both = [classify(x.summary, Thresholds(gamma, gamma, gamma)) for x in (a, b)]
        np.testing.assert_array_equal(*by_both)
        chosen |= set(by_both[0].flat)
    assert len(chosen) == 4
    assert a.fingerprint == b.fingerprint and a.choice == b.choice and a.template == b.template == TEMPLATE
    assert a.provenance.dataset_hash == b.provenance.dataset_hash
    assert set(a.provenance.versions) == {"blindsight-vlm", "jax", "flax", "numpy"}


def test_both_choose_the_same_within_a_budget(tmp_path, monkeypatch):
    """Ranked by the gradient, the default, and measured on held-out prompts, point by point."""
    monkeypatch.setattr(measured, "SMALLEST_GROUP", 1)
    both = calibrate_both(tiny("qwen2_5_vl"), prompts_of("qwen2_5_vl", 6), tmp_path, budget=0.02, held_out=0.4)
    a, b = both["jax"].profile, both["torch"].profile
    np.testing.assert_array_equal(a.categories, b.categories)
    assert a.choice["ranking"] == b.choice["ranking"] == "gradient" and set(a.summary.harm) == {"gradient", "residual"}
    assert [(p.heads, p.n_images) for p in a.curve] == [(p.heads, p.n_images) for p in b.curve]
    assert 0 < np.count_nonzero(a.categories) < a.categories.size


def test_one_goes_on_where_the_other_stopped(tmp_path):
    """A state of two prompts by torch, then of one more by JAX, then none is measured again by either."""
    model, (held, *prompts) = tiny("qwen2_5_vl"), prompts_of("qwen2_5_vl", 4)
    state = tmp_path / "state.npz"

    def options(framework):
        return QUIET | dict(held_out=[held if framework is torch_blindsight else in_numpy(held)], state=state)

    def interrupted():
        yield from map(in_numpy, prompts)
        raise KeyboardInterrupt

    torch_blindsight.calibrate(model.single, prompts[:2], **options(torch_blindsight))
    begun = records(state)
    with pytest.raises(KeyboardInterrupt):
        jax_blindsight.calibrate(model.params, interrupted(), **options(jax_blindsight))
    ended = records(state)
    assert len(Statistics.load(state)) == 3
    kept = np.isin(ended["prompt_ids"], begun["prompt_ids"])
    np.testing.assert_array_equal(ended["harm"][:, kept], begun["harm"])
    profiles = [
        torch_blindsight.calibrate(model.single, prompts, **options(torch_blindsight)),
        jax_blindsight.calibrate(model.params, map(in_numpy, prompts), **options(jax_blindsight)),
    ]
    assert profiles[0].summary == profiles[1].summary
    assert profiles[0].summary.harm
    other = options(jax_blindsight) | dict(template=SinkTemplate((0,), (1,), 8))
    with pytest.raises(ValueError, match="must have been measured with this template"):
        jax_blindsight.calibrate(model.params, map(in_numpy, prompts), **other)


@pytest.mark.parametrize(("family", "maker"), [("qwen2_5_vl", "torch"), ("gemma3", "jax")])
def test_a_profile_made_in_one_drives_the_other(family, maker, tmp_path):
    """Saved by its maker, loaded by both: hidden states, logits and 64 tokens are the same again."""
    model = tiny(family)
    options = dict(thresholds=Thresholds(gamma_dense=0.5, gamma_intra=0.6), **QUIET)
    if maker == "torch":
        made = torch_blindsight.calibrate(model.single, prompts_of(family, 2), **options)
    else:
        made = jax_blindsight.calibrate(model.params, map(in_numpy, prompts_of(family, 2)), **options)
    made.save(tmp_path / "profile.json")
    profile = Profile.load(tmp_path / "profile.json")
    assert 0 < profile.categories.mean() < 3
    profile.require(model.params.fingerprint)
    with torch_blindsight.patch(model.single, profile) as handle:
        assert handle.profile is profile
    driven = Subject(model.single, model.double, replace(model.params, profile=profile), model.inputs, "cpu")
    assert not {run: where for run, where in differing(driven).items() if where is not None}
    np.testing.assert_array_equal(*(driven.traces[name, True].tokens for name in ("jax", "torch")))
