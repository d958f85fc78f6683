"""`impl="triton"` through the whole patch, interpreted on tiny models: the kernel for sparse heads, the vendor's for
dense ones where that pays; and where it cannot run, an error at patch time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attention_inputs import draw_inputs
from blindsight_kernels.reference import reference_attention
from interpreted import worker
from interpreted_models import attend_mixed, calibrated, conversation, dense_heads, statistics
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from strategies import layouts, templates, windows
from tiny_models import family_names, make_model, mixed_profile, patch
from torch_blindsight import calibrate
from torch_blindsight.break_even import PORTABLE_COSTS, TRITON_COSTS
from torch_blindsight.implementations import implementation


@pytest.fixture(scope="module")
def call():
    """Runs a function where Triton is interpreted."""
    with worker() as call:
        yield call


@settings(max_examples=6, phases=[Phase.generate])  # interpreted, shrinking would take minutes
@given(
    st.data(),
    templates,
    windows,
    st.sampled_from([(4, 4), (4, 2), (6, 2)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_dense_heads_of_either_kernel_equal_the_definition(call, data, template, window, head_counts, by_vendor, seed):
    """Groups of heads split in any way between dense and sparse, two rows with their own images."""
    layout = data.draw(layouts(max_images=3, max_image=16))
    if not layout.n_tokens:
        return
    rows = [layout, Layout(layout.n_tokens, layout.start, layout.stop, layout.images[:1], layout.bidirectional)]
    heads, kv_heads = head_counts
    categories = data.draw(st.lists(st.sampled_from([0, 0, 1, 3]), min_size=heads, max_size=heads))
    q_start = data.draw(st.integers(0, layout.n_tokens - 1))
    rng = np.random.default_rng(seed)
    shapes = ((2, heads, layout.n_tokens - q_start, 16), *[(2, kv_heads, layout.n_tokens, 16)] * 2)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    arguments = dict(scale=0.3, window=window, q_start=q_start)
    out, lse = call(attend_mixed, by_vendor, q, k, v, rows, categories, template, **arguments)
    want, want_lse = reference_attention(q, k, v, rows, categories, template, **arguments)
    np.testing.assert_allclose(out.transpose(0, 2, 1, 3), want, rtol=0, atol=4e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("family", "by_vendor"),
    [("qwen2_vl", False), ("qwen2_5_vl", True), ("gemma3", True)],
    ids=["qwen2_vl-all-ours", "qwen2_5_vl-dense-by-vendor", "gemma3-dense-by-vendor"],
)
def test_a_conversation(call, family, by_vendor):
    """A padded batch with a row of one image, a second turn with a picture, decoding: float32 as good as portable's."""
    exact, _ = conversation(family, "reference", double=True)
    portable, _ = conversation(family, "portable")
    got, report = call(conversation, family, "triton", by_vendor=by_vendor)
    assert report["impl"] == "triton"
    assert report["forwards"] == {"sparse": 2, "dense: decode step": 1}
    for ours, theirs, want in zip(got, portable, exact, strict=True):
        assert np.abs(ours - want).max() <= 2 * np.abs(theirs - want).max() + 1e-5
    assert np.abs(want).max() > 0.1


