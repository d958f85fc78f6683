"""Both frameworks hand their kernels the same plan: bit for bit before, row by row and key by key after its packing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blindsight_kernels.pallas_work import build_pallas_work
from blindsight_kernels.plans import build_plans
from blindsight_kernels.triton_work import build_work
from jax_blindsight.work import attention_work
from parity_plan import (
    READERS,
    Prompts,
    alone,
    first_difference,
    keys_by_definition,
    plan_arrays,
    plans_of_jax,
    plans_of_torch,
    read_pallas,
    read_triton,
    read_xla,
)
from shared_profiles import Category, Layout, SinkTemplate
from shared_profiles.plan import build_plan
from strategies import chunks, cut, layouts, templates, windows


@st.composite
def prompts(draw) -> Prompts:
    """A ragged batch of two: a drawn prompt, whole or a chunk of it, and the same with one image only."""
    layout = draw(layouts(max_images=4, max_image=40))
    q_start, q_stop = draw(chunks(layout))
    rows = tuple(cut(x, q_stop) for x in (layout, alone(layout)))
    max_keys = draw(st.none() | st.integers(5, 40))
    return Prompts(rows, draw(templates), draw(windows), q_start, max_keys, draw(st.sampled_from([4, 16])))


def in_parts(**where) -> Prompts:
    """A ragged batch whose text rows are computed in two parts and, in its first row, in up to four."""
    images = np.array([(8, 9, 40, 41), (52, 53, 80, 80)])
    layouts = Layout(100, 2, 97, images), Layout(100, 50, 100, images[1:])
    return Prompts(layouts, SinkTemplate((0,), (1,), 8), max_keys=30, **where)


@settings(max_examples=25)
@given(prompts())
@example(in_parts())
@example(in_parts(window=70, q_start=45, block_k=4))
def test_every_kernel_is_told_the_same_keys(prompts):
    """Triton, Pallas and XLA work lists, read back: equal to the definition, and so to one another, in every row."""
    for category in Category:
        want = keys_by_definition(prompts, category)
        for name, read in READERS.items():
            difference = first_difference(read(prompts, category), want, prompts)
            assert difference is None, f"{name}, {category.name}: {difference}"


@settings(max_examples=8)
@given(layouts(max_images=3), templates, windows)
def test_rows_marked_dense_are_dense_under_every_category(layout, template, window):
    """As the JAX backend marks rows of a batch that run dense; the other row does not."""
    n = layout.n_tokens
    prompts = Prompts((layout, layout), template, window)
    sizes = dict(n_queries=-(-max(n, 1) // 8) * 8, n_keys=-(-n // 8) * 8)
    pallas = build_pallas_work(prompts.plans(), 16, dense=(False, True), **sizes)
    xla = attention_work(prompts.layouts, template, window=window, dense=[False, True], **sizes)
    dense = keys_by_definition(prompts, Category.DENSE)[1]
    for category in Category:
        want = np.stack([keys_by_definition(prompts, category)[0], dense])
        np.testing.assert_array_equal(read_pallas(pallas, category)[:, :n, :n], want)
        np.testing.assert_array_equal(read_xla(xla, category, (n, n), window), want)


@settings(max_examples=25)
@given(st.data(), layouts(max_images=4), windows)
def test_the_plans_are_the_same_bytes(data, layout, window):
    """As each kernel's own entry point builds them; the cache that would hand out one object is emptied between."""
    block = data.draw(st.sampled_from([8, 96, 128, 256]))
    layout = cut(layout, data.draw(st.integers(1, max(layout.n_tokens, 1)))) if layout.n_tokens else EMPTY
    q_start = data.draw(st.integers(0, layout.n_tokens - 1))
    prompts = Prompts((layout, alone(layout)), SinkTemplate(local_block=block), window, q_start)
    with pytest.MonkeyPatch.context() as patch:
        theirs = plans_of_torch(prompts, patch)
    build_plan.cache_clear()
    for a, b in zip(theirs, plans_of_jax(prompts), strict=True):
        assert a is not b
        assert (a.tile_rows, a.window, a.q_start) == (b.tile_rows, b.window, b.q_start)
        assert a.n_image_tiles == b.n_image_tiles and a.layout == b.layout and a.template == b.template
        ours = plan_arrays(b)
        assert plan_arrays(a).keys() == ours.keys()
        for name, x in plan_arrays(a).items():
            assert x.dtype == ours[name].dtype == np.int32, name
            assert x.shape == ours[name].shape and x.tobytes() == ours[name].tobytes(), name


