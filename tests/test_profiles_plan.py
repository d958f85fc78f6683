"""The plan says exactly what the definition says, for every layout; and it is small and quick."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_profiles import (
    Category,
    Layout,
    SinkTemplate,
    build_plan,
    category_mask,
    count_pairs,
    image_tiles,
    packed_positions,
)
from strategies import chunks, cut, layouts, pruned_layouts, templates, windows


def expand(plan, category: Category) -> np.ndarray:
    """Reads a plan the way a kernel does and counts how often each key is seen: `[T, S]` int."""
    seen = np.zeros((plan.layout.n_tokens - plan.q_start, plan.layout.n_tokens), dtype=int)
    packed = plan.packed(category)
    for t in range(len(plan.n_rows)):
        rows = np.arange(plan.row_start[t], plan.row_start[t] + plan.n_rows[t])
        is_image = t < plan.n_image_tiles
        if not is_image:
            rows = plan.gathered_rows[rows]
        keys = np.concatenate(
            [
                packed[plan.packed_start[category, t] : plan.packed_stop[category, t]],
                np.arange(plan.lo[category, t], plan.hi[category, t]),
            ]
        )
        ok = (keys <= rows[:, None]) | (is_image and plan.layout.bidirectional)
        if plan.window is not None:
            ok &= keys > rows[:, None] - plan.window
        row, key = np.nonzero(ok)
        np.add.at(seen, (rows[row] - plan.q_start, keys[key]), 1)
    return seen


@settings(max_examples=600, deadline=None)
@given(st.data(), layouts() | pruned_layouts(), templates, windows)
def test_the_plan_is_the_definition(data, layout, template, window):
    q_start, stop = data.draw(chunks(layout))
    layout = cut(layout, stop)
    tile_rows = data.draw(st.sampled_from([d for d in (1, 2, 4, 8, 12) if template.local_block % d == 0]))
    max_keys = data.draw(st.none() | st.integers(1, 50))
    plan = build_plan(layout, template, tile_rows=tile_rows, window=window, q_start=q_start, max_keys=max_keys)
    for category in Category:
        mask = category_mask(layout, category, template, window=window, q_start=q_start)
        np.testing.assert_array_equal(expand(plan, category), mask.astype(int))


@settings(max_examples=300, deadline=None)
@given(layouts() | pruned_layouts(), templates, windows)
def test_tiles_are_well_formed(layout, template, window):
    plan = build_plan(layout, template, tile_rows=8, window=window, max_keys=16)
    assert (plan.n_rows >= 1).all() and (plan.n_rows <= 8).all()
    assert (plan.hi >= plan.lo).all() and (plan.packed_stop >= plan.packed_start).all()
    image_of = np.full(layout.n_tokens, -1)
    for i, (_, first, last, _) in enumerate(layout.images):
        image_of[first:last] = i
    for start, n in zip(plan.row_start[: plan.n_image_tiles], plan.n_rows[: plan.n_image_tiles], strict=True):
        assert len(set(image_of[start : start + n])) == 1  # no tile straddles an image's edge
    for i, keys in enumerate(zip(plan.lo.T, plan.hi.T, plan.packed_start.T, plan.packed_stop.T, strict=True)):
        visited = [len(range(lo, hi)) + len(range(start, stop)) for lo, hi, start, stop in zip(*keys, strict=True)]
        assert plan.n_keys[:, i].tolist() == visited
    gathered = np.arange(len(plan.n_rows)) >= plan.n_image_tiles
    assert ((plan.hi - plan.lo)[0, gathered] <= 16).all()


@settings(max_examples=400, deadline=None)
@given(layouts() | pruned_layouts(), templates, windows)
def test_accounting_counts_the_mask(layout, template, window):
    is_text = np.isin(np.arange(layout.n_tokens), layout.text)
    for category in Category:
        mask = category_mask(layout, category, template, window=window)
        counts = count_pairs(layout, category, template, window=window)
        image_rows = np.zeros(layout.n_tokens, dtype=bool)
        image_text = intra = 0
        for begin, first, last, _ in layout.images:
            image_rows[first:last] = True
            image_text += mask[first:last, is_text].sum()
            intra += mask[first:last, begin:last].sum()
        assert counts.text_rows == mask[~image_rows].sum()
        assert counts.image_text == image_text
        assert counts.intra == intra
        assert counts.total == mask.sum()


def long_prompt(n_tokens: int, n_images: int) -> Layout:
    """Evenly spread images with a little text between them."""
    step = n_tokens // n_images
    begin = np.arange(n_images) * step + 10
    return Layout(n_tokens, 0, n_tokens, np.stack([begin, begin + 1, begin + step - 12, begin + step - 11], 1))


def test_300k_tokens_plan_is_small_quick_and_cached():
    template = SinkTemplate()
    build_plan(long_prompt(20_000, 10), template)  # warm numpy up
    seconds = []
    for i in range(5):
        layout = long_prompt(300_000 - i, 150)
        begun = time.perf_counter()
        plan = build_plan(layout, template)
        seconds.append(time.perf_counter() - begun)
    assert plan.nbytes < 1_000_000
    assert min(seconds) < 0.1, "a loose bound for shared machines; `blindsight bench plan` measures"
    assert build_plan(long_prompt(300_000 - 4, 150), template) is plan


def test_a_category_may_be_a_number_but_no_other_thing():
    """As a profile's table has it; a name, as its file has it, had another category's mask and counts."""
    template = SinkTemplate(local_block=8)
    stored = np.array(list(Category), dtype=np.int8)
    layout = long_prompt(100, 3)
    plan = build_plan(layout, template, tile_rows=8)
    for category, number in zip(Category, stored, strict=True):
        mask = category_mask(layout, category, template)
        for asked in (number, category):  # the first to ask fills the cache for both
            assert count_pairs(layout, asked, template).total == mask.sum()
        np.testing.assert_array_equal(category_mask(layout, number, template), mask)
        packed = packed_positions(layout, category, template)
        np.testing.assert_array_equal(packed_positions(layout, number, template), packed)
        np.testing.assert_array_equal(plan.packed(number), packed)
        ours, theirs = (image_tiles(layout, c, template, packed) for c in (number, category))
        np.testing.assert_array_equal(ours.lo, theirs.lo)
    for wrong in ("SINK", 4, None):
        for function in (category_mask, packed_positions, count_pairs):
            with pytest.raises(ValueError, match=r"a category must be one of 0 DENSE, .* Got .*take Category\[name\]"):
                function(layout, wrong, template)


def test_refusals():
    layout = long_prompt(1000, 2)
    for rows in (48, 0, -8):
        with pytest.raises(ValueError, match=rf"tile_rows must divide .* Got {rows}"):
            build_plan(layout, SinkTemplate(), tile_rows=rows)
    with pytest.raises(ValueError, match=r"0 <= q_start <= 1000 must hold. Got 1001"):
        build_plan(layout, SinkTemplate(), q_start=1001)
    with pytest.raises(ValueError, match=r"window must be at least 1, or None. Got 0"):
        build_plan(layout, SinkTemplate(), window=0)
    with pytest.raises(ValueError, match=r"max_keys must be at least 1, or None. Got 0"):
        build_plan(layout, SinkTemplate(), max_keys=0)
