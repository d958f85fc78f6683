"""The portable attention against the float64 reference and against torch's own masked attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_inputs import draw_inputs
from blindsight_kernels.reference import reference_attention
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from strategies import chunks, cut, layouts, templates, windows
from torch_blindsight import fused, portable
from torch_blindsight.portable import portable_attention


@settings(max_examples=250, deadline=None)
@given(st.data(), templates, windows, st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(0, 2**31))
def test_equals_the_reference(data, template, window, head_counts, seed):
    heads, kv_heads = head_counts
    layout = data.draw(layouts())
    rows = [layout, Layout(layout.n_tokens, layout.start, layout.stop, layout.images[:1], layout.bidirectional)]
    q_start, q_stop = data.draw(chunks(layout))
    rows = [cut(row, q_stop) for row in rows]
    categories = np.array(data.draw(st.lists(st.integers(0, 3), min_size=heads, max_size=heads)))
    spare = data.draw(st.integers(0, 3))  # a static cache is longer than the prompt
    q, k, v = draw_inputs(seed, 2, heads, kv_heads, q_stop - q_start, q_stop + spare, 16, torch.float64)
    k[:, :, q_stop:] = torch.nan
    arguments = dict(scale=0.3, window=window, q_start=q_start)
    out, lse = portable_attention(q, k, v, rows, categories, template, **arguments)
    want, want_lse = reference_attention(q.numpy(), k.numpy(), v.numpy(), rows, categories, template, **arguments)
    np.testing.assert_allclose(out.transpose(1, 2).numpy(), want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=0, atol=1e-12)


def three_images(bidirectional: bool) -> Layout:
    rows = [(4, 5, 68, 69), (70, 71, 182, 183), (183, 184, 307, 308)]
    return Layout(311, 0, 311, np.array(rows), bidirectional)


@pytest.mark.parametrize("window", [None, 50], ids=["full", "window50"])
@pytest.mark.parametrize("q_start", [0, 90], ids=["whole", "chunk"])
def test_long_text_and_long_images_equal_the_reference(q_start, window):
    """Blocks of every kind: long runs of text, gathered short ones, images of several blocks."""
    layout = Layout(820, 0, 820, np.array([(130, 131, 331, 332), (333, 334, 434, 435), (435, 436, 736, 737)]))
    q, k, v = draw_inputs(2, 1, 4, 2, 820 - q_start, 820, 16, torch.float64)
    arguments = dict(scale=0.3, window=window, q_start=q_start)
    template = SinkTemplate(local_block=128)
    out, lse = portable_attention(q, k, v, [layout], [0, 1, 2, 3], template, **arguments)
    want, want_lse = reference_attention(*(x.numpy() for x in (q, k, v)), [layout], [0, 1, 2, 3], template, **arguments)
    np.testing.assert_allclose(out.transpose(1, 2).numpy(), want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_start", [0, 1900], ids=["whole", "chunk"])
def test_images_of_several_chunks_equal_the_reference(q_start, dtype):
    """Where many rows see many keys, those are a call of their own: a merge, for all images but the short one."""
    layout, template = (
        Layout(4000, 0, 4000, np.array([(3, 4, 1900, 1901), (1901, 1902, 2002, 2003), (2004, 2005, 3999, 4000)])),
        SinkTemplate(),
    )
    q, k, v = draw_inputs(3, 1, 2, 1, 4000 - q_start, 4000, 8, dtype)
    arguments = dict(scale=0.3, q_start=q_start)
    out, lse = portable_attention(q, k, v, [layout], [2, 3], template, **arguments)
    want, want_lse = reference_attention(
        *(x.double().numpy() for x in (q, k, v)), [layout], [2, 3], template, **arguments
    )
    atol = 1e-12 if dtype == torch.float64 else 4e-3
    np.testing.assert_allclose(out.transpose(1, 2).double().numpy(), want, rtol=0, atol=atol)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=0, atol=max(atol, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [None, 100], ids=["full", "window100"])
def test_error_within_twice_that_of_plain_attention(dtype, bidirectional, window):
    """The bar of every kernel: at most 2x the error of plain attention in the same precision."""
    layout, template = three_images(bidirectional), SinkTemplate(local_block=64)
    categories = np.array([0, 1, 2, 3])
    q, k, v = draw_inputs(0, 1, 4, 2, 311, 311, 64, dtype)
    exact, _ = reference_attention(
        *(x.double().numpy() for x in (q, k, v)), [layout], categories, template, scale=0.125, window=window
    )
    masks = np.stack([category_mask(layout, Category(c), template, window=window) for c in categories])
    k4, v4 = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ k4.transpose(2, 3) * 0.125).masked_fill(~torch.from_numpy(masks), -torch.inf)
    plain = scores.softmax(-1) @ v4
    sdpa = F.scaled_dot_product_attention(q, k4, v4, attn_mask=torch.from_numpy(masks), scale=0.125)
    out, _ = portable_attention(q, k, v, [layout], categories, template, scale=0.125, window=window)
    error = np.abs(out.transpose(1, 2).double().numpy() - exact).max()
    assert error <= 2 * np.abs(plain.double().numpy() - exact).max()
    assert error <= 3 * np.abs(sdpa.double().numpy() - exact).max() + 1e-7  # an independent implementation agrees
    again, _ = portable_attention(q, k, v, [layout], categories, template, scale=0.125, window=window)
    assert torch.equal(out, again)


@pytest.fixture
def unfused(monkeypatch):
    """The matrix products of devices without the CPU's fused kernel, which run on a CPU just as well."""
    monkeypatch.setattr(fused, "_SCORES_AT_ONCE", 1000)
    monkeypatch.setattr(portable, "attend", fused._attend)
    monkeypatch.setattr(portable, "attend_backward", fused._attend_backward)


