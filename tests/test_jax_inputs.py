"""What `sparse_prefill` refuses, before anything is computed, and what it says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_blindsight import Cache, decode_step
from jax_blindsight.inputs import read_inputs
from jax_blindsight.tokens import Tokens
from shared_profiles import Category
from shared_profiles.profile import Profile
from tiny_jax import generate, in_numpy, sparse_prefill, twin
from tiny_models import END, IMAGE, IMAGE_TOKENS, START, VIDEO, make_ids, make_inputs, make_video_inputs

QWEN, GEMMA = "qwen2_5_vl", "gemma3"
TURN = dict(input_ids=np.array([[20, 21]]))


def prompt(family, n_images=2, **options):
    return in_numpy(make_inputs(family, [make_ids(n_images)], **options))


def with_ids(inputs, change):
    ids = inputs["input_ids"].copy()
    change(ids)
    bare = {name: x for name, x in inputs.items() if not name.endswith("token_type_ids")}
    return bare | {"input_ids": ids}


def set_id(at, to):
    def change(ids):
        ids[0, at] = to

    return change


def grids(inputs):
    return inputs["image_grid_thw"]


# Text before the images is 4 tokens long: the first image's start, tokens and end stand at 4, [5, 21) and 21.
WRONG = {
    "no-mapping": (QWEN, lambda x: [x], "arrays by name. Got a list"),
    "no-ids": (QWEN, lambda x: {"attention_mask": x["attention_mask"]}, "must hold input_ids. Got"),
    "unknown": (QWEN, lambda x: x | {"pixel_value": 1}, "Got pixel_value. Leave it out"),
    "ragged": (QWEN, lambda x: x | {"input_ids": [[1, 2], [3]]}, "input_ids must be an array, or lists of one shape"),
    "one-row": (QWEN, lambda x: x | {"input_ids": x["input_ids"][0]}, r"integers \[B, N\].*Got int64 \(46,\)"),
    "float-ids": (QWEN, lambda x: x | {"input_ids": x["input_ids"] * 1.0}, "integers .*Got float64"),
    "no-tokens": (QWEN, lambda x: x | {"input_ids": x["input_ids"][:, :0]}, r"at least one. Got int64 \(1, 0\)"),
    "big-id": (QWEN, lambda x: with_ids(x, set_id(0, 96)), r"in \[0, 96\).*Got 4?1?3?.*96"),
    "negative-id": (QWEN, lambda x: with_ids(x, set_id(0, -1)), r"in \[0, 96\)"),
    "mask-shape": (
        QWEN,
        lambda x: x | {"attention_mask": np.ones((1, 45), int)},
        r"shape \(1, 46\).*Got int64 \(1, 45\)",
    ),
    "mask-float": (QWEN, lambda x: x | {"attention_mask": np.ones((1, 46))}, "Got float64"),
    "mask-hole": (QWEN, lambda x: x | {"attention_mask": np.arange(46)[None] % 9}, "left or right of a row.*row 0"),
    "all-padding": (QWEN, lambda x: x | {"attention_mask": np.zeros((1, 46), int)}, "every row must have a token"),
    "types": (QWEN, lambda x: x | {"mm_token_type_ids": x["mm_token_type_ids"] * 2}, "mm_token_type_ids must be 1 at"),
    "types-shape": (GEMMA, lambda x: x | {"token_type_ids": np.zeros((1, 3))}, r"the shape \(1, 46\)"),
    "no-pixels": (QWEN, lambda x: {n: v for n, v in x.items() if n != "pixel_values"}, "Got none for 2 runs"),
    "no-pixels-gemma": (GEMMA, lambda x: {n: v for n, v in x.items() if n != "pixel_values"}, "Got none for 2 runs"),
    "no-grids": (
        QWEN,
        lambda x: {n: v for n, v in x.items() if n != "image_grid_thw"},
        "image_grid_thw must .*nothing",
    ),
    "grids-shape": (QWEN, lambda x: x | {"image_grid_thw": grids(x).T}, r"integers \[n, 3\].*Got int64 \(3, 2\)"),
    "grids-float": (QWEN, lambda x: x | {"image_grid_thw": grids(x) * 1.0}, "Got float64"),
    "grids-few": (QWEN, lambda x: x | {"image_grid_thw": grids(x)[:1]}, "each of the 2 runs .*Got 1 rows"),
    "grids-alone": (QWEN, lambda x: x | {"video_grid_thw": grids(x)}, "comes with pixel_values_videos. Got it alone"),
    "grids-wrong": (
        QWEN,
        lambda x: x | {"image_grid_thw": grids(x) * [1, 1, 2]},
        "image 0 must have 32 placeholders.*16",
    ),
    "grids-odd": (QWEN, lambda x: x | {"image_grid_thw": np.array([[1, 64, 1]] * 2)}, "multiples of 2"),
    "grids-zero": (QWEN, lambda x: x | {"image_grid_thw": grids(x) * 0}, "positive sizes"),
    "pixels-int": (QWEN, lambda x: x | {"pixel_values": np.zeros((128, 96), int)}, "floating-point.*Got int64"),
    "pixels-few": (QWEN, lambda x: x | {"pixel_values": x["pixel_values"][:-1]}, r"\(128, 96\).*Got \(127, 96\)"),
    "pixels-many": (GEMMA, lambda x: x | {"pixel_values": np.zeros((3, 3, 32, 32), np.float32)}, "48.*Got 32"),
    "pixels-small": (GEMMA, lambda x: x | {"pixel_values": x["pixel_values"][..., :16]}, r"Got \(2, 3, 32, 16\)"),
    "pixels-for-text": (GEMMA, lambda x: x | {"input_ids": np.full((1, 46), 9)}, "Got .* for 0 runs|token_type_ids"),
    "video-for-gemma": (GEMMA, lambda x: x | {"video_grid_thw": np.ones((1, 3), int)}, "takes no video_grid_thw"),
    "short-image": (QWEN, lambda x: with_ids(x, set_id(20, 9)), r"image 0 .*Got 15, at \[5, 20\) of row 0"),
    "short-image-gemma": (GEMMA, lambda x: with_ids(x, set_id(20, 9)), "image 0 must have 16 placeholders"),
    "split-image": (QWEN, lambda x: with_ids(x, set_id(10, 9)), "each of the 3 runs"),
    "no-start": (QWEN, lambda x: with_ids(x, set_id(4, 9)), "image 0, .*no start before"),
    "no-end": (GEMMA, lambda x: with_ids(x, set_id(21, 9)), "image 0, .*no end after"),
}


@pytest.mark.parametrize(("family", "change", "message"), WRONG.values(), ids=WRONG)
def test_malformed_inputs(family, change, message):
    with pytest.raises(ValueError, match=message):
        sparse_prefill(twin(family).params, change(prompt(family)))


@pytest.mark.parametrize("name", ["no-mapping", "no-ids", "ragged", "one-row"])
def test_generate_refuses_them_alike(name):
    """Although it looks at the ids itself, for the cache's capacity."""
    family, change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        generate(twin(family).params, change(prompt(family)), max_new_tokens=2)


