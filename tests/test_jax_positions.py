"""Rotary positions in JAX: equal to transformers' own `get_rope_index`, for any prompt of images and videos."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from jax_blindsight.config import ModelConfig
from jax_blindsight.positions import rope_positions
from tiny_models import END, IMAGE, PAD, START, VIDEO, make_inputs, make_model, positions_of

QWENS = ("qwen2_vl", "qwen2_5_vl")
MERGE = 2
MODELS = cache(make_model)


def config_of(family: str) -> ModelConfig:
    return ModelConfig.from_hf(MODELS(family).config)


# A picture: (placeholder, [groups, rows, columns] in tokens); an item of a prompt: a picture, or so many words.
sides = st.integers(1, 5)
images = st.tuples(st.just(IMAGE), st.tuples(st.just(1), sides, sides))
videos = st.tuples(st.just(VIDEO), st.tuples(st.integers(1, 4), sides, sides))
prompts = st.lists(st.one_of(st.integers(1, 9), images, videos), min_size=1, max_size=6)


@st.composite
def batches(draw):
    rows = draw(st.lists(prompts, min_size=1, max_size=3))
    extra, left = draw(st.integers(0, 5)), draw(st.booleans())
    n_videos = sum(not isinstance(item, int) and item[0] == VIDEO for row in rows for item in row)
    whole = st.integers(0, 3).map(float)  # transformers 5.17 cut the others
    seconds = draw(st.none() | st.lists(whole, min_size=n_videos, max_size=n_videos))
    return rows, extra, left, seconds


def build(rows, extra=0, left=True):
    """Ids, validity and grids (in patches) of a padded batch."""
    ids, grids = [], {IMAGE: [], VIDEO: []}
    for row in rows:
        ids.append([])
        for item in row:
            if isinstance(item, int):
                ids[-1] += [10] * item
            else:
                kind, (groups, n_rows, n_columns) = item
                ids[-1] += [START, *[kind] * (groups * n_rows * n_columns), END]
                grids[kind].append([groups, n_rows * MERGE, n_columns * MERGE])
    n = max(map(len, ids)) + extra
    padded, valid = np.full((len(ids), n), PAD), np.zeros((len(ids), n), dtype=bool)
    for b, row in enumerate(ids):
        where = slice(n - len(row), n) if left else slice(0, len(row))
        padded[b, where], valid[b, where] = row, True
    return padded, valid, *(np.array(g, dtype=np.int64).reshape(-1, 3) for g in grids.values())


def rope_index(family, ids, valid, image_grids, video_grids, seconds):
    """transformers' positions and the position of the next token."""
    more = {} if family == "qwen2_vl" else dict(second_per_grid_ts=None if seconds is None else torch.tensor(seconds))
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    positions, deltas = MODELS(family).model.get_rope_index(
        torch.tensor(ids),
        mm_token_type_ids=torch.tensor(kinds),
        image_grid_thw=torch.tensor(image_grids),
        video_grid_thw=torch.tensor(video_grids),
        attention_mask=torch.tensor(valid).long(),
        **more,
    )
    return positions.numpy(), deltas[:, 0].numpy() + valid.sum(axis=1)


@pytest.mark.parametrize("family", QWENS)
@given(batch=batches())
@example(batch=([[3, (VIDEO, (4, 1, 1)), (VIDEO, (3, 2, 5))], [(IMAGE, (1, 5, 2)), 1]], 2, False, [2.0, 0.0]))
def test_positions_are_those_of_transformers(family, batch):
    rows, extra, left, seconds = batch
    inputs = build(rows, extra, left)
    positions, following, _ = rope_positions(config_of(family), *inputs, seconds)
    want, want_following = rope_index(family, *inputs, seconds)
    assert positions.dtype == following.dtype == np.int32
    np.testing.assert_array_equal(positions, want)
    np.testing.assert_array_equal(following, want_following)


def test_the_drawing_of_the_module():
    positions, following, _ = rope_positions(config_of("qwen2_vl"), *build([[2, (IMAGE, (1, 2, 2)), 1]]))
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 3, 4, 4, 5, 6],
        [0, 1, 2, 3, 4, 3, 4, 5, 6],
    ]
    assert following.tolist() == [7]


def test_time_passes_in_a_video_of_one_family_only():
    inputs = build([[(VIDEO, (3, 1, 1)), 1]])
    assert rope_positions(config_of("qwen2_vl"), *inputs)[0][0, 0].tolist() == [0, 1, 2, 3, 2, 3]
    assert rope_positions(config_of("qwen2_5_vl"), *inputs, [2.0])[0][0, 0].tolist() == [0, 1, 9, 17, 2, 3]


def test_fractions_of_a_second_count():
    """Four positions a second: 0.4 seconds are 1.6 of them, an eighth is half of one. Products are cut, not steps."""
    inputs = build([[(VIDEO, (4, 1, 1)), 1]])
    for seconds in (0.4, np.float32(0.4)):
        positions, following, _ = rope_positions(config_of("qwen2_5_vl"), *inputs, [seconds])
        assert positions[0, 0].tolist() == [0, 1, 2, 4, 5, 2, 3]
        assert following.tolist() == [6]
    eighths = rope_positions(config_of("qwen2_5_vl"), *inputs, [0.125])[0]
    assert eighths[0, 0].tolist() == [0, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_gemma_counts_real_tokens(left):
    prompts = [[1, 10, 11], [1, START, *[IMAGE] * 16, END, 12]]
    inputs = make_inputs("gemma3", prompts, left=left)
    valid = inputs["attention_mask"].numpy() != 0
    positions, following, _ = rope_positions(config_of("gemma3"), inputs["input_ids"].numpy(), valid)
    want = positions_of(MODELS("gemma3"), inputs).numpy()
    np.testing.assert_array_equal(positions, np.where(valid, want, 0))
    assert following.tolist() == [3, 20]


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ({}, "image_grids must have one row per run .* 6 placeholders where the grids give no more"),
        ({"image_grids": [[1, 4, 4]]}, "image_grids must .* run of 6 placeholders where the grids give 4 tokens"),
        ({"image_grids": [[1, 4, 6], [1, 4, 6]]}, "image_grids must have .* Got 1 rows too many"),
        ({"image_grids": [[1, 4, 6]], "video_grids": [[1, 4, 6]]}, "video_grids must have .* Got 1 rows too many"),
    ],
    ids=["none", "another-size", "too-many-images", "too-many-videos"],
)
def test_grids_must_match_the_placeholders(grids, message):
    ids, valid, *_ = build([[2, (IMAGE, (1, 2, 3))]])
    with pytest.raises(ValueError, match=message):
        rope_positions(config_of("qwen2_vl"), ids, valid, **grids)
