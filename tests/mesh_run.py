"""One tiny model on one device and on a mesh of eight, compared; prints what it found as JSON.

Run in a process of its own, because the number of devices is fixed when JAX starts:
`python tests/mesh_run.py FAMILY FOLDER`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import tiny_models
from jax_blindsight import attention, generation, prefill, stack, tower
from jax_blindsight.attention import attend
from jax_blindsight.calibration import measure
from jax_blindsight.convert import path_name
from jax_blindsight.model import Weights
from jax_blindsight.params import Params, load, save
from jax_blindsight.sharding import make_mesh
from jax_blindsight.sinks import measure_sinks
from jax_blindsight.work import attention_work
from jax_checkpoints import save_tiny
from shared_profiles import Layout, SinkTemplate
from shared_profiles.profile import Profile
from torch_blindsight import fingerprint

NEW_WORDS = 3
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def collectives(compiled: str) -> dict[str, int]:
    """How often an HLO text has each kind of collective, with the shape that it gives."""
    found = re.findall(rf"= (\S+?)(?:\{{[^ ]*)? ({COLLECTIVES})(?:-start)?\(", compiled)
    return dict(Counter(f"{kind} {shape}" for shape, kind in found))


def recorded(module: Any, name: str, seen: dict[str, dict[str, int]]) -> None:
    """Makes a jitted function of a module, whose options are static, note the collectives of its first program."""
    function = getattr(module, name)
    programs: dict[str, Any] = {}

    def call(*args: Any, **static: Any) -> Any:
        first = jax.tree.leaves(args)[0]
        if isinstance(first, jax.core.Tracer) or first.sharding.num_devices == 1:
            return function(*args, **static)
        key = str((jax.tree.map(np.shape, args), static))
        if key not in programs:
            programs[key] = function.lower(*args, **static).compile()
            seen.setdefault(name, collectives(programs[key].as_text()))
        return programs[key](*args)

    setattr(module, name, call)


def equal(a: Weights, b: Weights) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b))


def gaps(a: Any, b: Any) -> list[float]:
    """The largest difference of each array, or number, of two records."""
    values = (jax.tree.leaves([getattr(x, field.name) for field in fields(x)]) for x in (a, b))
    return [float(np.abs(np.subtract(x, y)).max()) for x, y in zip(*values, strict=True)]


def refused(run: Any) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def attention_alone() -> dict[str, Any]:
    """The attention with sharded inputs, wrapped and not."""
    mesh = make_mesh(data=2, model=2)
    images = np.array([[4, 5, 53, 54], [60, 61, 109, 110]])
    layouts = [Layout(128, start, 120, images) for start in (0, 2)]
    work = attention_work(layouts, SinkTemplate(), n_queries=128, n_keys=128)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, heads, 128, 16)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    options = dict(categories=(0, 1, 2, 3), window=None, scale=0.25, bidirectional=False)
    one = jax.jit(partial(attend, **options))(q, k, v, work)
    sharded = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "model"))) for x in (q, k, v)]
    programs = [
        jax.jit(function).lower(*sharded, work).compile()
        for function in (partial(attend, mesh=mesh, **options), partial(attend, **options))
    ]
    many = programs[0](*sharded, work)
    return {
        "close": [np.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(one, many, strict=True)],
        "wrapped": collectives(programs[0].as_text()),
        "plain": collectives(programs[1].as_text()),
        "odd batch": refused(lambda: attend(q[:1], k[:1], v[:1], work, mesh=mesh, **options)),
    }


class Run:
    """A model loaded for one device and for 4 x 2, both prefilled; the collectives of the latter's programs."""

    def __init__(self, family: str, folder: Path, categories: list[list[int]]) -> None:
        self.folder = folder
        model = save_tiny(folder / "checkpoint", family, layers=slice(1, 3))
        template = SinkTemplate((0, 1), (1, 2), 8)
        profile = Profile(np.array(categories), template, fingerprint(model), None, {"method": "manual"})
        prompts = [tiny_models.make_ids(n, seed=n) for n in (3, 2, 3, 2)]
        self.inputs = {name: x.numpy() for name, x in tiny_models.make_inputs(family, prompts).items()}
        self.one, self.many = (self.load(profile, mesh=mesh) for mesh in (None, make_mesh(data=4, model=2)))
        # The capacity that `generate` takes, so that nothing is compiled twice.
        capacity = self.inputs["input_ids"].shape[1] + NEW_WORDS
        expected = prefill.sparse_prefill(self.one, self.inputs, capacity=capacity, break_even=False)
        self.collectives: dict[str, dict[str, int]] = {}
        for module, name in (
            (tower, "_siglip"),
            (tower, "_block"),
            (prefill, "_embed"),
            (stack, "_begin"),
            (attention, "_by_category"),
            (stack, "_end"),
            (prefill, "_unembed"),
            (generation, "_step"),
        ):
            recorded(module, name, self.collectives)
        got = prefill.sparse_prefill(self.many, self.inputs, capacity=capacity, break_even=False)
        self.logits = np.asarray(expected.logits), np.asarray(got.logits)
        self.cache = got.cache.keys[0]

    def load(self, *args: Any, **options: Any) -> Params:
        return load(self.folder / "checkpoint", *args, **options)

    def prefill(self) -> dict[str, Any]:
        return {
            "difference": float(np.abs(np.subtract(*self.logits)).max()),
            "largest": float(np.abs(self.logits[0]).max()),
            "collectives": self.collectives,
            "cache": self.cache.addressable_shards[0].data.shape[:2],
        }

    def generate(self) -> dict[str, Any]:
        options: dict[str, Any] = dict(max_new_tokens=NEW_WORDS, break_even=False)
        written = [generation.generate(p, self.inputs, **options) for p in (self.one, self.many)]
        return {"equal": np.array_equal(*written)}

    def shares(self) -> dict[str, Any]:
        """How much of each weight is on one device, by path."""
        leaves = jax.tree_util.tree_leaves_with_path(self.many.weights)
        return {path_name(path): x.size // x.addressable_shards[0].data.size for path, x in leaves}

    def saved(self) -> dict[str, bool]:
        """Whether saving from a mesh, and loading on one device and on the mesh, keeps every bit."""
        save(self.many, self.folder / "saved")
        again = [load(self.folder / "saved", mesh=mesh) for mesh in (None, self.many.mesh)]
        shardings = [jax.tree.map(lambda x: x.sharding, p.weights) for p in (self.many, again[1])]
        return {
            "bits": all(equal(self.one.weights, p.weights) for p in (self.many, *again)),
            "shardings": shardings[0] == shardings[1],
            "marks": len({p.marks for p in (self.one, self.many, *again)}) == 1,
        }

    def measured(self) -> dict[str, float]:
        """The largest difference in what calibration measures of one prompt, heads on two devices instead of one."""
        some = {name: x.numpy() for name, x in tiny_models.make_inputs("qwen2_5_vl", [tiny_models.make_ids(3)]).items()}
        template, two = SinkTemplate((0, 1), (1, 2), 8), self.load(mesh=make_mesh(model=2))
        found = {
            "statistics": [measure(p, some, template, rankings=("gradient", "residual")) for p in (self.one, two)],
            "sinks": [measure_sinks(p, some) for p in (self.one, two)],
        }
        return {name: max(gaps(*pair)) for name, pair in found.items()}

    def refusals(self) -> dict[str, str]:
        words = {"input_ids": np.full((1, 8), 20), "attention_mask": np.ones((1, 8), dtype=np.int64)}
        return {
            "batch": refused(lambda: prefill.sparse_prefill(self.many, words)),
            "kv heads": refused(lambda: self.load(mesh=make_mesh(model=4))),
            "axes": refused(lambda: self.load(mesh=jax.make_mesh((8,), ("model",)))),
            "explicit": refused(lambda: self.load(mesh=jax.make_mesh((4, 2), ("data", "model")))),
            "devices": refused(lambda: make_mesh(data=3, model=3)),
        }


def main(family: str, folder: str) -> None:
    if family == "gemma3":  # the rest does not depend on the family
        found = Run(family, Path(folder), [[3, 3, 3, 3]] * 2).prefill()
    else:
        run = Run(family, Path(folder), [[3, 3, 0, 0], [3, 3, 3, 3]])
        parts = (run.prefill, run.generate, run.shares, run.saved, run.measured, run.refusals)
        with jax.set_mesh(jax.make_mesh((8,), ("x",))):  # of the caller's other programs: the model has its own
            found = run.prefill() | {part.__name__: part() for part in parts}
        found["attention"] = attention_alone()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
