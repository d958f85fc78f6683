"""`sparse_prefill` is the patched transformers model: batches, paddings, pieces, videos; one compile per bucket."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_blindsight.prefill
import jax_blindsight.tower
from jax_blindsight.buckets import bucket
from shared_profiles import Category
from shared_profiles.profile import Profile
from tiny_jax import in_numpy, sparse_prefill, twin
from tiny_models import FAMILIES, IMAGE, IMAGE_TOKENS, VIDEO, make_ids, make_inputs, make_video_inputs

family_names = pytest.mark.parametrize("family", FAMILIES)
two_families = pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
ONE_IMAGE = IMAGE_TOKENS + 2 + 3  # with its delimiters and the text after it, in `make_ids`


# One batch size, bucket and capacity for all: what has been compiled is used again.
OPTIONS = dict(all_logits=True, capacity=200)


def cut(inputs, *borders):
    """A batch in pieces that end at the borders; pictures come with their first tokens, and lie alike in all rows."""
    ids, first = inputs["input_ids"], inputs["input_ids"] == IMAGE
    first &= np.roll(ids, 1, axis=1) != IMAGE
    owner = np.cumsum(first).reshape(first.shape) - 1  # of each first token: its image among those of the batch
    pieces = []
    for start, stop in zip((0, *borders), (*borders, ids.shape[1]), strict=True):
        piece = {name: x[:, start:stop] for name, x in inputs.items() if x.shape == ids.shape}
        images = owner[:, start:stop][first[:, start:stop]]
        if len(images):
            size = 64 if "image_grid_thw" in inputs else 1
            pixels = inputs["pixel_values"]
            piece["pixel_values"] = pixels.reshape(-1, size, *pixels.shape[1:])[images].reshape(-1, *pixels.shape[1:])
            if size > 1:
                piece["image_grid_thw"] = inputs["image_grid_thw"][images]
        pieces.append(piece)
    return pieces


@family_names
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_a_batch_is_what_transformers_computes(family, dense):
    """Rows of four and two images, padded on the left and on the right."""
    model, results = twin(family), []
    for left in (True, False):
        inputs = make_inputs(family, [make_ids(4), make_ids(2, seed=1)], left=left)
        expected = model.expect(inputs, None if dense else model.params.profile)
        done = sparse_prefill(model.params, in_numpy(inputs), dense=dense, **OPTIONS)
        assert done.how == ("dense: asked for" if dense else "sparse")
        assert done.logits.shape == expected.truth.shape and done.logits.dtype == np.float32
        expected.check(done.logits)
        results.append(np.asarray(done.logits)[expected.valid])
    np.testing.assert_array_equal(*results)


@two_families
def test_rows_with_fewer_than_two_images_run_dense(family):
    """As they would alone, beside rows that run sparsely."""
    model = twin(family)
    inputs = make_inputs(family, [make_ids(1, seed=2), make_ids(3)], left=False)
    expected = model.expect(inputs, model.params.profile)
    done = sparse_prefill(model.params, in_numpy(inputs), **OPTIONS)
    assert done.how == "sparse"
    expected.check(done.logits)
    changed = np.abs(expected.truth - model.expect(inputs, None).truth)
    assert changed[0][expected.valid[0]].max() < 1e-9 and changed[1].max() > 0.1


def test_a_profile_of_dense_heads_alone_runs_dense_and_says_so():
    params, inputs = twin("gemma3").params, in_numpy(make_inputs("gemma3", [make_ids(4), make_ids(2, seed=1)]))
    profile = Profile.uniform(Category.DENSE, params.fingerprint)
    done = sparse_prefill(replace(params, profile=profile), inputs, **OPTIONS)
    assert done.how == "dense: all heads are Dense"
    np.testing.assert_array_equal(done.logits, sparse_prefill(params, inputs, dense=True, **OPTIONS).logits)


def test_a_prompt_that_is_too_short_to_gain_runs_dense_and_says_so():
    params, inputs = twin("gemma3").params, in_numpy(make_inputs("gemma3", [make_ids(4), make_ids(2, seed=1)]))
    done = jax_blindsight.sparse_prefill(params, inputs, **OPTIONS)
    assert done.how == "dense: too short to gain"
    np.testing.assert_array_equal(done.logits, sparse_prefill(params, inputs, dense=True, **OPTIONS).logits)
    assert not np.array_equal(done.logits, sparse_prefill(params, inputs, **OPTIONS).logits)


@two_families
@pytest.mark.parametrize("border", [-3, 0, 1, 1 + IMAGE_TOKENS], ids=["text", "before-start", "after-start", "end"])
def test_pieces_are_the_whole(family, border):
    """Cut in text, or between an image's tokens and its delimiters; then a second turn that is text alone."""
    model = twin(family)
    row = [*make_ids(4), *range(20, 40)]
    inputs = make_inputs(family, [row, row[2:]])
    expected = model.expect(inputs, model.params.profile)
    logits, how, cache = [], [], None
    for piece in cut(in_numpy(inputs), 4 + 2 * ONE_IMAGE + border, 4 + 4 * ONE_IMAGE):
        options = OPTIONS if cache is None else dict(all_logits=True)
        done = sparse_prefill(model.params, piece, cache=cache, **options)
        logits.append(np.asarray(done.logits))
        how.append(done.how)
        cache = done.cache
    assert how == ["sparse", "sparse", "dense: no image tokens among the queries"]
    assert cache.length == len(row) and cache.capacity == bucket(200)
    expected.check(np.concatenate(logits, axis=1))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_videos(family):
    """Every frame group is an image of its own; an image between two videos keeps the features in order."""
    model = twin(family)
    inputs, image = make_video_inputs([3, 1]), make_inputs(family, [make_ids(1)])
    where = int((inputs["input_ids"][0] == VIDEO).nonzero()[3 * IMAGE_TOKENS]) - 1  # before the second video
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = torch.cat([inputs[name][:, :where], image[name], inputs[name][:, where:]], dim=1)
    inputs |= {name: image[name] for name in ("pixel_values", "image_grid_thw")}
    inputs = {name: torch.cat([x, x.flip(0) if name.startswith("pixel") else x]) for name, x in inputs.items()}
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([2.0, 1.0, 1.0, 1.0])
    expected = model.expect(inputs, model.params.profile)
    done = sparse_prefill(model.params, in_numpy(inputs), **OPTIONS)
    assert done.how == "sparse"
    assert [len(layout.images) for layout in done.cache.prefilled.layouts(model.params.config)] == [5, 5]
    expected.check(done.logits)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_pieces_with_videos_are_the_whole(family):
    """Text counts on from a video's side, not from its time, across a border as well."""
    model, inputs = twin(family), make_video_inputs([7, 2], seed=1)
    expected, given = model.expect(inputs, model.params.profile), in_numpy(inputs)
    logits, cache = [], None
    parts = np.split(given["input_ids"], [3 + 7 * IMAGE_TOKENS + 3, -1], axis=1)
    pixels = np.split(given["pixel_values_videos"], [64 * 7, 64 * 9])
    for part, patches, groups in zip(parts, pixels, (7, 2, 0), strict=True):
        video = dict(pixel_values_videos=patches, video_grid_thw=np.array([[groups, 8, 8]]))
        piece = dict(input_ids=part) | (video if groups else {})
        options = OPTIONS if cache is None else dict(all_logits=True)
        done = sparse_prefill(model.params, piece, cache=cache, **options)
        logits, cache = [*logits, done.logits], done.cache
    expected.check(np.concatenate(logits, axis=1))


