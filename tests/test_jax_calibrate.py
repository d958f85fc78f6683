"""Calibration in JAX: the statistics, categories and state files of `torch_blindsight.calibrate`."""

from __future__ import annotations

import numpy as np
import pytest

import jax_blindsight
import torch_blindsight
from shared_profiles import SPARSE, SinkTemplate
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.statistics import Statistics
from tiny_jax import in_numpy, twin
from tiny_models import FAMILIES, make_ids, make_inputs, make_video_inputs

TEMPLATE = SinkTemplate((0, 1), (1, 2), 8)
QUIET = dict(template=TEMPLATE, progress=False)


def prompts_of(family, n):
    return [make_inputs(family, [make_ids(2 + i % 3, seed=i)], seed=i) for i in range(n)]


def records(path):
    """Everything in a state, prompt by prompt."""
    with np.load(path) as state:
        return {name: state[name] for name in state.files}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_measure_the_same(family, tmp_path):
    """Prompt by prompt, within the rounding of float32; so they choose the same categories."""
    model, prompts = twin(family), prompts_of(family, 4)
    thresholds = Thresholds(gamma_sink=0.9, gamma_intra=0.6, gamma_dense=0.5)
    options = dict(dataset="puzzles", thresholds=thresholds, **QUIET)
    theirs = torch_blindsight.calibrate(model.single, prompts, state=tmp_path / "torch.npz", **options)
    ours = jax_blindsight.calibrate(model.params, map(in_numpy, prompts), state=tmp_path / "jax.npz", **options)
    torch_state, jax_state = records(tmp_path / "torch.npz"), records(tmp_path / "jax.npz")
    for name in ("schema", "origin", "prompt_ids", "counts", "kept"):
        np.testing.assert_array_equal(jax_state[name], torch_state[name])
    for name in ("mass", "error"):
        np.testing.assert_allclose(jax_state[name], torch_state[name], rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(ours.categories, theirs.categories)
    np.testing.assert_array_equal(ours.categories, classify(ours.summary, thresholds))
    chosen = set()
    for gamma in np.linspace(0.1, 0.99, 30):
        by_both = [classify(x.summary, Thresholds(gamma, gamma, gamma)) for x in (ours, theirs)]
        np.testing.assert_array_equal(*by_both)
        chosen |= set(by_both[0].flat)
    assert len(chosen) == 4
    assert ours.fingerprint == theirs.fingerprint and ours.choice == theirs.choice and ours.template == TEMPLATE
    assert ours.provenance.dataset_hash == theirs.provenance.dataset_hash
    assert set(ours.provenance.versions) == {"blindsight", "jax", "flax", "numpy"}


def test_one_backend_goes_on_where_the_other_stopped(tmp_path):
    """A state of two prompts by torch, then of one more by JAX, then none is measured again by either."""
    model, prompts = twin("qwen2_5_vl"), prompts_of("qwen2_5_vl", 3)
    state = tmp_path / "state.npz"

    def interrupted():
        yield from map(in_numpy, prompts)
        raise KeyboardInterrupt

    torch_blindsight.calibrate(model.single, prompts[:2], state=state, **QUIET)
    begun = records(state)
    with pytest.raises(KeyboardInterrupt):
        jax_blindsight.calibrate(model.params, interrupted(), state=state, **QUIET)
    ended = records(state)
    assert len(Statistics.load(state)) == 3
    kept = np.isin(ended["prompt_ids"], begun["prompt_ids"])
    np.testing.assert_array_equal(ended["mass"][kept], begun["mass"])
    profiles = [
        torch_blindsight.calibrate(model.single, prompts, state=state, **QUIET),
        jax_blindsight.calibrate(model.params, map(in_numpy, prompts), state=state, **QUIET),
    ]
    assert profiles[0].summary == profiles[1].summary
    other = dict(QUIET, template=SinkTemplate((0,), (1,), 8))
    with pytest.raises(ValueError, match="origin"):
        jax_blindsight.calibrate(model.params, map(in_numpy, prompts), state=state, **other)


def test_a_profile_made_here_drives_both():
    model, prompts = twin("qwen2_5_vl"), prompts_of("qwen2_5_vl", 2)
    profile = jax_blindsight.calibrate(
        model.params, map(in_numpy, prompts), thresholds=Thresholds(gamma_dense=0.5, gamma_intra=0.6), **QUIET
    )
    with torch_blindsight.patch(model.single, profile) as handle:
        assert handle.profile is profile
    profile.require(model.params.fingerprint)
    assert 0 < profile.categories.mean() < 3
    for category in SPARSE:
        assert (profile.summary.mass[category] <= 1).all() and (profile.summary.error[category] >= 0).all()


def test_what_is_skipped_and_what_is_refused():
    params = twin("qwen2_5_vl").params
    one = in_numpy(make_inputs("qwen2_5_vl", [make_ids(1)]))
    with pytest.raises(ValueError, match=r"at least two images. Got none \(2 prompts with fewer\)"):
        jax_blindsight.calibrate(params, [one, one | {"pixel_values": one["pixel_values"] + 1}], **QUIET)
    with pytest.raises(ValueError, match="Got none"):
        jax_blindsight.calibrate(params, [], **QUIET)
    batch = in_numpy(make_inputs("qwen2_5_vl", [make_ids(2), make_ids(2)]))
    with pytest.raises(ValueError, match=r"input_ids \[1, N\]. Got \(2, 46\)"):
        jax_blindsight.calibrate(params, [batch], **QUIET)
    with pytest.raises(ValueError, match=r"input_ids \[1, N\]"):
        jax_blindsight.calibrate(params, [{}], **QUIET)
    with pytest.raises(ValueError, match="Got none for 2 runs"):
        jax_blindsight.calibrate(params, [in_numpy(make_inputs("qwen2_5_vl", [make_ids(2)])) | {"pixel_values": None}])


def test_videos_are_measured():
    model, inputs = twin("qwen2_5_vl"), make_video_inputs([3, 1])
    thresholds = Thresholds(gamma_dense=0.5, gamma_intra=0.6)
    theirs = torch_blindsight.calibrate(model.single, [inputs], thresholds=thresholds, **QUIET)
    ours = jax_blindsight.calibrate(model.params, [in_numpy(inputs)], thresholds=thresholds, **QUIET)
    for category in SPARSE:
        np.testing.assert_allclose(
            ours.summary.mass_mean[category], theirs.summary.mass_mean[category], rtol=2e-5, atol=2e-6
        )
    np.testing.assert_array_equal(ours.categories, theirs.categories)