def test_inputs_may_be_lists_and_tensors():
    config, inputs = twin(QWEN).params.config, make_inputs(QWEN, [make_ids(2)])
    pixels = inputs["pixel_values"].requires_grad_()
    for given, want in ((pixels, pixels), (pixels.bfloat16(), pixels.bfloat16().float())):
        read = read_inputs(config, inputs | {"pixel_values": given})
        np.testing.assert_array_equal(read.pictures["pixel_values"], want.detach().numpy())
    read = read_inputs(config, {name: x.tolist() for name, x in inputs.items()})
    np.testing.assert_array_equal(read.tokens.ids, inputs["input_ids"].numpy())


def test_malformed_videos():
    params, inputs = twin(QWEN).params, in_numpy(make_video_inputs([3]))
    with pytest.raises(ValueError, match=r"video 0 must have 32 placeholders"):
        sparse_prefill(params, inputs | {"video_grid_thw": np.array([[2, 8, 8]])})
    with pytest.raises(ValueError, match=r"one number per video, 1. Got"):
        sparse_prefill(params, inputs | {"second_per_grid_ts": np.ones(2)})
    with pytest.raises(ValueError, match=r"one number per video, 1. Got object"):
        sparse_prefill(params, inputs | {"second_per_grid_ts": [None]})
    for seconds in (np.nan, np.inf, -1.0, 1e12):
        with pytest.raises(ValueError, match=r"second_per_grid_ts must be in \[0, 65536\). Got"):
            sparse_prefill(params, inputs | {"second_per_grid_ts": [seconds]})


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_the_ids_alone_do(left):
    """Mask and token types say again what the ids say; padding may hold any id."""
    config = twin(QWEN).params.config
    inputs = in_numpy(make_inputs(QWEN, [make_ids(2), make_ids(2)[2:]], left=left))
    full = read_inputs(config, inputs)
    padding = inputs["attention_mask"] == 0
    ids = np.where(padding, IMAGE, inputs["input_ids"])
    for types in (None, inputs["mm_token_type_ids"]):
        bare = read_inputs(config, inputs | {"input_ids": ids, "mm_token_type_ids": types})
        np.testing.assert_array_equal(full.tokens.ids, bare.tokens.ids)
    assert full.tokens.start.tolist() == [0, 2] and not full.tokens.ids[1, :2].any()
    np.testing.assert_array_equal(full.tokens.ids[1, 2:], inputs["input_ids"][1][~padding[1]])
    past = np.arange(7) >= np.array([[2], [0]])
    with_past = inputs | {"attention_mask": np.c_[past, inputs["attention_mask"]]}
    np.testing.assert_array_equal(read_inputs(config, with_past, past=past).given, full.given)
    np.testing.assert_array_equal(read_inputs(config, inputs, past=past).given, full.given)


