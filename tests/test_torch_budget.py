"""Calibration by a budget in torch: the gradients are true, memory stays linear, what is chosen was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from harm import SMALL, measure_in_torch
from shared_profiles import SPARSE, Category, measured
from shared_profiles.budget import Budget, chosen_point, retune
from shared_profiles.classifier import Thresholds
from shared_profiles.fisher import fisher_vector
from shared_profiles.profile import Profile
from shared_profiles.statistics import Statistics
from tiny_models import (
    IMAGE_TOKENS,
    double_model,
    family_names,
    in_double,
    make_ids,
    make_inputs,
    make_model,
    patch,
)
from torch_blindsight import attention, calibrate, calibration, fingerprint, held_out
from torch_blindsight.gradient import GradientMode, measure_with_gradient
from torch_blindsight.handle import Handle
from torch_blindsight.implementations import implementation
from torch_blindsight.models import inspect_model
from torch_blindsight.prompts import Dense
from torch_blindsight.residual import ResidualStream
from torch_blindsight.sinks import measure_sinks

QUIET = dict(template=SMALL, progress=False)


def prompts_of(family, n, first=0):
    return [make_inputs(family, [make_ids(2 + i % 3, seed=i)], seed=i) for i in range(first, first + n)]


seen: dict[int, torch.Tensor] = {}


def keeping_attention(module, query, key, value, attention_mask, **kwargs):
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    seen[module.layer_idx] = out
    out.retain_grad()
    return out, None


AttentionInterface.register("keeping", keeping_attention)
AttentionMaskInterface.register("keeping", sdpa_mask)


@family_names
def test_the_harm_is_that_of_one_whole_backward_pass(family, monkeypatch):
    """Against autograd through the unpatched model; the changes are those between two forwards' outputs."""
    model = double_model(family)
    inputs = in_double(make_inputs(family, [make_ids(3)]))
    vectors = []
    monkeypatch.setattr(
        "torch_blindsight.gradient.fisher_vector",
        lambda logits, seed: vectors.append(fisher_vector(logits, seed)) or vectors[-1],
    )
    changes = {}
    portable = implementation("portable", model, inspect_model(model)).attend
    flags = [p.requires_grad for p in model.parameters()]
    observer = measure_in_torch(model, inputs)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())

    def noting(q, k, v, layouts, categories, template, *, scale, window):
        out = portable(q, k, v, layouts, categories, template, scale=scale, window=window)
        changes.setdefault(categories[0], []).append(out[0])
        return out

    info = inspect_model(model)
    mode = GradientMode(info, SMALL, noting)
    with Handle(model, info, mode, implementation("portable", model, info)) as handle:
        handle.install()
        measure_with_gradient(model, mode, inputs)

    model.set_attn_implementation({"text_config": "keeping"})
    logits = model(**inputs, use_cache=False).logits[:, -1]
    (torch.from_numpy(vectors[0]) * logits.float()).sum().backward()
    model.set_attn_implementation({"text_config": "sdpa"})
    model.zero_grad()
    begin = 4 + np.arange(3) * (IMAGE_TOKENS + 2 + 3)
    rows = np.concatenate([np.arange(b + 1, b + 1 + IMAGE_TOKENS) for b in begin[1:]])
    for layer in range(4):
        gradient = seen[layer].grad[0]
        # The forward computed all layers densely once; then the layers came again, the last first.
        dense = changes[Category.DENSE][4 + 3 - layer][0]
        for c, category in enumerate(SPARSE):
            change = changes[category][3 - layer][0] - dense
            steered = (change * gradient)[rows].sum(dim=(0, 2))
            np.testing.assert_allclose(observer.harm["gradient"][0, c, layer], steered.square() / 2, rtol=2e-4)
    assert (observer.harm["gradient"][:, :, :3] > 0).mean() > 0.9
    assert not observer.harm["gradient"][:, :, 3].any(), "nothing reads image tokens of the last output"