def test_twenty_prompts_of_one_bucket_compile_once(monkeypatch):
    """Other lengths, other images for a row (six in all: their patches are one bucket), other padding."""
    params, traces = twin("qwen2_5_vl").params, []
    for module, name in (
        (jax_blindsight.tower, "begin_vision"),
        (jax_blindsight.tower, "vision_block"),
        (jax_blindsight.tower, "end_vision"),
        (jax_blindsight.prefill, "embed_tokens"),
        (jax_blindsight.stack, "begin_layer"),
        (jax_blindsight.attention, "attend_sequence"),
        (jax_blindsight.stack, "end_layer"),
        (jax_blindsight.prefill, "unembed"),
    ):
        traced = getattr(module, name)

        def counted(*args, traced=traced, name=name, **options):
            traces.append(name)
            return traced(*args, **options)

        monkeypatch.setattr(module, name, counted)
    seen = []
    for i in range(20):
        ids = [*make_ids(2 + i % 3, seed=i), *range(20, 20 + i)]
        inputs = make_inputs("qwen2_5_vl", [ids, make_ids(4 - i % 3)], left=bool(i % 2))
        done = sparse_prefill(params, in_numpy(inputs), **OPTIONS)
        assert done.how == "sparse"
        seen.append((inputs["input_ids"].shape, len(traces)))
    assert len({shape for shape, _ in seen}) >= 8
    assert seen[0][1] <= 9 and seen[-1][1] == seen[0][1], f"traced again: {traces}"


def test_a_bucket_may_hang_over_the_end_of_the_cache():
    """Its tail is unused; a plain dynamic_update_slice would move the keys to other slots."""
    cache = np.arange(16.0).reshape(1, 1, 16, 1)
    new = 100 + np.arange(8.0).reshape(1, 1, 8, 1)
    for start in (0, 5, 8, 11, 15):
        expected = cache.copy()
        expected[:, :, start : start + 8] = new[:, :, : 16 - start]
        written = jax_blindsight.prefill._written(jnp.asarray(cache), jnp.asarray(new), jnp.int32(start))
        np.testing.assert_array_equal(written, expected)
