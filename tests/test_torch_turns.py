"""What transformers takes in second turns, and what a patched model makes of it: token types, masks with holes.

And what static caches hold of the prompts before.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from shared_profiles import FAMILIES
from tiny_models import (
    END,
    IMAGE,
    START,
    double_model,
    family_names,
    in_double,
    make_ids,
    make_inputs,
    make_model,
    mixed_profile,
    patch,
    positions_of,
)
from torch_blindsight import prompts
from torch_blindsight.known_tokens import Chunk, note_tokens
from torch_blindsight.models import inspect_model
from torch_blindsight.prompts import Dense, read_layouts


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("types", ["of all tokens", "of the new tokens", "all text"])
def test_token_types_of_gemma(types):
    """Transformers reads them from the first cached token on; what does not mark just the images runs dense."""
    model = double_model("gemma3")
    first, more = (in_double(make_inputs("gemma3", [make_ids(2, seed=s)], seed=s)) for s in (0, 5))
    given = torch.cat([first["token_type_ids"], more["token_type_ids"]], dim=1)
    given = {"of all tokens": given, "of the new tokens": more["token_type_ids"], "all text": 0 * given}[types]
    mask = torch.ones(1, first["input_ids"].shape[1] + more["input_ids"].shape[1], dtype=torch.long)

    def first_turn():
        return model(**first, past_key_values=DynamicCache(config=model.config)).past_key_values

    def second_turn(cache):
        return model(**more | dict(attention_mask=mask, token_type_ids=given), past_key_values=cache).logits

    with patch(model, mixed_profile(model)) as handle:
        caches = first_turn(), first_turn()
        got, forwards = second_turn(caches[0]), handle.report()["forwards"]
    dense = second_turn(caches[1])
    if types == "of all tokens":
        assert forwards == {"sparse": 3}
        assert not torch.equal(got, dense)
    else:
        assert forwards == {"sparse": 2, "dense: token_type_ids are not those of all tokens": 1}
        assert torch.equal(got, dense)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_padding_between_turns_runs_dense(family):
    """A batch padded on the right goes on behind its padding."""
    model = make_model(family)
    inputs = make_inputs(family, [make_ids(3), make_ids(2)], left=False)
    past = inputs["input_ids"].shape[1]
    new = torch.tensor([make_ids(1)]).expand(2, -1)
    n = new.shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, n, dtype=torch.long)], dim=1)
    where = torch.arange(past, past + n).expand(*(() if family == "gemma3" else (3,)), 2, -1)

    def second_turn(cache):
        return model(input_ids=new, attention_mask=mask, position_ids=where, past_key_values=cache).logits

    with patch(model, mixed_profile(model)) as handle:
        caches = [model(**inputs, past_key_values=DynamicCache()).past_key_values for _ in range(2)]
        got = second_turn(caches[0])
        assert handle.report()["forwards"] == {"sparse": 2, "dense: padding inside a row": 1}
    assert torch.equal(got, second_turn(caches[1]))


@family_names
def test_a_placeholder_in_an_answer_is_no_image(family):
    """Sampled, or proposed by an assistant: what follows runs dense, as transformers would."""
    model = double_model(family)
    inputs = in_double(make_inputs(family, [make_ids(3)]))
    n, last = inputs["input_ids"].shape[1], int(positions_of(model, inputs).max())

    def pass_on(cache, ids):
        past = cache.get_seq_length()
        where = (past - n + last + 1 + torch.arange(len(ids))).expand(*(() if family == "gemma3" else (3,)), 1, -1)
        mask = torch.ones(1, past + len(ids), dtype=torch.long)
        new = dict(input_ids=torch.tensor([ids]), attention_mask=mask, position_ids=where)
        return model(**new, past_key_values=cache).logits

    with patch(model, mixed_profile(model)) as handle:
        caches = [model(**inputs, past_key_values=DynamicCache()).past_key_values for _ in range(2)]
        for cache in caches:
            pass_on(cache, [IMAGE])
        got = pass_on(caches[0], [20, START, IMAGE, END, 21])
        reason = "dense: placeholders behind the first prompt that mark no image"
        assert handle.report()["forwards"] == {"sparse": 2, "dense: decode step": 2, reason: 1}
    assert torch.equal(got, pass_on(caches[1], [20, START, IMAGE, END, 21]))


@family_names
def test_a_server_may_write_its_next_prompt_into_the_same_tensors(family):
    """The second turn on the first prompt's cache still knows where that one's images stand."""
    model = double_model(family)
    inputs = in_double(make_inputs(family, [make_ids(3)]))
    more = torch.tensor([make_ids(1, seed=5)])
    positions = positions_of(model, inputs)
    mask = torch.ones(1, positions.shape[-1] + more.shape[1], dtype=torch.long)
    where = (int(positions.max()) + 1 + torch.arange(more.shape[1])).expand(*positions.shape[:-1], -1)
    results = []
    with patch(model, mixed_profile(model)) as handle:
        for other in (make_ids(3), [*make_ids(2, seed=4, text=6), *[20] * 100][: len(make_ids(3))]):
            buffer, cache = inputs["input_ids"].clone(), DynamicCache(config=model.config)
            model(**inputs | dict(input_ids=buffer), past_key_values=cache)
            buffer.copy_(torch.tensor([other]))
            turn = dict(input_ids=more, attention_mask=mask, position_ids=where)
            results.append(model(**turn, past_key_values=cache).logits)
        assert handle.report()["forwards"] == {"sparse": 4}
    assert torch.equal(*results)


def test_tokens_that_an_assistant_proposes_do_not_read_the_whole_cache(monkeypatch):
    """Thousands of candidates follow one prompt; most are thrown away again."""
    cache = DynamicCache()
    keys = torch.zeros(1, 1, 1000, 1)
    cache.update(keys, keys, 0)
    note_tokens(cache, 0, Chunk(torch.tensor([make_ids(30)[:1000]])))
    monkeypatch.setattr(prompts, "tokens_before", None)  # whoever calls it fails
    special = inspect_model(make_model("qwen2_vl")).special
    arguments = dict(input_ids=torch.tensor([[20, 21, 22]]), past_key_values=cache)
    with pytest.raises(Dense, match="no image tokens among the queries"):
        read_layouts(arguments, FAMILIES["qwen2_vl"], special)


def test_a_static_cache_in_inference_mode_is_unknown():
    """Nobody counts what is written to it there: it may have been filled anew, past the patch."""
    model = double_model("qwen2_vl")
    prompts = [make_ids(3), [*make_ids(2), *[20] * 21]]  # of one length
    inputs = [in_double(make_inputs("qwen2_vl", [ids], seed=1)) for ids in prompts]
    cache = StaticCache(config=model.config, max_cache_len=200)
    more = torch.tensor([make_ids(1, seed=5)])
    turn = dict(input_ids=more, position_ids=torch.arange(70, 70 + more.shape[1]).expand(3, 1, -1))
    profile = mixed_profile(model)
    with torch.inference_mode():
        with patch(model, profile):
            model(**inputs[0], past_key_values=cache)
        cache.reset()
        model(**inputs[1], past_key_values=cache)
        with patch(model, profile) as handle:
            model(**turn, past_key_values=cache)
            assert handle.report()["forwards"] == {"dense: tokens in the cache are unknown": 1}


def test_a_cache_that_hides_its_keys_is_unknown():
    """A server's own, around another: what it holds may be replaced."""

    class Around:
        def __init__(self):
            self.inner = DynamicCache()

        def __getattr__(self, name):
            if name == "layers":
                raise AttributeError(name)
            return getattr(self.inner, name)

    model, cache, more = double_model("qwen2_vl"), Around(), torch.tensor([make_ids(1, seed=5)])
    turn = dict(input_ids=more, position_ids=torch.arange(70, 70 + more.shape[1]).expand(3, 1, -1))
    with patch(model, mixed_profile(model)) as handle:
        model(**in_double(make_inputs("qwen2_vl", [make_ids(3)])), past_key_values=cache)
        model(**turn, past_key_values=cache)
        assert handle.report()["forwards"] == {"sparse": 1, "dense: tokens in the cache are unknown": 1}