@pytest.mark.gpu
@family_names
def test_a_conversation_on_a_gpu(family):
    exact, _ = conversation(family, "reference", double=True)
    portable, _ = conversation(family, "portable", device="cuda")
    got, report = conversation(family, "triton", device="cuda")
    assert report["impl"] == "triton"
    for ours, theirs, want in zip(got, portable, exact, strict=True):
        assert np.abs(ours - want).max() <= 2 * np.abs(theirs - want).max() + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("by_vendor", [False, True], ids=["all-ours", "dense-by-vendor"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
def test_low_precision_on_a_gpu(by_vendor, bidirectional):
    """Within twice the error of plain attention in bfloat16."""
    from torch_blindsight.mixed import mixed_attention

    images = np.array([(4, 5, 68, 69), (70, 71, 282, 283), (283, 284, 496, 497)])
    layout, template, categories = Layout(515, 0, 515, images, bidirectional), SinkTemplate(), [0, 3, 0, 0, 1, 2]
    q, k, v = draw_inputs(0, 1, 6, 2, 515, 515, 128, torch.bfloat16)
    with dense_heads(by_vendor):
        out, lse = mixed_attention(*(x.cuda() for x in (q, k, v)), [layout], categories, template, scale=0.1)
    exact, exact_lse = reference_attention(
        *(x.double().numpy() for x in (q, k, v)), [layout], categories, template, scale=0.1
    )
    masks = torch.from_numpy(np.stack([category_mask(layout, Category(c), template) for c in categories]))
    k_h, v_h = (x.repeat_interleave(3, dim=1) for x in (k, v))
    plain = (q @ k_h.transpose(2, 3) * 0.1).masked_fill(~masks, -torch.inf).softmax(-1) @ v_h
    error = np.abs(out.cpu().transpose(1, 2).double().numpy() - exact).max()
    assert error <= 2 * np.abs(plain.double().numpy() - exact).max()
    np.testing.assert_allclose(lse.cpu().double().numpy(), exact_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_calibration_through_the_kernel(call, family, tmp_path):
    """Retained mass and output error from its outputs and log-sum-exps are those of the portable implementation."""
    got, want = call(statistics, family, "triton", tmp_path), statistics(family, "portable", tmp_path)
    assert got.prompt_ids == want.prompt_ids
    a, b = got.summarize(), want.summarize()
    for category in (Category.SINK, Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK):
        np.testing.assert_allclose(a.mass_mean[category], b.mass_mean[category], rtol=0, atol=1e-5)
        np.testing.assert_allclose(a.error_mean[category], b.error_mean[category], rtol=0, atol=1e-5)
        assert a.kept[category] == b.kept[category]


@pytest.mark.parametrize(
    ("impl", "device"),
    [("portable", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)],
    ids=["portable-cpu", "triton-gpu"],
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_calibrating_patching_and_generating(family, impl, device):
    """The whole way, on the model's own device: learned sinks, the gradient's ranking, held-out prompts, 8 tokens."""
    profile, tokens, report = calibrated(family, impl, device)
    assert profile.categories.any()
    assert profile.choice["sinks"]["prompts"] > 0
    assert report["impl"] == impl
    assert report["forwards"]["sparse"] == 1
    assert len(tokens) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("by_vendor", [False, True], ids=["ours", "vendor"])
@pytest.mark.parametrize("dim", [128, 256], ids="D{}".format)
def test_dense_heads_beyond_64k_keys_equal_flash_attention(by_vendor, dim):
    from torch_blindsight.mixed import mixed_attention

    n, scale = (1 << 16) + 100, dim**-0.5
    layout = Layout(n, 0, n, np.array([(4, 5, 30_000, 30_001), (30_002, 30_003, 65_000, 65_001)]))
    q, k, v = (x.cuda() for x in draw_inputs(0, 1, 2, 1, n, n, dim, torch.bfloat16))
    k_h, v_h = (x.repeat_interleave(2, dim=1) for x in (k, v))
    want, want_lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k_h, v_h, 0.0, True, scale=scale)[:2]
    with dense_heads(by_vendor):
        out, lse = mixed_attention(q, k, v, [layout], [Category.DENSE] * 2, SinkTemplate(), scale=scale)
    torch.testing.assert_close(out.transpose(1, 2), want, rtol=2**-6, atol=2**-8)  # two bfloat16 kernels
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-3)


@family_names
def test_a_model_that_is_not_on_a_gpu_is_refused(family):
    model = make_model(family)
    message = r"on a CUDA GPU. Got cpu. Move the model to a GPU, or use the portable"
    with pytest.raises(ValueError, match=message):
        patch(model, mixed_profile(model), impl="triton")
    with pytest.raises(ValueError, match=message):
        calibrate(model, [], impl="triton")
    assert not hasattr(model, "_blindsight_handle")
    assert model.config.text_config._attn_implementation == "sdpa"
    with patch(model, mixed_profile(model)) as handle:
        assert handle.report()["impl"] == "portable", "the default of a model on a CPU"


def on_gpu(head_dim: int = 64, dtype=torch.bfloat16) -> tuple:
    """A stand-in for a model on a GPU, as far as choosing an implementation looks at it."""
    weights = [SimpleNamespace(device=torch.device("cuda"))]
    projection = SimpleNamespace(parameters=lambda: weights, buffers=list)
    attention = SimpleNamespace(q_proj=projection)
    return SimpleNamespace(dtype=dtype), SimpleNamespace(attentions=(attention,), head_dim=head_dim)


def test_on_a_gpu_it_is_the_default_and_what_it_cannot_serve_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, chosen, differentiable, costs in (
        (None, "triton", False, TRITON_COSTS),
        ("portable", "portable", True, PORTABLE_COSTS),
        ("reference", "reference", False, None),
    ):
        found = implementation(name, *on_gpu())
        assert (found.name, found.differentiable, found.costs) == (chosen, differentiable, costs)
    model, info = on_gpu()
    info.attentions += (SimpleNamespace(q_proj=torch.nn.Linear(1, 1)),)
    assert implementation(None, model, info).name == "portable", "a part of the model is on the CPU"
    with pytest.raises(NotImplementedError, match=r"one of \(16, 32, 64, 128, 256\). Got 72.* or use the portable"):
        implementation(None, *on_gpu(head_dim=72))
    with pytest.raises(NotImplementedError, match=r"computes in .*Got torch.float64.* or use the portable"):
        implementation(None, *on_gpu(dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(NotImplementedError, match=r"8.0 \(Ampere\) or later. Got Tesla T4.* Use the portable"):
        implementation(None, *on_gpu())


def test_without_triton_it_is_refused_and_portable_still_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from tiny_models import *\n"
        "model = make_model('qwen2_5_vl'); profile = mixed_profile(model)\n"
        "with patch(model, profile) as handle: model(**make_inputs('qwen2_5_vl', [make_ids(2)]))\n"
        "assert handle.report()['forwards'] == {'sparse': 1}\n"
        "patch(model, profile, impl='triton')"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the Triton kernel needs triton 3.6 or later."), done.stderr
    assert "portable" in last
