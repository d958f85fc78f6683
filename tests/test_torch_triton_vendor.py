"""Dense attention put together from the vendor's causal squares and rectangles: the definition's numbers, no mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_inputs import draw_inputs
from blindsight_kernels.reference import reference_attention
from shared_profiles import Category, Layout, SinkTemplate
from strategies import chunks, layouts
from torch_blindsight import vendor
from torch_blindsight.vendor import vendor_attention, vendor_serves

EXACT = dict(rtol=0, atol=1e-12)


def attend(q, k, v, rows, heads=None, **kwargs):
    """`vendor_attention` of all heads, or some, written over zeros and -inf: `[B, T, H, D]` and `[B, H, T]`."""
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    precise = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=precise, device=q.device)
    vendor_attention(out, lse, q, k, v, rows, range(q.shape[1]) if heads is None else heads, **kwargs)
    return out, lse


def definition(q, k, v, rows, scale, q_start):
    arrays = (x.double().cpu().numpy() for x in (q, k, v))
    dense = [Category.DENSE] * q.shape[1]
    out, lse = reference_attention(*arrays, rows, dense, SinkTemplate(), scale=scale, q_start=q_start)
    return out.transpose(0, 2, 1, 3), lse


@settings(max_examples=200)
@given(st.data(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(1, 40), st.integers(0, 2**31))
def test_equals_the_definition(data, head_counts, image_tokens, seed):
    """Padding, chunks that cut images, images that look both ways, several of one length, longer caches."""
    layout = data.draw(layouts())
    q_start, q_stop = data.draw(chunks(layout))
    images = np.minimum(layout.images, q_stop)
    images = images[images[:, 1] < images[:, 2]]
    span = min(layout.start, q_stop), min(layout.stop, q_stop)
    rows = [Layout(q_stop, *span, images[:n], layout.bidirectional) for n in (len(images), 1)]
    q, k, v = draw_inputs(
        seed, 2, *head_counts, q_stop - q_start, q_stop + data.draw(st.integers(0, 3)), 16, torch.float64
    )
    k[:, :, q_stop:] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vendor, "_IMAGE_TOKENS", image_tokens)
        vendor._images.cache_clear()
        out, lse = attend(q, k, v, rows, scale=0.3, q_start=q_start)
    vendor._images.cache_clear()
    want, want_lse = definition(q, k[:, :, :q_stop], v[:, :, :q_stop], rows, 0.3, q_start)
    np.testing.assert_allclose(out.numpy(), want, **EXACT)
    np.testing.assert_allclose(lse.numpy(), want_lse, **EXACT)


def test_rows_of_a_batch_with_other_padding():
    rows = [
        Layout(70, 12, 70, np.array([(14, 15, 50, 51)]), True),
        Layout(70, 0, 0, np.zeros((0, 4))),
        Layout(70, 0, 41, np.array([(3, 4, 20, 21), (21, 22, 40, 41)]), True),
    ]
    for q_start in (0, 30, 45):
        q, k, v = draw_inputs(0, 3, 4, 2, 70 - q_start, 70, 16, torch.float64)
        out, lse = attend(q, k, v, rows, scale=0.3, q_start=q_start)
        want, want_lse = definition(q, k, v, rows, 0.3, q_start)
        np.testing.assert_allclose(out.numpy(), want, **EXACT)
        np.testing.assert_allclose(lse.numpy(), want_lse, **EXACT)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
    ids=["cpu-float32", "cpu-bfloat16", "gpu-bfloat16", "gpu-float16"],
)
@pytest.mark.parametrize("q_start", [0, 200], ids=["whole", "chunk"])
@pytest.mark.parametrize("dim", [64, 128], ids="D{}".format)
def test_error_within_twice_that_of_plain_attention(device, dtype, q_start, dim):
    """Merging in parts may not cost precision; heads that are no neighbours, lengths that are no multiples."""
    layout = Layout(515, 0, 515, np.array([(4, 5, 68, 69), (70, 71, 282, 283), (283, 284, 496, 497)]), True)
    q, k, v = draw_inputs(0, 1, 6, 2, 515 - q_start, 515, dim, dtype)
    heads = [0, 2, 3, 5]
    on = (q.to(device), k.to(device), v.to(device))
    assert vendor_serves(*on)
    out, lse = (x.cpu() for x in attend(*on, [layout], heads, scale=dim**-0.5, q_start=q_start))
    assert not out[:, :, [1, 4]].any(), "other heads must be left as they are"
    out, lse = out[:, :, heads], lse[:, heads]
    exact, exact_lse = definition(q, k, v, [layout], dim**-0.5, q_start)
    exact, exact_lse = exact[:, :, heads], exact_lse[:, heads]
    rows, keys = np.arange(q_start, 515)[:, None], np.arange(515)
    shown = keys <= rows
    for _, first, last, _ in layout.images:
        shown |= (rows >= first) & (rows < last) & (keys >= first) & (keys < last)
    k_h, v_h = (x.repeat_interleave(3, dim=1)[:, heads] for x in (k, v))
    scores = (q[:, heads] @ k_h.transpose(2, 3) * dim**-0.5).masked_fill(~torch.from_numpy(shown), -torch.inf)
    plain = (scores.softmax(-1) @ v_h).transpose(1, 2)
    error = np.abs(out.double().numpy() - exact).max()
    assert error <= 2 * np.abs(plain.double().numpy() - exact).max()
    np.testing.assert_allclose(lse.numpy(), exact_lse, rtol=0, atol=1e-4)


def test_dense_heads_go_to_the_vendor_where_the_rows_are_many():
    """A short chunk on a long past stays with our kernel: every new length of the past would be another plan."""
    from torch_blindsight.mixed import VENDOR_ROWS, _vendor_is_faster

    def go(n_tokens: int, q_start: int = 0, start: int = 0, window: int | None = None, dim: int = 128) -> bool:
        layouts = [Layout(n_tokens, start, n_tokens, np.zeros((0, 4))), Layout(n_tokens, 0, 0, np.zeros((0, 4)))]
        return _vendor_is_faster(*[torch.empty(2, 1, 1, dim)] * 3, layouts, window, q_start)

    assert go(VENDOR_ROWS)
    assert go(2 * VENDOR_ROWS, q_start=VENDOR_ROWS)
    assert go(VENDOR_ROWS, window=VENDOR_ROWS)
    assert not go(VENDOR_ROWS, dim=256)
    assert not go(VENDOR_ROWS - 1)
    assert not go(VENDOR_ROWS, start=1)
    assert not go(2 * VENDOR_ROWS, q_start=VENDOR_ROWS + 1)
    assert not go(VENDOR_ROWS, window=VENDOR_ROWS - 1)


@pytest.fixture
def recorded(monkeypatch):
    """Kernels of a GPU that only note their calls: `recorded.can` says which of them take anything at all."""

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    class Recorded:
        calls: list = []  # noqa: RUF012
        can = {"cudnn": True, "flash": True}  # noqa: RUF012

        def __getattr__(self, name):
            def call(q, k, v, *args, **kwargs):
                kind = name.split("_")[-2]
                self.calls.append((kind, q, k))
                lse = torch.zeros(*q.shape[:3], *[1] * (kind == "cudnn"))
                return torch.zeros(q.shape), lse

            return call

        def inputs(self, *args):
            return [x.as_subclass(OnGpu) for x in draw_inputs(0, *args, torch.float32)]

    recorded = Recorded()

    def flash(params):  # causal: it takes squares only
        return recorded.can["flash"] and params[0].shape == params[1].shape

    monkeypatch.setattr(vendor.torch.ops, "aten", recorded)
    monkeypatch.setattr(vendor, "SDPAParams", lambda *args: args)
    monkeypatch.setattr(vendor, "can_use_cudnn_attention", lambda params: recorded.can["cudnn"])
    monkeypatch.setattr(vendor, "can_use_flash_attention", flash)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    return recorded


def test_the_order_of_preference_on_a_gpu(recorded, monkeypatch):
    """cuDNN where it can and is new enough, else FlashAttention; nothing where neither can."""
    q, k, v = recorded.inputs(1, 1, 1, 9, 9, 16)
    for cudnn, version, called in ((True, 91900, "cudnn"), (False, 91900, "flash"), (True, 91500, "flash")):
        recorded.can["cudnn"] = cudnn
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        _, got = vendor._planned(q, k, v, 0.25, causal=True)
        assert recorded.calls.pop()[0] == called
        assert got.shape == (1, 1, 9)
        assert vendor_serves(q, k, v)
    assert vendor_serves(*recorded.inputs(1, 4, 2, 5, 9, 16)), "a chunk on a filled cache"
    recorded.can["flash"] = False
    assert not vendor_serves(q, k, v)


def test_one_plan_serves_all_layers_and_no_key_is_copied(recorded, monkeypatch):
    """Whatever heads of a layer are dense, cuDNN sees one shape and reads in place; the triangles see flash only."""
    monkeypatch.setattr(vendor, "_images", lambda *args: (torch.arange(9).flip(0)[None],))
    layout = Layout(24, 0, 24, np.array([(0, 0, 9, 9), (12, 12, 21, 21)]), True)
    q, k, v = recorded.inputs(1, 4, 2, 24, 24, 16)
    for heads in ([0], [0, 1, 3], [2]):
        vendor_attention(torch.zeros(1, 24, 4, 16), torch.zeros(1, 4, 24), q, k, v, [layout], heads, scale=0.25)
    planned = [(x, y) for kind, x, y in recorded.calls if kind == "cudnn"]
    assert len(planned) == 5
    assert len({(x.shape, x.stride(), y.shape, y.stride()) for x, y in planned}) == 1
    first = k.untyped_storage().data_ptr()
    assert {y.untyped_storage().data_ptr() for _, y in planned} == {first}
    assert {tuple(x.shape) for kind, x, _ in recorded.calls if kind == "flash"} == {(1, 1, 8, 16)}
