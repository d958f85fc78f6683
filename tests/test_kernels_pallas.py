"""The Pallas kernel in the simulator, with race detection, against the float64 reference; and that the checks bite."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("jax", reason="the Pallas kernel needs jax, which is not installed")

import jax
import jax.numpy as jnp

import sampled_rows
from blindsight_kernels.pallas_configurations import Configuration
from blindsight_kernels.pallas_prefill import pallas_attention
from blindsight_kernels.pallas_work import build_pallas_work
from blindsight_kernels.plans import build_plans
from blindsight_kernels.reference import reference_attention
from sampled_rows import check_rows, images_in
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from simulated import Simulate, native, simulator

TEMPLATE = SinkTemplate(local_block=128)
NARROW = Configuration(64, 2)  # many tiles of a short prompt, and few slots for them
SMALL_BLOCKS = SinkTemplate(from_start=(0, 5), from_end=(2,), local_block=32)


@pytest.fixture(scope="module")
def simulate() -> Simulate:
    """The kernel in the simulator."""
    with simulator() as simulate:
        yield simulate


@pytest.fixture(scope="module", params=["simulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def attend(request) -> Simulate:
    """The kernel in the simulator, and on a GPU."""
    if request.param == "gpu":
        with native() as attend:
            yield attend
    else:
        yield request.getfixturevalue("simulate")


def prompt(n: int, bidirectional: bool = False) -> Layout:
    """Three images in `n` tokens: with delimiters, adjacent, the last without any."""
    a, b, c = 5, n // 3, n - 20
    return Layout(
        n, 0, n, np.array([(a, a + 1, b, b + 1), (b + 2, b + 3, c, c + 1), (c + 1, c + 1, n - 3, n - 3)]), bidirectional
    )


def draw_inputs(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype="bfloat16"):
    generator = np.random.default_rng(0)
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [np.asarray(jnp.asarray(generator.standard_normal(s), dtype), np.float32) for s in shapes]


def plain_attention(q, k, v, layouts, categories, template, *, scale, window, q_start, dtype) -> np.ndarray:
    """Attention with everything in `dtype`, a boolean mask and H = K, the bar of every kernel: `[B, H, T, D]`."""
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    where = dict(window=window, q_start=q_start)
    masks = [[category_mask(x, Category(c), template, **where) for c in categories] for x in layouts]
    scores = jnp.where(np.array(masks), jnp.einsum("bhtd,bhsd->bhts", q, k) * jnp.asarray(scale, dtype), -jnp.inf)
    weights = jnp.nan_to_num(jax.nn.softmax(scores, axis=-1))
    return np.asarray(jnp.einsum("bhts,bhsd->bhtd", weights, v), np.float64)


def check(
    attend,
    q,
    k,
    v,
    layouts,
    categories,
    template,
    *,
    window=None,
    q_start=0,
    dtype="bfloat16",
    kv_heads=None,
    **options,
):
    """Demands no race, at most twice the error of plain attention, and zeros and `-inf` in rows without keys."""
    keys = layouts[0].n_tokens
    queries = keys - q_start
    group = q.shape[1] // k.shape[1]
    kv = np.arange(q.shape[1]) // group if kv_heads is None else kv_heads
    real = q[:, :, :queries], np.nan_to_num(k)[:, kv, :keys], np.nan_to_num(v)[:, kv, :keys]
    where = dict(window=window, q_start=q_start)
    scale = q.shape[3] ** -0.5
    exact, exact_lse = reference_attention(*real, layouts, categories, template, scale=scale, **where)
    plain = plain_attention(*real, layouts, categories, template, scale=scale, dtype=dtype, **where)
    options |= dict(dtype=dtype, kv_heads=kv_heads, **where)
    out, lse, raced = attend(q, k, v, layouts, categories, template, **options)
    assert not raced
    rest, rest_lse = out[:, queries:], lse[:, :, queries:]
    assert (rest == 0).all()
    assert (rest_lse == -np.inf).all()
    np.testing.assert_allclose(lse[:, :, :queries], exact_lse, rtol=0, atol=1e-5)
    assert (out[:, :queries].swapaxes(1, 2)[exact_lse == -np.inf] == 0).all()
    error = np.abs(out[:, :queries].swapaxes(1, 2) - exact).max()
    assert error <= 2 * np.abs(plain - exact).max()
    return out, lse


@pytest.mark.parametrize(
    ("n", "dim", "dtype", "heads", "kv_heads", "window", "bidirectional"),
    [
        (263, 64, "bfloat16", 4, 4, None, False),
        (411, 128, "float16", 4, 1, None, True),
        (233, 64, "float16", 4, 2, 90, True),
        (207, 256, "bfloat16", 4, 2, None, False),
    ],
    ids=[
        "T263-D64-bf16-H4-K4",
        "T411-D128-fp16-H4-K1-bidirectional",
        "T233-D64-fp16-H4-K2-bidirectional-window",
        "T207-D256-bf16-H4-K2",
    ],
)
def test_every_category_within_twice_the_error_of_plain_attention(
    attend, n, dim, dtype, heads, kv_heads, window, bidirectional
):
    q, k, v = draw_inputs(1, heads, kv_heads, n, -(-n // 8) * 8, dim, dtype)
    options = dict(window=window, dtype=dtype, races=dim != 256 and not window, tiles=NARROW if window else None)
    check(attend, q, k, v, [prompt(n, bidirectional)], [3, 0, 1, 2], TEMPLATE, **options)


def test_ragged_batch_in_a_larger_bucket(attend):
    """Padding on the left, on the right, a row of nothing else; anything beyond the prompt; uneven groups."""
    left = Layout(70, 12, 70, np.array([(14, 15, 50, 51)]))
    right = Layout(70, 0, 41, np.array([(3, 4, 20, 21), (21, 22, 40, 41)]))
    nothing = Layout(70, 0, 0, np.zeros((0, 4)))
    q, k, v = draw_inputs(3, 3, 2, 80, 96, 64)
    k[:, :, 70:] = v[:, :, 70:] = np.nan
    k[0, :, :12] = v[0, :, :12] = np.nan
    k[2, :, 41:] = v[2, :, 41:] = np.nan
    check(attend, q, k, v, [left, nothing, right], [1, 2, 3], SMALL_BLOCKS, kv_heads=[1, 0, 1], races=False)


@pytest.mark.parametrize("window", [None, 170], ids=["", "window"])
def test_split_text_ranges_of_a_chunk(attend, window):
    """Text after a long past in parts; rows that do not reach a part's keys are not disturbed by it. The same twice."""
    layout = Layout(450, 3, 450, np.array([(30, 31, 160, 161), (300, 301, 421, 422)]))
    q, k, v = draw_inputs(1, 2, 1, 270, 456, 64)
    arguments = (q, k, v, [layout], [0, 3], TEMPLATE)
    options = dict(window=window, q_start=180, max_keys=130, races=window is None, tiles=NARROW)
    out, lse = check(attend, *arguments, **options)
    if window is None:
        out_one, lse_one, _ = attend(*arguments[:4], [-1, 3], TEMPLATE, **options | dict(races=False))
        assert not out_one[:, :, 0].any() and (lse_one[:, 0] == -np.inf).all()  # left out
        np.testing.assert_array_equal(out_one[:, :, 1], out[:, :, 1])
        again, again_lse, _ = attend(*arguments, **options | dict(races=False))
        np.testing.assert_array_equal(again, out)
        np.testing.assert_array_equal(again_lse, lse)


