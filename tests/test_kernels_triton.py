"""The Triton kernel against the float64 reference: the same tests interpreted on a CPU and natively on a GPU."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindsight_kernels.reference import reference_attention
from blindsight_kernels.triton_configurations import Configuration
from interpreted import Attend, interpreted, native
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from strategies import chunks, cut, layouts, templates, windows

TEMPLATE = SinkTemplate(local_block=32)
SMALL = {tma: Configuration(16, 16, 4, 2, tma) for tma in (False, True)}  # many tiles of every kind in a short prompt


@pytest.fixture(scope="module", params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def attend(request) -> Attend:
    """`triton_attention` for CPU tensors, wherever it then runs."""
    with interpreted() if request.param == "interpreted" else native() as attend:
        yield attend


def draw_inputs(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def reference(q, k, v, *args, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    return reference_attention(*(x.double().numpy() for x in (q, k, v)), *args, **kwargs)


def assert_equals_reference(attend: Attend, q, k, v, *args, max_keys=None, tiles=None, **kwargs) -> None:
    out, lse = attend(q, k, v, *args, max_keys=max_keys, tiles=tiles, **kwargs)
    want, want_lse = reference(q, k, v, *args, **kwargs)
    np.testing.assert_allclose(out.transpose(1, 2).double().numpy(), want, rtol=0, atol=4e-6)
    np.testing.assert_allclose(lse.double().numpy(), want_lse, rtol=0, atol=4e-6)


@settings(max_examples=8)
@given(
    st.data(),
    templates,
    windows,
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.none() | st.integers(5, 40),
    st.booleans(),
)
def test_equals_the_reference_on_random_layouts(attend, data, template, window, head_counts, max_keys, tma):
    heads, kv_heads = head_counts
    layout = data.draw(layouts(max_images=3, max_image=24))
    one_image = Layout(layout.n_tokens, layout.start, layout.stop, layout.images[:1], layout.bidirectional)
    q_start, q_stop = data.draw(chunks(layout))
    rows = [cut(layout, q_stop), cut(one_image, q_stop)]
    categories = data.draw(st.lists(st.integers(0, 3), min_size=heads, max_size=heads))
    spare = data.draw(st.integers(1, 3))  # a static cache is longer than the prompt
    q, k, v = draw_inputs(2, heads, kv_heads, q_stop - q_start, q_stop + spare, 16, torch.float32)
    k[:, :, q_stop:] = v[:, :, q_stop:] = torch.nan
    arguments = dict(scale=0.3, window=window, q_start=q_start)
    out, lse = attend(q, k, v, rows, categories, template, max_keys=max_keys, tiles=SMALL[tma], **arguments)
    want, want_lse = reference(q, k, v, rows, categories, template, **arguments)
    np.testing.assert_allclose(out.transpose(1, 2).numpy(), want, rtol=0, atol=4e-6)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=0, atol=4e-6)


def prompt(n: int, bidirectional: bool = False) -> Layout:
    """Three images in `n` tokens: with delimiters, adjacent, the last without any."""
    a, b, c = 5, n // 3, n - 20
    return Layout(
        n, 0, n, np.array([(a, a + 1, b, b + 1), (b + 2, b + 3, c, c + 1), (c + 1, c + 1, n - 3, n - 3)]), bidirectional
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "window", "bidirectional"),
    [(63, 4, 4, None, False), (111, 4, 2, 40, False), (123, 4, 1, None, True), (123, 4, 2, 40, True)],
    ids=["T63-H4-K4", "T111-H4-K2-window", "T123-H4-K1-bidirectional", "T123-H4-K2-bidirectional-window"],
)
def test_error_within_twice_that_of_plain_attention(attend, dtype, n, heads, kv_heads, window, bidirectional):
    """The bar of every kernel: at most 2x the error of plain attention in the same precision; bitwise repeatable."""
    layout, categories = prompt(n, bidirectional), list(Category)
    q, k, v = draw_inputs(1, heads, kv_heads, n, n, 64, dtype)
    arguments = ([layout], categories, TEMPLATE)
    exact, exact_lse = reference(q, k, v, *arguments, scale=0.125, window=window)
    masks = torch.from_numpy(np.stack([category_mask(layout, c, TEMPLATE, window=window) for c in categories]))
    k_h, v_h = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    plain = (q @ k_h.transpose(2, 3) * 0.125).masked_fill(~masks, -torch.inf).softmax(-1) @ v_h
    out, lse = attend(q, k, v, *arguments, scale=0.125, window=window)
    error = np.abs(out.transpose(1, 2).double().numpy() - exact).max()
    assert error <= 2 * np.abs(plain.double().numpy() - exact).max()
    np.testing.assert_allclose(lse.numpy(), exact_lse, rtol=0, atol=1e-5)
    again, again_lse = attend(q, k, v, *arguments, scale=0.125, window=window)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)


@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256], ids="D{}".format)
def test_every_head_dimension(attend, dim):
    q, k, v = draw_inputs(1, 4, 2, 75, 75, dim, torch.float32)
    assert_equals_reference(attend, q, k, v, [prompt(75)], [3, 2, 1, 0], TEMPLATE, scale=dim**-0.5)


@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256], ids="D{}".format)
def test_every_head_dimension_in_bfloat16(attend, dim):
    """By the tiles that are shipped; values on a GPU as a model projects them, tokens before heads."""
    layout, categories, scale = prompt(75), list(Category), dim**-0.5
    q, k, v = draw_inputs(1, 4, 2, 75, 75, dim, torch.bfloat16)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = attend(q, k, v, [layout], categories, TEMPLATE, scale=scale)
    exact, exact_lse = reference(q, k, v, [layout], categories, TEMPLATE, scale=scale)
    masks = torch.from_numpy(np.stack([category_mask(layout, c, TEMPLATE) for c in categories]))
    k_h, v_h = (x.repeat_interleave(2, dim=1) for x in (k, v))
    plain = (q @ k_h.transpose(2, 3) * scale).masked_fill(~masks, -torch.inf).softmax(-1) @ v_h
    error = np.abs(out.transpose(1, 2).double().numpy() - exact).max()
    assert error <= 2 * np.abs(plain.double().numpy() - exact).max()
    np.testing.assert_allclose(lse.numpy(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("q_start", "window", "tma"),
    [(0, None, True), (60, 50, True), (60, None, False)],
    ids=["whole-tma", "chunk-window50-tma", "chunk-pointers"],
)
def test_split_text_ranges(attend, q_start, window, tma):
    """Text after a long past is computed in parts; rows that do not reach a part's keys must not be disturbed by it."""
    layout = Layout(150, 0, 150, np.array([(30, 31, 60, 61), (100, 101, 120, 121)]))
    q, k, v = draw_inputs(1, 2, 1, 150 - q_start, 150, 32, torch.float32)
    arguments = dict(scale=0.2, window=window, q_start=q_start, max_keys=40, tiles=SMALL[tma])
    assert_equals_reference(attend, q, k, v, [layout], [0, 3], TEMPLATE, **arguments)


