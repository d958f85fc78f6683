"""What BlindSight needs to know of a Hugging Face model: its family, its attention layers, its fingerprint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared_profiles import FAMILIES, Family, SpecialTokens, family_of
from shared_profiles.fingerprints import make_fingerprint, sampled_rows
from shared_profiles.profile import Fingerprint
from torch_blindsight.tensor_parallel import local_heads

PACKAGES = ("torch", "transformers")  # whose versions a profile's provenance names


@dataclass(frozen=True)
class ModelInfo:
    """The attention-relevant facts of one model.

    Attributes:
        family: how it marks images.
        special: its token ids of delimiters and placeholders.
        attentions: the language model's attention modules, in layer order.
        windows: the sliding window of each layer, None where it has none.
        n_heads, n_kv_heads, head_dim: shape of its attention.
        heads: the query heads that this process computes: all, but for a tensor-parallel model.
    """

    family: Family
    special: SpecialTokens
    attentions: tuple[Any, ...]
    windows: tuple[int | None, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    heads: range

    @property
    def n_layers(self) -> int:
        """Number of language-model layers."""
        return len(self.attentions)

    @property
    def config(self) -> object:
        """The language model's configuration, which its attention modules share."""
        return self.attentions[0].config

    def require_all_heads(self, what: str) -> None:
        """Checks that this process computes all heads.

        Raises:
            NotImplementedError: it has some of them, and cannot do `what`.
        """
        if len(self.heads) < self.n_heads:
            raise NotImplementedError(
                f"{what} needs all heads of a layer in one process. Got a tensor-parallel model (tp_plan), of which "
                f"this one has {len(self.heads)} of {self.n_heads}. Load it with device_map instead, which spreads "
                "whole layers over several GPUs; patch() takes both."
            )


def inspect_model(model: nn.Module) -> ModelInfo:
    """Reads a model's family and attention layers.

    Raises:
        ValueError: not a Hugging Face model of a supported family, or wrapped or compiled.
        NotImplementedError: a tensor-parallel model that is not split by heads, or one whose text looks both ways.
    """
    _refuse_wrapped(model)
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(
            f"the model must be a Hugging Face transformers model. Got {type(model).__name__}, which has no config."
        )
    settings = config.to_dict()
    text = config.get_text_config()
    if text is config and str(settings.get("model_type")).removesuffix("_text") in FAMILIES:
        raise ValueError(
            f"the model must be the multimodal one, which sees the images. Got the language model alone, "
            f"{type(model).__name__}. Pass the ...ForConditionalGeneration model."
        )
    family = family_of(settings)
    attentions = [
        m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj") and hasattr(m, "k_proj")
    ]
    attentions.sort(key=lambda m: int(m.layer_idx))  # type: ignore[arg-type]
    if [m.layer_idx for m in attentions] != list(range(text.num_hidden_layers)):
        raise ValueError(
            f"the model must have one attention module per layer, {text.num_hidden_layers} in all. Found layers "
            f"{[m.layer_idx for m in attentions]}. Is part of the model missing or replaced?"
        )
    if not all(getattr(m, "is_causal", True) for m in attentions):
        raise NotImplementedError(
            "the model's text must look back only. Got use_bidirectional_attention=True in its configuration, with "
            "which text may look both ways: no category says that. Leave the model unpatched."
        )
    windows = tuple(getattr(m, "sliding_window", None) for m in attentions)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelInfo(
        family,
        family.special_tokens(settings),
        tuple(attentions),
        windows,
        text.num_attention_heads,
        text.num_key_value_heads,
        head_dim,
        local_heads(model, attentions, text.num_attention_heads),
    )


def decoder_layers(model: nn.Module, info: ModelInfo) -> list[Any]:
    """The layers that hold the attention modules, in order."""
    parents = {id(child): module for module in model.modules() for child in module.children()}
    return [parents[id(attention)] for attention in info.attentions]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In this context the model is in evaluation mode; then every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuses wrappers, under which hooks on the outermost module would not see a forward's arguments."""
    kind = type(model).__name__
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"the model must not be compiled. Got a compiled {kind}. Patch the model before compiling its parts."
        )
    if isinstance(getattr(model, "module", None), nn.Module) or hasattr(model, "get_base_model"):
        raise ValueError(f"the model must not be wrapped. Got {kind}. Patch the model inside it, then wrap.")


def checkpoint_folder(model: nn.Module) -> str:
    """The folder that a model was loaded from; of one loaded by a repository's name, its snapshot in the hub's cache.

    A name that is neither is returned as it is; empty for a model that was not loaded.
    """
    config: Any = model.config
    name = getattr(config, "_name_or_path", None) or ""
    if not name or os.path.isdir(name):
        return name
    try:
        file = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except HFValidationError:  # not a repository's name: a folder that is gone, or relative to another one
        return name
    return os.path.dirname(file) if isinstance(file, str) else name


@torch.no_grad()
def fingerprint(model: nn.Module, info: ModelInfo | None = None) -> Fingerprint:
    """Identifies a model by its attention configuration and a sample of every weight; adapters count, too.

    Weights are hashed as bfloat16, so the same checkpoint loaded in float32 or bfloat16 has the same fingerprint, and a
    model split over several processes, all of which must call this, that of the whole one.

    Args:
        model: a supported Hugging Face model.
        info: `inspect_model(model)`, if at hand.

    Raises:
        ValueError, NotImplementedError: see `inspect_model`.
        ValueError: weights that are not loaded (meta device).
    """
    info = info or inspect_model(model)
    config: Any = model.config
    return make_fingerprint(info.family.name, config.get_text_config().to_dict(), _samples(model))


def _samples(model: nn.Module) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """What `make_fingerprint` wants of every weight."""
    unpack(model)
    for name, weight in chain(model.named_parameters(), _saved_buffers(model)):
        if name == "lm_head.weight":  # a model without its head is the same model
            continue
        if weight.device.type == "meta":
            raise ValueError(
                "the model's weights must be loaded. Got some on the meta device: offloaded, or not loaded yet. "
                "Load the whole model onto its devices."
            )
        weight = weight.detach()
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        elif type(weight) is not Tensor:  # a quantizer's own: torchao, quanto
            weight = weight.dequantize()
        weight = torch.atleast_1d(weight)
        shape = tuple(weight.shape)
        rows = weight[sampled_rows(shape)].to("cpu", torch.bfloat16)
        yield shape, rows.contiguous().view(torch.uint8).numpy()


def unpack(model: nn.Module) -> None:
    """Undoes how bitsandbytes packs 4-bit weights at their first use, on CPUs with bfloat16 in AVX-512.

    So packed, they are other bytes and have no backward pass.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # they are saved unpacked, and stay so until the next use without gradients


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those of a checkpoint: the weights of some quantizers (AWQ, GPTQ) are no parameters."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer
