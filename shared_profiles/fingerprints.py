"""The fingerprint of a model: its attention configuration and a hash of a sample of every weight.

A sample will do: whatever trains a matrix moves all of its rows. Any weight counts, the vision tower's too, since all
of them decide where heads look and what comes of it.
"""

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
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
)
_ROWS = 8
# bfloat16 values of less than 2^-16 count as zero: float16 has no room for all of their digits.
_SMALL = (127 - 16) << 7


def sampled_rows(shape: tuple[int, ...]) -> list[int] | slice:
    """The rows along the first axis that stand for a weight, evenly spread; of a vector, all."""
    if len(shape) < 2:
        return slice(None)
    n = min(shape[0], _ROWS)
    return [i * shape[0] // n for i in range(n)]


def make_fingerprint(
    family: str, text: Mapping[str, Any], samples: Iterable[tuple[tuple[int, ...], np.ndarray]]
) -> Fingerprint:
    """Identifies a model; the same for every framework, and for the checkpoint in float32 and in bfloat16.

    Args:
        family: its `model_type`.
        text: the language model's configuration, `config.get_text_config().to_dict()` of transformers.
        samples: of every weight but the output head's, in any order: its shape as transformers has it, `[out, in]` for
            a projection, and its `sampled_rows`, bfloat16 viewed as bytes (uint8). Tied weights count once.

    The checkpoint loaded in float16 is the same, too, if it is stored in bfloat16 or float16.
    """
    settings = {key: text.get(key) for key in _TEXT_KEYS}
    digest = hashlib.sha256(json.dumps([family, settings], sort_keys=True, default=str).encode())
    # Sorted: frameworks and versions of transformers name the weights differently.
    for weight in sorted(hashlib.sha256(f"{shape}".encode() + _bits(rows)).digest() for shape, rows in samples):
        digest.update(weight)
    return Fingerprint(
        family=family,
        n_layers=text["num_hidden_layers"],
        n_heads=text["num_attention_heads"],
        n_kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        digest="sha256:" + digest.hexdigest(),
    )


def _bits(rows: np.ndarray) -> bytes:
    """What is hashed of bfloat16 rows, given as bytes."""
    values = np.ascontiguousarray(rows).view("<u2")
    return np.where(values & 0x7FFF < _SMALL, 0, values).astype("<u2").tobytes()
