"""The life of a patch: on, off, twice, on two models, in two threads, through errors; and what its report says."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shared_profiles import Category, SinkTemplate
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import Profile
from tiny_models import (
    FAMILIES,
    double_model,
    family_names,
    in_double,
    make_ids,
    make_inputs,
    make_model,
    mixed_profile,
    patch,
)
from torch_blindsight import DivPrune, calibrate, fingerprint
from torch_blindsight.attention import NAME, current_prefill
from torch_blindsight.models import inspect_model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    assert current_prefill.get() is None, "a forward left its prefill behind"


@pytest.fixture(params=FAMILIES)
def case(request):
    """A fresh model, a profile for it, a prompt, and its dense logits."""
    model = make_model(request.param)
    inputs = make_inputs(request.param, [make_ids(3)])
    return SimpleNamespace(
        family=request.param, model=model, profile=mixed_profile(model), inputs=inputs, dense=model(**inputs).logits
    )


def implementations(model):
    config = model.config
    return [c._attn_implementation for c in (config, config.text_config, config.vision_config)]


def test_unpatch_restores_the_model(case):
    before = implementations(case.model), dict(case.model._forward_hooks), set(vars(case.model))
    handle = patch(case.model, case.profile)
    assert implementations(case.model) == ["sdpa", NAME, "sdpa"], "the vision tower keeps its own"
    assert not torch.equal(case.model(**case.inputs).logits, case.dense)
    handle.unpatch()
    assert (implementations(case.model), dict(case.model._forward_hooks), set(vars(case.model))) == before
    assert not case.model._forward_pre_hooks
    assert torch.equal(case.model(**case.inputs).logits, case.dense)
    handle.unpatch()
    assert handle.report()["state"] == "unpatched"
    assert handle.report()["forwards"] == {"sparse": 1}


def test_another_implementation_is_restored_too(case):
    case.model.set_attn_implementation("eager")
    with patch(case.model, case.profile):
        assert implementations(case.model) == ["eager", NAME, "eager"]
    assert implementations(case.model) == ["eager", "eager", "eager"]


def test_patching_again_returns_the_same_handle(case, tmp_path):
    handle = patch(case.model, case.profile)
    assert patch(case.model, Profile.from_json(case.profile.to_json())) is handle
    for other in (
        dict(profile=Profile.uniform(Category.SINK, case.profile.fingerprint)),
        dict(profile=case.profile, impl="reference"),
        dict(profile=case.profile, allow_mismatch=True),
        dict(),
    ):
        with pytest.raises(ValueError, match=r"must not be patched already .* Call unpatch\(\)"):
            patch(case.model, **other)
    assert patch(case.model, case.profile) is handle
    handle.unpatch()

    case.profile.save(tmp_path / "profile.json")
    with patch(case.model, tmp_path / "profile.json") as handle:
        assert handle.profile == case.profile
        assert handle.report()["profile"] == str(tmp_path / "profile.json")
        assert patch(case.model, str(tmp_path / "profile.json")) is handle
    newer = patch(case.model, case.profile)
    handle.unpatch()
    assert patch(case.model, case.profile) is newer, "an old handle must not take a new patch off"
    newer.unpatch()


def test_as_a_context_manager(case):
    with pytest.raises(KeyError), patch(case.model, case.profile) as handle:
        assert handle.report()["state"] == "sparse"
        raise KeyError
    assert implementations(case.model) == ["sdpa", "sdpa", "sdpa"]
    assert torch.equal(case.model(**case.inputs).logits, case.dense)


def test_report(case):
    text = make_inputs(case.family, [make_ids(1)])
    with patch(case.model, case.profile) as handle:
        one_of_each = {"DENSE": 1, "SINK": 1, "INTRA_IMAGE": 1, "INTRA_IMAGE_SINK": 1}
        assert handle.report() == {
            "state": "sparse",
            "impl": "portable",
            "profile": "in memory",
            "categories": [one_of_each] * 4,
            "forwards": {},
        }
        case.model.generate(**case.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        case.model(**text)
        case.model(**text)
        forwards = handle.report()["forwards"]
        assert forwards == {"sparse": 1, "dense: decode step": 2, "dense: fewer than two images": 2}
        forwards.clear()
        assert sum(handle.report()["forwards"].values()) == 5, "a report is a copy"


def test_two_models_at_once(case):
    """Taking turns, with different profiles; and one patched model leaves an unpatched one alone."""
    other = make_model(case.family, seed=1)
    lone = Profile.uniform(Category.INTRA_IMAGE, fingerprint(other))
    with patch(other, lone):
        other_alone = other(**case.inputs).logits
    with patch(case.model, case.profile) as first:
        alone = case.model(**case.inputs).logits
        unpatched = other(**case.inputs).logits
        with patch(other, lone) as second:
            for _ in range(2):
                assert torch.equal(case.model(**case.inputs).logits, alone)
                assert torch.equal(other(**case.inputs).logits, other_alone)
            assert second.report()["forwards"] == {"sparse": 2}
        assert first.report()["forwards"] == {"sparse": 3}
        assert torch.equal(other(**case.inputs).logits, unpatched)
    assert not torch.equal(unpatched, other_alone)


def test_two_models_in_two_threads(case):
    """Each thread's prompts have another length, so that a mixed-up layout cannot go unnoticed."""
    models = [case.model, make_model(case.family, seed=1)]
    prompts = [[make_inputs(case.family, [make_ids(2 + t + i)]) for i in range(4)] for t in range(2)]
    handles = [patch(model, mixed_profile(model, seed=t)) for t, model in enumerate(models)]
    alone = [[model(**x).logits for x in mine] for model, mine in zip(models, prompts, strict=True)]
    barrier, together = threading.Barrier(2), [[], []]

    def serve(t):
        with torch.no_grad():
            for x in prompts[t] * 3:
                barrier.wait(timeout=60)
                together[t].append(models[t](**x).logits)

    threads = [threading.Thread(target=serve, args=(t,)) for t in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for t in range(2):
        assert len(together[t]) == 12
        assert all(torch.equal(a, b) for a, b in zip(alone[t] * 3, together[t], strict=True))
        assert handles[t].report()["forwards"] == {"sparse": 16}
        handles[t].unpatch()


def run_at_once(handle, forwards):
    """Runs two forwards of one model in two threads that meet inside its second layer."""
    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait(timeout=60)

    def serve(forward):
        with torch.no_grad():
            forward()

    hook = handle.info.attentions[1].register_forward_hook(meet)
    threads = [threading.Thread(target=serve, args=(forward,)) for forward in forwards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()


# The forward of a Gemma 3 has no state of its own.
@pytest.mark.parametrize("case", ["gemma3"], indirect=True)
def test_one_model_in_two_threads(case):
    """What each turns out to have in its cache is its own."""
    length = case.inputs["input_ids"].shape[1]
    others = make_inputs(case.family, [[*make_ids(2, seed=3), *[60] * length][:length]], seed=3)
    turns, more = [case.inputs, others], make_inputs(case.family, [make_ids(1, seed=8)[1:]], seed=8)

    def second_turn(first, cache):
        both = {name: torch.cat([first[name], more[name]], dim=1) for name in ("attention_mask", "token_type_ids")}
        return case.model(**more | both, past_key_values=cache).logits

    with patch(case.model, case.profile) as handle:
        alone = [second_turn(x, case.model(**x, past_key_values=DynamicCache()).past_key_values) for x in turns]
        caches = [DynamicCache(), DynamicCache()]
        run_at_once(handle, [partial(case.model, **x, past_key_values=c) for x, c in zip(turns, caches, strict=True)])
        for first, cache, want in zip(turns, caches, alone, strict=True):
            assert torch.equal(second_turn(first, cache), want)
        assert handle.report()["forwards"] == {"sparse": 8}


@pytest.mark.parametrize("case", ["gemma3"], indirect=True)
def test_one_model_measured_in_two_threads(case):
    """Each prompt's statistics are its own."""
    prompts = [make_inputs(case.family, [make_ids(2 + t)], seed=t) for t in range(2)]
    template = SinkTemplate()
    want = calibrate(case.model, prompts, template=template, thresholds=Thresholds(), progress=False).summary
    with patch(case.model, template=template, measure_prompts=2) as handle:
        run_at_once(handle, [partial(case.model, **x) for x in prompts])
        assert handle.profile.summary == want


def fail_in_a_layer(handle, error):
    def fail(*_):
        raise error

    return handle.info.attentions[2].register_forward_hook(fail)


@pytest.mark.parametrize("how", ["bad-pictures", "malformed-prompt", "inside-a-layer", "interrupted"])
def test_an_exception_leaves_nothing_behind(case, how):
    with patch(case.model, case.profile) as handle:
        want = case.model(**case.inputs).logits
        inputs, error, hook = dict(case.inputs), (RuntimeError, ValueError), None
        if how == "bad-pictures":
            inputs["pixel_values"] = inputs["pixel_values"][:-1]
        elif how == "malformed-prompt":
            inputs["input_ids"] = inputs["input_ids"].clone()
            inputs["input_ids"][0, 4] = 50  # over the first start delimiter
        else:
            error = RuntimeError if how == "inside-a-layer" else KeyboardInterrupt
            hook = fail_in_a_layer(handle, error)
        with pytest.raises(error):
            case.model(**inputs)
        if how != "interrupted":  # torch runs no hook after an interrupt; the next forward starts afresh
            assert current_prefill.get() is None
        if hook is not None:
            hook.remove()
        assert torch.equal(case.model(**case.inputs).logits, want)
        assert current_prefill.get() is None
        if how == "interrupted":
            hook = fail_in_a_layer(handle, error)
            with pytest.raises(error):
                case.model(**inputs)
            hook.remove()
            assert current_prefill.get() is not None
    assert current_prefill.get() is None, "unpatching cleans up"
    assert torch.equal(case.model(**case.inputs).logits, case.dense)


def test_a_copy_of_a_patched_model_is_patched_by_itself(case):
    with patch(case.model, case.profile) as handle:
        want = case.model(**case.inputs).logits
        twin = copy.deepcopy(case.model)
        assert torch.equal(twin(**case.inputs).logits, want)
        assert handle.report()["forwards"] == {"sparse": 1}
        twins = patch(twin, case.profile)
        assert twins is not handle
        twins.unpatch()
        assert torch.equal(twin(**case.inputs).logits, case.dense)
        assert torch.equal(case.model(**case.inputs).logits, want)


def test_a_patched_model_can_be_pickled(case):
    pruner = DivPrune(0.5)
    with patch(case.model, case.profile, pruner=pruner):
        want = case.model(**case.inputs).logits
        pickled = pickle.dumps(case.model)
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):  # as in a process that never patched
            del functions._global_mapping[NAME]
        twin = pickle.loads(pickled)
        assert torch.equal(twin(**case.inputs).logits, want)
        patch(twin, case.profile, pruner=pruner).unpatch()
    assert torch.equal(twin(**case.inputs).logits, case.dense)


def test_patching_again_after_the_profile_or_the_weights_changed_is_refused(case, tmp_path):
    path = tmp_path / "profile.json"
    case.profile.save(path)
    with patch(case.model, path) as handle:
        assert patch(case.model, path) is handle
        Profile.uniform(Category.SINK, fingerprint(case.model)).save(path)
        with pytest.raises(ValueError, match="patched already with other arguments, by another profile or with other"):
            patch(case.model, path)
    with patch(case.model, case.profile, allow_mismatch=True):
        case.model.get_input_embeddings().weight.mul_(2)
        with pytest.raises(ValueError, match="by another profile or with other weights"):
            patch(case.model, case.profile, allow_mismatch=True)


def test_a_model_that_shares_its_configuration_with_a_patched_one_is_refused(case):
    """As a part of it does: two patches on one configuration could not be taken off one by one."""
    inner = case.model.model
    assert inner.config is case.model.config
    with patch(case.model, case.profile) as handle:
        with pytest.raises(ValueError, match="must not share its configuration with a patched model, or be part"):
            patch(inner, case.profile)
        case.model(**case.inputs)
        assert handle.report()["forwards"] == {"sparse": 1}


def test_attention_that_was_replaced_after_the_patch_is_noticed(case):
    handle = patch(case.model, case.profile)
    case.model.set_attn_implementation({"text_config": "eager"})
    with pytest.raises(RuntimeError, match=r"all 4 layers must call BlindSight's attention, once each. Called: \[\]"):
        case.model(**case.inputs)
    handle.unpatch()
    assert torch.equal(case.model(**case.inputs).logits, case.dense)


def test_a_name_that_somebody_else_took_is_noticed(case):
    ALL_ATTENTION_FUNCTIONS[NAME] = sdpa_attention_forward  # shadows what was registered
    try:
        with pytest.raises(RuntimeError, match=r"all 4 layers must call BlindSight's attention.* left unpatched"):
            patch(case.model, case.profile)
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]
    assert implementations(case.model) == ["sdpa", "sdpa", "sdpa"]
    assert torch.equal(case.model(**case.inputs).logits, case.dense)
    with patch(case.model, case.profile) as handle:
        case.model(**case.inputs)
        assert handle.report()["forwards"] == {"sparse": 1}


