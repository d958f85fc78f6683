"""The attention of the JAX backend: one entry point, every head by its category.

    heads of one category  ──►  loops over the work list in XLA (portable.py), on every platform
    dense, plain, CUDA     ──►  cuDNN, through `jax.nn.dot_product_attention`
    impl="pallas"          ──►  the place of the Pallas kernel; not there yet

The categories are static: the heads of a layer are split by them, and each category present is one loop. Inside
`jax.shard_map`, q, k, v and every array of the work may be split over the batch, and q, k, v over heads, a kv head with
all its query heads. Where shards differ in the categories of their heads, each takes its own branch of a
`lax.switch` over `lax.axis_index`, as `sharding.attend_on_mesh` does. The tables of the work hold all categories, so
devices with different branches share one work.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import backend

from jax_blindsight.portable import HeadPicker, attend_heads, select
from jax_blindsight.work import AttentionWork
from shared_profiles import Category


def attend(
    q: Array,
    k: Array,
    v: Array,
    work: AttentionWork,
    *,
    categories: tuple[int, ...],
    window: int | None,
    scale: float,
    bidirectional: bool,
    impl: str = "portable",
    lse: bool = True,
) -> tuple[Array, Array]:
    """Prefill attention of a batch, every head by its category; the meaning is `shared_profiles.masks`.

    Args:
        q: queries `[B, H, T, D]`, row t at position `work.q_start + t`. float32, bfloat16, float16, or float64.
        k, v: keys and values `[B, K, S, D]`, H a multiple of K. Those beyond a sequence's real tokens are ignored,
            whatever they hold.
        work: of these sequences, built for this window and for T queries and at most S keys.
        categories: one per query head, values of `Category`.
        window: sliding window in tokens, None for none.
        scale: factor on the scores, usually `D ** -0.5`.
        bidirectional: whether an image's tokens look at later ones of the same image.
        impl: "portable".
        lse: whether the log-sum-exps are wanted. Without them, dense heads of a causal layer without a window go to
            cuDNN on CUDA, in bfloat16 and float16 with D at most 128 and a multiple of 8, if the prompt starts at
            position 0 with no padding on its left. (JAX returns cuDNN's log-sum-exps rounded to q's dtype.)

    Returns:
        `[B, T, H, D]` outputs in q's dtype, and `[B, H, T]` log-sum-exps of the scaled scores, float32 (float64 for
        float64). Rows of padding and rows beyond the real ones are zero and `-inf`. Without `lse`, the log-sum-exps of
        heads that went to cuDNN are NaN.

    Raises:
        ValueError: shapes, dtypes or categories do not fit together, or an unknown `impl`.
        NotImplementedError: `impl` is "pallas".
    """
    _check(q, k, v, work, categories, impl)
    present = sorted(set(categories))
    heads = {c: [h for h, x in enumerate(categories) if x == c] for c in present}
    outs, sums = [], []
    for c in present:
        category = Category(c)
        if category is Category.DENSE and not lse and _cudnn_takes(q, window, bidirectional):
            out, total = _attend_dense(q, k, v, work, heads[c], scale)
        else:
            out, total = _attend_blocked(q, k, v, work, category, heads[c], window, scale)
        outs.append(out)
        sums.append(total)
    order = [h for c in present for h in heads[c]]
    back = sorted(range(len(order)), key=order.__getitem__)
    return select(jnp.concatenate(outs, axis=2), back, 2), select(jnp.concatenate(sums, axis=1), back, 1)


def _attend_blocked(
    q: Array,
    k: Array,
    v: Array,
    work: AttentionWork,
    category: Category,
    heads: Sequence[int],
    window: int | None,
    scale: float,
) -> tuple[Array, Array]:
    """The heads of one category by the portable loops: `[B, T, heads, D]`, `[B, heads, T]`."""
    return lax.map(
        lambda row: attend_heads(*row, category=category, heads=heads, window=window, scale=scale), (q, k, v, work)
    )


def _cudnn_takes(q: Array, window: int | None, bidirectional: bool) -> bool:
    """Whether dense heads can go to cuDNN, as far as is known before the program runs."""
    supported = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    return supported and window is None and not bidirectional and has_cuda()


def _attend_dense(
    q: Array, k: Array, v: Array, work: AttentionWork, heads: Sequence[int], scale: float
) -> tuple[Array, Array]:
    """Causal dense heads where JAX has CUDA; a chunk, padding on the left or another platform takes the loops.

    The log-sum-exps, `[B, heads, T]`, are NaN if cuDNN ran.
    """

    def blocked(q: Array, k: Array, v: Array, work: AttentionWork) -> tuple[Array, Array]:
        return _attend_blocked(q, k, v, work, Category.DENSE, heads, None, scale)

    def cudnn(q: Array, k: Array, v: Array, work: AttentionWork) -> tuple[Array, Array]:
        n = q.shape[2]
        real = jnp.arange(n)[:, None] < jnp.asarray(work.span)[:, 1, None, None, None]  # [B, 1, T, 1]
        pick = HeadPicker(heads, q.shape[1] // k.shape[1])
        # The keys beyond the real ones come after every real row, but 0 x NaN would be NaN.
        k, v = (jnp.where(real, select(x[:, :, :n], pick.kv, 1), 0) for x in (k, v))
        q = select(q, heads, 1)
        by_row = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        out = jax.nn.dot_product_attention(*by_row, scale=scale, is_causal=True, implementation="cudnn")
        return jnp.where(jnp.swapaxes(real, 1, 2), out, 0), jnp.full(q.shape[:3], jnp.nan, jnp.float32)

    def on_cuda(q: Array, k: Array, v: Array, work: AttentionWork) -> tuple[Array, Array]:
        plain = (jnp.asarray(work.q_start) == 0).all() & (jnp.asarray(work.span)[:, 0] == 0).all()
        return lax.cond(plain, cudnn, blocked, q, k, v, work)

    return lax.platform_dependent(q, k, v, work, cuda=on_cuda, default=blocked)


def has_cuda() -> bool:
    """Whether JAX runs on CUDA by default."""
    return "cuda" in backend.get_backend().platform_version


def _check(q: Array, k: Array, v: Array, work: AttentionWork, categories: tuple[int, ...], impl: str) -> None:
    """Refuses what does not fit together, and lowerings that are not there."""
    if impl == "pallas":
        cuda = "" if has_cuda() else ", and JAX has no CUDA plug-in here (it runs on " + jax.default_backend() + ")"
        raise NotImplementedError(f'the Pallas kernel is not part of attend yet{cuda}. Use impl="portable".')
    if impl != "portable":
        raise ValueError(f'impl must be "portable". Got {impl!r}.')
    if (
        k.shape != v.shape
        or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
        or q.shape[1] % k.shape[1]
        or not q.dtype == k.dtype == v.dtype
    ):
        raise ValueError(
            "q, k and v must be [B, H, T, D], [B, K, S, D], [B, K, S, D] of one dtype with H a multiple of K. Got "
            f"{q.shape}, {k.shape}, {v.shape}; {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if work.gathered_rows.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"the work must be of B, T = {(q.shape[0], q.shape[2])} rows. Got one of {work.gathered_rows.shape}. Build "
            "it from the layouts of this batch with n_queries=T."
        )
    if len(categories) != q.shape[1] or not set(categories) <= set(map(int, Category)):
        raise ValueError(
            f"categories must hold one of {list(map(int, Category))} per query head, H={q.shape[1]}. Got {categories}."
        )