def test_ragged_batch_pads_with_zeros(attend):
    """Padding on the left, on the right, and a row of nothing else, in one launch."""
    left = Layout(70, 12, 70, np.array([(14, 15, 50, 51)]))
    right = Layout(70, 0, 41, np.array([(3, 4, 20, 21), (21, 22, 40, 41)]))
    nothing = Layout(70, 0, 0, np.zeros((0, 4)))
    q, k, v = draw_inputs(3, 4, 2, 70, 70, 32, torch.float32)
    arguments = ([left, nothing, right], [0, 1, 2, 3], TEMPLATE)
    assert_equals_reference(attend, q, k, v, *arguments, scale=0.2, tiles=SMALL[True])
    out, lse = attend(q, k, v, *arguments, scale=0.2)
    for b, padding in ((0, slice(0, 12)), (1, slice(None)), (2, slice(41, None))):
        assert (out[b, padding] == 0).all()
        assert (lse[b, :, padding] == -torch.inf).all()


def test_dense_heads_may_be_left_to_another_kernel(attend):
    """Their rows stay as they were allocated, those of padding excepted; all others are computed."""
    layout = Layout(70, 4, 66, np.array([(14, 15, 50, 51)]))
    q, k, v = draw_inputs(1, 4, 2, 70, 70, 32, torch.float32)
    arguments = ([layout], [1, 0, 3, 0], TEMPLATE)
    out, lse = attend(q, k, v, *arguments, scale=0.2, tiles=SMALL[True], max_keys=20, skip_dense=True)
    want, want_lse = reference(q, k, v, *arguments, scale=0.2)
    np.testing.assert_allclose(out[:, :, ::2].transpose(1, 2).double().numpy(), want[:, ::2], rtol=0, atol=4e-6)
    np.testing.assert_allclose(lse[:, ::2].double().numpy(), want_lse[:, ::2], rtol=0, atol=4e-6)
    assert out[:, 4:66, 1::2].isnan().all() and lse[:, 1::2, 4:66].isnan().all()
    assert not out[:, :4].any() and not out[:, 66:].any()


def test_large_scores_do_not_overflow(attend):
    q, k, v = draw_inputs(1, 4, 2, 75, 75, 32, torch.float32)
    out, _ = attend(q * 100, k * 100, v, [prompt(75)], [0, 1, 2, 3], TEMPLATE, scale=1.0)
    want, _ = reference(q * 100, k * 100, v, [prompt(75)], [0, 1, 2, 3], TEMPLATE, scale=1.0)
    np.testing.assert_allclose(out.transpose(1, 2).numpy(), want, rtol=0, atol=0.05)


