"""Prompts that are too short to gain run dense, by a rule of three numbers, and are counted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared_profiles import Category, Layout, SinkTemplate, count_pairs
from shared_profiles.plan import build_plan
from shared_profiles.profile import Fingerprint, Profile
from tiny_models import FAMILIES, make_ids, make_inputs, make_model, mixed_profile
from torch_blindsight import patch
from torch_blindsight.break_even import PORTABLE_COSTS, TRITON_COSTS, Costs, gains

FREE = Costs(per_layer=0, per_block=0, rate=1.0)


def even_layout(n_images: int, image_tokens: int, text: int = 4) -> Layout:
    begin = np.arange(n_images) * (image_tokens + text) + text
    images = np.stack([begin, begin + 1, begin + image_tokens - 1, begin + image_tokens], axis=1)
    n_tokens = n_images * (image_tokens + text)
    return Layout(n_tokens, 0, n_tokens, images)


def profile_of(categories) -> Profile:
    array = np.array(categories)
    print_ = Fingerprint("qwen2_5_vl", *array.shape, 2, 64, f"sha256:{0:064x}")
    return Profile(array, SinkTemplate(), print_, None, {"method": "manual"})


def info_of(profile: Profile, windows=None, n_processes=1):
    heads = range(profile.categories.shape[1] // n_processes)
    return SimpleNamespace(head_dim=64, heads=heads, windows=windows or (None,) * len(profile.categories))


SPARSE = profile_of([[3] * 8] * 4)


@pytest.mark.parametrize("costs", [PORTABLE_COSTS, TRITON_COSTS], ids=["portable", "triton"])
def test_long_prompts_gain_and_short_ones_do_not(costs):
    info = info_of(SPARSE)
    assert not gains(costs, SPARSE, info, [even_layout(6, 18)], 0)
    assert gains(costs, SPARSE, info, [even_layout(40, 1024)], 0)
    assert not gains(costs, SPARSE, info, [even_layout(6, 18)] * 8, 0), "a batch of short prompts stays short"


def test_the_rule_is_the_formula():
    """One more product of overhead than what is saved tips it; a layer that is all dense saves and costs nothing."""
    layout, profile = even_layout(4, 131), profile_of([[0, 2], [0, 0]])
    info = info_of(profile)
    dense, kept = (count_pairs(layout, c, profile.template).total for c in (Category.DENSE, Category.INTRA_IMAGE))
    assert gains(Costs((dense - kept) * 64 - 1, 0, 1.0), profile, info, [layout], 0)
    assert not gains(Costs((dense - kept) * 64 + 1, 0, 1.0), profile, info, [layout], 0)
    blocks = -(-layout.n_tokens // 128)
    assert gains(Costs(0, ((dense - kept) * 64 - 1) / blocks, 1.0), profile, info, [layout], 0)
    assert not gains(Costs(0, ((dense - kept) * 64 + 1) / blocks, 1.0), profile, info, [layout], 0)


@pytest.mark.parametrize("case", ["window", "images both ways", "padding", "filled cache"])
def test_what_a_mask_hides_is_computed_all_the_same(case):
    """Dense attention with a mask takes all pairs; in batches with other rows' too. To the last product."""
    layout, window, q_start = even_layout(4, 131), None, 0
    match case:
        case "window":
            window = 20
        case "images both ways":
            layout = replace(layout, bidirectional=True)
        case "padding":
            layout = Layout(layout.n_tokens + 7, 0, layout.n_tokens, layout.images)
        case "filled cache":
            q_start = int(layout.images[1, 0])
    profile, n = profile_of([[0, 2]]), layout.n_tokens
    info = info_of(profile, windows=(window,))
    plan = build_plan(layout, profile.template, window=window, q_start=q_start)
    kept = int(plan.n_keys[Category.INTRA_IMAGE] @ plan.n_rows)
    saved = ((n - q_start) * n - kept) * 64
    assert gains(Costs(saved - 1, 0, 1.0), profile, info, [layout], q_start)
    assert not gains(Costs(saved + 1, 0, 1.0), profile, info, [layout], q_start)


def test_a_padded_row_of_one_image_makes_the_masks_of_a_batch():
    layout, profile = even_layout(4, 131), profile_of([[0, 2]])
    n = layout.n_tokens
    costs = Costs(n * n * 64 / 2, 0, 1.0)  # more than a triangle
    whole, padded = (Layout(n, start, n, layout.images[:1] + [start] * 4) for start in (0, 5))
    assert not gains(costs, profile, info_of(profile), [layout, whole], 0)
    assert gains(costs, profile, info_of(profile), [layout, padded], 0)


def test_of_several_processes_the_one_that_gains_least_counts():
    layout, profile = even_layout(4, 131), profile_of([[0, 3, 3, 2], [2, 2, 0, 0]])
    dense, kept = (count_pairs(layout, c, profile.template).total for c in (Category.DENSE, Category.INTRA_IMAGE_SINK))
    half = (dense - kept) * 64 / 2  # one head saves it, and both layers cost something
    info = info_of(profile, n_processes=2)
    assert gains(Costs(half - 1, 0, 1.0), profile, info, [layout], 0)
    assert not gains(Costs(half + 1, 0, 1.0), profile, info, [layout], 0)


def test_what_is_not_there_to_be_saved_does_not_count():
    layout = even_layout(8, 100)
    assert gains(FREE, SPARSE, info_of(SPARSE), [layout], 0)
    assert not gains(FREE, profile_of([[0] * 8]), info_of(profile_of([[0] * 8])), [layout], 0)
    assert not gains(FREE, SPARSE, info_of(SPARSE), [even_layout(1, 100)], 0), "rows of one image run dense either way"
    assert not gains(FREE, SPARSE, info_of(SPARSE), [layout], layout.images[-1, 2]), "a second turn of text"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_prompt_runs_dense_bit_for_bit_and_is_counted(family):
    model = make_model(family)
    inputs = make_inputs(family, [make_ids(3)])
    with torch.no_grad():
        want = model(**inputs).logits
        with patch(model, mixed_profile(model)) as handle:
            assert torch.equal(model(**inputs).logits, want)
            assert handle.report()["forwards"] == {"dense: too short to gain": 1}
        with patch(model, mixed_profile(model), break_even=False) as handle:
            assert not torch.equal(model(**inputs).logits, want)
            assert handle.report()["forwards"] == {"sparse": 1}
            with pytest.raises(ValueError, match="patched already with other arguments"):
                patch(model, mixed_profile(model))
        with patch(model, mixed_profile(model), impl="reference") as handle:
            model(**inputs)
            assert handle.report()["forwards"] == {"sparse": 1}, "the oracle is never a matter of speed"