def test_full_tiles_of_both_sources(attend):
    """Behind a long text, far into a long image: packed keys and the image's own are walked by one loop."""
    layout = Layout(420, 0, 420, np.array([(80, 81, 419, 420)]))
    q, k, v = draw_inputs(1, 1, 1, 120, 424, 64)
    check(attend, q, k, v, [layout], [3], TEMPLATE, q_start=300, tiles=NARROW, races=False)


@pytest.mark.parametrize(
    ("attend", "n"), [("simulated", 264), pytest.param("gpu", 5000, marks=pytest.mark.gpu)], indirect=["attend"]
)
def test_rows_of_a_long_prompt(attend, n):
    """At D=128, as the models have it: many tiles of keys, images that begin anywhere, text in parts."""
    layout, categories = images_in(n, n_images=2), [3, 0, 1, 2]
    q, k, v = draw_inputs(1, 4, 2, n, n, 128)
    out, lse, _ = attend(q, k, v, [layout], categories, sampled_rows.TEMPLATE, max_keys=n // 2, races=False)
    check_rows(out, lse, *(jnp.asarray(x, "bfloat16") for x in (q, k, v)), layout, categories)


def wrong(simulate, planted: tuple[str, str], races: bool = True) -> str:
    """How a planted bug shows: as a race, as wrong numbers, as something that the simulator refuses; or not at all."""
    q, k, v = draw_inputs(1, 1, 1, 200, 200, 64)
    layouts = [prompt(200)]
    try:
        out, lse, raced = simulate(q, k, v, layouts, [3], TEMPLATE, planted=planted, tiles=NARROW, races=races)
    except RuntimeError as error:
        return str(error)
    if raced:
        return "race"
    _, exact_lse = reference_attention(q, k, v, layouts, [3], TEMPLATE, scale=0.125)
    return "numbers" if np.abs(lse - exact_lse).max() > 1e-4 or not np.isfinite(out).all() else ""


BUGS = {
    "values-not-awaited": ("plgpu.barrier_wait(v_here.at[slot])", "pass", r"race|barrier"),
    "slot-not-awaited": ("pl.when(i >= stages)(partial(plgpu.barrier_wait, free.at[slot]))", "pass", r"race|barrier"),
    "wrong-slot": ("k_s, v_s = (ring.at[slot] for", "k_s, v_s = (ring.at[next_slot] for", r"race|numbers"),
    "wrong-causal-limit": ("position <= _along_rows(high", "position < _along_rows(high", "numbers"),
    "aligned-keys-not-masked": ("jnp.maximum(oldest, own.start)", "oldest", "numbers"),
}


@pytest.mark.parametrize(("before", "after", "shows"), BUGS.values(), ids=BUGS)
def test_planted_bugs_are_seen(simulate, before, after, shows):
    assert re.search(shows, wrong(simulate, (before, after), races=shows != "numbers"))


def test_the_kernel_without_a_planted_bug_passes_the_same_checks(simulate):
    assert wrong(simulate, ("def _block(", "def _block(")) == ""


def test_a_forgotten_arrive_hangs_and_is_ended():
    with simulator(seconds=15) as simulate, pytest.raises(TimeoutError, match=r"must end. Got nothing after 15 s"):
        wrong(simulate, ("plgpu.barrier_arrive(k_free.at[slot])", "pass"))


def test_refusals():
    q, k, v = (jnp.asarray(x, "bfloat16") for x in draw_inputs(1, 4, 2, 304, 304, 64))
    work = build_pallas_work(build_plans([prompt(300)], TEMPLATE), 128, n_queries=304, n_keys=304)

    def attend(q=q, k=k, v=v, work=work, categories=(0, 1, 2, 3), scale=0.125, **options):
        return jax.eval_shape(
            lambda q, k, v: pallas_attention(q, k, v, work, np.array(categories), scale=scale, **options), q, k, v
        )

    out, lse = attend()
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((1, 304, 4, 64), q.dtype, (1, 4, 304), jnp.float32)
    for arrays in (dict(q=q[:, :3]), dict(q=q[0]), dict(q=q[..., :32]), dict(v=v[:, :1]), dict(k=k[:, :0], v=v[:, :0])):
        with pytest.raises(ValueError, match=r"H a multiple of K"):
            attend(**arrays)
    for kv_heads in ([0, 1, 1], [0, 1, 1, 2]):
        with pytest.raises(ValueError, match=r"one of the K=2 kv heads for each of H=4 query heads. Got \[0, 1, 1"):
            attend(kv_heads=kv_heads)
    with pytest.raises(ValueError, match=r"share one dtype. Got bfloat16, float16, bfloat16"):
        attend(k=k.astype("float16"))
    with pytest.raises(NotImplementedError, match=r"computes in bfloat16 and float16. Got float32"):
        attend(*(x.astype("float32") for x in (q, k, v)))
    with pytest.raises(NotImplementedError, match=r"one of \(64, 128, 256\). Got 32"):
        attend(*(x[..., :32] for x in (q, k, v)), tiles=Configuration(128, 2))
    with pytest.raises(ValueError, match=r"a multiple of 8 keys, which TMA demands. Got S=300"):
        attend(k=k[:, :, :300], v=v[:, :, :300])
    with pytest.raises(ValueError, match=r"for B=1, T=296, S=304. Got one for B=1, T=304, S=304"):
        attend(q=q[:, :, :296])
    with pytest.raises(ValueError, match=r"built with block_k=64. Got block_k=128"):
        attend(tiles=Configuration(64, 2))
    with pytest.raises(ValueError, match=r"must fit the 227 KB .*which take 272 KB"):
        attend(tiles=Configuration(128, 8))
    with pytest.raises(ValueError, match=r"one category per query head, H=4. Got shape \(2,\)"):
        attend(categories=(0, 1))
    with pytest.raises(ValueError, match=r"among \[0, 1, 2, 3\], or -1 for none. Got \[0, 1, 2, 4\]"):
        attend(categories=(0, 1, 2, 4))
    for scale in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match=r"scale must be positive and finite"):
            attend(scale=scale)
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU .*Got cpu on platform cpu"):
        pallas_attention(q, k, v, work, np.arange(4), scale=0.125)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.modules['jax'] = None", "could not be imported"),
        ("import jax; jax.__version_info__ = (0, 10, 0); jax.__version__ = '0.10.0'", "Got 0.10.0. Upgrade"),
    ],
    ids=["missing", "old"],
)
def test_a_missing_or_old_jax_is_named(code, said):
    source = f"import sys\n{code}\nimport blindsight_kernels.pallas_prefill"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the Pallas kernel needs jax 0.11.2 or later.")
    assert said in last
    assert "portable" in last
