"""The work list of the JAX attention: what its arrays say, read back as a mask; shapes that depend on buckets alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_blindsight.buckets import bucket
from jax_blindsight.work import attention_work
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from strategies import layouts, templates, windows


def read_back(work, category: Category, shape: tuple[int, int], window: int | None) -> np.ndarray:
    """The mask `[T, S]` that a tile loop shows, by the docstring of `work.py`; every row must be told once."""
    q_start, mask = int(work.q_start[0]), np.zeros(shape, dtype=bool)
    tiles = [
        (np.arange(t[0], t[1]), *t[2:]) for t in work.tiles[0, category, : work.n_tiles[0, category]].astype(np.int64)
    ]
    for first, stop, lo, hi in work.gathered[0, : work.n_gathered[0, category]].astype(np.int64):
        tiles.append((work.gathered_rows[0, first:stop], lo, hi, 0, 0, 0))
    keys = np.arange(shape[1])
    told = np.concatenate([rows for rows, *_ in tiles]) if tiles else np.zeros(0)
    assert len(set(told.tolist())) == len(told)
    for rows, lo, hi, open_to, p_start, p_stop in tiles:
        for row in rows:
            shown = (keys >= lo) & (keys < hi) & (keys < max(row + 1, open_to))
            shown[work.packed[0, category, p_start:p_stop]] = True
            if window is not None:
                shown &= keys > row - window
            mask[row - q_start] = shown
    return mask


@settings(max_examples=200)
@given(st.data(), layouts(), templates, windows)
def test_the_tables_are_the_definition(data, layout, template, window):
    q_start = data.draw(st.integers(0, layout.n_tokens))
    n = layout.n_tokens
    work = attention_work([layout], template, window=window, q_start=q_start, n_queries=n - q_start + 5, n_keys=n + 9)
    for category in Category:
        want = category_mask(layout, category, template, window=window, q_start=q_start)
        np.testing.assert_array_equal(read_back(work, category, want.shape, window), want)


@settings(max_examples=30)
@given(layouts(), templates)
def test_dense_rows_are_dense_under_every_category(layout, template):
    work = attention_work([layout], template, n_queries=layout.n_tokens, n_keys=layout.n_tokens, dense=[True])
    want = category_mask(layout, Category.DENSE, template)
    for category in Category:
        np.testing.assert_array_equal(read_back(work, category, want.shape, None), want)


def even_layout(n: int, image: int) -> Layout:
    begin = np.arange(0, n - image + 1, image)
    return Layout(n, 0, n, np.stack([begin, begin + 1, begin + image - 1, begin + image], axis=1))


def test_shapes_depend_on_buckets_alone_and_are_int32():
    works = [
        attention_work([even_layout(n, image)], SinkTemplate(), n_queries=4096, n_keys=8192)
        for n, image in ((4096, 4096), (4000, 100), (3700, 64), (4096, 2048))
    ]
    shapes = [[x.shape for x in jax.tree.leaves(work)] for work in works]
    assert all(s == shapes[0] for s in shapes)
    assert {x.dtype for x in jax.tree.leaves(works[0])} == {np.dtype(np.int32)}
    assert all(shape[0] == 1 for shape in shapes[0])  # every array leads with B


def test_a_long_prompt_makes_small_tables():
    """300K tokens in 150 images: no table grows with rows times keys."""
    n = 150 * 2000
    work = attention_work([even_layout(n, 2000)], SinkTemplate(), n_queries=bucket(n), n_keys=bucket(n))
    assert work.nbytes < 3 << 20


def test_refusals():
    layout = even_layout(100, 50)
    make = lambda rows=(layout,), **more: attention_work(  # noqa: E731
        rows, SinkTemplate(), **{"n_queries": 128, "n_keys": 128, **more}
    )
    with pytest.raises(ValueError, match="must share n_tokens and bidirectional"):
        make(rows=(layout, even_layout(90, 45)))
    with pytest.raises(ValueError, match="must share n_tokens and bidirectional"):
        make(rows=())
    with pytest.raises(ValueError, match=r"Got 0, 100, 0 \+ 64, 128\. Take larger buckets"):
        make(n_queries=64)
    with pytest.raises(ValueError, match="Take larger buckets"):
        make(n_keys=64)
    with pytest.raises(ValueError, match="window must be at least 1"):
        make(window=0)
    with pytest.raises(ValueError, match=r"one bool per layout, 1\. Got 2"):
        make(dense=[True, False])


@given(st.integers(0, 1 << 20), st.sampled_from([1, 64, 100, 128]))
def test_a_bucket_holds_n_and_wastes_less_than_an_eighth(n, minimum):
    size = bucket(n, minimum=minimum)
    assert size >= max(n, minimum)
    assert size == minimum or size - n < size / 8
    assert bucket(size, minimum=minimum) == size


def test_few_buckets():
    assert len({bucket(n) for n in range(1024, 8 * 1024 + 1)}) == 25
    with pytest.raises(ValueError, match="Got n=-1"):
        bucket(-1)