EMPTY = Layout(1, 0, 1, np.zeros((0, 4)))
THREE_IMAGES = Prompts(
    (Layout(120, 2, 118, np.array([(5, 6, 30, 31), (33, 34, 70, 71), (71, 71, 100, 101)])),),
    SinkTemplate((0, 1), (1, 2), 16),
    window=40,
)


def test_long_texts_are_cut_alike():
    """Where text rows are so many that parts are longer than 16K keys, and where they are few."""
    for n_tokens, image_stop, n_parts in ((36_000, 9_000, 1), (20_000, 19_900, 2)):
        image = (20, 21, image_stop, image_stop + 1)
        long = Prompts((Layout(n_tokens, 0, n_tokens, np.array([image])),), SinkTemplate())
        with pytest.MonkeyPatch.context() as patch:
            (theirs,) = plans_of_torch(long, patch, head_dim=64)
        build_plan.cache_clear()
        (ours,) = plans_of_jax(long)
        assert theirs is not ours and ours.n_parts.max() == n_parts
        for name, x in plan_arrays(theirs).items():
            assert x.tobytes() == plan_arrays(ours)[name].tobytes(), name


@pytest.mark.parametrize(
    ("where", "n_tokens", "n_parts"),
    [
        (dict(max_keys=None, q_start=35_000), 36_000, 1),
        (dict(max_keys=9_000), 36_000, 4),
        (dict(), 36_000, 1),
        (dict(q_start=35_000), 36_000, 3),
        (dict(q_start=20_000), 20_500, 2),
        (dict(q_start=23_200, window=18_000), 36_000, 2),
    ],
    ids=["never", "asked", "much-text", "chunk", "chunk-amid", "window"],
)
def test_text_ranges_are_split_by_the_text_at_hand(where, n_tokens, n_parts):
    """That is the rows of this very chunk, and the keys within their window; or as a caller asks."""
    layout = Layout(n_tokens, 0, n_tokens, np.array([(20, 21, 9_000, 9_001)]))
    (plan,) = build_plans([layout], SinkTemplate(), **where)
    assert plan.n_parts.max() == n_parts


@pytest.mark.parametrize("name", ["packed_stop", "lo", "hi", "packed_start"])
@pytest.mark.parametrize("kernel", ["triton", "pallas"])
def test_a_number_off_by_one_is_seen(kernel, name):
    """Of one tile of one category."""
    (plan,) = THREE_IMAGES.plans()
    sinks = Category.INTRA_IMAGE_SINK
    array = getattr(plan, name).copy()
    tile = plan.n_image_tiles - 1
    array[sinks, tile] += -1 if name in ("hi", "packed_stop") else 1
    wrong = dataclasses.replace(plan, **{name: array})
    for one, differs in ((plan, False), (wrong, True)):
        if kernel == "triton":
            seen = read_triton(build_work((one,), 16, torch.device("cpu")), THREE_IMAGES, sinks)
        else:
            seen = read_pallas(build_pallas_work((one,), 16, n_queries=120, n_keys=120), sinks)
        difference = first_difference(seen, keys_by_definition(THREE_IMAGES, sinks), THREE_IMAGES)
        assert (difference is not None) == differs
        assert not differs or "batch row 0, query at" in difference


def test_a_dropped_window_is_seen():
    whole = dataclasses.replace(THREE_IMAGES, window=None)
    for name, read in READERS.items():
        difference = first_difference(
            read(whole, Category.DENSE), keys_by_definition(THREE_IMAGES, Category.DENSE), whole
        )
        assert difference is not None and "too often" in difference, name
