"""A patched model computes what its profile says: the unpatched model's numbers where nothing is dropped, the
definition's where something is, and transformers' own where a forward is no multi-image prefill."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from shared_profiles import Category, SinkTemplate
from shared_profiles.profile import Profile
from tiny_models import (
    END,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    START,
    double_model,
    family_names,
    in_double,
    make_ids,
    make_inputs,
    make_model,
    make_video_inputs,
    mixed_profile,
    patch,
    positions_of,
    qwens,
)
from torch_blindsight import fingerprint
from torch_blindsight.models import inspect_model
from torch_blindsight.prompts import read_layouts

pytestmark = pytest.mark.usefixtures("no_grad")

EXACT = dict(rtol=0, atol=1e-9)  # float64 sums in another order; logits are about 2 apart
# Every token of an image is a sink, so INTRA_IMAGE_SINK keeps all that DENSE keeps.
EVERYTHING = SinkTemplate(tuple(range(IMAGE_TOKENS + 2)), (), 8)


@pytest.fixture
def model(family):
    shared = double_model(family)
    yield shared
    assert not hasattr(shared, "_blindsight_handle"), "a test left the shared model patched"
    assert shared.config.text_config._attn_implementation == "sdpa"


PROMPTS = {
    "one-prompt": ([make_ids(3)], True),
    "one-long-prompt": ([make_ids(6, text=1)], True),
    "adjacent-images": ([make_ids(4, text=0)], True),
    "left-padding": ([make_ids(3), make_ids(2, seed=1), make_ids(1, seed=2)], True),
    "right-padding": ([make_ids(3), make_ids(2, seed=1), make_ids(4, seed=2, text=1)], False),
}
prompt_names = pytest.mark.parametrize("name", PROMPTS)


def inputs_of(family, name):
    prompts, left = PROMPTS[name]
    return in_double(make_inputs(family, prompts, left=left))


def real_logits(model, inputs):
    """Logits of the real tokens, `[n, V]`."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def everything_kept(model, category=Category.INTRA_IMAGE_SINK):
    return Profile.uniform(category, fingerprint(model), EVERYTHING)


@family_names
@prompt_names
def test_equals_the_unpatched_model_where_everything_is_kept(model, family, name):
    """Through the sparse path: causal and bidirectional images, windows, grouped heads, padding."""
    inputs = inputs_of(family, name)
    want = real_logits(model, inputs)
    with patch(model, everything_kept(model)) as handle:
        got = real_logits(model, inputs)
        assert handle.report()["forwards"] == {"sparse": 1}
    torch.testing.assert_close(got, want, **EXACT)
    with patch(model, Profile.uniform(Category.INTRA_IMAGE, fingerprint(model))):
        assert (real_logits(model, inputs) - want).abs().max() > 0.1, "the pictures' view of each other must matter"


@family_names
@prompt_names
def test_portable_equals_the_reference(model, family, name):
    """All four categories in every layer."""
    inputs = inputs_of(family, name)
    profile = mixed_profile(model, seed=len(name))
    dense = real_logits(model, inputs)
    with patch(model, profile) as handle:
        got = real_logits(model, inputs)
        assert torch.equal(real_logits(model, inputs), got), "two runs must agree bit for bit"
        assert handle.report()["forwards"] == {"sparse": 2}
    with patch(model, profile, impl="reference"):
        want = real_logits(model, inputs)
    torch.testing.assert_close(got, want, **EXACT)
    assert (got - dense).abs().max() > 0.1


@family_names
def test_all_dense_is_the_unpatched_model_bit_for_bit(model, family):
    inputs = inputs_of(family, "left-padding")
    want = model(**inputs).logits
    with patch(model, Profile.uniform(Category.DENSE, fingerprint(model))) as handle:
        assert torch.equal(model(**inputs).logits, want)
        assert handle.report()["forwards"] == {"dense: all heads are Dense": 1}


@family_names
def test_one_sparse_head_changes_nothing_before_it(model, family):
    layer, head = 2, 1
    inputs = inputs_of(family, "one-prompt")
    profile = Profile.uniform(Category.DENSE, fingerprint(model))
    categories = profile.categories.copy()
    categories[layer, head] = Category.INTRA_IMAGE
    profile = Profile(categories, profile.template, profile.fingerprint, None, profile.choice)
    seen = []
    hook = inspect_model(model).attentions[layer].o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense = model(**inputs, output_hidden_states=True).hidden_states
    with patch(model, profile) as handle:
        sparse = model(**inputs, output_hidden_states=True).hidden_states
        assert handle.report()["forwards"] == {"sparse": 1}
    hook.remove()
    for before, after in zip(dense[: layer + 1], sparse[: layer + 1], strict=True):
        torch.testing.assert_close(after, before, **EXACT)
    change = (seen[1] - seen[0]).unflatten(-1, (4, -1)).abs().amax((0, 1, 3))  # [H]
    assert [bool(c > 1e-3) for c in change] == [h == head for h in range(4)]
    assert (sparse[layer + 1] - dense[layer + 1]).abs().max() > 1e-3


