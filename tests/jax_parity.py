"""Pairs to compare: a transformers model and the same weights in JAX, and what "as exact as transformers" means."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from jax_blindsight.config import ModelConfig
from jax_blindsight.model import abstract_weights
from tiny_models import make_model

# From a leaf's path in JAX to a parameter's name in transformers; the first that fits, in every step.
_DECODER = {
    "decoder.": "model.language_model.",
    "model.language_model.lm_head": "lm_head",
    ".attention.": ".self_attn.",
    "pre_attention_norm": "input_layernorm",
}
_QWEN = {
    "pre_mlp_norm": "post_attention_layernorm",
    "vision.": "model.visual.",
    "patch_embed.": "patch_embed.proj.",
    "merger.norm": "merger.ln_q",
    "merger.mlp.fc1": "merger.mlp.0",
    "merger.mlp.fc2": "merger.mlp.2",
}
_GEMMA = {
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "vision.projector.linear.weight": "model.multi_modal_projector.mm_input_projection_weight",
    "vision.projector.norm": "model.multi_modal_projector.mm_soft_emb_norm",
    "vision.": "model.vision_tower.",
    "patch_embed.": "embeddings.patch_embedding.",
    "position_embed.": "embeddings.position_embedding.",
    "tower.blocks": "tower.encoder.layers",
    "self_attn.proj": "self_attn.out_proj",
    ".norm1": ".layer_norm1",
    ".norm2": ".layer_norm2",
    "tower.norm": "tower.post_layernorm",
}


def weights_of(model: Any) -> dict[Any, Any]:
    """The weights of a whole model in float32; every one is copied."""
    config = ModelConfig.from_hf(model.config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    renames = _DECODER | (_GEMMA if config.family == "gemma3" else _QWEN)

    def take(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = ".".join(str(entry.key) for entry in path)
        *module, kind = name.split(".")
        name = ".".join([*module, "bias" if kind == "bias" else "weight"])
        for ours, theirs in renames.items():
            if config.family != "gemma3" and ours == ".attention." and name.startswith("vision"):
                theirs = ".attn."
            name = name.replace(ours, theirs)
        array = parameters[name].detach().float().numpy()
        if kind == "kernel" and "mm_input_projection" not in name:
            array = array.reshape(len(array), -1).T
        assert array.shape == leaf.shape, f"{name}: {array.shape}, not {leaf.shape}"
        return np.array(array)

    return jax.tree_util.tree_map_with_path(take, abstract_weights(config, np.float32))


def make(module: type[nnx.Module], *args: Any, weights: Any, **kwargs: Any) -> Any:
    """A module with these weights."""
    return nnx.merge(nnx.split(nnx.eval_shape(partial(module, *args, **kwargs)))[0], weights)


@dataclass(frozen=True)
class Pair:
    """A transformers model in float32 and in float64, and what JAX makes of it. Shared: leave it unchanged."""

    single: Any
    double: Any
    config: ModelConfig
    weights: dict[Any, Any]

    def check(self, ours: Any, run: Callable[..., torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> None:
        """Demands that `ours` is as exact as `run(model, **inputs)` in float32; float64 is the truth."""
        with torch.no_grad():
            plain = run(self.single, **inputs).numpy()
            truth = run(self.double, **{n: x.double() if x.is_floating_point() else x for n, x in inputs.items()})
        assert_as_exact(ours, plain, truth.numpy())


def assert_as_exact(ours: Any, plain: np.ndarray, truth: np.ndarray, ulps: float = 4) -> None:
    """`ours` may err twice as much as `plain`, a result of the same precision, plus some last places of float32."""
    ours = np.asarray(ours, dtype=np.float64)
    assert ours.shape == truth.shape, f"{ours.shape}, not {truth.shape}"
    error, allowed = np.abs(ours - truth).max(), 2 * np.abs(plain - truth).max()
    allowed += ulps * np.finfo(np.float32).eps * np.abs(truth).max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, values up to {np.abs(truth).max():.3g}"


@cache
def pair(family: str) -> Pair:
    """The family's tiny model, with norms and biases scattered, which a fresh model leaves at one and zero."""
    model = make_model(family)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return Pair(model, copy.deepcopy(model).double(), ModelConfig.from_hf(model.config), weights_of(model))
