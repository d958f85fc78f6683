"""The Triton kernel's work list: its size, its order, and that its tiles cover every row and key once."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindsight_kernels.triton_work import build_work, order_heads, pack
from shared_profiles import Category, Layout, SinkTemplate, build_plan, category_mask
from strategies import chunks, layouts, templates, windows

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
    assert order_heads((3, 3, 1, 3, 0, 3, 2, 2), 4, work) is heads


def test_longest_tiles_come_first():
    layout = long_prompt(4)
    work = build_work((build_plan(layout, SinkTemplate()), build_plan(layout, SinkTemplate())), 64, CPU)
    start, stop, lo, hi = (work.tiles[:, :, i].numpy() for i in (5, 8, 9, 12))
    assert (np.diff(stop - start + hi - lo, axis=1) <= 0).all()


@settings(max_examples=25)
@given(st.data(), layouts(), templates, windows, st.none() | st.integers(1, 30), st.sampled_from([4, 16]))
def test_tiles_show_every_row_exactly_the_keys_of_its_category(data, layout, template, window, max_keys, block_k):
    """The kernel's walk in NumPy: full tiles must need no mask, and nothing may be seen twice or missed."""
    q_start, q_stop = data.draw(chunks(layout))
    arguments = dict(window=window, q_start=q_start, q_stop=q_stop)
    plan = build_plan(layout, template, tile_rows=8, max_keys=max_keys, **arguments)
    work = build_work((plan,), block_k, CPU)
    rows, packed = work.gathered_rows.numpy(), work.packed_positions.numpy()
    for category in Category:
        seen = np.zeros((q_stop - q_start, layout.n_tokens), dtype=int)
        for tile in work.tiles[category].tolist():
            _, flags, row_start, n_rows, _, *spans = tile
            pos = rows[row_start : row_start + n_rows] if flags & 1 else np.arange(row_start, row_start + n_rows)
            for i, (start, full, n_full, stop) in enumerate((spans[:4], spans[4:])):
                index = np.arange(start, stop)
                keys = index if i else packed[start:stop]
                masked = (index < full) | (index >= full + n_full * block_k)
                late = (keys > pos[:, None]) & (not (flags & 2 and i))
                hidden = late | (window is not None and keys <= pos[:, None] - (window or 0))
                assert not hidden[:, ~masked].any()
                np.add.at(seen, (pos[:, None] - q_start, keys[None, :]), ~hidden)
        np.testing.assert_array_equal(seen, category_mask(layout, category, template, **arguments))


def test_packing_gathers_text_and_sinks_of_every_row():
    layout = Layout(30, 2, 30, np.array([(6, 7, 20, 21)]))
    plans = tuple(build_plan(x, SinkTemplate()) for x in (layout, Layout(30, 0, 30, layout.images)))
    work = build_work(plans, 16, CPU)
    k = torch.randn(2, 3, 40, 8)
    packed = pack(k, work)
    want = [k[b][:, list(x)] for b, p in enumerate(plans) for x in (p.packed_text, p.packed_sinks)]
    assert torch.equal(packed[0], torch.cat(want, dim=1))


@pytest.mark.parametrize(("categories", "n_kv_heads"), [((0, 1, 2, 4), 2), ((0, 1, 2), 2)], ids=["value", "count"])
def test_wrong_categories_are_refused(categories, n_kv_heads):
    work = build_work((build_plan(long_prompt(2), SinkTemplate()),), 64, CPU)
    with pytest.raises(ValueError, match="categories must be one of"):
        order_heads(categories, n_kv_heads, work)
