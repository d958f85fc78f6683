"""The work list of the Pallas kernel: its shapes and its order. `test_parity_plan` reads back what its tiles say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax", reason="the Pallas kernel needs jax, which is not installed")

import jax

from blindsight_kernels.pallas_prefill import order_heads
from blindsight_kernels.pallas_work import FIELDS, GATHERED, NO_TILE, build_pallas_work, stack_pallas_works
from blindsight_kernels.plans import build_plans
from parity_plan import read_pallas
from shared_profiles import Category, Layout, SinkTemplate, build_plan, category_mask
from strategies import cut


def long_prompt(n: int, n_images: int, text: int = 12) -> Layout:
    begin = 20 + np.arange(n_images) * ((n - 40) // n_images)
    end = begin + (n - 40) // n_images - text
    return Layout(n, 0, n, np.stack([begin, begin + 1, end - 1, end], axis=1))


TEXT = Layout(200_000, 0, 200_000, np.zeros((0, 4)))


def test_dense_rows_are_dense_under_every_category():
    template, layouts = SinkTemplate(local_block=8), [long_prompt(150, 2, 5), long_prompt(150, 3, 7)]
    plans = tuple(build_plan(x, template, tile_rows=8) for x in layouts)
    work = build_pallas_work(plans, 16, n_queries=152, n_keys=152, dense=(True, False))
    for category in Category:
        for b, runs_as in enumerate((Category.DENSE, category)):
            mask = category_mask(layouts[b], runs_as, template)
            np.testing.assert_array_equal(read_pallas(work, category)[b, :150, :150], mask)
    assert (np.diff(work.cost[[Category.INTRA_IMAGE_SINK, Category.DENSE]]) > 0).all()


def test_works_of_several_devices_are_stacked_with_equal_shapes():
    """Each one's part says what it said alone, though images, packed keys and parts differ."""
    template = SinkTemplate(local_block=8)
    layouts = [long_prompt(150, 1, 9), long_prompt(150, 12, 5), long_prompt(150, 2, 40)]
    works = [
        build_pallas_work((build_plan(x, template, tile_rows=8, max_keys=n),), 16, n_queries=152, n_keys=152)
        for x, n in zip(layouts, (None, 20, 60), strict=True)
    ]
    shapes = {tuple(x.shape for x in jax.tree.leaves(work)) for work in works}
    stacked = stack_pallas_works(works)
    assert len(shapes) == 3 and stacked.n_slots == max(work.n_slots for work in works) > 1
    for i, (work, layout) in enumerate(zip(works, layouts, strict=True)):
        part = jax.tree.map(lambda x, i=i: x[i], stacked)
        merged = [row for row in part.merges.tolist() if row[0] != NO_TILE]
        alone = [row for row in work.merges.tolist() if row[0] != NO_TILE]
        assert [row[: len(alone[0])] for row in merged] == alone if alone else not merged
        for category in Category:
            np.testing.assert_array_equal(
                read_pallas(part, category)[0, :150, :150], category_mask(layout, category, template)
            )


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


@pytest.mark.parametrize(("window", "edges"), [(None, 1), (3000, 2)], ids=["", "window"])
def test_masks_are_paid_only_where_rows_differ(window, edges):
    """At the causal limit, and where a window begins: K tiles of 128 rows, and one where the span begins."""
    layout = long_prompt(9000, 4)
    work = build_pallas_work(build_plans([layout], SinkTemplate(), window=window), 64)
    tiles = work.tiles[work.q_tiles[work.tiles[:, :, FIELDS.index("q_tile")], 3] & GATHERED == 0]
    for source in ("packed", "range"):
        n_tiles, low, high = (tiles[:, FIELDS.index(f"{source}_{name}")] for name in ("n_tiles", "low", "high"))
        assert (n_tiles - (high - low) <= 1 + 3 * edges).all()
    assert (high > low).any()


def test_a_prompt_of_300k_tokens_stays_under_a_megabyte():
    assert build_pallas_work(build_plans([long_prompt(300_000, 150)], SinkTemplate()), 128).nbytes < 1 << 20


@pytest.mark.parametrize(("text", "n_slots"), [(12, 128), (60, 256), (700, 1)])
def test_parts_stay_few_however_long_the_text(text, n_slots):
    work = build_pallas_work(build_plans([long_prompt(200_000, 150, text)], SinkTemplate()), 128)
    assert work.n_slots == n_slots


@pytest.mark.parametrize(
    ("layout", "n_parts", "where"),
    [
        (TEXT, 1, {}),
        (TEXT, 13, dict(q_start=199_000)),
        (cut(TEXT, 20_000), 2, {}),
        (long_prompt(300_000, 1, 10_000), 2, dict(window=20_000)),
        (TEXT, 8, dict(q_start=199_000, max_keys=25_000)),
        (TEXT, 1, dict(q_start=199_000, max_keys=None)),
    ],
    ids=["whole", "end", "beginning", "window", "given-length", "never"],
)
def test_text_is_cut_by_what_its_rows_read(layout, n_parts, where):
    """Of a chunk its own rows count, under a sliding window the keys within; what the caller says is kept to."""
    assert build_plans([layout], SinkTemplate(), **where)[0].n_parts[-1] == n_parts


def test_heads_of_a_group_stay_adjacent_and_the_most_expensive_come_first():
    cost = np.array([100, 10, 30, 40], np.float32)
    heads = np.asarray(order_heads(np.array([1, 2, 0, 3, 3, 2], np.int32), cost, np.arange(6) // 2))
    np.testing.assert_array_equal(heads, [[2, 1, 0], [3, 1, 3], [4, 2, 3], [5, 2, 2], [1, 0, 2], [0, 0, 1]])


def test_refusals():
    template = SinkTemplate(local_block=256)
    plan = build_plan(long_prompt(4000, 2), template)
    with pytest.raises(ValueError, match=r"must share q_start, window and n_tokens"):
        build_pallas_work((plan, build_plan(long_prompt(4000, 2), template, window=9)), 128)
    with pytest.raises(ValueError, match=r"must share .*Got \[\]"):
        build_pallas_work((), 128)
    with pytest.raises(ValueError, match=r"one bool per plan, 1. Got 2"):
        build_pallas_work((plan,), 128, dense=(True, False))
    with pytest.raises(ValueError, match=r"n_keys >= 4000 .*Got n_queries=4000, n_keys=3968"):
        build_pallas_work((plan,), 128, n_queries=4000, n_keys=3968)
    with pytest.raises(ValueError, match=r"n_queries >= 1,"):
        build_pallas_work((build_plan(long_prompt(4000, 2), template, q_start=4000),), 128)
    with pytest.raises(ValueError, match=r"at most 128 rows. Got .*tile_rows=256"):
        build_pallas_work((plan, build_plan(long_prompt(4000, 2), template, tile_rows=256)), 128)


def test_more_tiles_than_a_launch_can_have_are_refused():
    """Tiles of 8 rows, as local blocks of 8 demand: one prompt of 300K tokens fits, two do not."""
    plan = build_plans([long_prompt(300_000, 150)], SinkTemplate(local_block=8))[0]
    assert build_pallas_work((plan,), 128).tiles.shape[1] < 65_536
    with pytest.raises(
        NotImplementedError, match=r"at most 65535 tiles .*Got 83710, for 2 x 300000 .* of 8 rows\. Make"
    ):
        build_pallas_work((plan, plan), 128)