def test_unfused_attention_of_other_devices_agrees(request):
    layout, template = three_images(False), SinkTemplate(local_block=64)
    leaves = [x.requires_grad_() for x in draw_inputs(1, 1, 4, 2, 311, 311, 32, torch.float32)]

    def run():
        out, lse = portable_attention(*leaves, [layout], [0, 1, 2, 3], template, scale=0.2)
        return out, lse, *torch.autograd.grad(out.square().sum(), leaves)

    want = run()
    request.getfixturevalue("unfused")
    with torch.autocast("cpu"):  # which would round every score
        torch.testing.assert_close(run(), want, rtol=0, atol=2e-5)


SMALL = Layout(500, 0, 500, np.array([(4, 5, 158, 159), (160, 161, 322, 323), (323, 324, 490, 491)]))
# The short ones share calls.
TINY = Layout(300, 0, 300, np.array([(4, 5, 158, 159), *((s, s + 1, s + 19, s + 20) for s in range(165, 290, 21))]))
# Of these calls share rows: some see earlier ones of the image, or only text far before it.
LONG = Layout(1900, 4, 1897, np.array([(5, 6, 1880, 1881)]))
LATE = Layout(1850, 0, 1850, np.array([(3, 4, 20, 21), (800, 800, 1824, 1824)]))  # no delimiters, as of a video


@pytest.mark.parametrize("trained", ["qkv", "qv", "k", "v"])
def test_gradients_are_those_of_plain_attention(trained):
    """Whichever of the projections are trained."""
    check_gradients(SMALL, trained=trained)


@pytest.mark.parametrize("window", [None, 100], ids=["full", "window100"])
@pytest.mark.parametrize("layout", [SMALL, TINY], ids=["small", "tiny"])
@pytest.mark.parametrize("how", ["both_ways", "chunk", "unfused"])
def test_gradients_of_every_kind_of_call(layout, window, how, request):
    if how == "unfused":
        request.getfixturevalue("unfused")
    layout = replace(layout, bidirectional=how == "both_ways")
    check_gradients(layout, window=window, q_start=100 if how == "chunk" else 0)


@pytest.mark.parametrize("layout", [LONG, LATE], ids=["long", "late"])
def test_gradients_of_images_of_several_chunks(layout):
    check_gradients(layout)


