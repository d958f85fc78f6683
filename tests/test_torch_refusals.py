"""Models and profiles that `patch` refuses, with what the message must say; the model is untouched afterwards."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from shared_profiles import Category, SpecialTokens, family_of
from shared_profiles.layout import NO_IMAGE_TOKENS
from shared_profiles.profile import Profile, ProfileError, ProfileMismatchError
from tiny_models import END, IMAGE, START, VIDEO, family_names, make_ids, make_inputs, make_model, mixed_profile, patch
from torch_blindsight import calibrate, fingerprint
from torch_blindsight.attention import announce, blindsight_attention, check_masked
from torch_blindsight.models import inspect_model


@pytest.fixture
def model(family):
    """A fresh model, which must come out of the test unpatched."""
    fresh = make_model(family)
    yield fresh
    assert not hasattr(fresh, "_blindsight_handle")
    assert fresh.config.text_config._attn_implementation == "sdpa"
    assert not fresh._forward_pre_hooks
    assert not fresh._forward_hooks


@family_names
def test_special_tokens_of_the_real_configurations(model, family):
    config = model.config.to_dict()
    found = family_of(config)
    assert found.name == family
    assert found.bidirectional == (family == "gemma3")
    assert found.special_tokens(config) == SpecialTokens(START, END, IMAGE, None if family == "gemma3" else VIDEO)


@family_names
def test_a_profile_of_another_model(model, family):
    other = make_model(family, seed=1)
    profile = mixed_profile(other)
    theirs, mine = fingerprint(other), fingerprint(model)
    assert theirs.digest != mine.digest
    message = rf"digest: the profile says '{theirs.digest}', the model has '{mine.digest}'\n.*pass allow_mismatch=True"
    with pytest.raises(ProfileMismatchError, match=message):
        patch(model, profile)
    inputs = make_inputs(family, [make_ids(3)])
    with torch.no_grad(), patch(model, profile, allow_mismatch=True) as handle:
        model(**inputs)
        assert handle.report()["forwards"] == {"sparse": 1}
        assert handle.profile is profile


@family_names
@pytest.mark.parametrize(
    ("field", "value"), [("n_layers", 3), ("n_layers", 5), ("n_heads", 2), ("n_heads", 8)], ids=lambda x: str(x)
)
def test_a_profile_of_another_shape(model, family, field, value):
    profile = Profile.uniform(Category.SINK, replace(fingerprint(model), **{field: value}))
    for allow in (False, True):
        message = rf"{field}: the profile says {value}, the model has 4\n.*cannot be applied, allow_mismatch or not"
        with pytest.raises(ProfileMismatchError, match=message):
            patch(model, profile, allow_mismatch=allow)


@pytest.mark.parametrize("family", ["gemma3"])
def test_a_profile_file_that_is_none(model, tmp_path):
    path = tmp_path / "profile.json"
    with pytest.raises(FileNotFoundError):
        patch(model, path)
    text = mixed_profile(model).to_json()
    for content in ("", "{", text[:-20], text.replace("DENSE", "SINK", 1)):
        path.write_text(content)
        with pytest.raises(ProfileError, match=r"profile\.json: "):
            patch(model, path)
    path.write_text(text)
    with patch(model, str(path)) as handle:
        assert handle.profile == mixed_profile(model)


def test_another_family():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"one of qwen2_vl, qwen2_5_vl, gemma3. Got 'llama': this family is not supp"):
        patch(llama)
    with pytest.raises(ValueError, match=r"a Hugging Face transformers model. Got Linear, which has no config"):
        patch(nn.Linear(2, 2))


@family_names
def test_the_language_model_alone(model, family):
    alone = Gemma3ForCausalLM(model.config.text_config) if family == "gemma3" else model.model.language_model
    with pytest.raises(ValueError, match=rf"the language model alone, {type(alone).__name__}. Pass the \.\.\.For"):
        patch(alone)


def test_text_that_looks_both_ways():
    """Without token types such a Gemma's text sees what follows; the plan's rows of text never do."""
    config = copy.deepcopy(make_model("gemma3", n_layers=1).config)
    config.text_config.use_bidirectional_attention = True
    with pytest.raises(NotImplementedError, match=r"must look back only. Got use_bidirectional_attention=True"):
        patch(Gemma3ForConditionalGeneration(config))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_compiled_and_wrapped_models(model):
    with pytest.raises(ValueError, match=r"must not be compiled. Got a compiled OptimizedModule. Patch the model"):
        patch(torch.compile(model))
    with pytest.raises(ValueError, match=r"must not be wrapped. Got DataParallel. Patch the model inside it"):
        patch(nn.DataParallel(model))
    model.compile()
    with pytest.raises(ValueError, match=r"must not be compiled. Got a compiled Qwen2_5_VLForConditionalGeneration"):
        patch(model)


def test_dense_attention_that_torch_masks_wrongly():
    """With more than 2^32 query-key pairs, on CUDA."""
    cuda = torch.device("cuda")
    check_masked(1 << 32, cuda)
    check_masked(1 << 40, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"at most 4294967296 .* Got 4295098369. Prefill in pieces"):
        check_masked(65537**2, cuda)


def test_a_dense_forward_asks_whether_torch_masks_it_wrongly():
    """Gemma's own attention of 65,537 tokens on CUDA, with its mask; tensors that only have a shape."""
    (module, *_) = inspect_model(make_model("gemma3")).attentions
    announce(None, module.config)
    with FakeTensorMode():
        q, k = (torch.empty(1, heads, 65537, 8, device="cuda", dtype=torch.bfloat16) for heads in (2, 1))
        mask = torch.empty(1, 1, 65536, 65537, device="cuda", dtype=torch.bool)
        for rows, keys, its_mask in ((65537, 65537, None), (65536, 65536, mask[..., :65536])):
            kv = k[:, :, :keys]
            assert blindsight_attention(module, q[:, :, :rows], kv, kv, its_mask)[0].shape == (1, rows, 2, 8)
        with pytest.raises(NotImplementedError, match=r"at most 4294967296 .* Got 4295032832"):
            blindsight_attention(module, q[:, :, :65536], k, k, mask)
    announce(None)