@pytest.mark.gpu
def test_one_compiled_kernel_serves_every_profile_and_prompt():
    from blindsight_kernels.triton_kernels import prefill_kernel
    from blindsight_kernels.triton_prefill import triton_attention

    counts = []
    for n, window, categories in ((64, None, [0] * 4), (111, 16, [3] * 4), (160, 1, [0, 1, 2, 3])):
        q, k, v = (x.cuda() for x in draw_inputs(1, 4, 2, n, n, 64, torch.bfloat16))
        triton_attention(q, k, v, [prompt(n)], categories, TEMPLATE, scale=0.125, window=window)
        counts.append(sum(len(cache[0]) for cache in prefill_kernel.device_caches.values()))
    assert counts[0] == counts[-1]


def call(attend, q, k, v, *, layouts=None, categories=(0, 1, 2, 3), scale=0.2, **kwargs):
    return attend(q, k, v, layouts or [prompt(75)], categories, TEMPLATE, scale=scale, **kwargs)


def test_refusals(attend):
    q, k, v = draw_inputs(1, 4, 2, 75, 75, 32, torch.float32)
    with pytest.raises(ValueError, match=r"H a multiple of K"):
        call(attend, q[:, :3], k, v)
    with pytest.raises(NotImplementedError, match=r"one of \(16, 32, 64, 128, 256\). Got 24"):
        call(attend, *(x[..., :24] for x in (q, k, v)))
    with pytest.raises(ValueError, match=r"1 layouts of q_start \+ T = 75 tokens"):
        call(attend, q, k, v, layouts=[prompt(76)])
    with pytest.raises(ValueError, match=r"S >= 75. Got S=70"):
        call(attend, q, k[:, :, :70], v[:, :, :70])
    with pytest.raises(ValueError, match=r"one category per query head, H=4. Got 2"):
        call(attend, q, k, v, categories=(0, 1))
    with pytest.raises(ValueError, match=r"categories must be one of"):
        call(attend, q, k, v, categories=(0, 1, 2, 4))
    for scale in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match=r"scale must be positive and finite"):
            call(attend, q, k, v, scale=scale)


def test_refusals_of_what_does_not_travel_to_a_worker(monkeypatch):
    """Checks that look at strides, dtypes and devices, made where the tensors are."""
    from blindsight_kernels import triton_prefill
    from blindsight_kernels.triton_prefill import check_inputs, triton_attention

    q, k, v = draw_inputs(1, 4, 2, 75, 75, 32, torch.float32)
    with pytest.raises(ValueError, match=r"on a CUDA GPU. Got cpu.*portable"):
        call(triton_attention, q, k, v)
    with pytest.raises(ValueError, match=r"share one device and one dtype"):
        check_inputs(q, k.half(), v, 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        with pytest.raises(NotImplementedError, match=r"8.0 \(Ampere\) or later. Got Tesla T4 with \(7, 5\)"):
            triton_prefill.check_device(torch.device("cuda"))
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        triton_prefill.check_device(torch.device("cuda"))
    monkeypatch.setattr(triton_prefill, "INTERPRETED", True)
    with pytest.raises(ValueError, match=r"must get CPU tensors where it is interpreted"):
        triton_prefill.check_device(torch.device("cuda"))
    with pytest.raises(NotImplementedError, match=r"torch.float64"):
        check_inputs(q.double(), k.double(), v.double(), 0.2)
    with pytest.raises(NotImplementedError, match=r"one of \(16, 32, 64, 128, 256\). Got 24"):
        triton_prefill.check_support(q.device, q.dtype, 24)
    with pytest.raises(ValueError, match=r"q must be contiguous along D"):
        check_inputs(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, 0.2)
    shifted = torch.zeros(k.numel() + 1)[1:].view(k.shape)
    with pytest.raises(
        ValueError, match=r"v must be .* rows that start at multiples of 16 bytes.* at an address 4 bytes past"
    ):
        check_inputs(q, k, shifted, 0.2)
    with pytest.raises(ValueError, match=r"k must be contiguous along D"):
        check_inputs(q, torch.zeros(1, 2, 75, 33)[..., :32], v, 0.2)
    one = torch.zeros(75, 32).as_strided((1, 1, 75, 32), (7, 5, 32, 1))  # no key stands by a dimension of one element
    check_inputs(q, one, one, 0.2)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.modules['triton'] = None", "could not be imported"),
        ("import triton; triton.__version__ = '3.2.0'", "Got 3.2.0. Upgrade"),
    ],
    ids=["missing", "old"],
)
def test_a_missing_or_old_triton_is_named(code, said):
    source = f"import sys\n{code}\nimport blindsight_kernels.triton_prefill"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the Triton kernel needs triton 3.6 or later.")
    assert said in last
    assert "portable" in last