def test_chunks_of_gemma_on_a_static_cache():
    """Their masks say that images look both ways, but 5.17 leaves token_type_ids out; later ones pass them on."""
    model, inputs = double_model("gemma3"), in_double(make_inputs("gemma3", [make_ids(3)]))

    def logits(cache):
        options = dict(prefill_chunk_size=30, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        return model.generate(**inputs, **options, cache_implementation=cache).logits[0]

    dense = logits("static")
    with patch(model, mixed_profile(model)) as handle:
        got, forwards = logits("static"), handle.report()["forwards"]
        if forwards == {"sparse": 3}:
            torch.testing.assert_close(got, logits("dynamic"), rtol=0, atol=1e-6)
        else:
            assert forwards == {"dense: token_type_ids are not those of all tokens": 3}
            assert torch.equal(got, dense)


@family_names
@pytest.mark.parametrize("where", ["visual", "layers.1"])
def test_padding_after_an_interrupted_prefill(family, where):
    """Ctrl-C while pictures are encoded or layers run: `generate` makes a static cache's masks before its forward."""
    model, inputs = double_model(family), in_double(make_inputs(family, [make_ids(3), make_ids(2)]))

    def interrupt(*_):
        raise KeyboardInterrupt

    def logits():
        options = dict(max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        return model.generate(**inputs, **options, cache_implementation="static").logits[0]

    where = where.replace("visual", "vision_tower") if family == "gemma3" else where
    with patch(model, mixed_profile(model)) as handle:
        want = logits()
        module = next(m for name, m in model.named_modules() if name.endswith(where))
        hook = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        assert torch.equal(logits(), want)
        assert handle.report()["forwards"] == {"sparse": 3}


@family_names
@pytest.mark.parametrize("cached", [False, True])
def test_no_padding_after_an_interrupted_prefill_that_had_some(family, cached):
    """Ctrl-C between the masks and the first layer; the next prompt, of as many tokens, comes without a mask."""
    model = double_model(family)
    padded, whole = (in_double(make_inputs(family, [make_ids(3), make_ids(n, seed=n)])) for n in (2, 3))
    del whole["attention_mask"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with patch(model, mixed_profile(model)):
        want = model(**whole).logits
        hook = model.model.language_model.layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**padded)
        hook.remove()
        assert torch.equal(model(**whole, past_key_values=DynamicCache() if cached else None).logits, want)
