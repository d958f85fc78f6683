"""The models and prompts that both frameworks run: tiny random ones of every family, and the trained ones shipped.

A `Subject` is one model in transformers, in float32 and float64, and the same weights in JAX, with a prompt batch and a
profile. Truth is computed on the CPU, whatever the device of the runs.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import blindsight_cli
import jax_blindsight
from blindsight_cli.loading import load_checkpoint
from blindsight_cli.smallvlm.evaluate import make_puzzles, to_inputs
from parity_model import N_NEW, Bar, Trace, divergence_of_logits, trace_jax, trace_torch
from shared_profiles import SinkTemplate
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile
from tiny_jax import in_numpy, twin
from tiny_models import in_double, make_ids, make_inputs, make_model, mixed_profile, positions_of

SHIPPED = sorted(path.parent for path in (Path(blindsight_cli.__file__).parent / "models").glob("*/config.json"))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
_TEMPLATE = SinkTemplate((0, 1), (1, 2), 8)


@dataclass(frozen=True)
class Subject:
    """A model to run in both frameworks; unpatched between runs.

    Attributes:
        single, double: in transformers, float32 and float64, on the CPU.
        params: the same weights in JAX, with the profile.
        inputs: a batch padded on the left, on the CPU.
        device: where the runs take place, "cpu" or "cuda".
    """

    single: Any
    double: Any
    params: jax_blindsight.Params
    inputs: Mapping[str, torch.Tensor]
    device: str

    @property
    def profile(self) -> Profile:
        """The profile of the sparse runs."""
        assert self.params.profile is not None
        return self.params.profile

    @cached_property
    def moved(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The float32 model and the inputs on the device."""
        model = self.single if self.device == "cpu" else copy.deepcopy(self.single).to(self.device)
        return model, {name: x.to(self.device) for name, x in self.inputs.items()}

    def torch(self, *, sparse: bool, n_new: int = 0, impl: str | None = None) -> Trace:
        """transformers in float32, as it is or with the profile."""
        model, inputs = self.moved
        return trace_torch(model, inputs, self.profile if sparse else None, impl=impl, n_new=n_new)

    def jax(self, *, sparse: bool, n_new: int = 0, params: jax_blindsight.Params | None = None) -> Trace:
        """`sparse_prefill` in float32; `params` may be others of the same shapes."""
        with jax_on(self.device):
            arrays = in_numpy({name: x for name, x in self.inputs.items() if name != "position_ids"})
            # Of the lowerings of JAX, the portable one computes in float32.
            return trace_jax(params or self.params, arrays, dense=not sparse, n_new=n_new, impl="portable")

    @cached_property
    def bars(self) -> dict[bool, Bar]:
        """What counts as equal, without and with the profile: by the definition of every category."""
        bars = {}
        for sparse in (False, True):
            profile = self.profile if sparse else None
            truth = trace_torch(self.double, in_double(dict(self.inputs)), profile, impl="reference")
            bars[sparse] = Bar(truth, self.torch(sparse=sparse, impl="reference"))
        return bars

    @cached_property
    def traces(self) -> dict[tuple[str, bool], Trace]:
        """Every way to run it by framework and sparseness, greedy answers included."""
        return {
            (name, sparse): run(sparse=sparse, n_new=N_NEW)
            for name, run in (("torch", self.torch), ("jax", self.jax))
            for sparse in (False, True)
        }


@contextmanager
def jax_on(device: str) -> Iterator[None]:
    """Makes JAX compute on a device; a GPU that JAX cannot reach skips the test, and says so."""
    here = jax.default_backend()
    if device == "cuda" and here != "gpu":
        pytest.skip(f"needs JAX for CUDA (pip install 'jax[cuda13]'); JAX runs on {here} here")
    if device == "cpu" and here != "cpu":
        with jax.default_device(jax.devices("cpu")[0]):
            yield
    else:  # another context would compile everything anew
        yield


def _placed(params: jax_blindsight.Params, device: str) -> jax_blindsight.Params:
    """The model on a device that JAX computes on."""
    with jax_on(device):
        here = jax.devices("cpu" if device == "cpu" else "gpu")[0]
        return replace(params, weights=jax.device_put(params.weights, here))


