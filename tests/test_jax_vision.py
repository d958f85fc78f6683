"""The JAX vision towers and their inputs, each piece against transformers' own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from jax_blindsight import tower
from jax_blindsight.buckets import bucket
from jax_blindsight.layers import rotation
from jax_blindsight.tower import encode_images
from jax_blindsight.vision_blocks import VisionBlock, segment_attention
from jax_blindsight.vision_inputs import patch_coordinates, prepare_vision, window_order
from jax_blindsight.vision_qwen import PatchMerger
from jax_blindsight.vision_segments import SCORES_PER_STEP, segments
from jax_blindsight.vision_siglip import Projector
from jax_parity import assert_as_exact, make, pair
from tiny_models import END, IMAGE, START, VIDEO

QWENS = ("qwen2_vl", "qwen2_5_vl")
qwens = pytest.mark.parametrize("family", QWENS)
families = pytest.mark.parametrize("family", [*QWENS, "gemma3"])

# Frame groups, rows and columns in tokens of 2 x 2 patches; windows of the tiny Qwen2.5-VL are 2 x 2 tokens.
ODD = [[1, 3, 5], [1, 1, 1], [1, 9, 8], [1, 4, 2]]
FILMS = [[3, 2, 3], [2, 1, 4]]
grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


def prompt_of(pictures, seed=0):
    """Inputs of a Qwen prompt with these pictures in turn, `(placeholder, [groups, rows, columns] in tokens)`."""
    torch.manual_seed(seed)
    ids, grids = [1, 10], {IMAGE: [], VIDEO: []}
    for kind, (t, h, w) in pictures:
        ids += [START, *[kind] * (t * h * w), END, 11]
        grids[kind].append([t, 2 * h, 2 * w])
    inputs = dict(input_ids=torch.tensor([ids]))
    for kind, pixels, grid in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[kind]:
            inputs[grid] = torch.tensor(grids[kind])
            inputs[pixels] = torch.randn(int(inputs[grid].prod(-1).sum()), 96)
    return inputs


def features_of(p, inputs):
    """Our features of the real placeholders."""
    arrays = {name: x.numpy() for name, x in inputs.items()}
    vision, place = prepare_vision(p.config, arrays)
    np.testing.assert_array_equal(place >= 0, np.isin(arrays["input_ids"], (IMAGE, VIDEO)))
    return jax.jit(partial(encode_images, config=p.config))(p.weights, vision=vision)[place[place >= 0]]


def run_images(model, pixel_values, image_grid_thw, **_):
    return torch.cat(model.model.get_image_features(pixel_values, image_grid_thw).pooler_output)


def run_videos(model, pixel_values_videos, video_grid_thw, **_):
    return torch.cat(model.model.get_video_features(pixel_values_videos, video_grid_thw).pooler_output)


@qwens
def test_image_features_of_odd_grids(family):
    """Single tokens, cut windows, and one big image whose frame takes several query blocks."""
    p, inputs = pair(family), prompt_of([(IMAGE, grid) for grid in ODD])
    p.check(features_of(p, inputs), run_images, inputs)


@qwens
def test_video_features(family):
    p, inputs = pair(family), prompt_of([(VIDEO, grid) for grid in FILMS])
    p.check(features_of(p, inputs), run_videos, inputs)


@qwens
def test_images_and_videos_in_turn_keep_the_order_of_the_prompt(family):
    p = pair(family)
    inputs = prompt_of([(IMAGE, ODD[0]), (VIDEO, FILMS[0]), (IMAGE, ODD[3]), (VIDEO, FILMS[1])])

    def run(model, **inputs):
        images, videos = run_images(model, **inputs), run_videos(model, **inputs)
        first, second = int(np.prod(ODD[0])), int(np.prod(FILMS[0]))
        return torch.cat([images[:first], videos[:second], images[first:], videos[second:]])

    p.check(features_of(p, inputs), run, inputs)


def test_gemma_image_features():
    p = pair("gemma3")
    inputs = dict(pixel_values=torch.randn(3, 3, 32, 32))
    ours = features_of(p, inputs | dict(input_ids=torch.full((3, 16), IMAGE)))
    p.check(
        ours,
        lambda model, pixel_values: model.model.get_image_features(pixel_values).pooler_output.flatten(0, 1),
        inputs,
    )


@qwens
def test_qwen_block(family):
    p, x = pair(family), torch.randn(24, 32)
    lengths = np.array([8, 12, 4])
    angles = torch.randn(24, 8)
    block = make(VisionBlock, p.config.vision, weights=p.weights["vision"]["blocks"][0])

    def run(model, x, angles):
        rotation = tuple(torch.cat([f(angles.float()).to(x.dtype)] * 2, dim=-1) for f in (torch.cos, torch.sin))
        cu_seqlens = torch.tensor([0, *lengths.cumsum()], dtype=torch.int32)
        return model.model.visual.blocks[0](x, cu_seqlens=cu_seqlens, position_embeddings=rotation)

    padded = jnp.pad(jnp.asarray(x), ((0, 104), (0, 0)))
    ours = block(padded, segments(lengths, 128), rotation(jnp.pad(jnp.asarray(angles), ((0, 104), (0, 0)))))
    p.check(ours[:24], run, dict(x=x, angles=angles))


@qwens
def test_merger(family):
    p, x = pair(family), torch.randn(24, 32)
    merger = make(PatchMerger, p.config.vision, 64, weights=p.weights["vision"]["merger"])
    p.check(merger(jnp.asarray(x)), lambda model, x: model.model.visual.merger(x), dict(x=x))


def test_siglip_block_and_projector():
    p, x = pair("gemma3"), torch.randn(64, 32)
    block = make(VisionBlock, p.config.vision, weights=p.weights["vision"]["blocks"][0])
    ours = block(jnp.asarray(x), segments(np.array([64]), 64))
    p.check(ours, lambda model, x: model.model.vision_tower.encoder.layers[0](x[None], None)[0], dict(x=x))
    projector = make(Projector, p.config.vision, 64, weights=p.weights["vision"]["projector"])
    p.check(projector(jnp.asarray(x)), lambda model, x: model.model.multi_modal_projector(x[None])[0], dict(x=x))


@given(grids=grids, merge=st.integers(1, 3))
def test_coordinates_are_those_of_transformers(grids, merge):
    patches = np.array(grids) * [1, merge, merge]
    want = get_vision_position_ids(torch.tensor(patches), merge)
    np.testing.assert_array_equal(patch_coordinates(patches, merge), want.numpy())


@given(grids=grids, side=st.integers(1, 4))
def test_windows_are_those_of_transformers(grids, side):
    tokens, lengths = window_order(np.array(grids), side)
    patches = torch.tensor(grids) * torch.tensor([1, 2, 2])
    want, cu_seqlens = get_vision_window_index(patches, spatial_merge_size=2, window_size=side * 2 * 14, patch_size=14)
    np.testing.assert_array_equal(tokens, want.numpy())
    np.testing.assert_array_equal(4 * lengths.cumsum(), cu_seqlens[1:].numpy())


@given(
    lengths=st.lists(st.integers(1, 40) | st.integers(100, 600), min_size=1, max_size=12),
    spare=st.integers(0, 300),
)
@settings(max_examples=300)
def test_every_patch_has_a_slot_and_sees_its_own_segment(lengths, spare):
    lengths = np.array(lengths)
    n_padded = bucket(int(lengths.sum())) + spare
    plan = segments(lengths, n_padded)
    n = len(plan.query_start)
    assert {np.shape(x) for x in jax.tree.leaves(plan)} == {(), (n,), (n_padded,)}
    assert n == len(segments([n_padded], n_padded).query_start), "as many blocks for whatever lies in the bucket"
    assert n % plan.step == 0 and n * plan.rows <= 2 * n_padded + plan.step * plan.rows
    assert 0 < plan.n_steps * plan.step <= n and (np.diff(plan.n_tiles) <= 0).all()
    assert (plan.query_start >= 0).all() and (plan.query_start + plan.rows <= n_padded).all()
    segment = np.repeat(np.arange(len(lengths)), lengths)
    patch, block = np.arange(len(segment)), plan.slot[: len(segment)] // plan.rows
    np.testing.assert_array_equal(plan.query_start[block] + plan.slot[: len(segment)] % plan.rows, patch)
    assert (block < plan.n_steps * plan.step).all()
    stop = lengths.cumsum()[segment]
    np.testing.assert_array_equal(plan.first[: len(segment)], stop - lengths[segment])
    np.testing.assert_array_equal(plan.last[: len(segment)], stop)
    first, last = plan.key_start[block], plan.key_start[block] + plan.n_tiles[block] * plan.tile
    assert (first <= stop - lengths[segment]).all() and (stop <= last).all(), "all keys are in a tile"


def test_the_drawing_of_the_module():
    plan = segments(np.array([6, 2, 1, 4]), 14, rows=4, tile=4)
    assert plan.query_start[:4].tolist() == [0, 4, 8, 9] and plan.key_start[:4].tolist() == [0, 0, 8, 9]
    assert plan.n_tiles[:5].tolist() == [2, 2, 1, 1, 0]
    assert plan.slot[:13].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("lengths", "size"), [([7], 2), ([300, 5, 129, 64], 2), ([300, 5, 129, 64], 20), ([16] * 40, 2)], ids=str
)
def test_attention_within_segments(lengths, size):
    """Also of scores so far apart, some 1,000, that exp would overflow if it began anew with every tile of keys."""
    n = sum(lengths)
    n_padded = bucket(n)
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, n_padded, 8)).astype(np.float32) * size
    arguments = *map(jnp.asarray, (q, k, v)), segments(np.array(lengths), n_padded)
    ours = segment_attention(*arguments)
    program = str(jax.make_jaxpr(segment_attention)(*arguments))
    assert program.count("HIGHEST") == 2 * program.count("dot_general["), "no product is rounded to TF32"
    segment = torch.tensor(np.repeat(np.arange(len(lengths)), lengths))
    mask = segment[:, None] == segment

    def run(dtype):
        return (
            torch.nn.functional.scaled_dot_product_attention(
                *(torch.tensor(x[:, :n], dtype=dtype)[None] for x in (q, k, v)), attn_mask=mask
            )[0]
            .transpose(0, 1)
            .numpy()
        )

    assert_as_exact(ours[:n], run(torch.float32), run(torch.float64))


@families
def test_other_pictures_of_one_bucket_do_not_retrace(family):
    p, traces = pair(family), []

    @jax.jit
    def encode(weights, vision):
        traces.append(None)
        return encode_images(weights, p.config, vision)

    if family == "gemma3":
        prompts = [
            dict(input_ids=np.full((n, 16), IMAGE), pixel_values=np.zeros((n, 3, 32, 32))) for n in (1, 4, 3, 5, 8)
        ]
    else:
        shapes = ([[1, 3, 5], [1, 4, 4]], [[1, 8, 3], [1, 2, 3]], [[1, 1, 1]] * 20, [[2, 4, 4]])
        prompts = [{n: x.numpy() for n, x in prompt_of([(IMAGE, s) for s in shape]).items()} for shape in shapes]
    for prompt in prompts:
        encode(p.weights, prepare_vision(p.config, prompt)[0])
    assert len(traces) == (2 if family == "gemma3" else 1)  # up to four of Gemma's pictures, and up to eight


def test_memory_is_linear_in_the_patches():
    """Twice the images, at most about twice the temporary memory; patches x patches would be four times."""
    p = pair("qwen2_5_vl")
    encode = jax.jit(partial(encode_images, config=p.config))

    def temporary(n_images):
        prompt = {n: x.numpy() for n, x in prompt_of([(IMAGE, [1, 16, 16])] * n_images).items()}
        compiled = encode.lower(p.weights, vision=prepare_vision(p.config, prompt)[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(32) < 2.2 * temporary(16)


def test_a_big_image_does_not_make_small_ones_costly():
    """Its 32 blocks take 16 tiles each; fifty small ones share 25 blocks of one tile."""
    n_tiles = segments(np.array([4000, *[60] * 50]), 8192).n_tiles
    assert n_tiles[: 32 + 25 + 1].tolist() == [16] * 32 + [1] * 25 + [0]


def test_what_is_computed_at_once_is_bounded():
    plan = segments(np.array([4000] * 16), 1 << 16)
    assert plan.step * plan.rows * plan.tile == SCORES_PER_STEP


@qwens
def test_programs_are_bounded_by_the_buckets(family, monkeypatch):
    """Any number of pictures of any sizes: for each bucket of patches one program of a kind."""
    p, rng, traces, buckets = pair(family), np.random.default_rng(0), [], set()
    for name in ("begin_vision", "vision_block", "end_vision"):
        traced = getattr(tower, name)
        monkeypatch.setattr(tower, name, lambda *args, name=name, traced=traced: traces.append(name) or traced(*args))
    encode = partial(encode_images, config=replace(p.config, bidirectional=True))  # of no other test
    for _ in range(40):
        sizes = rng.integers(1, [5, 12, 12], (rng.integers(1, 9), 3)).tolist()
        prompt = {n: x.numpy() for n, x in prompt_of([(VIDEO, size) for size in sizes]).items()}
        vision, _ = prepare_vision(p.config, prompt)
        jax.eval_shape(encode, p.weights, vision=vision)
        buckets.add(len(vision.pixels))
    assert 10 < len(buckets) < 30
    kinds = dict(begin_vision=1, vision_block=2 if p.config.vision.window_size else 1, end_vision=1)
    assert {name: traces.count(name) for name in kinds} == {name: n * len(buckets) for name, n in kinds.items()}


BAD = {
    "no-pictures": ("qwen2_vl", dict(pixel_values=None, image_grid_thw=None), r"per image token \(0\) .* Got 6 and 0"),
    "other-patches": ("qwen2_vl", dict(pixel_values=np.zeros((20, 96))), r"must have shape \(24, 96\) .* \(20, 96\)"),
    "other-ids": ("qwen2_5_vl", dict(input_ids=np.full((1, 5), IMAGE)), r"per image token \(6\) .* Got 5 and 0"),
    "other-size": ("gemma3", dict(pixel_values=np.zeros((1, 3, 16, 16))), r"\(n, 3, 32, 32\), n > 0. Got \(1, 3, 16"),
    "no-gemma-pictures": ("gemma3", dict(pixel_values=None), r"n > 0. Got \(0,\)"),
    "other-gemma-ids": ("gemma3", dict(input_ids=np.full((1, 15), IMAGE)), r"token \(16\) .* Got 15 and 0"),
}


@pytest.mark.parametrize(("family", "change", "message"), BAD.values(), ids=BAD)
def test_bad_pictures_are_refused(family, change, message):
    if family == "gemma3":
        inputs = dict(input_ids=np.full((1, 16), IMAGE), pixel_values=np.zeros((1, 3, 32, 32)))
    else:
        inputs = {n: x.numpy() for n, x in prompt_of([(IMAGE, [1, 2, 3])]).items()}
    inputs = {name: x for name, x in (inputs | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        prepare_vision(pair(family).config, inputs)


def test_rows_beyond_the_placeholders_are_harmless():
    """Padding reaches no real feature: with other padding they are the same bits."""
    p = pair("qwen2_5_vl")
    vision, _ = prepare_vision(p.config, {n: x.numpy() for n, x in prompt_of([(IMAGE, ODD[0])]).items()})
    n = int(np.prod(ODD[0]))
    noisy = vision.pixels.copy()
    noisy[4 * n :] = 1e3
    encode = jax.jit(partial(encode_images, config=p.config))
    clean, same = encode(p.weights, vision=vision)[:n], encode(p.weights, vision=replace(vision, pixels=noisy))[:n]
    np.testing.assert_array_equal(clean, same)