@family_names
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_no_row(model, family, left):
    """Each row of a padded batch gives what its prompt gives alone, those with too few images included."""
    prompts = [make_ids(2, seed=1), make_ids(1, seed=4), make_ids(4, seed=2, text=1), make_ids(0, seed=5)]
    batch = in_double(make_inputs(family, prompts, left=left))
    mask = batch["attention_mask"]
    batch["position_ids"] = positions_of(model, batch)  # as in generate; rotations are float32 and round by position
    with patch(model, mixed_profile(model)) as handle:
        together = model(**batch).logits
        pixels, done = batch["pixel_values"], 0
        for row, prompt in enumerate(prompts):
            n = prompt.count(START) * (1 if family == "gemma3" else 64)
            alone = in_double(make_inputs(family, [prompt])) | {"pixel_values": pixels[done : done + n]}
            if not n:
                alone = {name: alone[name] for name in ("input_ids", "attention_mask")}
            torch.testing.assert_close(together[row][mask[row].bool()], model(**alone).logits[0], **EXACT)
            done += n
        assert handle.report()["forwards"] == {"sparse": 3, "dense: fewer than two images": 2}


@family_names
@pytest.mark.parametrize("n_images", [0, 1])
def test_too_few_images_run_dense_bit_for_bit(model, family, n_images):
    inputs = in_double(make_inputs(family, [make_ids(n_images, text=9)]))
    if not n_images:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    want = model(**inputs).logits
    with patch(model, mixed_profile(model)) as handle:
        assert torch.equal(model(**inputs).logits, want)
        assert handle.report()["forwards"] == {"dense: fewer than two images": 1}


@family_names
def test_forwards_that_are_no_prefill_run_dense_and_say_why(family):
    """Each equals the unpatched model bit for bit, and is counted with its reason."""
    model = make_model(family).double()
    inputs = inputs_of(family, "left-padding")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    whole = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, -1, embeds.shape[1], -1).tril()
    calls = {
        "training mode": inputs,
        "no input_ids": dict(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]),
        "attention_mask is not [batch, tokens]": {k: v for k, v in inputs.items() if k != "token_type_ids"}
        | dict(attention_mask=whole, position_ids=positions_of(model, inputs)),
    }
    handle = patch(model, mixed_profile(model))
    for reason, call in calls.items():
        model.train(reason == "training mode")
        got = model(**call).logits
        handle.unpatch()
        assert torch.equal(got, model(**call).logits), reason
        assert handle.report()["forwards"] == {f"dense: {reason}": 1}
        handle = patch(model, mixed_profile(model))


@family_names
def test_a_filled_cache_that_is_not_ours_runs_dense(model, family):
    inputs = in_double(make_inputs(family, [make_ids(3)]))
    more = torch.tensor([[START, *[IMAGE] * IMAGE_TOKENS, END, 40]])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + more.shape[1], dtype=torch.long)
    past = inputs["input_ids"].shape[1]
    positions = torch.arange(past, past + more.shape[1]).expand(*(() if family == "gemma3" else (3,)), 1, -1)
    results = []
    for patched in (False, True):
        cache = model(**inputs, past_key_values=DynamicCache(config=model.config)).past_key_values
        handle = patch(model, mixed_profile(model)) if patched else None
        second = dict(input_ids=more, attention_mask=mask, position_ids=positions, past_key_values=cache)
        results.append(model(**second).logits)
    assert handle.report()["forwards"] == {"dense: tokens in the cache are unknown": 1}
    handle.unpatch()
    assert torch.equal(*results)


@family_names
def test_several_sequences_in_one_row_run_dense(family):
    """Transformers keeps them apart by positions that start over; a layout would let them see each other."""
    model = double_model(family)
    prompt = make_ids(2)
    inputs = in_double(make_inputs(family, [prompt + prompt]))
    del inputs["attention_mask"]
    where = torch.arange(len(prompt)).repeat(2)[None]
    if family != "gemma3":  # those of the text in front of time, height and width
        one = positions_of(model, make_inputs(family, [prompt]))
        where = torch.cat([where[None], one.repeat(1, 1, 2)])
    inputs["position_ids"] = where
    want = model(**inputs).logits
    with patch(model, mixed_profile(model)) as handle:
        assert torch.equal(model(**inputs).logits, want)
        assert handle.report()["forwards"] == {"dense: several sequences in one row": 1}


