"""Compiles the attention of the JAX backend for eight H200s that are not there; prints what its program holds.

Run as a script, with jax's CUDA plug-in on the path.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blindsight_kernels.pallas_compile import absent_gpus
from jax_blindsight.attention import attend
from jax_blindsight.implementations import build_work
from jax_blindsight.sharding import DATA, MODEL
from shared_profiles import Category, Layout, SinkTemplate

BATCH, TOKENS, HEADS, KV_HEADS, DIM = 2, 1024, 16, 4, 128


def main() -> None:
    """Two prompts over two rows of devices, heads over four of each."""
    mesh = absent_gpus((2, 4), (DATA, MODEL))
    begin = 10 + 300 * np.arange(3)
    layout = Layout(TOKENS, 0, TOKENS, np.stack([begin, begin + 1, begin + 200, begin + 201], axis=1))
    work = build_work(
        "pallas", [layout] * BATCH, SinkTemplate(), head_dim=DIM, n_queries=TOKENS, n_keys=TOKENS, n_shards=2
    )

    def place(shape: tuple[int, ...], dtype: np.dtype | str, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, k = (place((BATCH, n, TOKENS, DIM), "bfloat16", P(DATA, MODEL)) for n in (HEADS, KV_HEADS))
    arrays = jax.tree.map(lambda x: place(np.shape(x), np.asarray(x).dtype, P(DATA)), work)
    run = partial(
        attend,
        categories=tuple(Category(head % 4) for head in range(HEADS)),
        window=None,
        scale=DIM**-0.5,
        bidirectional=False,
        mesh=mesh,
    )
    text = jax.jit(run).lower(q, k, k, arrays).compile().as_text()
    found = {word: word in text for word in ("all-gather", "dynamic-slice-fusion")}
    print("kernels:", text.count('custom_call_target="mosaic_gpu'), found)


if __name__ == "__main__":
    main()
