"""Calibration in JAX: videos, and what is skipped and refused. `test_parity_profile` compares it with torch's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from jax.sharding import AbstractMesh

import jax_blindsight
import torch_blindsight
from shared_profiles import SPARSE, SinkTemplate
from shared_profiles.budget import Budget
from shared_profiles.classifier import Thresholds
from tiny_jax import in_numpy, twin
from tiny_models import make_ids, make_inputs, make_video_inputs

TEMPLATE = SinkTemplate((0, 1), (1, 2), 8)
QUIET = dict(template=TEMPLATE, progress=False)


def test_what_is_skipped_and_what_is_refused():
    params, by_thresholds = twin("qwen2_5_vl").params, QUIET | dict(thresholds=Thresholds())
    one = in_numpy(make_inputs("qwen2_5_vl", [make_ids(1)]))
    with pytest.raises(ValueError, match=r"at least two images. Got none \(2 prompts with fewer\)"):
        jax_blindsight.calibrate(params, [one, one | {"pixel_values": one["pixel_values"] + 1}], **by_thresholds)
    with pytest.raises(ValueError, match="Got none"):
        jax_blindsight.calibrate(params, [], **QUIET)
    batch = in_numpy(make_inputs("qwen2_5_vl", [make_ids(2), make_ids(2)]))
    with pytest.raises(ValueError, match=r"input_ids \[1, N\]. Got \(2, 46\)"):
        jax_blindsight.calibrate(params, [batch], **QUIET)
    with pytest.raises(ValueError, match=r"input_ids \[1, N\]"):
        jax_blindsight.calibrate(params, [{}], **QUIET)
    blind = in_numpy(make_inputs("qwen2_5_vl", [make_ids(2)])) | {"pixel_values": None}
    with pytest.raises(ValueError, match="Got none for 2 runs"):
        jax_blindsight.calibrate(params, [blind], **by_thresholds)


def test_what_is_wrong_with_given_held_out_prompts_shows_before_anything_is_measured(monkeypatch):
    params = twin("qwen2_5_vl").params
    good, one = (in_numpy(make_inputs("qwen2_5_vl", [make_ids(n)])) for n in (2, 1))
    pixels = good["pixel_values"]
    no_batch, few, nan = (
        {"input_ids": [1, 2]},
        good | {"pixel_values": pixels[1:]},
        good | {"pixel_values": pixels * np.nan},
    )
    monkeypatch.setattr(jax_blindsight.calibration, "measure", None)
    for held_out, message in (
        ([good, no_batch], r"held-out prompt 1: .* input_ids \[1, N\]. Got \(2,\)"),
        ([good, few], r"held-out prompt [0-9a-f]{32}: pixel_values must have shape"),
        ([good, nan], r"held-out prompt [0-9a-f]{32}: the model must answer with numbers. Got NaN"),
        ([one], r"two images. Got none \(1 prompts held out\)"),
        (np.float32(1.5), r"share of the prompts in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax_blindsight.calibrate(params, [good], held_out=held_out, **QUIET)


def test_a_mesh_that_deals_out_rows_is_refused_before_any_prompt():
    mesh = AbstractMesh((2, 1), ("data", "model"))
    with pytest.raises(ValueError, match=r"^calibrate .* the mesh's data axis must be 1\. Got 2 devices"):
        jax_blindsight.calibrate(replace(twin("qwen2_5_vl").params, mesh=mesh), [{}], **QUIET)


def test_prompts_may_be_lists():
    params = twin("qwen2_5_vl").params
    prompts = [in_numpy(make_inputs("qwen2_5_vl", [make_ids(2, seed=seed)], seed=seed)) for seed in range(2)]
    lists = [{name: x.tolist() for name, x in prompt.items()} for prompt in prompts]
    a, b = (jax_blindsight.calibrate(params, x[:1], held_out=x[1:], **QUIET) for x in (prompts, lists))
    assert a.summary == b.summary and a.curve == b.curve


def test_padding_counts_for_nothing():
    params = twin("qwen2_5_vl").params
    prompts = [in_numpy(make_inputs("qwen2_5_vl", [make_ids(2, seed=seed)], seed=seed)) for seed in range(2)]
    shape = prompts[0]["input_ids"].shape
    padded = [
        {name: np.pad(x, ((0, 0), (3, 0))) if x.shape == shape else x for name, x in prompt.items()}
        for prompt in prompts
    ]
    options = QUIET | dict(budget=Budget(0.05, "error"))  # gradients are random by the ids, padding included
    a, b = (jax_blindsight.calibrate(params, x[:1], held_out=x[1:], **options) for x in (prompts, padded))
    assert b.provenance.n_tokens == a.provenance.n_tokens
    for category in SPARSE:
        np.testing.assert_allclose(b.summary.mass_mean[category], a.summary.mass_mean[category], atol=2e-6)
    np.testing.assert_allclose([point.kl for point in b.curve], [point.kl for point in a.curve], rtol=1e-3, atol=1e-6)


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