def with_positions(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with the positions that transformers' own `generate` passes: padding does not count."""
    if model.config.model_type == "gemma3":
        return {**inputs, "position_ids": positions_of(model, dict(inputs))}
    return dict(inputs)


@cache
def tiny(family: str, device: str = "cpu") -> Subject:
    """A random model of four layers; rows of four and of two images."""
    model = twin(family)
    inputs = with_positions(model.single, make_inputs(family, [make_ids(4), make_ids(2, seed=1)]))
    return Subject(model.single, model.double, _placed(model.params, device), inputs, device)


@cache
def trained(folder: Path, device: str = "cpu") -> Subject:
    """A shipped model with its own profile; puzzles of two and of six images, as its processor gives them."""
    model, processor = load_checkpoint(folder, dtype="float32")
    inputs = to_inputs(processor, [make_puzzles(n, 1, 1_000_000 + n)[0] for n in (2, 6)])
    inputs = with_positions(model, inputs)
    params = jax_blindsight.load(folder, Profile.load(folder / FILE_NAME), dtype="float32")
    return Subject(model, copy.deepcopy(model).double(), _placed(params, device), inputs, device)


@cache
def wide_model(family: str) -> Any:
    """A random model of two layers whose heads are 64 wide, which every kernel serves."""
    small = make_model(family, n_layers=2)
    config, text = small.config, small.config.text_config
    text.hidden_size = text.intermediate_size = 256
    if family == "gemma3":
        text.head_dim = text.query_pre_attn_scalar = 64
    else:
        text.rope_parameters["mrope_section"] = [8, 12, 12]
        setattr(config.vision_config, "hidden_size" if family == "qwen2_vl" else "out_hidden_size", 256)
    text.initializer_range = config.initializer_range = 0.1
    torch.manual_seed(0)
    return type(small)(config).eval()


@dataclass(frozen=True)
class Lost:
    """What a bfloat16 run loses: KL per token, in nats, from a float32 run of the same (rounded) weights."""

    impl: str
    kl: float


@cache
def lost_in_bfloat16(family: str, device: str = "cpu") -> dict[str, Lost]:
    """By framework; "transformers" is the bar: its own bfloat16, every category by its definition."""
    narrow = copy.deepcopy(wide_model(family)).bfloat16()
    wide = copy.deepcopy(narrow).float()
    profile = mixed_profile(wide, seed=3, template=_TEMPLATE)
    inputs = make_inputs(family, [make_ids(3), make_ids(2, seed=1)])
    truth = trace_torch(wide, inputs, profile, impl="reference").points["logits"]
    with tempfile.TemporaryDirectory() as folder:
        narrow.save_pretrained(folder)
        params = _placed(jax_blindsight.load(folder, profile), device)
    halved = {name: (x.bfloat16() if x.is_floating_point() else x).to(device) for name, x in inputs.items()}
    narrow = narrow.to(device)
    with jax_on(device):
        runs = {
            "transformers": trace_torch(narrow, halved, profile, impl="reference"),
            "torch": trace_torch(narrow, halved, profile),
            "jax": trace_jax(params, in_numpy(inputs)),
        }
    return {
        name: Lost(x.impl, float(divergence_of_logits(x.points["logits"], truth).mean())) for name, x in runs.items()
    }


def perturbed(params: jax_blindsight.Params, *path: Any, by: float = 0.01) -> jax_blindsight.Params:
    """The model with one weight of the decoder off by a share of itself."""
    weights: Any = jax.tree.map(lambda x: x, params.weights)
    leaf = weights["decoder"]
    for name in path[:-1]:
        leaf = leaf[name]
    leaf[path[-1]] = leaf[path[-1]] * (1 + by)
    return replace(params, weights=weights)


def differing(subject: Subject) -> dict[str, str | None]:
    """Where each run first leaves what is allowed, and where a pair does; None where it never does."""
    found = {}
    for sparse, bar in subject.bars.items():
        ours, theirs = (subject.traces[name, sparse] for name in ("jax", "torch"))
        kind = "sparse" if sparse else "dense"
        found[f"jax {kind}"] = bar.divergence(ours)
        found[f"torch {kind}"] = bar.divergence(theirs)
        found[f"jax and torch {kind}"] = bar.divergence(ours, theirs)
    return found


def is_profile_at_work(subject: Subject) -> bool:
    """Whether the profile changes the logits: otherwise sparse runs would prove nothing."""
    dense, sparse = (subject.bars[x].truth.points["logits"] for x in (False, True))
    return bool(np.abs(dense - sparse).max() > 1e-3)
