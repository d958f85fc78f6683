"""Pruned prefills and the decode steps after them, against a dense model whose mask hides the pruned tokens."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache

from shared_profiles import Category, Layout, category_mask
from shared_profiles.profile import Profile
from tiny_models import (
    END,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    START,
    VIDEO,
    double_model,
    family_names,
    in_double,
    make_ids,
    make_inputs,
    make_video_inputs,
    mixed_profile,
    patch,
    positions_of,
)
from torch_blindsight import DivPrune, FastV, Seen, fingerprint
from torch_blindsight.models import inspect_model
from torch_blindsight.pruning import LayerAttention

pytestmark = pytest.mark.usefixtures("no_grad")

EXACT = dict(rtol=0, atol=1e-9)
STEPS = 5


@dataclass(frozen=True)
class Fixed:
    """Keeps what it is told to; a `Pruner`."""

    kept: tuple[int, ...]
    layer: int

    def __call__(self, seen: Seen) -> np.ndarray:
        assert (seen.before is None) == (self.layer == 0)
        return np.array(self.kept)


@pytest.fixture
def model(family):
    shared = double_model(family)
    yield shared
    assert not hasattr(shared, "_blindsight_handle"), "a test left the shared model patched"
    assert not any(m._forward_pre_hooks for m in shared.modules())


def one_prompt(family):
    return in_double(make_inputs(family, [make_ids(3, text=1)]))


def layout_of(model, inputs):
    info = inspect_model(model)
    return Layout.from_ids(inputs["input_ids"][0].numpy(), info.special, bidirectional=info.family.bidirectional)


def drop_most(layout):
    """Drops most tokens of two images, one end delimiter, an image between but for its start, and a text token.

    Fewer are left than Gemma's window is wide, so that its layers' caches differ in length.
    """
    (_, first, last, _), (_, gone, _, end), (begin, third, _, _) = layout.images.tolist()
    dropped = np.zeros(layout.n_tokens, dtype=bool)
    dropped[first : last + 1] = dropped[gone:end] = dropped[begin - 1] = dropped[third : third + IMAGE_TOKENS] = True
    dropped[first + np.array([0, 6, 9, 12])] = dropped[third + np.array([2, 3, 8, 15])] = False
    assert (~dropped).sum() < 24 - STEPS
    return tuple(np.flatnonzero(~dropped).tolist())


class HiddenTokens:
    """The whole sequence, densely, under one mask a head; from `layer` on pruned tokens are hidden from the others.

    Args:
        model: the model, unpatched.
        profile: every head's category.
        layer, kept: from which layer on, and what is not pruned of the prompt.
    """

    def __init__(self, model, profile, layer, kept):
        self.model, self.profile, self.layer, self.kept = model, profile, layer, kept
        self.windows = inspect_model(model).windows

    def mask(self, layer, layout, kept):
        """`[H, N, N]` bool."""
        left = np.arange(layout.n_tokens) if layer < self.layer else kept
        pruned = layout.keep(left)
        categories = self.profile.categories[layer] if pruned.n_images > 1 else [Category.DENSE] * 4
        mask = np.repeat(np.eye(layout.n_tokens, dtype=bool)[None], len(categories), axis=0)
        for head, category in enumerate(categories):
            mask[head][np.ix_(left, left)] = category_mask(
                pruned, Category(int(category)), self.profile.template, window=self.windows[layer]
            )
        return mask

    def logits(self, inputs, n_prompt):
        """Logits `[n, V]` of the kept tokens and of all after the prompt, without a cache."""
        layout = layout_of(self.model, inputs)
        kept = np.concatenate([self.kept, np.arange(n_prompt, layout.n_tokens)])
        masks = [torch.from_numpy(self.mask(i, layout, kept)) for i in range(len(self.windows))]

        def attend(module, q, k, v, mask, *, scaling, **_):
            groups = q.shape[1] // k.shape[1]
            scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling
            scores = scores.masked_fill(~masks[module.layer_idx], -torch.inf)
            return (scores.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

        AttentionInterface.register("hidden_tokens", attend)
        self.model.set_attn_implementation({"text_config": "hidden_tokens"})
        try:
            out = self.model(**inputs, position_ids=positions_of(self.model, inputs), use_cache=False)
        finally:
            self.model.set_attn_implementation({"text_config": "sdpa"})
        return out.logits[0, kept]


def with_tokens(inputs, tokens):
    """The prompt with tokens of text after it."""
    more = torch.tensor([tokens])
    longer = dict(inputs)
    for name, x in (("input_ids", more), ("attention_mask", torch.ones_like(more))):
        longer[name] = torch.cat([inputs[name], x], dim=1)
    for name in {"token_type_ids", "mm_token_type_ids"} & set(inputs):
        longer[name] = torch.cat([inputs[name], torch.zeros_like(more)], dim=1)
    return longer


@family_names
@pytest.mark.parametrize("layer", [0, 2])
def test_a_pruned_prompt_is_one_whose_pruned_tokens_nobody_sees(model, family, layer):
    """Prefill, then decode steps as `generate` makes them and as a loop without positions does."""
    inputs, profile = one_prompt(family), mixed_profile(model, seed=3)
    n_prompt = inputs["input_ids"].shape[1]
    kept = drop_most(layout_of(model, inputs))
    options = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE, VIDEO, START, END])
    with patch(model, profile, pruner=Fixed(kept, layer)) as handle:
        out = model.generate(
            **inputs, **options, min_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True
        )
        assert handle.report()["forwards"] == {"sparse, pruned": 1, "dense: decode step": STEPS - 1}
        assert handle.kept.tolist() == list(kept)
        tokens = out.sequences[0, n_prompt:].tolist()
        lengths = [x.get_seq_length() for x in out.past_key_values.layers]
        assert lengths == [(n_prompt if i < layer else len(kept)) + STEPS - 1 for i in range(4)]
        prefill = model(**inputs)
        got = [prefill.logits[0]]
        for token in tokens[:-1]:
            step = model(input_ids=torch.tensor([[token]]), past_key_values=prefill.past_key_values)
            got.append(step.logits[0])
    want = HiddenTokens(model, profile, layer, kept).logits(with_tokens(inputs, tokens[:-1]), n_prompt)
    torch.testing.assert_close(torch.cat(got), want, **EXACT)
    torch.testing.assert_close(torch.cat(out.logits), want[-STEPS:].float(), rtol=0, atol=1e-5)


@family_names
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("n_left", [0, 1])
def test_fewer_than_two_images_are_left(model, family, layer, n_left):
    """Then all that is left is seen, as in any prompt of fewer than two images."""
    inputs, profile = one_prompt(family), mixed_profile(model, seed=3)
    layout = layout_of(model, inputs)
    gone = np.concatenate([np.arange(begin, end) for begin, _, _, end in layout.images[n_left:]])
    kept = tuple(np.setdiff1d(np.arange(layout.n_tokens), gone).tolist())
    with patch(model, profile, pruner=Fixed(kept, layer)):
        got = model(**inputs).logits[0]
    want = HiddenTokens(model, profile, layer, kept).logits(inputs, layout.n_tokens)
    torch.testing.assert_close(got, want, **EXACT)


@family_names
def test_keeping_all_and_prompts_that_run_dense(model, family):
    """All tokens kept is not pruned at all; a prompt that runs dense is pruned like any other."""
    inputs = one_prompt(family)
    layout = layout_of(model, inputs)
    whole, kept = tuple(range(layout.n_tokens)), drop_most(layout)
    profile, dense = mixed_profile(model, seed=3), Profile.uniform(Category.DENSE, fingerprint(model))
    with patch(model, profile):
        want = model(**inputs).logits
    with patch(model, profile, pruner=Fixed(whole, 1)):
        assert torch.equal(model(**inputs).logits, want)
    want = HiddenTokens(model, dense, 1, kept).logits(inputs, layout.n_tokens)
    for reason, options in (
        ("all heads are Dense", dict(profile=dense)),
        ("too short to gain", dict(profile=profile, break_even=True)),
    ):
        with patch(model, **options, pruner=Fixed(kept, 1)) as handle:
            got = model(**inputs, use_cache=False).logits[0]
            assert handle.report()["forwards"] == {f"dense: {reason}, pruned": 1}
        torch.testing.assert_close(got, want, **EXACT)
    lone = in_double(make_inputs(family, [make_ids(1)]))
    want = model(**lone).logits
    with patch(model, profile, pruner=DivPrune(1)) as handle:
        torch.testing.assert_close(model(**lone).logits, want, **EXACT)
        assert handle.report()["forwards"] == {"dense: fewer than two images, pruned": 1}
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    text = dict(input_ids=torch.tensor([[1, 10, 11], [PAD, 1, 13]]), attention_mask=mask)
    want = model(**text).logits[mask > 0]
    with patch(model, profile, pruner=Fixed(whole, 1)) as handle:
        first = model(**text)
        assert torch.equal(first.logits[mask > 0], want)
        model(input_ids=torch.tensor([[10], [11]]), past_key_values=first.past_key_values)
        assert handle.report()["forwards"] == {"dense: fewer than two images": 1, "dense: decode step": 1}
        assert handle.kept is None


def test_a_pruned_video_by_either_implementation():
    """The frame groups of a video are images."""
    model = double_model("qwen2_5_vl")
    inputs = in_double(make_video_inputs([3, 2]))
    profile, logits = mixed_profile(model, seed=3), []
    for impl in ("portable", "reference"):
        with patch(model, profile, pruner=DivPrune(0.4), impl=impl) as handle:
            logits.append(model(**inputs).logits)
            assert handle.report()["forwards"] == {"sparse, pruned": 1}
            assert len(handle.kept) == inputs["input_ids"].shape[1] - 5 * (16 - 6)
    torch.testing.assert_close(*logits, **EXACT)


def test_divprune_is_greedy_max_min_diversity():
    """On a line of directions: the loneliest first, then always the farthest from those chosen."""
    degrees = torch.tensor([0.0, 40.0, 45.0, 90.0, 100.0, 175.0, 0.0])
    angle = degrees * torch.pi / 180
    hidden = torch.stack([angle.cos(), angle.sin()], dim=1) * torch.arange(1, 8)[:, None]
    layout = Layout(9, 0, 9, np.array([[0, 1, 8, 8]]))
    seen = Seen(layout, torch.cat([torch.zeros(1, 2), hidden, torch.zeros(1, 2)]), None)
    # 175 is alone by 75 degrees; farthest from it 0, which is there twice; then 90, 45, 40 or 100.
    for n, chosen in ((1, [5]), (2, [0, 5]), (3, [0, 3, 5]), (4, [0, 2, 3, 5]), (5, [0, 2, 3, 4, 5])):
        assert DivPrune(n / 7)(seen).tolist() == [0, *(1 + np.array(chosen)), 8]
    assert DivPrune(1)(seen).tolist() == list(range(9))
    assert DivPrune(0.01)(seen).tolist() == [0, 6, 8], "one token of each image at least"
    axes = torch.tensor([[0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [-1, 0], [0, 0]])  # no rounding: nearest 0, last 1
    assert DivPrune(0.2)(Seen(Layout(7, 0, 7, np.array([[0, 1, 6, 6]])), axes, None)).tolist() == [0, 5, 6]


def test_fastv_ranks_by_what_the_last_token_looks_at(family="gemma3"):
    """The attention that a pruner sees is the model's own, sliding window included."""
    model, inputs = double_model(family), one_prompt(family)
    layout, seen = layout_of(model, inputs), []

    @dataclass(frozen=True)
    class Look:
        layer: int

        def __call__(self, given):
            seen.append(given)
            return np.arange(given.layout.n_tokens)

    model.set_attn_implementation({"text_config": "eager"})
    try:
        want = model(**inputs, output_attentions=True, output_hidden_states=True)
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
    for layer in (0, 1, 3):  # the layer before 1 slides, that before 3 looks at everything
        with patch(model, Profile.uniform(Category.DENSE, fingerprint(model)), pruner=Look(layer)):
            model(**inputs)
        torch.testing.assert_close(seen[-1].hidden, want.hidden_states[layer][0], rtol=0, atol=1e-5)
        if layer == 0:
            features = model.get_image_features(inputs["pixel_values"]).pooler_output
            assert torch.equal(seen[-1].hidden[inputs["input_ids"][0] == IMAGE], features.flatten(0, 1))
            continue
        looked = want.attentions[layer - 1][0, :, -1]  # through a softmax in float32
        torch.testing.assert_close(seen[-1].before.of_last_token(), looked, rtol=0, atol=1e-6)
    tokens = np.flatnonzero(inputs["input_ids"][0].numpy() == IMAGE)
    received = want.attentions[2][0, :, -1].mean(0).numpy()[tokens]
    best = tokens[np.argsort(received)[-12:]]
    kept = FastV(0.25, 3)(seen[-1])
    assert kept.tolist() == np.union1d(np.setdiff1d(np.arange(layout.n_tokens), tokens), best).tolist()