def test_grids_and_seconds_go_to_the_rows_of_their_placeholders():
    rows = [(IMAGE, 4), (VIDEO, 2)], [(VIDEO, 3), (IMAGE, 2), (VIDEO, 2)]
    ids = [[i for kind, n in row for i in (START, *[kind] * n, END)] for row in rows]
    ids[0] += [9] * (len(ids[1]) - len(ids[0]))
    inputs = dict(
        input_ids=np.array(ids),
        pixel_values=np.zeros((24, 96), np.float32),
        image_grid_thw=np.array([[1, 4, 4], [1, 2, 4]]),
        pixel_values_videos=np.zeros((28, 96), np.float32),
        video_grid_thw=np.array([[2, 2, 2], [3, 2, 2], [1, 4, 2]]),
        second_per_grid_ts=np.array([0.5, 1.0, 2.0]),
    )
    first, second = read_inputs(twin(QWEN).params.config, inputs).tokens.grids
    assert (first.images.tolist(), second.images.tolist()) == ([[1, 4, 4]], [[1, 2, 4]])
    assert (first.videos.tolist(), second.videos.tolist()) == ([[2, 2, 2]], [[3, 2, 2], [1, 4, 2]])
    assert (first.seconds.tolist(), second.seconds.tolist()) == ([0.5], [1.0, 2.0])


def test_a_profile_is_needed_and_must_fit():
    params, inputs = twin(QWEN).params, prompt(QWEN)
    with pytest.raises(ValueError, match=r"blindsight calibrate.*dense=True"):
        sparse_prefill(replace(params, profile=None), inputs)
    other = replace(params.fingerprint, n_layers=5)
    with pytest.raises(ValueError, match=r"4 layers of 4 heads. Got one of \(5, 4\)"):
        sparse_prefill(replace(params, profile=Profile.uniform(Category.SINK, other)), inputs)


def test_weights_on_the_host_are_refused():
    params, inputs = twin(QWEN).params, prompt(QWEN)
    with pytest.raises(ValueError, match=r"arrays of JAX. Got a ndarray.*device_put\(params\)"):
        sparse_prefill(jax.device_get(params), inputs)


@pytest.fixture
def cache():
    """One that holds `make_ids(2)`, up to the second image's last token but one; 46 tokens of 128 slots."""
    params = twin(QWEN).params
    tokens = read_inputs(params.config, prompt(QWEN)).tokens
    buffers = tuple(jnp.zeros((1, 2, 128, 16)) for _ in range(4))
    position = np.array([20], np.int32)
    return Cache(buffers, buffers, 46, position, position, tokens)


