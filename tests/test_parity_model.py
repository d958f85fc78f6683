"""Whole models: transformers, patched transformers and JAX, from the embeddings to 64 tokens, point by point."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from parity_model import N_NEW, Bar, Trace, divergence_of_logits, first_other_token, point_names
from parity_subjects import (
    DEVICES,
    SHIPPED,
    Subject,
    differing,
    is_profile_at_work,
    lost_in_bfloat16,
    perturbed,
    tiny,
    trained,
)
from tiny_models import FAMILIES

SUBJECTS = {family: partial(tiny, family) for family in FAMILIES} | {x.name: partial(trained, x) for x in SHIPPED}
devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(params=SUBJECTS)
def subject(request, device) -> Subject:
    """A model, with its prompts and its profile, on a device."""
    return SUBJECTS[request.param](device)


def test_torch_rounds_nothing_to_tf32():
    """Else its runs on a GPU would differ from JAX's by more than float32 does."""
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@devices
def test_no_point_differs(subject):
    """Keys, values, attention and output of every layer, and logits, dense and sparse: against float64 and in pairs."""
    assert is_profile_at_work(subject)
    assert not {run: where for run, where in differing(subject).items() if where is not None}
    names = point_names(subject.params.config.text.n_layers)
    for bar in subject.bars.values():
        assert list(bar.allowed) == names
        assert max(bar.allowed[x] / np.abs(bar.truth.points[x]).max() for x in names) < 1e-3


@devices
def test_64_greedy_tokens_are_the_same(subject):
    for sparse in (False, True):
        ours, theirs = (subject.traces[name, sparse].tokens for name in ("jax", "torch"))
        assert ours.shape == theirs.shape == (2, N_NEW)
        assert (difference := first_other_token(ours, theirs)) is None, difference


@devices
def test_each_ran_by_the_implementation_that_is_meant(subject, device):
    kernels = {("torch", False): "sdpa", ("torch", True): "portable" if device == "cpu" else "triton"}
    kernels |= {("jax", False): "portable", ("jax", True): "portable"}
    assert {name: trace.impl for name, trace in subject.traces.items()} == kernels


@devices
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_loses_no_more_than_transformers_does(family, device):
    """KL per token from float32, at most twice that of transformers' own bfloat16; on a Hopper GPU both kernels."""
    lost = lost_in_bfloat16(family, device)
    kernels = {"transformers": "reference", "torch": "portable", "jax": "portable"}
    assert {name: x.impl for name, x in lost.items()} == (
        kernels if device == "cpu" else kernels | {"torch": "triton", "jax": "pallas"}
    )
    assert 0 < lost["transformers"].kl < 0.01
    for name in ("torch", "jax"):
        assert 0 < lost[name].kl <= 2 * lost["transformers"].kl, name


@pytest.mark.parametrize(
    ("path", "point", "before"),
    [
        (("layers", 0, "attention", "k_proj", "kernel"), "layer 0 keys", "embeddings"),
        (("layers", 2, "attention", "v_proj", "kernel"), "layer 2 values", "layer 2 keys"),
        (("layers", 1, "attention", "q_proj", "kernel"), "layer 1 attention", "layer 1 values"),
        (("layers", 3, "mlp", "down_proj", "kernel"), "layer 3 output", "layer 3 attention"),
        (("norm", "scale"), "logits", "layer 3 output"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_first_divergence_is_named(path, point, before):
    """One weight off by 1%: everything after it differs, and the message names where it begins."""
    subject = tiny("qwen2_5_vl")
    got = subject.jax(sparse=True, params=perturbed(subject.params, *path))
    said = subject.bars[True].divergence(got)
    assert said is not None and said.startswith(f"first divergence: {point}, equal up to {before}. Error "), said


def test_a_dropped_window_is_named():
    """Of the second layer of Gemma 3: its keys are still those of transformers, what it attends to is not."""
    subject = tiny("gemma3")
    config = subject.params.config
    windows = (config.text.windows[0], None, *config.text.windows[2:])
    wrong = replace(subject.params, config=replace(config, text=replace(config.text, windows=windows)))
    said = subject.bars[True].divergence(subject.jax(sparse=True, params=wrong))
    assert said is not None and "first divergence: layer 1 attention, equal up to layer 1 values" in said


def test_how_a_difference_is_told():
    truth = Trace({"embeddings": np.ones((2, 2)), "logits": np.full((2, 3), 4.0)}, "sdpa")
    plain = Trace({"embeddings": np.ones((2, 2)), "logits": np.full((2, 3), 4.5)}, "sdpa")
    bar = Bar(truth, plain)
    assert bar.divergence(plain) is None
    assert bar.divergence(replace(plain, points=plain.points | {"logits": np.full((2, 3), 6.0)})) == (
        "first divergence: logits, equal up to embeddings. Error 2, allowed 1.5, relative 0.5; 1 of 2 points differ."
    )
    gone = replace(plain, points=plain.points | {"embeddings": np.full((2, 2), np.nan)})
    assert "first divergence: embeddings, from the very start. Error inf" in bar.divergence(gone)
    a = np.arange(8).reshape(2, 4)
    assert first_other_token(a, a) is None
    assert first_other_token(a + (a == 6), a).startswith("first divergence: token 2 of row 1 is 7, not 6; 1 of 8")
    logits = np.log([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]])
    np.testing.assert_allclose(divergence_of_logits(logits + 3, logits), 0, atol=1e-15)
    np.testing.assert_allclose(divergence_of_logits(logits[:1], np.log([[1.0, 1e-300, 1e-300]])), np.log(2))