@family_names
def test_weights_that_are_not_there(model, family):
    profile = mixed_profile(model)
    absent = make_model(family).to("meta")
    for attempt in (lambda: patch(absent, profile), lambda: patch(absent), lambda: calibrate(absent, [])):
        with pytest.raises(ValueError, match=r"weights must be loaded. Got some on the meta device"):
            attempt()
    del model.get_submodule("model.language_model.layers")[1]
    with pytest.raises(ValueError, match=r"one attention module per layer, 4 in all. Found layers \[0, 2, 3\]"):
        patch(model, profile)


@pytest.mark.parametrize("family", ["gemma3"])
def test_arguments_out_of_range(model):
    with pytest.raises(ValueError, match=r"impl must be one of .*portable.*reference.* Got 'fastest'"):
        patch(model, mixed_profile(model), impl="fastest")
    with pytest.raises(ValueError, match=r"measure_prompts must be at least 1. Got 0"):
        patch(model, measure_prompts=0)


@family_names
def test_the_fingerprint_knows_the_model_and_not_its_precision(model, family):
    mine = fingerprint(model)
    assert (mine.family, mine.n_layers, mine.n_heads, mine.n_kv_heads, mine.head_dim) == (family, 4, 4, 2, 16)
    assert fingerprint(make_model(family)) == mine
    assert fingerprint(make_model(family).double()) == mine
    assert fingerprint(make_model(family).bfloat16()) == mine
    assert fingerprint(make_model(family).bfloat16().half()) == mine, "stored in bfloat16, loaded in float16"
    other = make_model(family)
    other.config.text_config.sliding_window = np.random.default_rng(0).integers(1000, 2000).item()
    assert fingerprint(other) == replace(mine, digest=fingerprint(other).digest)
    assert fingerprint(other).digest != mine.digest
    other = make_model(family)
    other.config.text_config.query_pre_attn_scalar = 7
    assert fingerprint(other).digest != mine.digest


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_the_fingerprint_knows_adapters(model, family):
    """As PEFT injects them: a wrapper that has the layer as `base_layer`."""
    mine = fingerprint(model)
    attention = model.get_submodule("model.language_model.layers.3.self_attn")
    adapted = nn.Module()
    adapted.base_layer, adapted.lora_A = attention.q_proj, nn.Linear(64, 4, bias=False)
    attention.q_proj = adapted
    assert fingerprint(model).digest != mine.digest


def test_the_page_of_limits_lists_every_reason_to_run_dense():
    """And no other: those of the patch, of JAX, and of layouts, which both ask."""
    root = Path(__file__).resolve().parents[1]
    files = [f"torch_blindsight/{name}.py" for name in ("handle", "modes", "observe", "prompts")]
    code = "".join((root / name).read_text(encoding="utf-8") for name in (*files, "jax_blindsight/prefill.py"))
    known = {"fewer than two images", NO_IMAGE_TOKENS}
    known |= {*re.findall(r'Dense\("([^"]+)"', code), *re.findall(r'"dense: ([\w ]+)"', code)}
    page = (root / "docs" / "limits.md").read_text(encoding="utf-8").partition("## Refused")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)[1:]  # below the head
    assert {reason for cell in cells for reason in re.findall(r"`([^`]+)`", cell)} == known
