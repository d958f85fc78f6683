"""The work list of the JAX attention: shapes that depend on buckets alone. `test_parity_plan` reads its tiles back."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_blindsight.buckets import bucket, power_of_two
from jax_blindsight.implementations import build_work
from jax_blindsight.work import attention_work
from shared_profiles import Category, Layout, SinkTemplate


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


def test_a_row_of_many_images_beside_one_of_none():
    """There is room for the tiles and the packed keys of both."""
    rows = even_layout(2000, 5), Layout(2000, 0, 2000, np.zeros((0, 4)))
    work = attention_work(rows, SinkTemplate(), n_queries=2048, n_keys=2048)
    assert work.n_tiles[:, Category.SINK].tolist() == [400, 16] and work.packed.shape[2] == 2048


def test_long_runs_of_text_between_many_images():
    """There is room for a short tile at the end of each."""
    begin = 64 + 66 * np.arange(64)
    layout = Layout(64 * 66 + 64, 0, 64 * 66 + 64, np.stack([begin, begin, begin + 2, begin + 2], axis=1))
    work = attention_work([layout], SinkTemplate(), n_queries=4352, n_keys=4352)
    assert work.n_tiles[0, Category.SINK] == 64 + 65


def test_a_row_that_ended_long_before_the_chunk_has_no_tiles():
    layout = Layout(400, 0, 60, even_layout(60, 30).images)
    work = attention_work([layout], SinkTemplate(), q_start=300, n_queries=128, n_keys=512)
    assert not work.n_tiles.any() and not work.n_gathered.any()


@pytest.mark.parametrize("q_start", [0, 90])
def test_every_row_is_in_one_tile_and_reads_no_key_before_its_window(q_start):
    """What is computed twice, or masked again, would only take longer."""
    images = np.array([(63, 64, 94, 95), (157, 158, 199, 200), (465, 465, 500, 500)])
    layout = Layout(520, 3, 520, images)  # runs of 61, 64 and 266 text rows, delimiters counted
    work = attention_work([layout], SinkTemplate(), window=50, q_start=q_start, n_queries=520, n_keys=520)
    for category in Category:
        tiles = work.tiles[0, category, : work.n_tiles[0, category]]
        gathered = work.gathered[0, : work.n_gathered[0, category]]
        rows = [
            *(np.arange(*tile[:2]) for tile in tiles),
            *(work.gathered_rows[0, slice(*tile[:2])] for tile in gathered),
        ]
        assert sorted(np.concatenate(rows)) == [*range(max(3, q_start), 520)]
        for row, (_, _, lo, *_) in zip(rows, [*tiles, *gathered], strict=True):
            assert lo >= row[0] - 49


@pytest.mark.parametrize("window", [None, 300])
def test_the_longest_tiles_come_first(window):
    """So that tiles computed together read about as many keys; gathered ones too."""
    layout = Layout(3000, 0, 3000, np.array([(b, b + 1, b + 701, b + 702) for b in range(5, 2200, 720)]))
    work = attention_work([layout], SinkTemplate(), window=window, n_queries=3000, n_keys=3000)
    tables = [table[:n] for table, n in zip(work.tiles[0], work.n_tiles[0], strict=True)]
    for table in (*tables, work.gathered[0, : work.n_gathered.max()]):
        _, _, lo, hi, _, packed_start, packed_stop = table.T
        assert len(table) > 1
        assert (np.diff(hi - lo + packed_stop - packed_start) <= 0).all()


def test_a_long_prompt_makes_small_tables():
    """300K tokens in 150 images: no table grows with rows times keys."""
    n = 150 * 2000
    work = attention_work([even_layout(n, 2000)], SinkTemplate(), n_queries=bucket(n), n_keys=bucket(n))
    assert work.nbytes < 3 << 20


@pytest.mark.parametrize("n_shards", [None, 2])
def test_the_kernels_work_knows_which_rows_are_dense(n_shards):
    """Each shard those of its own rows."""
    sizes = dict(head_dim=64, n_queries=128, n_keys=128, n_shards=n_shards)
    build = partial(build_work, "pallas", [even_layout(100, 50)] * 2, SinkTemplate(), **sizes)
    sparse, both, second = (build(dense=dense).cost for dense in (None, [True, True], [False, True]))
    assert (np.diff(both) == 0).all() and (np.diff(sparse)[..., 0] < 0).all()
    np.testing.assert_array_equal(second, [sparse[0], both[1]] if n_shards else (sparse + both) / 2)


@pytest.mark.parametrize("impl", ["portable", "pallas"])
def test_refusals(impl):
    layout = even_layout(100, 50)
    make = lambda rows=(layout,), **more: build_work(  # noqa: E731
        impl, rows, SinkTemplate(), **{"head_dim": 64, "n_queries": 128, "n_keys": 128, **more}
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
    make(window=1)
    with pytest.raises(ValueError, match=r"one bool per layout, 1\. Got 2"):
        make(dense=[True, False])


@given(st.integers(0, 1 << 20))
def test_a_bucket_holds_n_and_wastes_less_than_an_eighth(n):
    size = bucket(n)
    assert size >= max(n, 128)
    assert size == 128 or size - n < size / 8
    assert bucket(size) == size


@given(st.integers(0, 1 << 20), st.sampled_from([1, 64, 100, 128]))
def test_the_least_power_of_two(n, minimum):
    assert power_of_two(n, minimum) == next(p for p in map((1).__lshift__, range(21)) if p >= max(n, minimum))


def test_few_buckets():
    assert len({bucket(n) for n in range(1024, 8 * 1024 + 1)}) == 25
    with pytest.raises(ValueError, match="Got n=-1"):
        bucket(-1)
