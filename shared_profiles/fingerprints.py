"""The fingerprint of a model: its attention configuration and a hash of its query and key projection weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from shared_profiles.profile_parts import Fingerprint

# What decides how a head attends; a change of any of these makes another model of it.
_TEXT_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "layer_types",
    "sliding_window",
)


def make_fingerprint(family: str, text: Mapping[str, Any], weights: Iterable[np.ndarray]) -> Fingerprint:
    """Identifies a model; the same for every framework, and for the checkpoint in float32 and in bfloat16.

    Args:
        family: its `model_type`.
        text: the language model's configuration, `config.get_text_config().to_dict()` of transformers.
        weights: query, then key projection of every layer in order, `[out, in]` bfloat16 viewed as bytes (uint8).
    """
    settings = {key: text.get(key) for key in _TEXT_KEYS}
    digest = hashlib.sha256(json.dumps([family, settings], sort_keys=True, default=str).encode())
    for weight in weights:
        digest.update(np.ascontiguousarray(weight))
    return Fingerprint(
        family=family,
        n_layers=text["num_hidden_layers"],
        n_heads=text["num_attention_heads"],
        n_kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        digest="sha256:" + digest.hexdigest(),
    )
