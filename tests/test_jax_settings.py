"""Settings of JAX that callers have on for programs of their own change nothing here."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_blindsight import calibrate, decode_step, load, save
from jax_checkpoints import save_tiny
from tiny_jax import generate, in_numpy, sparse_prefill, twin
from tiny_models import make_ids, make_inputs

FAMILY = "qwen2_5_vl"


@pytest.fixture(params=["ranks", "types", "transfers", "infinities"])
def strict(request) -> Iterator[None]:
    """What finds mistakes in one's own programs. A mesh of one's own is `mesh_run`'s."""
    settings = {
        "ranks": lambda: jax.numpy_rank_promotion("raise"),
        "types": lambda: jax.numpy_dtype_promotion("strict"),
        "transfers": lambda: jax.transfer_guard("disallow"),
        "infinities": lambda: jax.debug_infs(True),
    }
    with settings[request.param]():
        yield


def test_a_prompt_and_an_answer(strict):
    model, inputs = twin(FAMILY), make_inputs(FAMILY, [make_ids(4), make_ids(2, seed=1)])
    done = sparse_prefill(model.params, in_numpy(inputs), all_logits=True, capacity=200)
    model.expect(inputs, model.params.profile).check(done.logits)
    decode_step(model.params, [20, 21], done.cache)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    assert np.isfinite(sparse_prefill(narrow, in_numpy(inputs), capacity=200).logits).all()
    generate(model.params, in_numpy(inputs), max_new_tokens=2, temperature=1.0, top_k=5, top_p=1.0, eos=())


def test_a_seed_is_the_same_whatever_draws_the_callers_numbers():
    model, inputs = twin(FAMILY), in_numpy(make_inputs(FAMILY, [make_ids(2)]))
    options = dict(max_new_tokens=8, temperature=5.0, seed=3, eos=())
    want = generate(model.params, inputs, **options)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(generate(model.params, inputs, **options), want)


def test_a_prompt_with_doubles_on():
    model, inputs = twin(FAMILY), make_inputs(FAMILY, [make_ids(2)])
    with jax.enable_x64(True):
        logits = sparse_prefill(model.params, in_numpy(inputs), all_logits=True).logits
    assert logits.dtype == np.float32
    model.expect(inputs, model.params.profile).check(logits)


def test_a_calibration(strict):
    params = twin(FAMILY).params
    prompts = [in_numpy(make_inputs(FAMILY, [make_ids(2, seed=seed)], seed=seed)) for seed in range(2)]
    calibrate(params, prompts[:1], held_out=prompts[1:], progress=False)


def test_a_folder(tmp_path, strict):
    save_tiny(tmp_path / "checkpoint", "gemma3", layers=slice(1))
    params = load(tmp_path / "checkpoint")
    save(params, tmp_path / "saved")
    again = load(tmp_path / "saved")
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)