@family_names
def test_the_ranking_without_gradient_is_that_of_the_residual_stream(family):
    """What a layer adds to the stream, once with and once without a head's change."""
    model = make_model(family)
    with torch.no_grad():
        for layer in model.get_submodule("model.language_model.layers"):
            layer.self_attn.o_proj.weight.mul_(1.5)
    info = inspect_model(model)
    observed = measure_in_torch(model, make_inputs(family, [make_ids(3)]), stream=True)
    assert (observed.harm["residual"] > 0).all() and np.isfinite(observed.harm["residual"]).all()
    layer = model.get_submodule("model.language_model.layers")[1]
    stream = ResidualStream(model, info)
    torch.manual_seed(0)
    hidden, dense = torch.randn(1, 5, 64), torch.randn(1, 5, 4, 16)
    hidden[:, 0] = 0  # nothing that could be moved in proportion
    layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.randn(64))  # no part of a change
    with stream:
        for module in model.get_submodule("model.language_model.layers"):
            for hook in module._forward_pre_hooks.values():
                hook(module, (hidden,), {})
    change = torch.zeros(5, 4, 16)
    change[:, 2] = 1e-3 * torch.randn(5, 16)
    moved = stream.moved(1, 0, torch.arange(5), dense, change)

    def added(out):
        projected = layer.self_attn.o_proj(out.flatten(1))
        if family != "gemma3":
            return projected
        # The norm's scale is held: it is a property of the row, which one head hardly changes.
        norm = layer.post_attention_layernorm(layer.self_attn.o_proj(dense[0].flatten(1)))
        return projected * (norm.norm(dim=1) / layer.self_attn.o_proj(dense[0].flatten(1)).norm(dim=1))[:, None]

    difference = (added(dense[0] + change) - added(dense[0])).norm(dim=1)
    want = (difference / hidden[0].norm(dim=1)).square()
    torch.testing.assert_close(moved[1:, 2], want[1:], rtol=1e-3, atol=1e-12)
    assert not moved[:, [0, 1, 3]].any() and not moved[0].any()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_no_tensor_of_the_backward_pass_grows_with_the_square(family):
    model = make_model(family, n_layers=2)
    elements = []
    for n_images in (20, 40):
        inputs = make_inputs(family, [make_ids(n_images)])
        with Largest() as largest:
            measure_in_torch(model, inputs)
        elements.append(largest.elements)
        n = inputs["input_ids"].shape[1]
    assert elements[1] < 2.6 * elements[0]
    assert elements[1] < 4 * n * n / 2, "less than half of all scores of four heads"


@family_names
def test_what_is_chosen_is_within_the_budget_and_was_measured(family, monkeypatch):
    monkeypatch.setattr(measured, "SMALLEST_GROUP", 1)
    model, prompts = make_model(family, n_layers=2), prompts_of(family, 12)
    profile = calibrate(model, iter(prompts), budget=0.03, held_out=0.4, dataset="puzzles", **QUIET)
    assert profile.choice["method"] == "budget" and profile.choice["ranking"] == "gradient"
    assert set(profile.summary.harm) == {"gradient", "residual"}
    point = chosen_point(profile)
    assert point.kl <= 0.03 and point.kl == profile.choice["kl"] and 2 <= len(profile.curve) <= 13
    held = profile.choice["held_out_prompts"]
    assert held + profile.summary.n_prompts == profile.provenance.n_prompts == 12
    assert profile.provenance.n_tokens == sum(x["input_ids"].shape[1] for x in prompts)
    assert Profile.from_json(profile.to_json()) == profile
    # The number is what a user of the patch would measure on those of these prompts where it is worst.
    given = calibrate(model, prompts[:8], budget=0.03, held_out=prompts[8:], **QUIET)
    dearest = [p for p in given.curve if p.heads is not None and p.categories.any()]
    with torch.no_grad():
        log_probs = {None: [], 0: []}
        for x in prompts[8:]:
            log_probs[None].append(model(**x).logits[0, -1].log_softmax(-1))
        with patch(model, retune(given, dearest[-1].kl)):
            for x in prompts[8:]:
                log_probs[0].append(model(**x).logits[0, -1].log_softmax(-1))
    p, q = (torch.stack(x).double() for x in (log_probs[None], log_probs[0]))
    two, three, *four = (p.exp() * (p - q)).sum(-1)[[1, 2, 0, 3]].tolist()
    by_images = {(2, 2): two, (3, 3): three, (4, 4): sum(four) / 2}
    for kl in (by_images[dearest[-1].n_images], max(by_images.values())):
        assert dearest[-1].kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert dearest[-1].n_prompts == 4


