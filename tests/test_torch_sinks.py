"""Measured sinks: equal to the attention matrix summed by hand, planted ones are found, the ablation removes them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attention_inputs import draw_inputs
from shared_profiles import Category, Layout
from shared_profiles.sink_statistics import SinkMass, learn_template
from sinks_by_hand import REACH, by_hand, lse, stacked
from strategies import layouts, windows
from tiny_models import END, START, family_names, make_ids, make_inputs, make_model
from torch_blindsight import sinks
from torch_blindsight.maps import attention_maps
from torch_blindsight.sinks import SinkMeter, WithoutDelimiters, measure_sinks


def metered(q, k, layout, scale, window):
    """What the meter makes of one layer."""
    meter = SinkMeter(layout, SimpleNamespace(n_layers=1, n_heads=len(q)), REACH)
    dense, intra = (lse(q, k, layout, c, scale, window)[None] for c in (Category.DENSE, Category.INTRA_IMAGE))
    meter.add(0, q[None], k[None], scale, window, dense, intra)
    return meter.mass()


@settings(max_examples=40)
@given(layouts(max_images=4, max_image=20).filter(lambda x: x.n_images >= 2), windows, st.integers(0, 99))
def test_the_meter_equals_the_attention_matrix_summed_by_hand(layout, window, seed):
    """Any layout, window, padding and direction: own image, text and every bin, a few rows at a time."""
    q, k, _ = (x[0] for x in draw_inputs(seed, 1, 4, 2, layout.n_tokens, layout.n_tokens, 8, torch.float32))
    before, sinks._SCORES = sinks._SCORES, 300
    try:
        mass = metered(q, k, layout, 0.5, window)
    finally:
        sinks._SCORES = before
    np.testing.assert_allclose(stacked(mass), by_hand(q, k, layout, 0.5, window), atol=2e-6)
    np.testing.assert_allclose(stacked(mass).sum(-1), 1, atol=2e-6)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.n = max(
            [self.n, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))]
        )
        return out


def test_no_matrix_of_the_prompts_length_squared_exists(monkeypatch):
    """A prompt of 6,000 tokens: what the meter makes is bounded by its block of scores and by what it was given."""
    monkeypatch.setattr(sinks, "_SCORES", 1 << 18)
    rows = np.arange(30)[:, None] * 200 + np.array([2, 3, 197, 198])
    layout = Layout(6000, 0, 6000, rows)
    q, k, _ = draw_inputs(0, 1, 4, 2, 6000, 6000, 8, torch.float32)
    meter = SinkMeter(layout, SimpleNamespace(n_layers=1, n_heads=4), REACH)
    with Largest() as largest:
        meter.add(0, q, k, 0.3, None, torch.zeros(1, 4, 6000), torch.zeros(1, 4, 6000))
    assert 0 < largest.n <= 1 << 18


def test_nothing_is_uploaded_a_block_at_a_time(monkeypatch):
    """On a GPU an upload waits for all that was launched."""
    rows = np.arange(30)[:, None] * 20 + np.array([2, 3, 17, 18])
    layout = Layout(600, 0, 600, rows)
    q, k, _ = (x[0] for x in draw_inputs(0, 1, 4, 2, 600, 600, 8, torch.float32))
    uploads, from_numpy = [], torch.from_numpy
    monkeypatch.setattr(sinks, "_SCORES", 300)
    meter = SinkMeter(layout, SimpleNamespace(n_layers=1, n_heads=4), REACH)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_numpy", lambda x: uploads.append(x) or from_numpy(x))
        meter.add(0, q[None], k[None], 0.3, None, torch.zeros(1, 4, 600), torch.zeros(1, 4, 600))
    assert len(uploads) == 4


@pytest.mark.parametrize("offset", [2, -3])
def test_a_planted_sink_is_learned(offset):
    """Keys that every query likes, at one offset of every image: that offset joins the ends, no other."""
    rows = np.arange(4)[:, None] * 26 + np.array([2, 3, 23, 24])
    layout = Layout(110, 0, 110, rows)
    q, k, _ = (x[0] for x in draw_inputs(1, 1, 4, 2, 110, 110, 8, torch.float32))
    places = rows[:, 0] + offset if offset > 0 else rows[:, 3] + offset
    q[..., 0], k[..., 0] = 4.0, 0.0
    plain = learn_template(metered(q, k, layout, 0.35, None))
    assert (plain.from_start, plain.from_end) == ((0, 1), (1, 2))
    k[:, places, 0] = 4.0
    template = learn_template(metered(q, k, layout, 0.35, None))
    expected = ((0, 1, offset), (1, 2)) if offset > 0 else ((0, 1), (1, 2, -offset))
    assert (template.from_start, template.from_end) == expected


@family_names
def test_a_model_is_measured_layer_by_layer(family, monkeypatch):
    """What reaches every layer's attention, summed by hand, is what `measure_sinks` says; one image shows nothing."""
    model = make_model(family)
    seen = {}
    attend = sinks.SinkMode.attend

    def spy(self, prefill, layer, q, k, v, scale, window):
        seen[layer] = q[0].clone(), k[0].clone(), prefill.layouts[0], scale, window
        return attend(self, prefill, layer, q, k, v, scale, window)

    monkeypatch.setattr(sinks.SinkMode, "attend", spy)
    prompts = [make_inputs(family, [make_ids(n, seed=n)], seed=n) for n in (1, 4, 1)]
    (reading,) = measure_sinks(model, prompts, reach=REACH)
    mass = reading.mass
    assert mass.own.shape == (4, 4)
    for layer in range(4):
        expected = by_hand(*seen[layer])
        one = SinkMass(*(getattr(mass, name)[layer : layer + 1] for name in ("own", "text", "others", "pairs")))
        np.testing.assert_allclose(stacked(one), expected, atol=1e-5)
    logits = model(**prompts[1]).logits[0, -1].double()
    np.testing.assert_allclose(reading.log_probs, logits.log_softmax(-1).detach().numpy(), atol=1e-4)
    if family == "gemma3":  # its windows hide the first images from the last
        assert mass.pairs[0].sum() < mass.pairs[2].sum()
    assert not model._forward_pre_hooks
    assert not model.get_input_embeddings()._forward_pre_hooks


