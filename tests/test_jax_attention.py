"""The attention of the JAX backend against the float64 reference: every category, layout, chunk, window and dtype."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from blindsight_kernels.reference import reference_attention
from jax_blindsight import attention
from jax_blindsight.attention import attend
from jax_blindsight.implementations import build_work, implementation
from jax_blindsight.portable import attend_sequence
from jax_blindsight.work import GATHERED_ROWS, attention_work
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from strategies import chunks, cut, layouts, templates

T, S, DIM = 216, 256, 16  # the buckets of the random layouts, of up to 214 tokens
ALL, MIXED = (0, 1, 2, 3), (3, 1, 3, 0, 2, 1)


def draw_inputs(seed: int, batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int):
    rng = np.random.default_rng(seed)
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [rng.standard_normal(shape) for shape in shapes]


def padded(x: np.ndarray, n: int, fill: float) -> np.ndarray:
    """`[..., N, D]` filled up to n."""
    return np.pad(x, [(0, 0), (0, 0), (0, n - x.shape[2]), (0, 0)], constant_values=fill)


@partial(jax.jit, static_argnames="window")
def compiled(q, k, v, work, categories, window):
    # `bidirectional` decides on cuDNN alone; layouts of both kinds share one program.
    return attend(q, k, v, work, categories=categories, window=window, scale=0.3, bidirectional=True)


def check(rows, categories, template, inputs, *, window=None, q_start=0, n_queries=T, n_keys=S, dense=None, atol=1e-12):
    """Runs padded inputs, NaN in the padding of K and V, against the reference: float64."""
    q, k, v = inputs
    n = q.shape[2]
    stop = q_start + n
    work = attention_work(
        rows, template, window=window, q_start=q_start, n_queries=n_queries, n_keys=n_keys, dense=dense
    )
    filled = padded(q, n_queries, np.nan), *(padded(x[:, :, :stop], n_keys, np.nan) for x in (k, v))
    with jax.enable_x64(True):
        out, lse = compiled(*map(jnp.asarray, filled), work, np.array(categories), window)
        out, lse = np.asarray(out), np.asarray(lse)
    want, want_lse = reference_attention(
        q, k[:, :, :stop], v[:, :, :stop], rows, categories, template, scale=0.3, window=window, q_start=q_start
    )
    np.testing.assert_allclose(out[:, :n].swapaxes(1, 2), want, rtol=0, atol=atol)
    np.testing.assert_allclose(lse[:, :, :n], want_lse, rtol=0, atol=atol)
    assert not out[:, n:].any()
    assert (lse[:, :, n:] == -np.inf).all()


@settings(max_examples=120)
@given(st.data(), templates, st.sampled_from([None, 30]), st.integers(0, 2**31))
def test_equals_the_reference(data, template, window, seed):
    template = SinkTemplate(template.from_start, template.from_end, 16)  # another block would be another shape
    layout = data.draw(layouts(max_images=4))
    alone = Layout(layout.n_tokens, layout.start, layout.stop, layout.images[:1], layout.bidirectional)
    q_start, q_stop = data.draw(chunks(layout))
    rows = [cut(layout, q_stop), cut(alone, q_stop)]
    inputs = draw_inputs(seed, 2, 6, 2, q_stop - q_start, q_stop, DIM)
    check(rows, MIXED, template, inputs, window=window, q_start=q_start)


@pytest.mark.parametrize("window", [None, 50], ids=["full", "window50"])
@pytest.mark.parametrize("q_start", [0, 90], ids=["whole", "chunk"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
def test_long_text_long_images_and_many_sinks(q_start, window, bidirectional):
    """Tiles and chunks of every kind: runs of text, long, gathered and just between, images of several tiles."""
    images = np.array([(130, 131, 331, 332), (333, 334, 434, 435), (435, 436, 836, 837)])
    n = 836 + 2 * GATHERED_ROWS  # the last run is just long enough for tiles of its own
    layout = Layout(n, 0, n, images, bidirectional)
    template = SinkTemplate(local_block=136)  # no multiple of the rows of a tile, nor they of it
    inputs = draw_inputs(2, 1, 4, 2, n - q_start, n, DIM)
    check([layout], ALL, template, inputs, window=window, q_start=q_start, n_queries=960, n_keys=960)


@pytest.mark.parametrize("group", [1, 8], ids="G{}".format)
def test_any_ratio_of_query_heads_to_kv_heads(group):
    layout = Layout(100, 3, 98, np.array([(5, 6, 40, 41), (41, 41, 42, 42), (50, 51, 90, 91)]))
    check(
        [layout],
        (3, 1, 3, 3, 1, 3, 3, 1),
        SinkTemplate(local_block=16),
        draw_inputs(0, 1, 8, 8 // group, 100, 100, DIM),
    )


def test_heads_left_out_are_zero_and_do_not_move_the_others():
    layout = Layout(100, 0, 100, np.array([(5, 6, 40, 41), (50, 51, 90, 91)]))
    template, categories = SinkTemplate(local_block=16), np.array((-1, 3, 0, -1, -1, 1))
    work = jax.tree.map(lambda x: x[0], attention_work([layout], template, n_queries=100, n_keys=100))
    inputs = draw_inputs(0, 1, 6, 2, 100, 100, DIM)
    q, k, v = (jnp.asarray(x[0], jnp.float32) for x in inputs)
    out, lse = jax.jit(partial(attend_sequence, window=None, scale=0.3))(q, k, v, work, jnp.asarray(categories))
    wanted = categories >= 0
    want, want_lse = reference_attention(*inputs, [layout], np.maximum(categories, 0), template, scale=0.3)
    np.testing.assert_allclose(out.swapaxes(0, 1)[wanted], want[0, wanted], rtol=0, atol=3e-6)
    np.testing.assert_allclose(lse[wanted], want_lse[0, wanted], rtol=0, atol=3e-6)
    assert not out[:, ~wanted].any()
    assert (lse[~wanted] == -np.inf).all()


def test_rows_marked_dense_are_dense_in_every_head():
    images = np.array([(5, 6, 40, 41), (50, 51, 90, 91)])
    rows, template = [Layout(100, 0, 100, images), Layout(100, 4, 100, images)], SinkTemplate(local_block=16)
    q, k, v = draw_inputs(0, 2, 6, 2, 100, 100, DIM)
    work = attention_work(rows, template, n_queries=T, n_keys=S, dense=[False, True])
    with jax.enable_x64(True):
        arguments = [jnp.asarray(padded(x, n, 0)) for x, n in ((q, T), (k, S), (v, S))]
        out = np.asarray(compiled(*arguments, work, np.array(MIXED), None)[0])
    for b, categories in enumerate((MIXED, (0,) * 6)):
        one = slice(b, b + 1)
        want, _ = reference_attention(q[one], k[one], v[one], rows[one], categories, template, scale=0.3)
        np.testing.assert_allclose(out[b, :100].swapaxes(0, 1), want[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
def test_error_within_twice_that_of_plain_attention(dtype, bidirectional):
    """The bar of every lowering: at most 2x the error of plain attention in the same precision; twice the same bits."""
    rows = np.array([(4, 5, 68, 69), (70, 71, 182, 183), (183, 184, 307, 308)])
    layout, template = Layout(311, 0, 311, rows, bidirectional), SinkTemplate(local_block=64)
    q, k, v = (jnp.asarray(x, dtype) for x in draw_inputs(0, 1, 4, 2, 311, 311, 64))
    exact, exact_lse = reference_attention(
        *(np.asarray(x, np.float64) for x in (q, k, v)), [layout], ALL, template, scale=0.3
    )
    masks = np.stack([category_mask(layout, Category(c), template) for c in ALL])
    scores = jnp.einsum("bhtd,bhsd->bhts", q, jnp.repeat(k, 2, axis=1)).astype(jnp.float32) * 0.3
    weights = jax.nn.softmax(jnp.where(masks, scores, -jnp.inf), axis=-1).astype(dtype)
    plain = jnp.einsum("bhts,bhsd->bhtd", weights, jnp.repeat(v, 2, axis=1))
    work = attention_work([layout], template, n_queries=311, n_keys=311)
    out, lse = compiled(q, k, v, work, np.array(ALL), None)
    assert out.dtype == q.dtype
    assert lse.dtype == jnp.float32
    error = np.abs(np.asarray(out, np.float64).swapaxes(1, 2) - exact).max()
    assert error <= 2 * np.abs(np.asarray(plain, np.float64) - exact).max()
    np.testing.assert_allclose(lse, exact_lse, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(compiled(q, k, v, work, np.array(ALL), None)[0], out)


def test_twenty_layouts_of_a_bucket_are_traced_once():
    traces = 0

    @jax.jit
    def run(q, k, v, work):
        nonlocal traces
        traces += 1
        return attend(q, k, v, work, categories=ALL, window=None, scale=0.3, bidirectional=False)[0]

    rng = np.random.default_rng(0)
    template = SinkTemplate(local_block=16)
    for i in range(20):
        n, begin, rows = int(rng.integers(150, 190)), 0, []
        for _ in range(i % 5):
            begin += int(rng.integers(0, 9))
            last = begin + 1 + int(rng.integers(1, 25))
            rows.append((begin, begin + 1, last, last + 1))
            begin = last + 1
        layout = Layout(n, 0, n, np.array(rows, dtype=np.int64).reshape(-1, 4))
        q, k, v = draw_inputs(i, 1, 4, 2, n, n, DIM)
        work = attention_work([layout], template, n_queries=T, n_keys=S)
        out = run(*(jnp.asarray(padded(x, m, 0), jnp.float32) for x, m in ((q, T), (k, S), (v, S))), work)
        want, _ = reference_attention(q, k, v, [layout], ALL, template, scale=0.3)
        np.testing.assert_allclose(out[:, :n].swapaxes(1, 2), want, rtol=0, atol=3e-6)
    assert traces == 1


def test_memory_grows_with_the_prompt_not_with_its_square():
    """XLA's own account of the temporary memory, from 4K to 16K tokens."""
    sizes = []
    for n in (4096, 16384):
        begin = np.arange(0, n, 1024)
        layout = Layout(n, 0, n, np.stack([begin, begin + 1, begin + 1023, begin + 1024], axis=1))
        work = attention_work([layout], SinkTemplate(), n_queries=n, n_keys=n)
        shapes = [jax.ShapeDtypeStruct((1, 4, n, 64), jnp.float32)] * 3
        done = compiled.lower(*shapes, work, np.array([0, 3, 0, 3]), None).compile()
        sizes.append(done.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 5 * sizes[0]
    assert sizes[1] < 3 * 4 * 16384 * 64 * 4  # bytes of q, k and v; one head's scores alone are 1 GiB


_ON_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax_blindsight.attention import attend
from jax_blindsight.implementations import build_work
from jax_blindsight.sharding import make_mesh
from jax_blindsight.work import attention_work
from shared_profiles import Layout, SinkTemplate

images = np.array([(5, 6, 40, 41), (50, 51, 90, 91)])
work = attention_work([Layout(128, 0, 128, images), Layout(128, 7, 120, images + 9)], SinkTemplate(local_block=16),
                      n_queries=128, n_keys=128)
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((2, h, 128, 16)), jnp.float32) for h in (8, 4, 4))
options = dict(categories=(0, 3, 1, 2, 0, 3, 1, 2), window=None, scale=0.3, bidirectional=False)
want = jax.jit(partial(attend, **options))(q, k, v, work)
run = jax.jit(partial(attend, mesh=make_mesh(data=2, model=4), **options))
for x, y in zip(run(q, k, v, work), want, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
text = run.lower(q, k, v, work).compile().as_text()
assert len(jax.devices()) == 8 and "all-gather" not in text and "all-reduce" not in text

# The Pallas kernel, lowered for eight GPUs: a work list for each of the two shards of the batch.
layouts = [Layout(1000, 0, 1000, images), Layout(1000, 3, 990, images[:1])]
work = build_work("pallas", layouts, SinkTemplate(), head_dim=64, n_queries=1024, n_keys=1024, n_shards=2)
shapes = [jax.ShapeDtypeStruct((2, h, 1024, 64), jnp.bfloat16) for h in (8, 4, 4)]
run = jax.jit(partial(attend, mesh=make_mesh(data=2, model=4), **options))
text = run.trace(*shapes, work).lower(lowering_platforms=("cuda",)).as_text()
assert "mosaic_gpu" in text and "manual_computation" in text
print("equal")
"""


def test_heads_and_batch_split_over_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _ON_DEVICES], capture_output=True, text=True, env=environment)
    assert done.stdout == "equal\n", done.stderr


@pytest.fixture
def cuda(monkeypatch):
    """As if JAX had CUDA: enough to lower programs for it."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(attention, "has_cuda", lambda: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91501)


@pytest.mark.parametrize("impl", ["portable", "pallas"])
def test_dense_heads_lower_to_cudnn_on_cuda(cuda, impl):
    """Lowered for CUDA without one: cuDNN's call is there, for as many heads as are dense, and only where it serves."""
    layout = Layout(100, 0, 100, np.array([(5, 6, 40, 41), (50, 51, 90, 91)]))

    def text(categories=(0, 0, 3, 0), n=128, dim=64, dtype="bfloat16", **options) -> str:
        options = dict(window=None, bidirectional=False, lse=False) | options
        work = build_work(
            impl, [layout], SinkTemplate(), head_dim=dim, window=options["window"], n_queries=n, n_keys=256
        )
        shapes = [jax.ShapeDtypeStruct((1, h, rows, dim), dtype) for h, rows in ((4, n), (2, 256), (2, 256))]
        run = partial(attend, categories=categories, scale=0.125, **options)
        return jax.jit(run).trace(*shapes, work).lower(lowering_platforms=("cuda",)).as_text()

    plain = text()
    assert re.search(r"cudnn\$fmha.*tensor<1x128x3x64xbf16>", plain)
    assert ("mosaic_gpu" in plain) == (impl == "pallas")
    for other in (dict(window=64), dict(bidirectional=True), dict(lse=True), dict(categories=(3, 3, 1, 2))):
        assert "cudnn$fmha" not in text(**other)
    if impl == "portable":  # the kernel knows fewer shapes
        assert "cudnn$fmha" in text(dim=128)
        for other in (dict(n=192), dict(dim=136), dict(dim=60), dict(dtype="float32")):
            assert "cudnn$fmha" not in text(**other), other


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_dense_heads_that_cudnn_computes_are_those_of_the_portable_attention(cuda, monkeypatch, device):
    """With XLA's plain attention in cuDNN's place; on a CPU beside a GPU nothing is left to it."""
    plain, calls = jax.nn.dot_product_attention, []

    def vendor(*arrays, scale, is_causal, implementation):
        calls.append((arrays[0].shape, implementation))
        wide = (x.astype(jnp.float32) for x in arrays)
        return plain(*wide, scale=scale, is_causal=is_causal).astype(arrays[0].dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", vendor)
    if device == "cuda":
        monkeypatch.setattr(attention.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))
    images, template = np.array([(5, 6, 40, 41), (50, 51, 90, 91)]), SinkTemplate(local_block=16)
    layouts, categories = [Layout(120, 0, stop, images) for stop in (120, 97)], (3, 0, 0, 0)
    inputs = [np.float64(np.float16(x)) for x in draw_inputs(4, 2, 4, 2, 120, 120, 24)]
    arrays = [jnp.asarray(padded(x, n, np.nan), jnp.float16) for x, n in zip(inputs, (128, 256, 256), strict=True)]
    work = attention_work(layouts, template, n_queries=128, n_keys=256)
    options = dict(window=None, scale=dict(cuda=0.2, cpu=0.3)[device], lse=False)  # of each its own programs
    want, _ = reference_attention(*inputs, layouts, categories, template, scale=options["scale"])
    for both_ways in (True, False):  # told that images look both ways, it leaves cuDNN out
        out, none = attend(*arrays, work, categories=categories, bidirectional=both_ways, **options)
        assert none is None and calls == ([] if both_ways else [((2, 128, 3, 24), "cudnn")])
        np.testing.assert_allclose(np.asarray(out)[:, :120].swapaxes(1, 2), want, rtol=0, atol=4e-3)
        assert not out[:, 120:].any() and not out[1, 97:].any()
    static = dict(spare_dense=True, mesh=None, interpret=None) | options
    spared, _ = attention._by_category(*arrays, work, jnp.array(categories, jnp.int32), **static)
    assert spared[:, :, 1:].any() == (device == "cpu"), "computed twice, or not at all"


def test_devices_have_room_for_the_most_dense_heads_of_any(cuda):
    mesh, q = AbstractMesh((1, 2), ("data", "model")), jnp.zeros((1, 4, 128, 64), jnp.bfloat16)
    assert attention._count_for_cudnn(q, np.array((0, 0, 3, 0)), None, False, mesh) == 2


@pytest.mark.parametrize("impl", ["portable", "pallas"])
@pytest.mark.parametrize(
    ("starts", "q_start", "plain"), [((0, 0), 0, True), ((0, 7), 0, False), ((7, 7), 0, False), ((0, 0), 50, False)]
)
def test_prompts_with_a_past_or_padding_on_the_left_are_not_for_cudnn(impl, starts, q_start, plain):
    """Its causal mask knows neither: one such row is enough."""
    layouts = [Layout(100, start, 100, np.array([(10, 11, 40, 41), (50, 51, 90, 91)])) for start in starts]
    work = build_work(impl, layouts, SinkTemplate(), head_dim=64, q_start=q_start, n_queries=128, n_keys=128)
    assert attention.is_plain(work) == plain


class Device:
    """A GPU that is not there."""

    platform, device_kind = "gpu", "NVIDIA"

    def __init__(self, capability: str, version: str = "cuda 13000") -> None:
        self.compute_capability, self.client = capability, SimpleNamespace(platform_version=version)


def test_which_implementation_serves():
    """Pallas on CUDA, refused where it cannot serve: nothing goes to XLA there unasked."""
    half, cpu, h200 = np.dtype(jnp.bfloat16), jax.devices()[0], Device("9.0")
    assert implementation(None, [cpu], half, 128) == "portable"
    assert implementation(None, [Device("9.4", "rocm 70000")], half, 128) == "portable"
    assert implementation(None, [h200, cpu], half, 128) == "portable"
    assert implementation(None, [h200, h200], half, 128) == implementation("pallas", [h200], half, 64) == "pallas"
    assert implementation("portable", [h200], np.dtype("float32"), 96) == "portable"
    with pytest.raises(ValueError, match=r"one of pallas, portable, or None\. Got 'triton'"):
        implementation("triton", [cpu], half, 128)
    for arguments, message in (
        (("pallas", [cpu], half, 128), "needs a Hopper GPU .*Got cpu"),
        ((None, [Device("8.0")], half, 128), "needs a Hopper GPU .*capability 8.0"),
        ((None, [h200], np.dtype("float32"), 128), "computes in bfloat16 and float16. Got float32"),
        ((None, [h200], half, 96), r"one of \(64, 128, 256\). Got 96"),
    ):
        with pytest.raises(NotImplementedError, match=message + '.*impl="portable"'):
            implementation(*arguments)


def test_a_jax_without_the_kernel_is_refused_on_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "blindsight_kernels.pallas_prefill", None)
    with pytest.raises(ImportError, match='impl="portable"'):
        implementation(None, [Device("9.0")], np.dtype(jnp.bfloat16), 128)


