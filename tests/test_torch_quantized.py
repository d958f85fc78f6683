"""Quantized models and models with adapters: calibrated, bound to their profiles and patched like any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from shared_profiles.budget import Budget
from shared_profiles.profile import ProfileMismatchError
from tiny_models import make_ids, make_inputs, make_model, mixed_profile, patch
from torch_blindsight import calibrate, fingerprint

peft = pytest.importorskip("peft", reason="needs peft, bitsandbytes and torchao, of the extra dev")

# What the quantizers themselves warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
FAMILY = "qwen2_5_vl"


def prompts(n):
    return [make_inputs(FAMILY, [make_ids(2 + i % 2, seed=i)], seed=i) for i in range(n)]


def quantization(name):
    if name == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if name == "bitsandbytes, 4 bits":
        # CPUs with bfloat16 in AVX-512 take only sizes that are multiples of 64
        odd = ["model.visual", "down_proj", "lm_head"]
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=odd)
    return BitsAndBytesConfig(load_in_8bit=True)


def quantized(name, folder, seed=0):
    """A model of two layers, saved and loaded in few bits, as a user loads a checkpoint."""
    model = make_model(FAMILY, seed=seed, n_layers=2)
    model.save_pretrained(folder / str(seed))
    load = type(model).from_pretrained
    return load(folder / str(seed), dtype=torch.float32, quantization_config=quantization(name)).eval()


def harm_of(model, ranking="gradient"):
    """What the two rankings say of the model; only one needs gradients."""
    profile = calibrate(model, prompts(4), budget=Budget(1e9, ranking), held_out=0.5, progress=False)
    return {name: profile.summary.harm_of(name) for name in profile.summary.harm}


@pytest.mark.parametrize("name", ["bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "torchao"])
def test_a_quantized_model_is_calibrated_and_patched(name, tmp_path):
    model = quantized(name, tmp_path)
    profile = calibrate(model, prompts(6), held_out=0.5, budget=Budget(1e9), progress=False)
    assert profile.choice["ranking"] == "gradient" and profile.categories.any()
    mixed, (inputs,) = mixed_profile(model), prompts(1)
    with torch.no_grad(), patch(model, profile) as handle:
        model(**inputs)
        assert handle.report()["forwards"] == {"sparse": 1}
    logits = []
    for impl in ("portable", "reference"):
        with torch.no_grad(), patch(model, mixed, impl=impl):
            logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)

    assert fingerprint(quantized(name, tmp_path)) == profile.fingerprint == fingerprint(model)
    with pytest.raises(ProfileMismatchError, match="digest"):
        patch(quantized(name, tmp_path, seed=1), profile)
    with pytest.raises(ProfileMismatchError, match="digest"):
        patch(model, mixed_profile(make_model(FAMILY, n_layers=2)))


def test_adapters_count_as_if_they_were_merged():
    model = make_model(FAMILY, n_layers=2)
    plain = harm_of(model)
    adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, adapters).eval()
    inside = harm_of(wrapped.base_model.model)
    merged = harm_of(wrapped.merge_and_unload())
    for name in ("gradient", "residual"):
        torch.testing.assert_close(*map(torch.from_numpy, (inside[name], merged[name])), rtol=1e-3, atol=1e-6)
        assert abs(inside[name] - plain[name]).max() > 0.01 * plain[name].max()


class Packed(nn.Module):
    """A projection as GPTQ and AWQ have it: all tensors are buffers, and nothing is differentiable."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @torch.no_grad()
    def forward(self, x):
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


def packed(seed=0):
    model = make_model(FAMILY, seed=seed, n_layers=2)
    for layer in model.model.language_model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    return model


def test_weights_that_are_buffers_count():
    model, other = packed(), packed()
    assert fingerprint(model) == fingerprint(other)
    other.model.language_model.layers[1].self_attn.o_proj.qweight += 1
    assert fingerprint(model) != fingerprint(other)
    (inputs,) = prompts(1)
    with torch.no_grad(), patch(model, mixed_profile(model)) as handle:
        model(**inputs)
        assert handle.report()["forwards"] == {"sparse": 1}


def test_without_a_backward_pass_another_ranking_is_named():
    model = packed()
    with pytest.raises(NotImplementedError, match=r"Layer 1 cannot: Packed has no backward pass. Rank by 'residual'"):
        harm_of(model)
    found = harm_of(model, "residual")
    exact = harm_of(make_model(FAMILY, n_layers=2), "residual")
    assert found.keys() == {"residual"}
    assert abs(found["residual"] - exact["residual"]).max() < 0.2 * exact["residual"].max()