@pytest.mark.parametrize("pruner", [FastV(0.5), DivPrune(0.5)], ids=["FastV", "DivPrune"])
def test_a_pruned_forward_may_be_differentiated(pruner):
    """Or merely be called where nobody turned gradients off: what a pruner chooses has none."""
    model, prompt = double_model("qwen2_vl"), one_prompt("qwen2_vl")
    with patch(model, mixed_profile(model), pruner=pruner):
        want = model(**prompt).logits
        with torch.enable_grad():
            got = model(**prompt).logits
            (gradient,) = torch.autograd.grad(got.sum(), model.get_input_embeddings().weight)
    assert torch.equal(got, want) and gradient.any()


@family_names
def test_a_copied_cache_and_one_from_a_tuple_go_on_at_the_same_position(family):
    model, prompt, step = double_model(family), one_prompt(family), dict(input_ids=torch.tensor([[42]]))
    with patch(model, mixed_profile(model), pruner=DivPrune(0.5)):
        cache = model(**prompt).past_key_values
        copied = copy.deepcopy(cache)
        (in_tuple,) = [part for part in model(**prompt, return_dict=False) if isinstance(part, DynamicCache)]
        want, *got = (model(**step, past_key_values=each).logits for each in (cache, copied, in_tuple))
    assert all(torch.equal(logits, want) for logits in got)