def test_what_does_not_fit_into_the_cache(cache):
    params, inputs = twin(QWEN).params, prompt(QWEN)
    for capacity in (45, 64.5, "64"):
        what = rf"capacity must be an integer of at least the prompt's 46 tokens.*Got {capacity!r}"
        with pytest.raises(ValueError, match=what):
            sparse_prefill(params, inputs, capacity=capacity)
    with pytest.raises(ValueError, match=r"keeps its capacity of 128. Got capacity=200"):
        sparse_prefill(params, inputs, cache=cache, capacity=200)
    text = {"input_ids": np.full((1, 83), 9)}
    with pytest.raises(ValueError, match=r"capacity of 128 slots. Got 46 \+ 83. Prefill with capacity=129"):
        sparse_prefill(params, text, cache=cache)
    with pytest.raises(ValueError, match=r"as many rows as the cache has, 1. Got 2"):
        sparse_prefill(params, {"input_ids": np.full((2, 3), 9)}, cache=cache)
    hidden = {"input_ids": np.full((1, 3), 9), "attention_mask": np.array([[0] + [1] * 48])}  # the first token alone
    with pytest.raises(ValueError, match=r"attention_mask must be 1 at the tokens in the cache.* of 46 slots"):
        sparse_prefill(params, hidden, cache=cache)
    padded = {"input_ids": np.full((1, 3), 9), "attention_mask": np.array([[1, 1, 0]])}
    with pytest.raises(ValueError, match=r"no padding.*Got \[1\]"):
        sparse_prefill(params, padded, cache=cache)
    with pytest.raises(ValueError, match=r"Got none for 1 runs"):
        sparse_prefill(params, {"input_ids": np.array([[IMAGE] * 5 + [END]])}, cache=cache)


def test_an_image_cannot_go_on_in_the_next_piece():
    """Neither with its picture, whose tokens are not all there, nor without."""
    params, inputs = twin(QWEN).params, prompt(QWEN, 1)
    piece = {name: inputs[name][:, :12] for name in ("input_ids", "attention_mask")}
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with pytest.raises(ValueError, match=r"image 0 must have 16 .*Got 7.*cut between images"):
        sparse_prefill(params, piece | pictures)


@pytest.mark.parametrize("family", [QWEN, "gemma3"])
def test_an_image_cannot_begin_where_another_ends_without_a_delimiter(family):
    params, inputs = twin(family).params, prompt(family, 1)
    end = inputs["input_ids"][0].tolist().index(END)
    pieces = [
        {name: x[:, part] if x.shape == inputs["input_ids"].shape else x for name, x in inputs.items()}
        for part in (slice(end), slice(end - IMAGE_TOKENS, None))
    ]
    first = sparse_prefill(params, pieces[0], capacity=end)  # just as much as it needs
    with pytest.raises(ValueError, match=r"border has placeholders on both sides. Keep every image's delimiters"):
        sparse_prefill(params, pieces[1], cache=first.cache)


