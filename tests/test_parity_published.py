"""The published checkpoints: their `config.json` as the hub has it, and every tensor by its name there, without data.

Both backends must read the same model out of it. Weights of these sizes are at hand nowhere, but a safetensors file may
be a header and a hole.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from jax_blindsight.config import ModelConfig
from jax_blindsight.convert import Conversion, WeightsError
from jax_blindsight.tensor_files import TensorFiles
from torch_blindsight.models import inspect_model


def qwen(hidden: int, width: int, heads: int, layers: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """One level, the names of transformers 4.41."""
    config = dict(
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        attention_dropout=0.0,
        hidden_act="silu",
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        max_position_embeddings=32768,
        max_window_layers=28,
        rms_norm_eps=1e-06,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        rope_theta=1000000.0,
        sliding_window=32768,
        use_sliding_window=False,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        vocab_size=152064,
    )
    return config | more


def qwen2(hidden: int, *sizes: int, **more: Any) -> dict[str, Any]:
    vision = dict(depth=32, embed_dim=1280, mlp_ratio=4, num_heads=16, in_chans=3, hidden_size=hidden)
    vision |= dict(patch_size=14, spatial_merge_size=2, spatial_patch_size=14, temporal_patch_size=2)
    return qwen(hidden, *sizes, model_type="qwen2_vl", vision_config=vision, **more)


def qwen2_5(hidden: int, *sizes: int, vision: int = 3420, **more: Any) -> dict[str, Any]:
    tower = dict(depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=vision, num_heads=16, in_chans=3)
    tower |= dict(patch_size=14, spatial_merge_size=2, spatial_patch_size=14, temporal_patch_size=2)
    tower |= dict(out_hidden_size=hidden, window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)
    return qwen(hidden, *sizes, model_type="qwen2_5_vl", vision_config=tower, **more)


def gemma3(hidden: int, width: int, layers: int, **more: Any) -> dict[str, Any]:
    """Only what differs from the defaults of transformers 4.50 is stated."""
    text = dict(hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, model_type="gemma3_text")
    text |= dict(rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024)
    tower = dict(hidden_size=1152, image_size=896, intermediate_size=4304, num_attention_heads=16, patch_size=14)
    tower |= dict(num_hidden_layers=27, model_type="siglip_vision_model", vision_use_head=False)
    return dict(
        model_type="gemma3",
        boi_token_index=255999,
        eoi_token_index=256000,
        eos_token_id=[1, 106],
        image_token_index=262144,
        mm_tokens_per_image=256,
        torch_dtype="bfloat16",
        text_config=text | more,
        vision_config=tower,
    )


SMALL = dict(tie_word_embeddings=True, vocab_size=151936)
# Each with what both backends must find: layers, query heads, kv heads, head dimension, sliding layers.
PUBLISHED = {
    "Qwen2-VL-2B": (qwen2(1536, 8960, 12, 28, 2, **SMALL), (28, 12, 2, 128, 0)),
    "Qwen2-VL-7B": (qwen2(3584, 18944, 28, 28, 4), (28, 28, 4, 128, 0)),
    "Qwen2.5-VL-3B": (qwen2_5(2048, 11008, 16, 36, 2, **SMALL), (36, 16, 2, 128, 0)),
    "Qwen2.5-VL-7B": (qwen2_5(3584, 18944, 28, 28, 4), (28, 28, 4, 128, 0)),
    "Qwen2.5-VL-32B": (qwen2_5(5120, 27648, 40, 64, 8, vision=3456), (64, 40, 8, 128, 0)),
    "Qwen2.5-VL-72B": (qwen2_5(8192, 29568, 64, 80, 8, vision=3456), (80, 64, 8, 128, 0)),
    "Gemma-3-4B": (gemma3(2560, 10240, 34), (34, 8, 4, 256, 29)),
    "Gemma-3-12B": (
        gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8),
        (48, 16, 8, 256, 40),
    ),
    "Gemma-3-27B": (
        gemma3(
            5376, 21504, 62, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168
        ),
        (62, 32, 16, 128, 52),
    ),
}
# Name in memory -> name on the hub, by model type.
ON_THE_HUB = {
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "gemma3": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
}


def on_the_hub(name: str, spellings: dict[str, str]) -> str:
    for ours, theirs in spellings.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A bfloat16 safetensors file of these tensors; of their data only the length."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_backends_read_a_published_checkpoint(tmp_path, name):
    config, (n_layers, n_heads, n_kv_heads, head_dim, n_sliding) = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(read, dtype=torch.bfloat16)
    info, ours = inspect_model(model), ModelConfig.from_hf(read)
    text = ours.text
    assert (info.n_layers, info.n_heads, info.head_dim) == (n_layers, n_heads, head_dim)
    assert (text.n_layers, text.n_heads, text.n_kv_heads, text.head_dim) == (n_layers, n_heads, n_kv_heads, head_dim)
    assert text.windows == tuple(info.windows)
    assert sum(window is not None for window in text.windows) == n_sliding

    spellings = ON_THE_HUB[config["model_type"]]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    shapes = {
        on_the_hub(key, spellings): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    write_header(tmp_path / "model.safetensors", shapes)
    assert os.stat(tmp_path / "model.safetensors").st_blocks < 10_000  # a hole
    Conversion(TensorFiles(tmp_path), ours)

    missing, wrong = list(shapes)[:: len(shapes) - 1]
    write_header(tmp_path / "model.safetensors", shapes | {wrong: (3, 5)})
    with pytest.raises(WeightsError, match=r"\(3, 5\)|\[3, 5\]"):
        Conversion(TensorFiles(tmp_path), ours)
    write_header(tmp_path / "model.safetensors", {key: shape for key, shape in shapes.items() if key != missing})
    with pytest.raises(WeightsError, match=missing.replace(".", r"\.")):
        Conversion(TensorFiles(tmp_path), ours)
