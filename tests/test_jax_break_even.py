"""Prompts that are too short to gain run dense in JAX, by what the loops would compute, and say so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import jax_blindsight
from jax_blindsight import break_even, portable
from jax_blindsight.break_even import gains
from jax_blindsight.implementations import build_work
from shared_profiles import Category, Layout, SinkTemplate

TEMPLATE = SinkTemplate((0, 1), (1, 2), 32)


def even_layout(n_images: int, image_tokens: int, *, start: int = 0, bidirectional: bool = False) -> Layout:
    """Images with 4 tokens of text before each; padding before `start`."""
    begin = np.arange(n_images) * (image_tokens + 6) + 4 + start
    images = np.stack([begin, begin + 1, begin + 1 + image_tokens, begin + 2 + image_tokens], axis=1)
    n_tokens = start + n_images * (image_tokens + 6)
    return Layout(n_tokens, start, n_tokens, images, bidirectional=bidirectional)


def model(*windows: int | None, bidirectional: bool = False) -> Any:
    return SimpleNamespace(text=SimpleNamespace(windows=windows), bidirectional=bidirectional)


def works(impl: Any, layouts: list[Layout], windows: Any = (None,), q_start: int = 0, **options: Any) -> dict:
    n_keys = -(-layouts[0].n_tokens // 8) * 8
    sizes: dict[str, Any] = dict(q_start=q_start, n_queries=n_keys - q_start // 8 * 8, n_keys=n_keys, head_dim=64)
    return {w: build_work(impl, layouts, TEMPLATE, window=w, **sizes, **options) for w in windows}


@pytest.mark.parametrize(
    ("window", "bidirectional", "categories"),
    [
        (None, False, [0] * 5),
        (None, False, [0, 1, 2, 3, 3]),
        (50, False, [0, 1, 2, 3, 3]),
        (None, True, [0, 0, 1, 1, 2]),
    ],
    ids=["dense", "mixed", "window", "both ways"],
)
def test_what_is_counted_is_what_the_loops_compute(window, bidirectional, categories, monkeypatch):
    """Every step of every loop, counted as it runs."""
    layouts = [
        even_layout(n, size, start=start, bidirectional=bidirectional) for n, size, start in ((3, 70, 0), (5, 39, 3))
    ]
    work = works("portable", layouts, (window,), q_start=100)[window]
    computed = []
    absorb = portable._absorb

    def counted(state, q, k, *rest):
        computed.append(q.shape[0] * q.shape[1] * k.shape[1])
        return absorb(state, q, k, *rest)

    monkeypatch.setattr(portable, "_absorb", counted)
    q = np.zeros((2, 5, work.gathered_rows.shape[1], 8), np.float32)
    kv = np.zeros((2, 5, work.n_keys, 8), np.float32)
    want = []
    with jax.disable_jit():
        for b in range(2):
            row = jax.tree.map(lambda x, b=b: jax.numpy.asarray(x[b]), work)
            heads = jax.numpy.asarray(categories)
            computed.clear()
            portable.attend_sequence(
                *map(jax.numpy.asarray, (q[b], kv[b], kv[b])), row, heads, window=window, scale=1.0
            )
            want.append(sum(computed))
    counts = tuple(np.bincount(categories, minlength=4).tolist())
    np.testing.assert_array_equal(break_even._portable(work, counts), want)


@pytest.mark.parametrize("impl", ["portable", "pallas"])
def test_long_prompts_gain_and_short_ones_do_not(impl):
    sparse, dense = np.full((2, 4), Category.INTRA_IMAGE_SINK), np.full((2, 4), Category.DENSE)
    long, short = (works(impl, [even_layout(n, size)]) for n, size in ((12, 512), (6, 16)))
    assert gains(model(None, None), sparse, long)
    assert not gains(model(None, None), sparse, short)
    assert not gains(model(None, None), dense, long), "there is nothing to gain"
    assert not gains(model(None, None), sparse, works(impl, [even_layout(6, 16)] * 8)), "short ones stay short"
    assert not gains(model(None, None), sparse, works(impl, [even_layout(12, 512)], dense=[True]))


@pytest.mark.parametrize("impl", ["portable", "pallas"])
def test_a_layer_counts_with_its_own_window(impl):
    """Dense heads leave out what a window hides, too: with little else there is nothing to gain."""
    layout = even_layout(12, 512)
    sparse = np.full((1, 4), Category.INTRA_IMAGE_SINK)
    of_each = works(impl, [layout], (None, 64))
    assert gains(model(None), sparse, of_each)
    assert not gains(model(64), sparse, of_each)
    assert gains(model(64, None), sparse.repeat(2, axis=0), of_each)


def test_of_several_devices_the_one_with_most_to_do_counts():
    """All sparse heads on one of two devices: the other keeps every layer waiting."""
    work = works("portable", [even_layout(12, 512)] * 2)
    categories = np.array([[3, 3, 0, 0]])
    assert gains(model(None), categories, work)
    assert not gains(model(None), categories, work, SimpleNamespace(shape=dict(data=1, model=2)))
    assert gains(model(None), np.array([[3, 0, 3, 0]]), work, SimpleNamespace(shape=dict(data=1, model=2)))
    lone = works("portable", [even_layout(12, 512)] * 2, dense=[False, True])
    assert gains(model(None), categories, lone)
    assert not gains(model(None), categories, lone, SimpleNamespace(shape=dict(data=2, model=1)))
    shared = works("pallas", [even_layout(12, 512)] * 2, n_shards=2)
    assert gains(model(None), categories, shared, SimpleNamespace(shape=dict(data=2, model=1)))


@pytest.mark.parametrize(
    "change", [dict(), dict(bidirectional=True), dict(windows=(8192,)), dict(start=8), dict(q_start=8)], ids=str
)
def test_the_vendors_speed_counts_where_it_computes_the_dense_heads(change, monkeypatch):
    """Plain causal prompts from their first token on. However fast it is, the others are of our own kernel."""
    change = dict(change)
    windows, q_start = change.pop("windows", (None,)), change.pop("q_start", 0)
    work = works("pallas", [even_layout(12, 512, **change)], windows, q_start=q_start)
    of_model = model(*windows, bidirectional=change.get("bidirectional", False))
    sparse = np.full((1, 4), Category.INTRA_IMAGE)
    assert gains(of_model, sparse, work)
    monkeypatch.setattr(break_even, "_CUDNN", 1e9)
    plain = windows == (None,) and not change and not q_start
    assert gains(of_model, sparse, work) == (not plain)


def test_answers_too(monkeypatch):
    seen = []

    def stop(params, inputs, **options):
        seen.append(options["break_even"])
        raise KeyboardInterrupt

    monkeypatch.setattr("jax_blindsight.generation.sparse_prefill", stop)
    params: Any = SimpleNamespace(eos=())
    for options in ({}, dict(break_even=False)):
        with pytest.raises(KeyboardInterrupt):
            jax_blindsight.generate(params, {"input_ids": np.ones((1, 9), int)}, max_new_tokens=2, **options)
    assert seen == [True, False]