def test_refusals():
    layout = Layout(100, 0, 100, np.array([(5, 6, 40, 41)]))
    work, for_pallas = (
        build_work(impl, [layout], SinkTemplate(), head_dim=64, n_queries=128, n_keys=128)
        for impl in ("portable", "pallas")
    )
    q, k, v = (jnp.zeros((1, h, 128, 64), jnp.bfloat16) for h in (4, 2, 2))

    def call(q=q, k=k, v=v, work=work, categories=(3,) * 4, **options):
        return attend(q, k, v, work, categories=categories, window=None, scale=1.0, bidirectional=False, **options)

    two = build_work("pallas", [layout] * 2, SinkTemplate(), head_dim=64, n_queries=128, n_keys=128)
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU .*Got cpu on platform cpu"):
        call(*(jnp.repeat(x, 2, axis=0) for x in (q, k, v)), work=two)
    wrong = dict(q=q[:, :3]), dict(q=q[0]), dict(q=q[..., :32]), dict(v=v[:, :1]), dict(k=k[:, :0], v=v[:, :0])
    for arrays in (*wrong, dict(q=jnp.zeros((2, 4, 128, 64), q.dtype))):
        with pytest.raises(ValueError, match="H a multiple of K"):
            call(**arrays)
    with pytest.raises(ValueError, match="of one dtype"):
        call(k=k.astype(jnp.float32))
    for one in (work, for_pallas):
        with pytest.raises(ValueError, match=r"B, T, S = \(1, 64, 128\). Got one of \(1, 128, 128\)"):
            call(q=q[:, :, :64], work=one)
        with pytest.raises(ValueError, match=r"B, T, S = \(1, 128, 64\). Got one of \(1, 128, 128\)"):
            call(k=k[:, :, :64], v=v[:, :, :64], work=one)
    with pytest.raises(ValueError, match=r"one of .* per query head, H=4"):
        call(categories=(3,))
    with pytest.raises(ValueError, match=r"one of .* per query head, H=4"):
        call(categories=(3, 3, 3, 4))
