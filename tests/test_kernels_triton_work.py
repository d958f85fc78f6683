"""The Triton kernel's work list: its size and its order. What its tiles say, `test_parity_plan` reads back."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from blindsight_kernels.triton_work import GATHERED, build_work, order_heads, pack
from shared_profiles import Category, Layout, SinkTemplate, build_plan

CPU = torch.device("cpu")


def long_prompt(n_images: int = 146, image: int = 2048) -> Layout:
    """About 300K tokens: images of 2K between short texts."""
    begin = 20 + np.arange(n_images) * (image + 7)
    images = np.stack([begin, begin + 1, begin + 1 + image, begin + 2 + image], axis=1)
    return Layout(int(images[-1, 3]) + 100, 0, int(images[-1, 3]) + 100, images)


def test_stays_small_at_300k_tokens():
    plan = build_plan(long_prompt(), SinkTemplate(), max_keys=16384)
    begin = time.perf_counter()
    work = build_work((plan,), 64, CPU)
    seconds = time.perf_counter() - begin
    assert work.nbytes < 1 << 20
    assert seconds < 0.2  # a few milliseconds on a quiet machine
    assert build_work((plan,), 64, CPU) is work


def test_heads_of_a_group_are_adjacent_and_the_dearest_come_first():
    work = build_work((build_plan(long_prompt(8), SinkTemplate()),), 64, CPU)
    heads = order_heads((3, 3, 1, 3, 0, 3, 2, 2), 4, work)
    assert heads.tolist() == [[4, 2, 0], [5, 2, 3], [0, 0, 3], [1, 0, 3], [6, 3, 2], [7, 3, 2], [3, 1, 3], [2, 1, 1]]
    other = build_work((build_plan(long_prompt(9), SinkTemplate()),), 64, CPU)
    assert order_heads((3, 3, 1, 3, 0, 3, 2, 2), 4, other) is heads, "another prompt uploads nothing anew"
    assert not order_heads((0, 0), 2, work, skip_dense=True).tolist()


def test_longest_tiles_come_first():
    layout = long_prompt(4)
    work = build_work((build_plan(layout, SinkTemplate()), build_plan(layout, SinkTemplate())), 64, CPU)
    start, stop, lo, hi = (work.tiles[:, :, i].numpy() for i in (5, 8, 9, 12))
    assert (np.diff(stop - start + hi - lo, axis=1) <= 0).all()


def test_packing_gathers_text_and_sinks_of_every_row():
    layout = Layout(30, 2, 30, np.array([(6, 7, 20, 21)]))
    plans = tuple(build_plan(x, SinkTemplate()) for x in (layout, Layout(30, 0, 30, layout.images)))
    work = build_work(plans, 16, CPU)
    k = torch.randn(2, 3, 40, 8)
    packed = pack(k, work)
    want = [k[b][:, list(x)] for b, p in enumerate(plans) for x in (p.packed_text, p.packed_sinks)]
    assert torch.equal(packed[0], torch.cat(want, dim=1))


@pytest.mark.parametrize(("window", "edges"), [(None, 1), (3000, 2)], ids=["", "window"])
def test_masks_are_paid_only_where_rows_differ(window, edges):
    """At the causal limit, and where a window begins: there the keys of a tile's rows, and what fills a K tile up."""
    plan = build_plan(long_prompt(4), SinkTemplate(), window=window)
    tiles = build_work((plan,), 64, CPU).tiles.numpy()
    for span in (slice(5, 9), slice(9, 13)):
        start, _, n_full, stop = np.moveaxis(tiles[(tiles[:, :, 1] & GATHERED) == 0][:, span], 1, 0)
        assert (stop - start - n_full * 64 < edges * plan.tile_rows + 64).all()
    assert n_full.any()


def test_an_image_reads_its_start_delimiter_with_the_sinks():
    """So that ranges begin with the image, like its tiles, and end with a whole number of K tiles."""
    layout = Layout(80, 0, 80, np.array([(5, 6, 38, 39), (39, 41, 73, 74)]))
    plan = build_plan(layout, SinkTemplate((), (), local_block=16), tile_rows=16)
    tiles = build_work((plan,), 16, CPU).tiles[Category.INTRA_IMAGE_SINK].numpy()
    n_packed = {lo: stop - start for start, stop, lo in tiles[(tiles[:, 1] & GATHERED) == 0][:, [5, 8, 9]].tolist()}
    assert n_packed == {6: 6, 41: 9}, "text, and delimiters up to the image's own"


def test_an_image_alone_has_packed_keys_too():
    """A tensor descriptor must not be empty."""
    plan = build_plan(Layout(40, 0, 40, np.array([(0, 0, 40, 40)])), SinkTemplate((), ()), tile_rows=16)
    work = build_work((plan,), 16, CPU)
    assert work.packed_positions.tolist() == [0]
    assert pack(torch.zeros(1, 2, 40, 8), work).shape == (1, 2, 1, 8)


@pytest.mark.parametrize(("categories", "n_kv_heads"), [((0, 1, 2, 4), 2), ((0, 1, 2), 2)], ids=["value", "count"])
def test_wrong_categories_are_refused(categories, n_kv_heads):
    work = build_work((build_plan(long_prompt(2), SinkTemplate()),), 64, CPU)
    with pytest.raises(ValueError, match="categories must be one of"):
        order_heads(categories, n_kv_heads, work)


def test_plans_of_different_windows_are_refused():
    layout = long_prompt(1)
    plans = build_plan(layout, SinkTemplate()), build_plan(layout, SinkTemplate(), window=9)
    with pytest.raises(ValueError, match=r"must share q_start, window and n_tokens"):
        build_work(plans, 16, CPU)
