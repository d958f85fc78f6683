"""A budget in JAX: its gradients are true, its programs are shared, and it finds what torch finds."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

import jax_blindsight
import torch_blindsight
from harm import SMALL, measure_in_torch
from jax_blindsight import gradient, observe, residual
from jax_blindsight.calibration import measure
from jax_blindsight.gradient import attention_backward, visible_keys
from shared_profiles import Category, Layout, category_mask
from shared_profiles.budget import Budget, chosen_point
from shared_profiles.classifier import Thresholds
from strategies import layouts
from tiny_jax import in_numpy, twin
from tiny_models import FAMILIES, make_ids, make_inputs, make_model

QUIET = dict(template=SMALL, progress=False)
PROGRAMS = [
    (gradient, "_logits"),
    (gradient, "_by_last"),
    (gradient, "_end_backward"),
    (gradient, "attention_backward"),
    (gradient, "_begin_backward"),
    (observe, "_compare"),
    (residual, "stream_of"),
]
T, HEADS, KV_HEADS, DIM = 224, 6, 2, 8


@jax.jit
def plain(q, k, v, mask, by_out):
    """Masked softmax attention, its log-sum-exps and, by autodiff, its gradients; rows that see nothing are zero."""

    def run(q, k, v):
        k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
        scores = jnp.where(mask, jnp.einsum("bhtd,bhsd->bhts", q, k) * 0.3, -1e30)
        weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)
        lse = jnp.where(mask.any(axis=-1), jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
        return jnp.einsum("bhts,bhsd->bthd", weights, v), lse

    out, back, lse = jax.vjp(run, q, k, v, has_aux=True)
    return out, lse, back(by_out)


@settings(max_examples=40)
@given(layouts(max_images=4), st.sampled_from([None, 30]), st.integers(0, 2**31))
def test_the_attentions_gradients_are_those_of_a_masked_softmax(layout, window, seed):
    """Causal and bidirectional images, padding that holds numbers, windows, groups of query heads: float64."""
    mask, n = np.zeros((T, T), dtype=bool), layout.n_tokens
    mask[:n, :n] = category_mask(layout, Category.DENSE, SMALL, window=window)
    rng = np.random.default_rng(seed)
    heads, kv_heads, rows = (1, HEADS, T, DIM), (1, KV_HEADS, T, DIM), (1, T, HEADS, DIM)
    q, k, v, by_out = (rng.standard_normal(shape) for shape in (heads, kv_heads, kv_heads, rows))
    with jax.enable_x64(True):
        out, lse, exact = plain(q, k, v, mask, by_out)
        got = attention_backward(q, k, v, out, lse, by_out, visible_keys(layout, T, window), scale=0.3)
    for name, mine, true in zip("qkv", got, exact, strict=True):
        np.testing.assert_allclose(mine, true, rtol=0, atol=1e-12, err_msg=name)


def largest(jaxpr):
    """The most elements of any array in a program, its loops included."""
    inner = [x for eqn in jaxpr.eqns for x in jaxprs_in_params(eqn.params)]
    own = [math.prod(x.aval.shape) for eqn in jaxpr.eqns for x in eqn.outvars]
    return max([*own, *map(largest, inner)])


def test_no_array_of_the_attentions_gradients_grows_with_the_square():
    elements = []
    for n in (2048, 4096):
        shapes = [(1, HEADS, n, 64), *[(1, KV_HEADS, n, 64)] * 2, (1, n, HEADS, 64), (1, HEADS, n), (1, n, HEADS, 64)]
        given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        visible = jax.ShapeDtypeStruct((2, n), jnp.int32)
        run = partial(gradient._attention_backward, scale=1.0, block=gradient._ON_CPU)
        elements.append(largest(jax.make_jaxpr(run)(*given, visible).jaxpr))
    assert HEADS * 4096 * 64 <= elements[1] <= 2 * elements[0] < 4096**2 / 4


def test_a_gpu_takes_larger_blocks_within_a_bound_of_memory():
    """Compiled for CUDA without one: 512 x 2048 for 28 heads, 1024 x 2048 for 4; a CPU keeps its small ones."""
    for heads, platform, block in ((4, "cuda", "1x4096x2048"), (28, "cuda", "1x14336x2048"), (4, "cpu", "1x1024x512")):
        shapes = [(1, heads, 4096, 64), *[(1, 1, 4096, 64)] * 2, (1, 4096, heads, 64), (1, heads, 4096)]
        given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [*shapes, shapes[3]]]
        visible = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
        traced = attention_backward.trace(*given, visible, scale=1.0)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert set(re.findall(r"exponential .*tensor<(\d+x\d+x\d+)xf32>", text)) == {block}


def test_larger_blocks_give_the_same_gradients():
    rng, n, kv_heads = np.random.default_rng(0), 2048, 1
    layout = Layout(n - 5, 3, n - 5, np.array([(10, 11, 900, 901), (905, 906, 1800, 1801)]), bidirectional=True)
    shapes = (1, 2, n, DIM), (1, kv_heads, n, DIM), (1, kv_heads, n, DIM), (1, n, 2, DIM), (1, 2, n), (1, n, 2, DIM)
    given = [rng.standard_normal(shape) for shape in shapes]
    given[4] += 9  # log-sum-exps, so that no weight is large
    with jax.enable_x64(True):
        visible = jnp.asarray(visible_keys(layout, n, 700))
        small, large = (
            jax.jit(partial(gradient._attention_backward, scale=0.3, block=block))(*map(jnp.asarray, given), visible)
            for block in (gradient._ON_CPU, gradient._ON_GPU)
        )
    for ours, theirs in zip(large, small, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_harm_is_that_of_torch_by_programs_that_all_layers_and_prompts_share(family):
    """Prompts of two to four images are one bucket; Gemma's layers have two windows."""
    model = twin(family)
    programs = [getattr(module, name) for module, name in PROGRAMS]
    for program in programs:
        program.clear_cache()
    for i in range(3):
        prompt = make_inputs(family, [make_ids(2 + i, seed=i)], seed=i)
        theirs = measure_in_torch(model.single, prompt, stream=True).records()[0]
        ours = measure(model.params, in_numpy(prompt), SMALL, rankings=("gradient", "residual"))
        assert ours.harm.keys() == theirs.harm.keys() == {"gradient", "residual"}
        for name, harm in theirs.harm.items():
            np.testing.assert_allclose(ours.harm[name], harm, rtol=2e-3, atol=1e-5 * harm.max(), err_msg=name)
        assert (ours.harm["gradient"][:, :-1] > 0).all() and not ours.harm["gradient"][:, -1].any()
        for name in ("mass", "error"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=2e-5, atol=2e-6, err_msg=name)
        assert [program._cache_size() for program in programs] == [1] * len(programs)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_passes_through_every_program(family):
    """Traced only: products of mixed dtypes show there."""
    params = twin(family).params
    config = params.config
    text = config.text

    def half(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    weights = jax.tree.map(lambda x: half(*x.shape), params.weights)
    layer = weights["decoder"]["layers"][0]
    hidden, out = half(1, 128, text.hidden_size), half(1, 128, text.n_heads, text.head_dim)
    heads = [half(1, h, 128, text.head_dim) for h in (text.n_heads, text.n_kv_heads, text.n_kv_heads)]
    by = (jax.ShapeDtypeStruct((1, 1, 128, text.head_dim // 2), jnp.float32),) * 2
    run = partial(jax.eval_shape, partial(gradient._end_backward, config=config, mesh=None))
    assert run(layer, hidden, out, hidden) == (hidden, out)
    run = partial(jax.eval_shape, partial(gradient._begin_backward, config=config, mesh=None))
    assert run(layer, hidden, by, tuple(heads), hidden) == hidden
    vector, row = (jax.ShapeDtypeStruct(*x) for x in (((1, text.vocab_size), jnp.float32), ((), jnp.int32)))
    assert jax.eval_shape(partial(gradient._by_last, config=config), weights, hidden, row, vector) == hidden
    lse, keys = (jax.ShapeDtypeStruct(*x) for x in (((1, text.n_heads, 128), jnp.float32), ((2, 128), jnp.int32)))
    back = partial(attention_backward, scale=1.0)
    assert list(jax.eval_shape(back, *heads, out, lse, out, keys)) == heads


def test_a_sure_models_gradients_do_not_vanish_in_float16(tmp_path):
    model, prompt = make_model("qwen2_5_vl"), make_inputs("qwen2_5_vl", [make_ids(3)], seed=3)
    with torch.no_grad():
        second, first = model(**prompt).logits[0, -1].sort().values[-2:]
        model.get_decoder().norm.weight.mul_(30 / (first - second))
    model.save_pretrained(tmp_path)
    exact = measure_in_torch(model, prompt).harm["gradient"][0, :, :3]
    params = jax_blindsight.load(tmp_path, dtype="float16")
    rough = measure(params, in_numpy(prompt), SMALL, rankings=("gradient",)).harm["gradient"][:, :3]
    assert rough.sum() == pytest.approx(exact.sum(), rel=0.25)
    assert np.corrcoef(np.log(exact).ravel(), np.log(rough).ravel())[0, 1] > 0.98


@pytest.mark.parametrize("ranking", ["residual", "error"])
def test_both_backends_find_the_same(ranking):
    """Equal statistics and equal divergences, so equal points; one compiled program a point."""
    model = twin("qwen2_5_vl")
    prompts = [make_inputs("qwen2_5_vl", [make_ids(2, seed=i)], seed=i) for i in range(5)]
    budget = Budget(0.05, ranking)
    theirs = torch_blindsight.calibrate(model.single, prompts[:3], budget=budget, held_out=prompts[3:], **QUIET)
    inputs = [in_numpy(x) for x in prompts]
    ours = jax_blindsight.calibrate(model.params, inputs[:3], budget=budget, held_out=inputs[3:], **QUIET)
    np.testing.assert_array_equal(ours.categories, theirs.categories)
    assert set(ours.summary.harm) == set(theirs.summary.harm) == {ranking} - {"error"}
    assert [point.heads for point in ours.curve] == [point.heads for point in theirs.curve]
    for mine, other in zip(ours.curve, theirs.curve, strict=True):
        assert mine.kl == pytest.approx(other.kl, rel=2e-3, abs=1e-6)
        assert (mine.kept, mine.agreement, mine.n_prompts) == (other.kept, other.agreement, 2)
    assert ours.choice["held_out"] == theirs.choice["held_out"]
    assert ours.provenance.n_prompts == 5 and chosen_point(ours).kl <= 0.05


def test_what_cannot_be_searched_is_refused():
    params = twin("qwen2_5_vl").params
    with pytest.raises(ValueError, match=r"by a budget or by thresholds\. Got both"):
        jax_blindsight.calibrate(params, [], budget=0.1, thresholds=Thresholds(), **QUIET)
    with pytest.raises(ValueError, match=r"the budget must be a finite number of nats.* Got -1"):
        jax_blindsight.calibrate(params, [], budget=-1, **QUIET)
    with pytest.raises(ValueError, match=r"the quantile must be a multiple of 0\.05 in \[0, 1\]\. Got 0\.33"):
        jax_blindsight.calibrate(params, [], thresholds=Thresholds(quantile=0.33), **QUIET)
    with pytest.raises(ValueError, match=r"dataset must be the data's name, a string that is not empty\. Got None"):
        jax_blindsight.calibrate(params, [], dataset=None, **QUIET)
    with pytest.raises(ValueError, match="impl must be one of"):
        jax_blindsight.calibrate(params, [], impl="nothing", **QUIET)
    with pytest.raises(ValueError, match="local_block must be left out where a template is given"):
        jax_blindsight.calibrate(params, [], local_block=16, **QUIET)
