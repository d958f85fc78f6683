"""Checkpoint folders to convert: tiny ones of every family in every spelling of names, and the tools to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import tiny_models

FILE = "model.safetensors"
SPELLINGS = ("saved", "memory", "hub")

Tensors = dict[str, np.ndarray]


def save_tiny(
    folder: Path, family: str, dtype: str = "float32", spelling: str = "saved", layers: slice = slice(None)
) -> torch.nn.Module:
    """Saves a tiny model, random in every parameter, and returns it.

    Args:
        folder: where.
        family: its `model_type`.
        dtype: of model and file.
        spelling: "saved" as `save_pretrained` names the tensors, "memory" as the modules do, "hub" as the checkpoints
            that everybody has do.
        layers: of the decoder's four kinds of layers, those to have.
    """
    model = tiny_models.make_model(family)
    text = model.config.text_config
    text.layer_types = text.layer_types[layers]
    text.num_hidden_layers = len(text.layer_types)
    model = type(model)(model.config).eval()
    with torch.no_grad():  # fresh norms and biases are all ones and zeros, and could be mixed up unseen
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.25)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    if spelling == "memory":
        tied = model.config.tie_word_embeddings
        state = {name: x for name, x in model.state_dict().items() if not (tied and name == "lm_head.weight")}
        save_file({name: in_numpy(x) for name, x in state.items()}, folder / FILE)
    elif spelling == "hub" and family == "gemma3":

        def respell(tensors: Tensors) -> Tensors:
            tensors = {name: x for name, x in tensors.items() if not name.startswith("vision_tower.head.")}
            return {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in tensors.items()}

        edit(folder, respell)
    return model


def edit(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Rewrites a folder's single file with its tensors changed, in place or by returning others."""
    tensors = load_file(folder / FILE)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / FILE)


def edit_json(path: Path, **values: object) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def in_numpy(x: torch.Tensor) -> np.ndarray:
    """A tensor's values in its own dtype, bfloat16 included."""
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