def test_decode_steps_refuse_what_is_not_one_token_a_row(cache):
    params = twin(QWEN).params
    for tokens, message in (
        (np.array([[9]]), r"integers \[B\].* 1 rows. Got int64 \(1, 1\)"),
        (np.array([9, 9]), r"Got int64 \(2,\)"),
        (np.array([9.0]), "Got float64"),
        ([9.0], "Got float64"),
        (np.array([96]), r"tokens must be in \[0, 96\).* Got \[96\]"),
        ([-1], r"in \[0, 96\).* Got \[-1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_step(params, tokens, cache)
    with pytest.raises(ValueError, match=r"capacity of 128 slots. Got 128 \+ 1"):
        decode_step(params, np.array([9]), replace(cache, length=128))
    for buffer in cache.keys:
        buffer.delete()
    with pytest.raises(ValueError, match=r"consumed already"):
        decode_step(params, np.array([9]), cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be an integer of at least 1. Got 0"),
        (dict(max_new_tokens=2.5), "max_new_tokens must be an integer of at least 1. Got 2.5"),
        (dict(temperature=-1.0), "temperature must be a finite number"),
        (dict(temperature=float("nan")), "temperature must be a finite number"),
        (dict(temperature=float("inf")), "temperature must be a finite number"),
        (dict(temperature=1.0, top_k=0), "top_k must be an integer of at least 1"),
        (dict(temperature=1.0, top_k=2.5), "top_k must be an integer of at least 1"),
        (dict(temperature=1.0, top_p=0.0), r"top_p must be in \(0, 1\]"),
        (dict(temperature=1.0, top_p=1.5), r"top_p must be in \(0, 1\]"),
        (dict(top_k=3), "with temperature=0"),
        (dict(top_p=0.5), "with temperature=0"),
    ],
)
def test_options_of_generate(options, message):
    with pytest.raises(ValueError, match=message):
        generate(twin(QWEN).params, prompt(QWEN), **dict(max_new_tokens=4) | options)


def test_a_consumed_cache_is_known_while_numpy_looks_at_a_part_of_it():
    """JAX leaves that part, and frees the others."""
    params = twin(QWEN).params
    cache = sparse_prefill(params, prompt(QWEN)).cache
    looked_at = np.asarray(cache.keys[0])
    decode_step(params, [9], cache)
    for go_on in (partial(decode_step, params, [9], cache), partial(sparse_prefill, params, TURN, cache=cache)):
        with pytest.raises(ValueError, match="consumed already"):
            go_on()
    assert np.isfinite(looked_at).all()


def test_a_cache_on_the_host_is_refused_until_it_is_back():
    params = twin(QWEN).params
    cache = sparse_prefill(params, prompt(QWEN)).cache
    there = replace(cache, **jax.device_get(dict(keys=cache.keys, values=cache.values)))
    for go_on in (partial(decode_step, params, [9], there), partial(sparse_prefill, params, TURN, cache=there)):
        with pytest.raises(ValueError, match=r"arrays of JAX.*keys=jax.device_put\(cache.keys\)"):
            go_on()
    back = replace(there, keys=jax.device_put(there.keys), values=jax.device_put(there.values))
    np.testing.assert_array_equal(*(decode_step(params, [9], x)[0] for x in (back, cache)))


def test_a_cache_of_another_model_is_refused_and_stays_as_it_is():
    """The first layer had been written, and so consumed, before the second or its dtype did not fit."""
    params = twin(QWEN).params
    narrow = replace(params, weights=jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.weights))
    cache = sparse_prefill(params, prompt(QWEN)).cache
    shorter = replace(cache, keys=cache.keys[:2], values=cache.values[:2])
    for other, given in ((narrow, cache), (params, shorter)):
        for go_on in (partial(decode_step, other, [9], given), partial(sparse_prefill, other, TURN, cache=given)):
            with pytest.raises(ValueError, match=r"the cache must be of this model.*with the params that it was made"):
                go_on()
    assert sparse_prefill(params, TURN, cache=cache).cache.length == cache.length + 2


def test_a_buffer_of_tokens_may_be_written_over():
    """As a loop does that takes the likeliest into one array; the next turn's picture begins with what was written."""
    params, inputs = twin(QWEN).params, prompt(QWEN, 1)
    buffer = np.array([START])
    cache = decode_step(params, buffer, sparse_prefill(params, prompt(QWEN)).cache)[1]
    buffer[:] = 9
    picture = {name: x[:, 5:] if x.shape == inputs["input_ids"].shape else x for name, x in inputs.items()}
    assert sparse_prefill(params, picture, cache=cache).how == "sparse"


def test_placeholders_that_the_model_wrote_are_text(cache):
    special = twin(QWEN).params.config.special
    written = replace(cache, written=(np.array([IMAGE]), jnp.array([VIDEO]), np.array([START])))
    tokens = written.tokens(special)
    assert tokens.ids[0, 46:].tolist() == [-1, -1, START]
    (layout,) = tokens.followed_by(Tokens.text(np.array([[9]])), special).layouts(twin(QWEN).params.config)
    assert layout.n_images == 2 and layout.n_tokens == 50
    assert layout.images[0].tolist() == [4, 5, 5 + IMAGE_TOKENS, 6 + IMAGE_TOKENS]
