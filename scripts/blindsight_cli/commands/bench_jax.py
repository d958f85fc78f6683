"""The JAX backend for `blindsight bench`: one layer's attention and whole prefills, against dense and against torch."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from blindsight_cli.random_model import make_random_model, make_random_prompt
from blindsight_cli.timing import time_pair
from jax_blindsight import Params, decode_step, load, sparse_prefill
from jax_blindsight.attention import attend
from jax_blindsight.work import attention_work
from shared_profiles import Category, Layout, SinkTemplate
from shared_profiles.profile import Profile
from torch_blindsight import fingerprint, patch, portable_attention

Row = dict[str, Any]


def bench_attention(repeats: int, layout: Layout) -> list[Row]:
    """One layer of 8 heads of 64 in float32, every head Intra-Image+Sink; as many kv heads, and half as many."""
    template, heads, dim = SinkTemplate(), 8, 64
    n, scale = layout.n_tokens, 64**-0.5
    work = attention_work([layout], template, n_queries=n, n_keys=n)

    def run(category: Category, arrays: list[Any]) -> object:
        options: dict[str, Any] = dict(window=None, scale=scale, bidirectional=False, lse=False)
        q, k, v = arrays
        return jax.block_until_ready(attend(q, k, v, work, categories=(category,) * heads, **options)[0])

    rows = []
    for kv_heads in (heads, heads // 2):
        q, k, v = (torch.randn(1, h, n, dim) for h in (heads, kv_heads, kv_heads))
        arrays = [jnp.asarray(x.numpy()) for x in (q, k, v)]
        sinks = [Category.INTRA_IMAGE_SINK] * heads
        in_torch = partial(portable_attention, q, k, v, [layout], sinks, template, scale=scale)
        in_jax = partial(run, Category.INTRA_IMAGE_SINK, arrays)
        case = f"attention in JAX, {layout.n_images} images, {n} tokens, {heads} heads, {kv_heads} kv heads, d={dim}"
        rows.append(_row(case, "all heads Dense in JAX", partial(run, Category.DENSE, arrays), in_jax, repeats))
        rows.append(_row(case, "the same in torch", in_torch, in_jax, repeats))
    return rows


def bench_prefill(repeats: int) -> list[Row]:
    """A random Qwen2.5-VL, hidden 512, 8 layers, 16K tokens in 16 images, every head Intra-Image+Sink."""
    model: Any = make_random_model()
    profile = Profile.uniform(Category.INTRA_IMAGE_SINK, fingerprint(model))
    params = _load(model, profile)
    patch(model, profile)
    inputs = make_random_prompt(16, 64, text=64)
    arrays = {name: x.numpy() for name, x in inputs.items()}

    def in_jax(params: Params, dense: bool) -> object:
        return jax.block_until_ready(sparse_prefill(params, arrays, dense=dense).logits)

    @torch.no_grad()
    def in_torch() -> object:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    sparse = partial(in_jax, params, False)
    case = f"prefill in JAX, {inputs['input_ids'].shape[1]} tokens, 16 images, hidden 512, 8 layers, float32"
    return [
        _row(case, "all heads Dense in JAX", partial(in_jax, params, True), sparse, repeats),
        _row(case, "the same in torch", in_torch, sparse, repeats),
    ]


def bench_decode(repeats: int) -> list[Row]:
    """What a decode step costs the host: a model of 28 narrow layers, whose arithmetic is next to nothing."""
    params = _load(make_random_model(hidden=64, layers=28, heads=4, kv_heads=2), None)
    ids = np.arange(10, 20)[None]
    steps = []
    for _ in range(repeats + 1):
        done = sparse_prefill(params, {"input_ids": ids}, capacity=128, dense=True)
        token, cache = jnp.zeros(1, jnp.int32), done.cache
        for _ in range(64):
            jax.block_until_ready(cache.keys)  # the host's part alone: nothing is in flight when it begins
            begun = time.perf_counter(), time.thread_time()
            _, cache = decode_step(params, token, cache)
            steps.append((time.perf_counter() - begun[0], time.thread_time() - begun[1]))
    wall, host = (1e3 * median(x) for x in zip(*steps[64:], strict=True))
    return [dict(case="decode step, 28 layers, until it returns", wall_ms=wall, host_cpu_ms=host)]


def bench_compile(repeats: int) -> list[Row]:
    """What the first prompt of a bucket costs: 28 layers of 28 heads, every layer with a mixture of its own.

    In one process nothing compiles twice, so there is one measurement, whatever `repeats`.
    """
    model: Any = make_random_model(hidden=448, layers=28, heads=28, kv_heads=4)
    categories = np.random.default_rng(0).choice(4, p=[0.3, 0.25, 0.2, 0.25], size=(28, 28))
    profile = Profile(categories, SinkTemplate(), fingerprint(model), None, {"method": "manual"})
    params = _load(model, profile)
    arrays = {name: x.numpy() for name, x in make_random_prompt(4, 16, text=30).items()}
    taken = []
    for dense in (False, False, True):
        begun = time.perf_counter()
        jax.block_until_ready(sparse_prefill(params, arrays, dense=dense, break_even=False).logits)
        taken.append(time.perf_counter() - begun)
    first, second, dense_s = taken
    case = f"first prefill of a bucket, 28 layers of 28 heads, all different, {arrays['input_ids'].shape[1]} tokens"
    return [dict(case=case, first_s=first, second_s=second, first_dense_s=dense_s)]


def _load(model: Any, profile: Profile | None) -> Params:
    """A transformers model as `load` gives it."""
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load(folder, profile=profile)


def _row(case: str, denominator: str, other: Any, in_jax: Any, repeats: int) -> Row:
    """Both sides timed in turns; a ratio above 1 says that ours in JAX is faster."""
    other_s, jax_s = time_pair(other, in_jax, repeats)
    return dict(case=case, denominator=denominator, denominator_s=other_s, jax_s=jax_s, ratio=other_s / jax_s)
