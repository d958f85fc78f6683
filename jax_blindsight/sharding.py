"""Several devices: tensor parallel over heads and MLP columns, data parallel over the batch.

A mesh has two axes. Rows of a batch are dealt out over "data"; over "model", every device holds the projections of
some kv heads with all their query heads, and some columns of each MLP, so that a layer needs two sums and no device
ever sees another's keys, values or weights. The partitioner of XLA does this for plain products once the weights lie
so; the attention's loops it would answer with all-gathers, so they run in `shard_map`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_blindsight.config import ModelConfig
from jax_blindsight.convert import path_name
from jax_blindsight.model import Weights, abstract_weights

DATA, MODEL = "data", "model"

_COLUMNS, _ROWS = P(None, MODEL), P(MODEL, None)

# Leaves that must be split, by their path. Where heads are split, so must be all that they meet.
_DECODER = {
    r"decoder\.layers\.\d+\.attention\.[qkv]_proj\.kernel": _COLUMNS,
    r"decoder\.layers\.\d+\.attention\.[qkv]_proj\.bias": P(MODEL),
    r"decoder\.layers\.\d+\.attention\.o_proj\.kernel": _ROWS,
    r"decoder\.layers\.\d+\.mlp\.(gate|up)_proj\.kernel": _COLUMNS,
    r"decoder\.layers\.\d+\.mlp\.down_proj\.kernel": _ROWS,
}
# Leaves that are split where they can be evenly, and else are on every device.
_WHERE_EVEN = {
    r"decoder\.embed_tokens\.embedding": _ROWS,
    r"decoder\.lm_head\.kernel": _COLUMNS,
    r"vision\.blocks\.\d+\.mlp\.(fc1|gate_proj|up_proj)\.kernel": _COLUMNS,
    r"vision\.blocks\.\d+\.mlp\.(fc1|gate_proj|up_proj)\.bias": P(MODEL),
    r"vision\.blocks\.\d+\.mlp\.(fc2|down_proj)\.kernel": _ROWS,
}


def make_mesh(*, data: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices.

    Args:
        data: over how many devices the rows of a batch are dealt out.
        model: over how many the heads are.
        devices: which; default: the first ones that there are.

    Raises:
        ValueError: there are fewer devices.
    """
    found = jax.devices() if devices is None else list(devices)
    if data < 1 or model < 1 or data * model > len(found):
        raise ValueError(
            f"data x model must be at least 1 and at most the number of devices, {len(found)}. Got {data} x {model}. "
            "Take a smaller mesh."
        )
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=kinds, devices=found[: data * model])


def param_shardings(config: ModelConfig, mesh: Mesh) -> Weights:
    """Where every weight goes: a tree of `NamedSharding` like the weights'.

    Raises:
        ValueError: the mesh has other axes than "data" and "model", or Explicit ones, or its model axis does not divide
            the kv heads or the columns of the MLP.
    """
    _check_mesh(config, mesh)
    size = mesh.shape[MODEL]

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        for pattern, spec in {**_DECODER, **_WHERE_EVEN}.items():
            if re.fullmatch(pattern, name):
                even = all(n % size == 0 for n, axis in zip(leaf.shape, spec, strict=True) if axis)
                return NamedSharding(mesh, spec if even else P())
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, abstract_weights(config, np.float32))


def _check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Demands that a model can be split over a mesh."""
    if set(mesh.axis_names) != {DATA, MODEL}:
        raise ValueError(f"a mesh must have the axes {DATA} and {MODEL}. Got {mesh.axis_names}. Use make_mesh.")
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"a mesh's axes must be Auto, so that XLA places what lies between. Got {mesh.axis_types}. Use make_mesh: "
            "jax.make_mesh makes them Explicit."
        )
    size, text = mesh.shape[MODEL], config.text
    for what, n in (("kv heads", text.n_kv_heads), ("MLP columns", text.intermediate_size)):
        if n % size:
            raise ValueError(
                f"the mesh's model axis must divide the model's {n} {what}: heads are not copied. Got {size} devices. "
                "Take a smaller model axis, and a larger data axis for the rest."
            )


def sharded_rows(mesh: Mesh | None, x: Array) -> Array:
    """`x` `[B, ...]` with its rows dealt out over the mesh's data axis; itself without a mesh.

    Raises:
        ValueError: the data axis does not divide B.
    """
    return _placed(mesh, x, P(DATA))


def sharded_heads(mesh: Mesh | None, x: Array) -> Array:
    """`x` `[B, heads, ...]` with its rows and its heads dealt out; itself without a mesh.

    Raises:
        ValueError: the data axis does not divide B.
    """
    return _placed(mesh, x, P(DATA, MODEL))


def _placed(mesh: Mesh | None, x: Array, spec: P) -> Array:
    if mesh is None:
        return x
    check_batch(mesh, x.shape[0])
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def check_batch(mesh: Mesh, batch: int) -> None:
    """Demands that a batch can be dealt out.

    Raises:
        ValueError: the data axis does not divide it.
    """
    if batch % mesh.shape[DATA]:
        raise ValueError(
            f"the mesh's data axis must divide the batch of {batch}. Got {mesh.shape[DATA]} devices. Fill the batch up "
            "or take a smaller data axis."
        )


def on_devices(mesh: Mesh | None, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function`, run by every device of the mesh on its own part of the arguments; itself without a mesh."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
