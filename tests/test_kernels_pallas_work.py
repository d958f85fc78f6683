"""The work list of the Pallas kernel: what its tiles say, walked in NumPy, is the definition of every category."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax", reason="the Pallas kernel needs jax, which is not installed")

import jax
from hypothesis import given, settings
from hypothesis import strategies as st

from blindsight_kernels.pallas_prefill import order_heads, rows_of
from blindsight_kernels.pallas_work import BLOCK_Q, FIELDS, PallasWork, build_pallas_work, build_plans
from shared_profiles import Category, Layout, SinkTemplate, build_plan, category_mask
from strategies import chunks, layouts, templates, windows

BLOCK_K = 16


def seen(work: PallasWork, category: Category) -> np.ndarray:
    """How often each query looks at each key, `[B, T, S]`, by the rules of the kernel."""
    index, oldest, newest, row_of = (np.asarray(x) for x in rows_of(work))
    counts = np.zeros((work.n_batch * work.n_queries, work.n_keys), int)
    n_packed = work.packed.shape[1]
    for tile in work.tiles[category]:
        field = dict(zip(FIELDS, tile.tolist(), strict=True))
        rows = np.arange(BLOCK_Q) + field["q_tile"] * BLOCK_Q
        mine = rows[row_of[index[rows]] == rows]
        for source in ("packed", "range"):
            first, n_tiles, low, high, start, stop = (
                field[f"{source}_{name}"] for name in ("first", "n_tiles", "low", "high", "start", "stop")
            )
            assert first % 8 == 0
            assert 0 <= low <= high <= n_tiles
            for j in range(n_tiles):
                key = first + j * BLOCK_K + np.arange(BLOCK_K)
                if source == "packed":
                    assert key[-1] < n_packed
                    batch, position = work.packed[:, key]
                    allowed = (key >= start) & (key < stop) & (position >= oldest[mine, None])
                    assert (batch[(key >= start) & (key < stop)] == field["batch"]).all()
                else:
                    position = key
                    allowed = (key >= np.maximum(oldest[mine], start)[:, None]) & (
                        key <= np.minimum(newest[mine], stop - 1)[:, None]
                    )
                if low <= j < high:
                    assert allowed.all()
                for row, keys in zip(mine, allowed, strict=True):
                    np.add.at(counts[index[row]], position[keys], 1)
    return counts.reshape(work.n_batch, work.n_queries, work.n_keys)


@settings(max_examples=40, deadline=None)
@given(st.data(), templates, windows, st.none() | st.integers(5, 40))
def test_tiles_say_what_the_masks_say(data, template, window, max_keys):
    layout = data.draw(layouts(max_images=3, max_image=40))
    q_start, q_stop = data.draw(chunks(layout))
    other = Layout(layout.n_tokens, layout.start, layout.stop, layout.images[:1], layout.bidirectional)
    both = [layout, other]
    plans = tuple(
        build_plan(x, template, tile_rows=8, window=window, q_start=q_start, q_stop=q_stop, max_keys=max_keys)
        for x in both
    )
    n_queries = q_stop - q_start
    work = build_pallas_work(plans, BLOCK_K, n_queries=168, n_keys=176)
    for category in Category:
        counts = seen(work, category)
        assert (counts[:, n_queries:] == 0).all()
        for b, one in enumerate(both):
            mask = category_mask(one, category, template, window=window, q_start=q_start, q_stop=q_stop)
            np.testing.assert_array_equal(counts[b, :n_queries, : layout.n_tokens], mask)


def long_prompt(n: int, n_images: int, text: int = 12) -> Layout:
    begin = 20 + np.arange(n_images) * ((n - 40) // n_images)
    end = begin + (n - 40) // n_images - text
    return Layout(n, 0, n, np.stack([begin, begin + 1, end - 1, end], axis=1))


def test_prompts_of_one_bucket_have_one_shape_and_longest_tiles_first():
    works = [
        build_pallas_work(build_plans([long_prompt(n, images)], SinkTemplate()), 128, n_queries=38912, n_keys=38912)
        for n, images in ((36000, 19), (38000, 23))
    ]
    shapes = [[x.shape for x in jax.tree.leaves(work)] for work in works]
    assert shapes[0] == shapes[1]
    assert jax.tree.structure(works[0]) == jax.tree.structure(works[1])
    steps = [FIELDS.index("packed_n_tiles"), FIELDS.index("range_n_tiles")]
    for table in works[0].tiles:
        n = table[:, steps].sum(axis=1)
        assert (np.diff(n[n > 0]) <= 2).all()  # sorted by keys, so a tile more or less for where spans begin
        assert (n[np.flatnonzero(n)[-1] + 1 :] == 0).all()


def test_a_prompt_of_300k_tokens_stays_under_a_megabyte():
    assert build_pallas_work(build_plans([long_prompt(300_000, 150)], SinkTemplate()), 128).nbytes < 1 << 20


@pytest.mark.parametrize(("text", "n_slots"), [(12, 128), (60, 256), (700, 1)])
def test_parts_stay_few_however_long_the_text(text, n_slots):
    work = build_pallas_work(build_plans([long_prompt(200_000, 150, text)], SinkTemplate()), 128)
    assert work.n_slots == n_slots


def test_heads_of_a_group_stay_adjacent_and_the_most_expensive_come_first():
    cost = np.array([100, 10, 30, 40], np.float32)
    heads = np.asarray(order_heads(np.array([1, 2, 0, 3, 3, 2], np.int32), cost, np.arange(6) // 2))
    np.testing.assert_array_equal(heads, [[2, 1, 0], [3, 1, 3], [4, 2, 3], [5, 2, 2], [1, 0, 2], [0, 0, 1]])


def test_refusals():
    template = SinkTemplate(local_block=256)
    plan = build_plan(long_prompt(4000, 2), template)
    with pytest.raises(ValueError, match=r"must share q_start, q_stop, window and n_tokens"):
        build_pallas_work((plan, build_plan(long_prompt(4000, 2), template, window=9)), 128)
    with pytest.raises(ValueError, match=r"must share .*Got \[\]"):
        build_pallas_work((), 128)
    with pytest.raises(ValueError, match=r"n_keys >= 4000 .*Got n_queries=4000, n_keys=3968"):
        build_pallas_work((plan,), 128, n_queries=4000, n_keys=3968)
    with pytest.raises(ValueError, match=r"n_queries >= 1,"):
        build_pallas_work((build_plan(long_prompt(4000, 2), template, q_start=4000),), 128)
    with pytest.raises(ValueError, match=r"at most 128 rows. Got .*tile_rows=256"):
        build_pallas_work((build_plan(long_prompt(4000, 2), template, tile_rows=256),), 128)