@pytest.mark.parametrize("ranking", ["residual", "error"])
def test_rankings_without_a_gradient(ranking):
    model, prompts = make_model("qwen2_5_vl"), prompts_of("qwen2_5_vl", 6)
    profile = calibrate(model, prompts[:4], budget=Budget(0.05, ranking), held_out=prompts[4:], **QUIET)
    assert profile.choice["ranking"] == ranking
    assert set(profile.summary.harm) == ({"residual"} if ranking == "residual" else set())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_forward_keeps_no_graph():
    """Not even where inputs ask for gradients, as those of a model prepared for adapters do."""
    model, inputs = make_model("qwen2_5_vl"), make_inputs("qwen2_5_vl", [make_ids(3)])
    want = measure_in_torch(model, inputs).harm["gradient"]
    model.enable_input_require_grads()
    recorded = []
    model.get_decoder().layers[1].register_forward_hook(lambda *args: recorded.append(args[2].requires_grad))
    model.model.visual.register_forward_hook(lambda *args: recorded.append(args[2].pooler_output.requires_grad))
    np.testing.assert_array_equal(measure_in_torch(model, inputs).harm["gradient"], want)
    assert recorded == [False, False, True], "the pictures, a layer, and that layer again"
    assert torch.is_grad_enabled()


def test_a_sure_models_gradients_do_not_vanish_in_float16():
    """The surer the model the smaller they are, and the answers of real models are mostly sure."""
    model, inputs = make_model("qwen2_5_vl"), make_inputs("qwen2_5_vl", [make_ids(3)], seed=3)
    with torch.no_grad():
        second, first = model(**inputs).logits[0, -1].sort().values[-2:]
        model.get_decoder().norm.weight.mul_(30 / (first - second))
    exact = measure_in_torch(model, inputs).harm["gradient"][0, :, :3]
    low = {name: x.half() if x.is_floating_point() else x for name, x in inputs.items()}
    rough = measure_in_torch(model.half(), low).harm["gradient"][0, :, :3]
    assert exact.sum() < 1e-8
    assert rough.sum() == pytest.approx(exact.sum(), rel=0.2)
    assert np.corrcoef(np.log(exact).ravel(), np.log(rough).ravel())[0, 1] > 0.98


@family_names
def test_padding_around_a_prompt_is_not_taken_for_a_part_of_it(family):
    """The next token is the one after the prompt, not after the padding, where nothing changes it."""
    model, padded = make_model(family), []
    prompts = prompts_of(family, 4)
    for prompt in prompts:
        rows = {name: x for name, x in prompt.items() if x.shape == prompt["input_ids"].shape}
        padded.append(prompt | {name: torch.nn.functional.pad(x, (2, 5)) for name, x in rows.items()})
    plain, around = (
        calibrate(model, some[:2], held_out=some[2:], budget=Budget(1e-4, "error"), **QUIET)
        for some in (prompts, padded)
    )
    assert around.provenance.n_tokens == plain.provenance.n_tokens == sum(x["input_ids"].numel() for x in prompts)
    np.testing.assert_array_equal(around.categories, plain.categories)
    assert len(around.curve) == len(plain.curve) > 2
    for mine, other in zip(around.curve, plain.curve, strict=True):
        assert mine.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-6)
    harm = measure_in_torch(model, padded[0]).harm["gradient"]
    assert (harm[:, :, :3] > 0).all()
    (mine,), (other,) = measure_sinks(model, padded[:1]), measure_sinks(model, prompts[:1])
    np.testing.assert_allclose(mine.log_probs, other.log_probs, rtol=0, atol=1e-4)


