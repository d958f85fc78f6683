"""Measuring a prefill: what each category would keep and change, from the attention's own outputs and log-sum-exps.

The observed forward runs dense. For every layer the three sparse categories are computed beside it, and per head two
means over the image rows that have an earlier image are kept (`PromptStatistics`):

* retained mass `exp(lse_category - lse_dense)`, the share of softmax weight that the category keeps;
* relative output error `||o_category - o_dense|| / ||o_dense||`;

and, where asked, one or two estimates of what the category's change does to the answer (`Summary.harm`). The programs
are a prefill's and a few small ones, compiled once per bucket. Nothing of size T * S ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_blindsight.attention import attend
from jax_blindsight.buckets import bucket, pad_last
from jax_blindsight.decoder import Attend
from jax_blindsight.inputs import Prompt, read_inputs
from jax_blindsight.params import Params
from jax_blindsight.prefill import embed_prompt, implementation_for, layer_work, place_rows
from jax_blindsight.residual import Stream, moved, stream_of
from jax_blindsight.stack import run_layers
from shared_profiles import SPARSE, Category, Layout, SinkTemplate
from shared_profiles.layout import concatenated_ranges


class Observer:
    """Collects the statistics of one prompt, layer by layer. Make one with `observer_of`.

    Args:
        params: the model.
        prompt: of one row.
        layout: of that row, at least two images.
        template: sinks and local blocks.
        impl: what computes the attention; as in `sparse_prefill`.
        rankings: which harm is measured beside mass and error: `"gradient"` needs `by_out`.

    Attributes:
        params, layout: as given.
        rows: `[R]` int64 positions of the image rows that have an earlier image: all that a category can change, and
            all that is measured.
        bucket: T, the bucket that the prompt is padded to.
        positions: `[3, 1, T]` or `[1, T]` int32, as `run_layers` takes them.
        unit: of the gradients, see `shared_profiles.fisher.magnified`.
    """

    unit = 1.0

    def __init__(
        self,
        params: Params,
        prompt: Prompt,
        layout: Layout,
        template: SinkTemplate,
        impl: str | None,
        rankings: Collection[str],
    ) -> None:
        self.params, self.layout, self._prompt, self._rankings = params, layout, prompt, sorted(rankings)
        self.bucket = n = bucket(layout.n_tokens)
        self.rows = concatenated_ranges(layout.images[1:, 1], layout.images[1:, 2])
        self.positions = pad_last(prompt.tokens.positions(params.config)[0], n)
        works = layer_work(params, implementation_for(params, impl), [layout], template, 0, n, n)
        self._works = place_rows(params, works)
        self._counted = np.zeros(n, dtype=np.float32)
        self._counted[self.rows] = 1
        self._found: dict[int, list[dict[str, Array]]] = {}  # by layer, then of each sparse category [H] each

    def run(self, attend: Attend, read: Callable[[Array], None] | None = None) -> Array:
        """Runs the prompt through all layers; arguments and result as `run_layers`."""
        embeddings = embed_prompt(self.params, self._prompt, self.bucket)
        return run_layers(self.params, embeddings, self.positions, attend, read)

    def attend(self, layer: int, q: Array, k: Array, v: Array, category: Category) -> tuple[Array, Array]:
        """Attention of one layer with all heads of one category: `[1, T, H, D]` and log-sum-exps `[1, H, T]`."""
        config = self.params.config
        window = config.text.windows[layer]
        return attend(  # type: ignore[return-value]  # with log-sum-exps
            q,
            k,
            v,
            self._works[window],
            categories=(category,) * config.text.n_heads,
            window=window,
            scale=config.text.scale,
            bidirectional=config.bidirectional,
            mesh=self.params.mesh,
        )

    def measure(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        dense: tuple[Array, Array],
        hidden: Array,
        by_out: Array | None = None,
    ) -> None:
        """Measures one layer.

        Args:
            layer: which.
            q, k, v: see `attend`.
            dense: what `attend` gives for `DENSE`.
            hidden: `[1, T, E]`, what the layer reads.
            by_out: `[1, T, H, D]`, the gradient by the dense outputs.
        """
        stream = None
        if "residual" in self._rankings:
            weights = self.params.weights["decoder"]["layers"][layer]
            stream = stream_of(weights, hidden, dense[0], config=self.params.config)
        self._found[layer] = [
            _compare(self.attend(layer, q, k, v, category), dense, self._counted, stream, by_out) for category in SPARSE
        ]

    def tables(self) -> dict[str, np.ndarray]:
        """What was measured, `[3, L, H]` float32 each: `"mass"`, `"error"` and each ranking's harm."""
        found = jax.device_get([self._found[layer] for layer in sorted(self._found)])
        tables = {
            name: np.stack([[by_category[c][name] for by_category in found] for c in range(len(SPARSE))])
            for name in ("mass", "error", *self._rankings)
        }
        if "gradient" in tables:
            tables["gradient"] *= np.float32(self.unit**2)
        return tables


def observer_of(
    params: Params,
    inputs: Mapping[str, Any],
    template: SinkTemplate,
    impl: str | None = None,
    rankings: Collection[str] = (),
) -> Observer | None:
    """The `Observer` of what a checkpoint's processor returns for one prompt; None if it has fewer than two images.

    Raises:
        ValueError: the prompt is malformed.
        NotImplementedError, ImportError: see `sparse_prefill`.
    """
    prompt = read_inputs(params.config, inputs)
    (layout,) = prompt.tokens.layouts(params.config)
    return None if layout.n_images < 2 else Observer(params, prompt, layout, template, impl, rankings)


def observe(observer: Observer) -> None:
    """Runs one prompt forward, and measures every layer on the way; the ranking `"gradient"` needs more."""
    inputs: list[Array] = []

    def attend_layer(layer: int, q: Array, k: Array, v: Array) -> Array:
        dense = observer.attend(layer, q, k, v, Category.DENSE)
        observer.measure(layer, q, k, v, dense, inputs.pop())
        return dense[0]

    observer.run(attend_layer, inputs.append)


@jax.jit
def _compare(
    sparse: tuple[Array, Array],
    dense: tuple[Array, Array],
    counted: Array,
    stream: Stream | None,
    by_out: Array | None,
) -> dict[str, Array]:
    """Everything measured of one category, `[H]` each, from `[1, T, H, D]` and `[1, H, T]` of it and of `DENSE`."""
    out, exact = (x[0][0].astype(jnp.float32) for x in (sparse, dense))
    change = out - exact  # [T, H, D]
    size = jnp.linalg.norm(change, axis=-1)
    rows = {
        "mass": jnp.exp(sparse[1][0] - dense[1][0]).T,
        # A pruned head is all zeros.
        "error": size / jnp.where(size == 0, 1.0, jnp.linalg.norm(exact, axis=-1)),
    }
    if stream is not None:
        rows["residual"] = moved(stream, change)
    if by_out is not None:
        rows["gradient"] = (change * by_out[0].astype(jnp.float32)).sum(axis=-1)
    sums = {name: jnp.where(counted[:, None] > 0, x, 0.0).sum(axis=0) for name, x in rows.items()}  # [H]
    return {name: x**2 / 2 if name == "gradient" else x / counted.sum() for name, x in sums.items()}