def test_a_pruned_cache_that_was_cut_is_refused():
    """What is left of it stands elsewhere than its length says."""
    model = double_model("qwen2_vl")
    with patch(model, mixed_profile(model), pruner=DivPrune(0.5)):
        cache = model(**one_prompt("qwen2_vl")).past_key_values
        cache.crop(-1)
        with pytest.raises(ValueError, match=r"its cache uncut and unmasked. Got .* -1 tokens decoded so far"):
            model(input_ids=torch.tensor([[42]]), past_key_values=cache)


def test_the_last_token_stays_even_where_it_is_of_an_image():
    layout = Layout(6, 0, 6, np.array([[0, 1, 6, 6]]), unfinished=True)
    attention = LayerAttention(torch.zeros(2, 6, 4), torch.zeros(1, 6, 4), 1.0, None)
    seen = Seen(layout, torch.eye(6), attention)
    for pruner in (DivPrune(0.2), FastV(0.2)):
        assert pruner(seen)[-1] == 5


def test_refusals():
    """What cannot be pruned is an error, never an unpruned run; what follows a pruned prompt is a decode step."""
    model = double_model("gemma3")
    profile, prompt = mixed_profile(model), one_prompt("gemma3")
    n = prompt["input_ids"].shape[1]
    two = in_double(make_inputs("gemma3", [make_ids(2), make_ids(2, seed=1)]))
    mask = prompt["attention_mask"].clone()
    mask[0, 0] = 0
    whole_cache = DynamicCache()
    cases = [
        ("a batch of several prompts", two),
        ("padding", prompt | dict(attention_mask=mask)),
        ("training mode, or labels", prompt | dict(labels=prompt["input_ids"])),
        ("logits_to_keep as a tensor", prompt | dict(logits_to_keep=torch.tensor([n - 1]))),
        ("a cache that keeps sliding layers whole", prompt | dict(past_key_values=whole_cache)),
        ("a static cache", prompt | dict(past_key_values=StaticCache(model.config, max_cache_len=n))),
        ("embeddings instead of input_ids", dict(inputs_embeds=torch.zeros(1, 4, 64, dtype=torch.float64))),
        ("attention_mask is not", prompt | dict(attention_mask=torch.ones(1, 1, n, n, dtype=torch.bool))),
    ]
    with patch(model, profile, pruner=FastV(0.5)) as handle:
        for message, inputs in cases:
            with pytest.raises(ValueError, match=f"one at a time, whole, unpadded, .* Got: {message}"):
                model(**inputs)
        started = model(input_ids=torch.tensor([[1, 10]]))
        with pytest.raises(ValueError, match="Got: a prompt in pieces, or a second turn"):
            model(**prompt | dict(attention_mask=None, past_key_values=started.past_key_values))
        cache = model(**prompt).past_key_values
        for ids, what in (([[1, 10]], r"input_ids of shape \(1, 2\), 0 tokens"), ([[1], [1]], r"shape \(2, 1\), 0 ")):
            with pytest.raises(ValueError, match=f"must be followed by decode steps of one token, .* Got .*{what}"):
                model(input_ids=torch.tensor(ids), past_key_values=cache)
        with pytest.raises(ValueError, match=r"unmasked. Got no input_ids, 0 tokens decoded so far"):
            model(inputs_embeds=torch.zeros(1, 1, 64, dtype=torch.float64), past_key_values=cache)
        with pytest.raises(ValueError, match="some tokens masked"):
            model(input_ids=torch.tensor([[1]]), past_key_values=cache, attention_mask=mask)
        assert handle.report()["forwards"] == {"dense: fewer than two images": 1, "sparse, pruned": 1}
        model.model.language_model.compile(backend="eager")
        try:
            with pytest.raises(ValueError, match="Got: a compiled language model"):
                model(**prompt)
        finally:
            model.model.language_model._compiled_call_impl = None
    wrong = [((0,), rf"must keep the prompt's last token, {n - 1}, .* Got 0"), ((), "at least one position of")]
    for kept, message in [*wrong, ((True,) * n, "take np.flatnonzero"), ((n - 1, n - 1), "each once")]:
        with patch(model, profile, pruner=Fixed(kept, 2)), pytest.raises(ValueError, match=message):
            model(**prompt)
    for layer in (-1, 4, 1.5):
        with pytest.raises(ValueError, match=rf"must be one of the model's 4. Got {layer}"):
            patch(model, profile, pruner=Fixed((0,), layer))
    for none in (DivPrune, 0.5, lambda seen: seen):
        with pytest.raises(ValueError, match=r"must be an object with a layer, .* like DivPrune\(0.5\)"):
            patch(model, profile, pruner=none)
    with pytest.raises(ValueError, match="a pruner needs a profile"):
        patch(model, pruner=DivPrune(0.5))
    for pruner, share in itertools.product((DivPrune, FastV), (0, -1, 1.01)):
        with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
            pruner(share)
    for layer in (0, 1.5):
        with pytest.raises(ValueError, match="layer must be an integer of at least 1"):
            FastV(0.5, layer)