def test_what_a_patched_model_cannot_give_is_refused(case):
    with patch(case.model, case.profile) as handle:
        with pytest.raises(ValueError, match=r"no attention weights .* Got output_attentions=True, as an"):
            case.model(**case.inputs, output_attentions=True)
        with pytest.raises(ValueError, match="no attention weights to return"):
            case.model.generate(**case.inputs, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
        with pytest.raises(ValueError, match=r"batches as rows with padding. Got a packed batch \(generate_batch"):
            case.model(**case.inputs, cu_seq_lens_q=torch.tensor([0, 67]))
        assert handle.report()["forwards"] == {}
    case.model.set_attn_implementation({"text_config": "eager"})
    case.model.config.text_config.output_attentions = True
    with (
        patch(case.model, case.profile),
        pytest.raises(ValueError, match="as an argument or in the configuration"),
    ):
        case.model(**case.inputs)


@family_names
def test_gradients_are_those_of_the_unpatched_model_where_everything_is_kept(family):
    """In evaluation mode with gradients on, as in ranking heads by what their change does to an answer."""
    model = double_model(family)
    inputs = in_double(make_inputs(family, [make_ids(3)]))
    everything = Profile.uniform(Category.INTRA_IMAGE_SINK, fingerprint(model), SinkTemplate(tuple(range(18)), (), 8))
    weights = [model.get_input_embeddings().weight, *(a.k_proj.weight for a in inspect_model(model).attentions)]

    def gradients():
        with torch.enable_grad():
            return torch.autograd.grad(model(**inputs).logits[0, -1].square().sum(), weights)

    want = gradients()
    with patch(model, everything) as handle:
        got = gradients()
        assert handle.report()["forwards"] == {"sparse": 1}
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))
