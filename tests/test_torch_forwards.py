"""Which forward is which: one within another, one that was interrupted, one past the patch's hooks, one that trains."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tiny_models import FAMILIES, make_ids, make_inputs, make_model, mixed_profile, patch
from torch_blindsight.attention import _warn_of_a_bypass


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=FAMILIES)
def case(request):
    """A model, what it is asked, and the layer whose hooks call."""
    model = make_model(request.param)
    return SimpleNamespace(
        family=request.param,
        model=model,
        layer=model.get_submodule("model.language_model.layers.2"),
        profile=mixed_profile(model),
        inputs=make_inputs(request.param, [make_ids(3)]),
    )


def test_ids_may_be_given_by_position(case):
    rest = dict(case.inputs)
    ids = rest.pop("input_ids")
    with patch(case.model, case.profile) as handle:
        assert torch.equal(case.model(ids, **rest).logits, case.model(**case.inputs).logits)
        assert handle.report()["forwards"] == {"sparse": 2}


def test_a_forward_within_that_of_another_model_changes_nothing(case):
    """Also one past the other model's own hooks, which runs dense."""
    other, inputs = make_model(case.family, seed=1), make_inputs(case.family, [make_ids(2, seed=1)])
    with patch(case.model, case.profile), patch(other, mixed_profile(other, seed=1)):
        want, alone = case.model(**case.inputs).logits, [other(**inputs).logits, other.model(**inputs)[0]]
        within = []
        hook = case.layer.register_forward_pre_hook(
            lambda *_: within.extend([other(**inputs).logits, other.model(**inputs)[0]])
        )
        assert torch.equal(case.model(**case.inputs).logits, want)
        assert len(within) == 2 and all(map(torch.equal, within, alone))
        hook.remove()


def test_a_model_called_within_itself_is_refused(case):
    with patch(case.model, case.profile):
        want = case.model(**case.inputs).logits

        def call(*_):
            hook.remove()
            case.model(**case.inputs)

        hook = case.layer.register_forward_pre_hook(call)
        with pytest.raises(RuntimeError, match="must end one forward before it begins the next in the same thread"):
            case.model(**case.inputs)
        assert torch.equal(case.model(**case.inputs).logits, want)


def test_an_interrupted_forward_leaves_nothing_behind(case):
    """Ctrl-C goes past the hook that ends a forward."""
    inner = case.model.model(**case.inputs)[0]
    with patch(case.model, case.profile):
        want = case.model(**case.inputs).logits

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = case.layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            case.model(**case.inputs)
        hook.remove()
        assert torch.equal(case.model.model(**case.inputs)[0], inner), "dense, as it did not pass the patch"
        assert torch.equal(case.model(**case.inputs).logits, want)


def test_an_interrupted_forward_ends_no_other(case):
    """The interrupted model is called next within a forward of another one."""
    other, inputs = make_model(case.family, seed=1), make_inputs(case.family, [make_ids(2, seed=1)])

    def interrupt(*_):
        raise KeyboardInterrupt

    with patch(case.model, case.profile), patch(other, mixed_profile(other, seed=1)):
        want, alone = case.model(**case.inputs).logits, other(**inputs).logits
        hook = other.model.language_model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            other(**inputs)
        hook.remove()
        within = []
        hook = case.layer.register_forward_pre_hook(lambda *_: within.append(other(**inputs).logits))
        assert torch.equal(case.model(**case.inputs).logits, want)
        assert torch.equal(within[0], alone)
        hook.remove()