def test_arrays_in_any_order_of_memory():
    """The fused CPU attention reads D as contiguous, whatever the strides say."""
    plain = draw_inputs(3, 1, 4, 2, 500, 500, 16, torch.float64)
    results = []
    for arrays in (plain, [torch.stack([x, x + 9], dim=-1)[..., 0] for x in plain]):
        leaves = [x.detach().requires_grad_() for x in arrays]
        out, lse = portable_attention(*leaves, [SMALL], [3, 1, 2, 0], SinkTemplate(local_block=64), scale=0.25)
        results.append([out, lse, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nested", [False, True], ids=["create_graph", "torch.func"])
def test_a_gradient_of_a_gradient_is_refused(nested):
    """A penalty on gradients; that of a sum reaches the backward pass without a graph."""
    q, k, v = draw_inputs(3, 1, 4, 2, 311, 311, 16, torch.float64)
    arguments = [three_images(False)], [3, 1, 2, 0], SinkTemplate(local_block=64)
    loss = lambda q: portable_attention(q, k, v, *arguments, scale=0.25)[0].sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="differentiated once at most"):
        if nested:
            torch.func.grad(lambda q: torch.func.grad(loss)(q).square().sum())(q)
        else:
            q.requires_grad_()
            (by_q,) = torch.autograd.grad(loss(q), q, create_graph=True)
            by_q.square().sum().backward()


def check_gradients(layout: Layout, *, trained: str = "qkv", window: int | None = None, q_start: int = 0) -> None:
    """Against autograd's own through a masked softmax, for heads of all categories, in a batch with an empty row."""
    n, template, categories = layout.n_tokens, SinkTemplate(local_block=64), [3, 1, 2, 0]
    q, k, v = draw_inputs(3, 2, 4, 2, n - q_start, n, 16, torch.float64)
    rows = [Layout(n, n, n, np.zeros((0, 4), int), layout.bidirectional), layout]
    masks = np.stack([category_mask(layout, Category(c), template, window=window) for c in categories])[:, q_start:]
    leaves = [x.requires_grad_() for name, x in zip("qkv", (q, k, v), strict=True) if name in trained]
    out, lse = portable_attention(q, k, v, rows, categories, template, scale=0.25, window=window, q_start=q_start)
    assert not lse.requires_grad
    got = torch.autograd.grad(out.square().sum() + out.sum(), leaves)
    k4, v4 = (x[1:].repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q[1:] @ k4.transpose(2, 3) * 0.25).masked_fill(~torch.from_numpy(masks), -torch.inf)
    weights = scores.softmax(-1).masked_fill(~torch.from_numpy(masks), 0)  # rows of padding see nothing
    plain = weights @ v4
    for a, b in zip(got, torch.autograd.grad(plain.square().sum() + plain.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_refusals():
    layout = three_images(False)
    q, k, v = draw_inputs(0, 1, 4, 2, 311, 311, 16, torch.float32)
    call = lambda q=q, k=k, v=v, layouts=(layout,), categories=(3,) * 4, window=None: portable_attention(  # noqa: E731
        q, k, v, layouts, categories, SinkTemplate(), scale=1.0, window=window
    )
    wrong = dict(q=q[:, :3]), dict(q=q[0]), dict(q=q[..., :8]), dict(v=v[:, :1]), dict(k=k[:, :0], v=v[:, :0])
    for arrays in (*wrong, dict(q=q.expand(2, -1, -1, -1), layouts=(layout,) * 2)):
        with pytest.raises(ValueError, match="H a multiple of K"):
            call(**arrays)
    with pytest.raises(ValueError, match="share one device and one dtype"):
        call(k=k.double())
    with pytest.raises(ValueError, match="1 layouts of q_start \\+ T = 311 tokens"):
        call(layouts=())
    with pytest.raises(ValueError, match=r"S >= 311\. Got S=300"):
        call(k=k[:, :, :300], v=v[:, :, :300])
    with pytest.raises(ValueError, match="one category per query head"):
        call(categories=(3,))
    for category in (0.5, 4):  # a half was DENSE
        with pytest.raises(ValueError, match="a category must be one of 0 DENSE"):
            call(categories=(3, 3, 3, category))
    with pytest.raises(ValueError, match="window must be at least 1, or None"):
        call(window=0)