def test_gradients_are_taken_where_the_caller_has_turned_them_off():
    """Serving code runs without gradients: the calibration inside it, its prompts made there, gives the same bits."""
    model = make_model("qwen2_5_vl", n_layers=2)
    found = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            prompts = prompts_of("qwen2_5_vl", 4)
            found.append(calibrate(model, prompts[:3], budget=0.05, held_out=prompts[3:], **QUIET))
    plain, *others = found
    assert plain.summary.harm_of("gradient").any()
    for other in others:
        assert (other.summary, other.curve) == (plain.summary, plain.curve)


def test_a_killed_run_counts_no_prompt_twice_and_ends_with_the_same_bits(tmp_path):
    model, prompts = make_model("qwen2_5_vl", n_layers=2), prompts_of("qwen2_5_vl", 8)
    options = dict(budget=0.05, held_out=0.4) | QUIET
    whole = calibrate(model, prompts, state=tmp_path / "whole.npz", **options)

    def interrupted(after):
        yield from prompts[:after]
        raise KeyboardInterrupt

    state = tmp_path / "state.npz"
    for after in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, interrupted(after), state=state, **options)
        assert not hasattr(model, "_blindsight_handle") and all(p.requires_grad for p in model.parameters())
    resumed = calibrate(model, prompts, state=state, **options)
    assert state.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert Statistics.load(state).rankings == ("gradient", "residual")
    assert (resumed.summary, resumed.curve, resumed.choice) == (whole.summary, whole.curve, whole.choice)
    with pytest.raises(ValueError, match="rankings"):
        calibrate(model, prompts, state=state, thresholds=Thresholds(), **QUIET)


def never():
    """Prompts that nobody must have begun to measure."""
    raise AssertionError("a mistake must show before the first prompt is measured")
    yield


def test_what_cannot_be_searched_is_refused():
    model, prompts = make_model("qwen2_5_vl"), prompts_of("qwen2_5_vl", 3)
    lone = [make_inputs("qwen2_5_vl", [make_ids(1, seed=i)]) for i in range(4)]
    with pytest.raises(ValueError, match=r"by a budget or by thresholds\. Got both"):
        calibrate(model, prompts, budget=0.1, thresholds=Thresholds(), **QUIET)
    with pytest.raises(ValueError, match=r"the budget must be a finite number of nats.* Got -1"):
        calibrate(model, prompts, budget=-1, **QUIET)
    with pytest.raises(ValueError, match=r"held_out must be a share of the prompts in \(0, 1\)"):
        calibrate(model, prompts, held_out=1.0, **QUIET)
    with pytest.raises(ValueError, match=r"the held-out split must have.*Got none \(0 prompts held out\)"):
        calibrate(model, prompts, held_out=1e-9, **QUIET)
    with pytest.raises(ValueError, match=r"the held-out split must have.*Got none \(4 prompts held out\)"):
        calibrate(model, never(), held_out=lone, **QUIET)
    with torch.inference_mode():
        frozen = make_model("qwen2_5_vl", n_layers=1)
    with pytest.raises(ValueError, match=r"weights that were made outside of torch.inference_mode\(\)"):
        calibrate(frozen, never(), **QUIET)
    with pytest.raises(ValueError, match=r"the quantile must be a multiple of 0\.05 in \[0, 1\]\. Got 0\.33"):
        calibrate(model, never(), thresholds=Thresholds(quantile=0.33), **QUIET)
    with pytest.raises(ValueError, match=r"dataset must be the data's name, a string that is not empty\. Got ''"):
        calibrate(model, never(), dataset="", **QUIET)
    with pytest.raises(ValueError, match="without labels"):
        calibrate(model, [prompts[0] | dict(labels=prompts[0]["input_ids"])], **QUIET)
    with pytest.raises(ValueError, match="calibration needs prompts with at least two images"):
        calibrate(model, lone, held_out=0.4, **QUIET)
    with pytest.raises(ValueError, match="must not be calibrated on"):
        calibrate(model, prompts, held_out=prompts[:1], **QUIET)
    with pytest.raises(ValueError, match=r"held-out prompt 1: .* input_ids \[1, N\]"):
        calibrate(model, never(), held_out=[prompts[0], {}], **QUIET)
    with pytest.raises(ValueError, match=r"^held-out prompt 0: prompts must be a list .*Got a str"):
        calibrate(model, never(), held_out=prompts[0], **QUIET)
    dark = prompts[0] | {"pixel_values": prompts[0]["pixel_values"] * torch.nan}
    with pytest.raises(ValueError, match=r"^held-out prompt [0-9a-f]{32}: the model must answer with numbers"):
        calibrate(model, prompts[1:], held_out=[dark], budget=Budget(ranking="error"), **QUIET)
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "_blindsight_handle")