def test_a_prompt_may_come_without_a_mask():
    """Then no token of it is padding."""
    model, masked = make_model("qwen2_5_vl"), make_inputs("qwen2_5_vl", [make_ids(2)])
    bare = {name: x for name, x in masked.items() if name != "attention_mask"}
    want, got = measure_sinks(model, [masked, bare])
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(stacked(got.mass), stacked(want.mass), rtol=0, atol=1e-6)


@family_names
def test_without_delimiters_a_text_token_stands_in_their_place(family, no_grad):
    """All text being one token, the ablation is the model whose delimiters are embedded as that token."""
    model = make_model(family)
    ids = [20 if i not in (START, END, 5) else i for i in make_ids(3)]
    inputs = make_inputs(family, [ids])
    plain = model(**inputs).logits
    with WithoutDelimiters(model):
        ablated = model(**inputs).logits
    assert not torch.allclose(plain, ablated)
    torch.testing.assert_close(model(**inputs).logits, plain)
    model.get_input_embeddings().weight[[START, END]] = model.get_input_embeddings().weight[20].clone()
    others = [i for i in range(96) if i not in (START, END)]  # Gemma reads its logits off the same table
    torch.testing.assert_close(model(**inputs).logits[..., others], ablated[..., others])


def test_the_ablation_takes_the_nearest_text_before_a_delimiter():
    """Before it where there is text, else the first after it; a prompt without text is refused."""
    model = make_model("qwen2_vl")
    with WithoutDelimiters(model) as _:
        (hook,) = model.get_input_embeddings()._forward_pre_hooks.values()
        row = torch.tensor([[START, 5, END, 21, 22, START, 5, END, START, 5, END, 23]])
        assert hook(None, (row,))[0].tolist() == [[21, 5, 21, 21, 22, 22, 5, 22, 22, 5, 22, 23]]
        with pytest.raises(ValueError, match="without text"):
            hook(None, (torch.tensor([[START, 5, END]]),))


def test_the_ablation_removes_a_sink_that_is_the_delimiters_own():
    """Start delimiters whose embedding draws every head: their strength falls to that of ordinary tokens."""
    model = make_model("qwen2_5_vl", n_layers=1)
    attention = model.model.language_model.layers[0].self_attn
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0.0
        model.get_input_embeddings().weight[START] = 0.0
        model.get_input_embeddings().weight[START, 0] = 3.0
        for bias in (attention.q_proj.bias, attention.k_proj.bias):
            bias.zero_()
        attention.q_proj.weight.mul_(0.05)
        attention.k_proj.weight.mul_(0.05)
        attention.k_proj.weight[:, 0] = 0.0
        # The slowest rotary pair turns least: queries always point along it, and START's key answers.
        for head in range(4):
            attention.q_proj.bias[head * 16 + 7] = 8.0
        for head in range(2):
            attention.k_proj.weight[head * 16 + 7, 0] = 4.0
    prompts = [make_inputs("qwen2_5_vl", [make_ids(3, seed=1)])]
    with_, without = (measure_sinks(model, prompts, delimiters=way)[0].mass for way in (True, False))
    assert with_.strength[..., 0].min() > 4
    assert without.strength[..., 0].max() < 2
    assert without.own.mean() > with_.own.mean()


@family_names
def test_drawn_maps_are_the_models_attention_weights(family, no_grad):
    """The heads asked for, equal to what transformers returns with output_attentions; other prompts are refused."""
    model = make_model(family)
    inputs = make_inputs(family, [make_ids(3)])
    layout, maps = attention_maps(model, inputs, [(0, 1), (2, 3)])
    assert layout.n_images == 3
    assert sorted(maps) == [(0, 1), (2, 3)]
    model.set_attn_implementation({"text_config": "eager"})
    attentions = model(**inputs, output_attentions=True).attentions
    for (layer, head), weights in maps.items():
        np.testing.assert_allclose(weights, attentions[layer][0, head].numpy(), atol=1e-5)
    model.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(ValueError, match="at least two images"):
        attention_maps(model, make_inputs(family, [make_ids(1)]), [(0, 0)])
    batch = make_inputs(family, [make_ids(2), make_ids(3)])
    with pytest.raises(ValueError, match=r"drawn one at a time, and whole\. Got 2 from position 0 on"):
        attention_maps(model, batch, [(0, 0)])
    with pytest.raises(ValueError, match=r"measured one at a time, and whole\. Got 2 from position 0 on"):
        measure_sinks(model, [batch])
    with pytest.raises(ValueError, match="at most 1024 tokens"):
        attention_maps(model, make_inputs(family, [make_ids(40, text=10)]), [(0, 0)])