def test_gemma_without_token_types_is_causal_like_the_model_itself():
    model = double_model("gemma3")
    inputs = inputs_of("gemma3", "one-prompt")
    both_ways = real_logits(model, inputs)
    del inputs["token_type_ids"]
    want = real_logits(model, inputs)
    assert (want - both_ways).abs().max() > 0.1
    with patch(model, everything_kept(model)) as handle:
        torch.testing.assert_close(real_logits(model, inputs), want, **EXACT)
        assert handle.report()["forwards"] == {"sparse": 1}


@family_names
def test_float32_is_as_good_as_the_reference_rounded_to_float32(family):
    """Error budget from float64: at most twice that of the reference attention inside the same float32 model."""
    inputs = make_inputs(family, [make_ids(4)])
    exact_model, model = double_model(family), make_model(family)
    assert fingerprint(model) == fingerprint(exact_model)
    profile = mixed_profile(model)
    with patch(exact_model, profile, impl="reference"):
        exact = exact_model(**in_double(inputs)).logits
    errors = []
    for impl in ("portable", "reference"):
        with patch(model, profile, impl=impl):
            errors.append((model(**inputs).logits.double() - exact).abs().max())
    assert errors[0] <= 2 * errors[1] + 1e-5
    assert errors[1] > 0


@family_names
def test_bfloat16_runs_and_stays_near(family):
    model = make_model(family).bfloat16()
    inputs = make_inputs(family, [make_ids(3)])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    dense = model(**inputs).logits
    with patch(model, everything_kept(model)) as handle:
        got = model(**inputs).logits
        assert handle.report()["forwards"] == {"sparse": 1}
    assert got.dtype == torch.bfloat16
    exact = double_model(family)(**in_double(make_inputs(family, [make_ids(3)]))).logits
    assert (got - exact).norm() <= 1.5 * (dense - exact).norm()


@family_names
@pytest.mark.parametrize("impl", ["portable", "reference"], ids=["differentiable", "operator"])
def test_under_autocast_it_computes_in_the_dtype_that_sdpa_would(family, impl):
    """Rotary positions leave queries and keys in float32, values come in bfloat16."""
    model, inputs = make_model(family), make_inputs(family, [make_ids(3)])
    exact = double_model(family)(**in_double(inputs)).logits
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(**inputs, use_cache=False).logits
        with patch(model, everything_kept(model), impl=impl) as handle:
            got = model(**inputs, use_cache=False).logits
            assert handle.report()["forwards"] == {"sparse": 1}
    assert got.dtype == dense.dtype
    assert (got - exact).norm() <= 1.5 * (dense - exact).norm()


@qwens
def test_frame_groups_of_a_video_are_images(model, family):
    inputs = in_double(make_video_inputs([3, 1]))
    info = inspect_model(model)
    groups = [(3, 4, 20, 20), (20, 20, 36, 36), (36, 36, 52, 53), (55, 56, 72, 73)]
    by_grid, _ = read_layouts(inputs, info.family, info.special)
    assert by_grid[0].images.tolist() == list(map(list, groups))

    without_grid = dict(input_ids=inputs["input_ids"], position_ids=positions_of(model, inputs))
    by_position, _ = read_layouts(without_grid, info.family, info.special)
    assert by_position == by_grid

    want = real_logits(model, inputs)
    with patch(model, everything_kept(model)) as handle:
        torch.testing.assert_close(real_logits(model, inputs), want, **EXACT)
    with patch(model, mixed_profile(model)) as handle:
        got = real_logits(model, inputs)
        assert handle.report()["forwards"] == {"sparse": 1}
    with patch(model, mixed_profile(model), impl="reference"):
        torch.testing.assert_close(got, real_logits(model, inputs), **EXACT)
    assert (got - want).abs().max() > 0.1


@qwens
def test_videos_and_images_in_a_padded_batch(model, family):
    """Grids are listed row by row; rows without a video take none."""
    video, pictures = make_video_inputs([2, 2]), make_inputs(family, [make_ids(2)])
    n, m = video["input_ids"].shape[1], pictures["input_ids"].shape[1]

    def stacked(name):
        rows = [torch.nn.functional.pad(x[name], (n - x[name].shape[1], 0), value=PAD) for x in (pictures, video)]
        return torch.cat(rows)

    batch = {name: stacked(name) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    batch |= {name: video[name] for name in ("pixel_values_videos", "video_grid_thw")}
    batch = in_double(batch | {name: pictures[name] for name in ("pixel_values", "image_grid_thw")})
    with patch(model, mixed_profile(model)) as handle:
        together = model(**batch).logits
        torch.testing.assert_close(together[0, n - m :], model(**in_double(pictures)).logits[0], **EXACT)
        torch.testing.assert_close(together[1], model(**in_double(video)).logits[0], **EXACT)
        assert handle.report()["forwards"] == {"sparse": 3}
