"""What the JAX backend computes on a GPU alone: dense heads by cuDNN, calibration through the Pallas kernel.

The same bodies run on a CPU with the portable implementation, as far as they can.
"""

from __future__ import annotations

import copy
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest

import jax_blindsight
from jax_blindsight import attention, gradient
from jax_blindsight.attention import attend
from jax_blindsight.calibration import measure
from jax_blindsight.implementations import build_work
from jax_blindsight.sinks import measure_sinks
from parity_subjects import jax_on, wide_model
from sampled_rows import TEMPLATE, check_rows, images_in
from tiny_jax import in_numpy
from tiny_models import make_ids, make_inputs

gpu = pytest.mark.gpu
MIXED = (0, 3, 1, 0, 2, 0)


@pytest.mark.parametrize(
    ("device", "impl", "queries"),
    [
        ("cpu", "portable", 512),
        pytest.param("cuda", "portable", 4096, marks=gpu),
        pytest.param("cuda", "pallas", 4096, marks=gpu),
    ],
)
def test_a_layer_whose_dense_heads_go_to_cudnn(device, impl, queries):
    """One prompt in bfloat16, D=128: nothing is padded but the end of the bucket, where keys and values are NaN."""
    layout = images_in(queries - 9, n_images=3)
    rng, keys = np.random.default_rng(0), queries + 128
    with jax_on(device):
        shapes = (1, 6, queries, 128), (1, 2, keys, 128), (1, 2, keys, 128)
        q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
        k, v = (x.at[:, :, layout.stop :].set(jnp.nan) for x in (k, v))
        work = build_work(impl, [layout], TEMPLATE, head_dim=128, n_queries=queries, n_keys=keys)
        assert bool(attention._by_cudnn(work)) == (device == "cuda")
        if device == "cuda":
            assert attention._count_for_cudnn(q, np.array(MIXED), None, False, None) == MIXED.count(0)
        where = dict(categories=MIXED, window=None, scale=128**-0.5, bidirectional=False)
        out, nothing = attend(q, k, v, work, lse=False, **where)
        assert nothing is None and out.dtype == q.dtype and not out[:, layout.stop :].any()
        check_rows(out, None, q, k, v, layout, MIXED)


def measured(params, prompt, impl):
    """All that calibration measures of a prompt: forward, backward, and where its rows look."""
    found = {}
    for ranking in ("residual", "gradient"):
        one = measure(params, prompt, TEMPLATE, impl, (ranking,))
        found |= {f"{ranking}: {name}": x for name, x in dict(one.harm, mass=one.mass, error=one.error).items()}
    sinks = measure_sinks(params, prompt, impl=impl)
    return found | {name: getattr(sinks, name) for name in ("own", "text", "others")}


@pytest.mark.parametrize(
    ("device", "impl", "family"),
    [
        ("cpu", "portable", "gemma3"),
        pytest.param("cuda", "pallas", "gemma3", marks=gpu),
        pytest.param("cuda", "pallas", "qwen2_5_vl", marks=gpu),
    ],
)
def test_calibration_in_bfloat16(device, impl, family, monkeypatch):
    """The kernel's is as near to float32 as the portable implementation's in bfloat16, and that is near."""
    # Signs of the true vector turn with the roundings of the logits.
    monkeypatch.setattr(
        gradient, "fisher_vector", lambda x, _: np.linspace(-1, 1, x.size, dtype=x.dtype).reshape(x.shape)
    )
    prompt = in_numpy(make_inputs(family, [make_ids(3)]))
    with tempfile.TemporaryDirectory() as folder, jax_on(device):
        copy.deepcopy(wide_model(family)).bfloat16().save_pretrained(folder)
        truth = measured(jax_blindsight.load(folder, search=False, dtype="float32"), prompt, "portable")
        params = jax_blindsight.load(folder, search=False)
        plain = measured(params, prompt, "portable")
        ours = plain if impl == "portable" else measured(params, prompt, impl)
    for name, exact in truth.items():
        error, bar = (np.abs(x[name] - exact).max() / np.abs(exact).max() for x in (ours, plain))
        # The gradient's harm is the square of a sum that cancels.
        near = 0.3 if name.endswith("gradient") else 0.05
        assert error <= 2 * bar + 1e-3 and bar < near, f"{name}: {error:.3g}, portable {bar:.3g}"