def test_a_budget_of_nothing_buys_what_nobody_reads():
    """Nothing reads the image tokens of the last layer's output: its heads are sparse for free, and no others."""
    model, prompts = make_model("qwen2_5_vl"), prompts_of("qwen2_5_vl", 4)
    profile = calibrate(model, prompts[:2], budget=0.0, held_out=prompts[2:], **QUIET)
    assert (profile.categories[3] == Category.SINK).all() and not profile.categories[:3].any()
    assert not profile.summary.harm_of("gradient")[3].any() and profile.summary.harm_of("residual")[3].any()


@family_names
def test_the_reference_is_the_unpatched_model_and_needs_no_mask(family, monkeypatch):
    """All heads dense, by the implementation: transformers' own attention would build N x N masks for Gemma 3."""
    model = make_model(family, n_layers=2)
    info, prompts = inspect_model(model), dict(zip("ab", prompts_of(family, 2), strict=True))
    with torch.no_grad():
        want = {name: model(**prompt).logits[:, -1].log_softmax(-1) for name, prompt in prompts.items()}
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    profile = Profile.uniform(Category.SINK, fingerprint(model))
    portable = implementation("portable", model, info)
    measure = held_out.HeldOut(model, info, portable, profile, prompts)
    for name, log_probs in measure._dense.items():
        np.testing.assert_allclose(log_probs, want[name], rtol=0, atol=1e-5)
    assert not measure(np.zeros_like(profile.categories)).kl.any()
    assert measure(profile.categories).kl.all()

    def dense(*_):
        raise Dense("of no use")

    monkeypatch.undo()
    lone = {"c": make_inputs(family, [make_ids(1)])}
    measure = held_out.HeldOut(model, info, portable, profile, prompts | lone)
    assert measure.n_tokens == {name: x["input_ids"].shape[1] for name, x in prompts.items()}
    monkeypatch.setattr(held_out.SparseMode, "prefill", dense)
    with pytest.raises(RuntimeError, match=r"all 2 held-out prompts must have run sparse. Got {'dense: of no use': 2}"):
        measure(profile.categories)


def test_held_out_prompts_wait_on_the_cpu(monkeypatch):
    """They stay until the end, and the pixels of a long prompt are gigabytes: only the one that runs is on the GPU."""
    moves = {"kept": [], "run": []}
    for name, module in (("kept", calibration), ("run", held_out)):
        moved = module.moved
        monkeypatch.setattr(
            module, "moved", lambda x, to, name=name, moved=moved: moves[name].append(torch.device(to)) or moved(x, to)
        )
    model = make_model("qwen2_vl", n_layers=1)
    prompts = prompts_of("qwen2_vl", 8)
    calibrate(model, prompts[:6], budget=Budget(1e9, "error"), held_out=0.5, **QUIET)
    assert 0 < len(moves["kept"]) < 6
    assert len(moves["run"]) >= 2 * len(moves["kept"])
    moves["kept"].clear()
    calibrate(model, prompts[:6], budget=Budget(1e9, "error"), held_out=prompts[6:], **QUIET)
    assert moves["kept"] == [torch.device("cpu")] * 2
    (kept,) = {x.device for x in held_out.moved(prompts[0], "meta").values()}
    assert kept.type == "meta"