def test_a_language_model_in_training_mode_runs_dense(case):
    """Its layers may be computed again in the backward pass, when nobody knows the prompt."""
    dense = case.model(**case.inputs).logits
    with patch(case.model, case.profile) as handle:
        case.model.model.language_model.train()
        assert torch.equal(case.model(**case.inputs).logits, dense)
        assert handle.report()["forwards"] == {"dense: training mode": 1}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_layers_that_are_checkpointed_one_by_one(case, reentrant):
    """In evaluation mode: computed again in the backward pass, they would be dense, and their gradients wrong."""
    forward = case.layer.forward
    with patch(case.model, case.profile), torch.enable_grad():
        want = torch.autograd.grad(case.model(**case.inputs).logits.sum(), case.layer.self_attn.q_proj.weight)
        case.layer.forward = lambda *args, **kwargs: checkpoint(
            partial(forward, **kwargs), *args, use_reentrant=reentrant
        )
        loss = case.model(**case.inputs).logits.sum()
        with pytest.raises(NotImplementedError, match="must not be checkpointed one by one"):
            loss.backward()
        case.layer.forward = forward
        again = lambda *_: case.model(**case.inputs).logits.sum()  # noqa: E731
        case.model.zero_grad()
        checkpoint(again, torch.zeros(1, requires_grad=True), use_reentrant=reentrant).backward()
        torch.testing.assert_close(case.layer.self_attn.q_proj.weight.grad, *want)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("past", ["forward", "model"])
def test_a_forward_past_the_patch_is_said(case, past, caplog):
    """Once: it is dense and in no count. Those that the patch itself lets run dense are in its report."""
    _warn_of_a_bypass.cache_clear()
    ids = case.inputs["input_ids"]
    with patch(case.model, case.profile) as handle:
        case.model(**case.inputs)
        case.model(input_ids=ids[:, :3])
        case.model.gradient_checkpointing_enable()
        with torch.enable_grad():
            case.model.train()(**case.inputs).logits.sum().backward()
        case.model.eval()
        assert "torch_blindsight" not in [record.name for record in caplog.records]
        for _ in range(2):
            getattr(case.model, past)(**case.inputs)
        said = [record.message for record in caplog.records if record.name == "torch_blindsight"]
        assert len(said) == 1 and said[0].startswith("a forward ran dense, uncounted: it went past the patch")
        assert sum(handle.report()["forwards"].values()) == 3


def test_models_that_share_their_layers(case):
    """Refusing the second leaves the first as it is."""
    other = type(case.model)(copy.deepcopy(case.model.config)).eval()
    other.model = case.model.model
    with patch(case.model, case.profile) as handle:
        want = case.model(**case.inputs).logits
        with pytest.raises(ValueError, match="must not share its configuration with a patched model"):
            patch(other, case.profile)
        assert torch.equal(case.model(**case.inputs).logits, want)
        assert handle.report()["forwards"] == {"sparse": 2}


def test_a_model_that_moved_after_the_patch_is_said(case, caplog):
    """Once: patched on a CPU, it would be served by the portable attention on a GPU, too."""
    with patch(case.model, case.profile) as handle:
        case.model(**case.inputs)
        assert not caplog.records
        handle._devices = {"cuda"}  # no second kind of device is at hand
        for _ in range(2):
            case.model(**case.inputs)
        assert handle.report()["forwards"] == {"sparse": 3}
    (said,) = caplog.records
    assert said.message.startswith("the model was on cuda when it was patched, and is on cpu now; its prefills are")


def test_an_unpatched_model_is_free_at_once(case):
    """Also after Ctrl-C: what a server lets go of must not wait for a garbage collection."""

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = patch(case.model, case.profile)
    case.layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        case.model(**case.inputs)
    handle.unpatch()
    alive = weakref.ref(case.model)
    gc.disable()
    try:
        del handle, caught, case.layer, case.model
        assert alive() is None
    finally:
        gc.enable()


def test_tokens_that_a_later_hook_replaces(case):
    """The layout would be of others. A hook from before the patch is heard by it."""

    def turned(module, args, kwargs):
        return args, kwargs | {"input_ids": kwargs["input_ids"].flip(1)}

    with patch(case.model, case.profile):
        hook = case.model.register_forward_pre_hook(turned, with_kwargs=True)
        with pytest.raises(RuntimeError, match="A hook that was registered after"):
            case.model(input_ids=case.inputs["input_ids"][:, :3])
    hook.remove()
    case.model.register_forward_pre_hook(turned, with_kwargs=True)
    want = case.model(input_ids=case.inputs["input_ids"][:, :3]).logits
    with patch(case.model, case.profile) as handle:
        assert torch.equal(case.model(input_ids=case.inputs["input_ids"][:, :3]).logits, want)
        assert handle.report()["forwards"] == {"dense: fewer than two images": 1}
