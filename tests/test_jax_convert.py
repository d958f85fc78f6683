"""From a checkpoint's files to a model's tree: every tensor used, every leaf filled, everything wrong told at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import tiny_models
from jax_blindsight.config import ModelConfig
from jax_blindsight.convert import Conversion, WeightsError, path_name
from jax_blindsight.model import abstract_weights
from jax_blindsight.names import NAMES
from jax_blindsight.params import load
from jax_blindsight.tensor_files import TensorFiles, TensorInfo, listed
from jax_checkpoints import FILE, SPELLINGS, edit, edit_json, in_numpy, save_tiny
from tiny_models import FAMILIES
from torch_blindsight import fingerprint

UP = "model.layers.1.mlp.up_proj.weight"


def leaves(weights: dict) -> dict[str, np.ndarray]:
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(weights)}


def converted(folder: Path, **options) -> dict[str, np.ndarray]:
    return leaves(load(folder, **options).weights)


def refusal(folder: Path) -> str:
    """What loading the folder is refused with."""
    with pytest.raises(ValueError) as error:
        load(folder)
    return str(error.value)


def bits(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


# What a leaf is, by hand: independent of the table, at least one of each module and all that could be mistaken.
PINNED = {
    "decoder.embed_tokens.embedding": "model.language_model.embed_tokens.weight",
    "decoder.norm.scale": "model.language_model.norm.weight",
    "decoder.layers.3.mlp.gate_proj.kernel": "model.language_model.layers.3.mlp.gate_proj.weight",
    "decoder.layers.3.mlp.up_proj.kernel": "model.language_model.layers.3.mlp.up_proj.weight",
    "decoder.layers.2.attention.q_proj.kernel": "model.language_model.layers.2.self_attn.q_proj.weight",
    "decoder.layers.2.attention.k_proj.kernel": "model.language_model.layers.2.self_attn.k_proj.weight",
    "decoder.layers.2.attention.v_proj.kernel": "model.language_model.layers.2.self_attn.v_proj.weight",
    "decoder.layers.2.attention.o_proj.kernel": "model.language_model.layers.2.self_attn.o_proj.weight",
    "decoder.layers.1.pre_attention_norm.scale": "model.language_model.layers.1.input_layernorm.weight",
}
QWEN = {
    "decoder.lm_head.kernel": "lm_head.weight",
    "decoder.layers.1.pre_mlp_norm.scale": "model.language_model.layers.1.post_attention_layernorm.weight",
    "decoder.layers.2.attention.k_proj.bias": "model.language_model.layers.2.self_attn.k_proj.bias",
    "vision.patch_embed.kernel": "model.visual.patch_embed.proj.weight",
    "vision.blocks.1.norm1.scale": "model.visual.blocks.1.norm1.weight",
    "vision.blocks.1.attention.qkv.kernel": "model.visual.blocks.1.attn.qkv.weight",
    "vision.blocks.1.attention.proj.kernel": "model.visual.blocks.1.attn.proj.weight",
    "vision.merger.norm.scale": "model.visual.merger.ln_q.weight",
    "vision.merger.mlp.fc1.kernel": "model.visual.merger.mlp.0.weight",
    "vision.merger.mlp.fc2.kernel": "model.visual.merger.mlp.2.weight",
}
GEMMA = {
    "decoder.layers.1.post_attention_norm.scale": "model.language_model.layers.1.post_attention_layernorm.weight",
    "decoder.layers.1.pre_mlp_norm.scale": "model.language_model.layers.1.pre_feedforward_layernorm.weight",
    "decoder.layers.1.post_mlp_norm.scale": "model.language_model.layers.1.post_feedforward_layernorm.weight",
    "decoder.layers.1.attention.q_norm.scale": "model.language_model.layers.1.self_attn.q_norm.weight",
    "decoder.layers.1.attention.k_norm.scale": "model.language_model.layers.1.self_attn.k_norm.weight",
    "vision.patch_embed.kernel": "model.vision_tower.embeddings.patch_embedding.weight",
    "vision.patch_embed.bias": "model.vision_tower.embeddings.patch_embedding.bias",
    "vision.position_embed.embedding": "model.vision_tower.embeddings.position_embedding.weight",
    "vision.blocks.0.norm2.bias": "model.vision_tower.encoder.layers.0.layer_norm2.bias",
    "vision.blocks.0.attention.k_proj.kernel": "model.vision_tower.encoder.layers.0.self_attn.k_proj.weight",
    "vision.blocks.0.attention.proj.kernel": "model.vision_tower.encoder.layers.0.self_attn.out_proj.weight",
    "vision.norm.scale": "model.vision_tower.post_layernorm.weight",
    "vision.projector.norm.scale": "model.multi_modal_projector.mm_soft_emb_norm.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_becomes_one_leaf(tmp_path, family, spelling):
    model = save_tiny(tmp_path, family, spelling=spelling)
    state = {name: in_numpy(x) for name, x in model.state_dict().items()}
    got = converted(tmp_path)
    if family == "gemma3":  # the one kernel that is [in, out] on disk, too; the head is tied, the tower's not used
        projection = state.pop("model.multi_modal_projector.mm_input_projection_weight")
        np.testing.assert_array_equal(got.pop("vision.projector.linear.kernel"), projection)
        state = {name: x for name, x in state.items() if name != "lm_head.weight" and ".vision_tower.head." not in name}
    there = {bits(x): name for name, x in state.items()}
    filled = {path: there[bits(x.T if path.endswith("kernel") else x)] for path, x in got.items()}
    assert sorted(filled.values()) == sorted(there.values())
    pinned = PINNED | (GEMMA if family == "gemma3" else QWEN)
    assert {path: filled[path] for path in pinned} == pinned


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_kernel_is_the_convolution(tmp_path, family):
    model = save_tiny(tmp_path, family)
    kernel = converted(tmp_path)["vision.patch_embed.kernel"]
    convolution = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    patch = torch.randn(1, *convolution.weight.shape[1:])
    want = torch.nn.functional.conv3d if patch.ndim == 5 else torch.nn.functional.conv2d
    want = want(patch, convolution.weight).detach().numpy().reshape(-1)
    np.testing.assert_allclose(patch.numpy().reshape(-1) @ kernel, want, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_give_what_one_file_gives(tmp_path, family):
    model = save_tiny(tmp_path / "one", family)
    model.save_pretrained(tmp_path / "many", max_shard_size="64KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = converted(tmp_path / "one"), converted(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(bits(one[path]) == bits(many[path]) for path in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_keep_the_bits_of_their_file(tmp_path, dtype):
    model = save_tiny(tmp_path, "qwen2_vl", dtype)
    want = in_numpy(model.state_dict()["model.language_model.layers.1.mlp.up_proj.weight"])
    got = converted(tmp_path)["decoder.layers.1.mlp.up_proj.kernel"]
    assert got.dtype.name == dtype
    assert bits(got.T) == bits(want)


@pytest.mark.parametrize(
    ("on_disk", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_another_dtype_on_request(tmp_path, on_disk, asked):
    model = save_tiny(tmp_path, "gemma3", on_disk)
    want = model.to(getattr(torch, asked)).state_dict()["model.language_model.layers.1.mlp.up_proj.weight"]
    assert bits(converted(tmp_path, dtype=asked)["decoder.layers.1.mlp.up_proj.kernel"].T) == bits(in_numpy(want))


def test_the_stated_dtype_is_the_checkpoints_own(tmp_path):
    save_tiny(tmp_path, "qwen2_vl")
    edit_json(tmp_path / "config.json", dtype=None, torch_dtype="bfloat16")  # as older versions wrote it
    assert {x.dtype.name for x in converted(tmp_path).values()} == {"bfloat16"}
    edit_json(tmp_path / "config.json", torch_dtype=None)
    assert {x.dtype.name for x in converted(tmp_path).values()} == {"float32"}
    edit_json(tmp_path / "config.json", dtype="float8_e4m3fn")
    assert "float8_e4m3fn" in refusal(tmp_path)
    assert converted(tmp_path, dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_is_that_of_torch(tmp_path, family, dtype):
    model = save_tiny(tmp_path, family, dtype)
    found = load(tmp_path).fingerprint
    assert found == fingerprint(model)
    assert load(tmp_path, dtype="float16").fingerprint == found  # of the checkpoint, however it is loaded
    with torch.no_grad():
        for name, weight in model.named_parameters():
            before = weight.clone()
            weight += 1
            assert (fingerprint(model) == found) == (name == "lm_head.weight"), name
            weight.copy_(before)
    assert fingerprint(model) == found


# Tied embeddings.


def tie(folder: Path) -> None:
    """Makes a saved Qwen checkpoint one whose logits come from the embedding, as the 2B models are."""
    edit_json(folder / "config.json", tie_word_embeddings=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_copy_of_the_tied_head_is_not_needed(tmp_path, head):
    save_tiny(tmp_path, "gemma3")
    embedding = "language_model.model.embed_tokens.weight"
    edit(tmp_path, lambda tensors: tensors.update({head: tensors[embedding]}))
    assert "decoder.lm_head.kernel" not in converted(tmp_path)
    for other in (lambda x: x + 1, lambda x: np.pad(x, ((0, 8), (0, 0)))):
        edit(tmp_path, lambda tensors, other=other: tensors.update({head: other(tensors[embedding])}))
        assert f"tie_word_embeddings is set: {head}." in refusal(tmp_path)


def test_qwen_may_be_tied(tmp_path):
    save_tiny(tmp_path, "qwen2_5_vl")
    tie(tmp_path)
    assert "decoder.lm_head.kernel" not in converted(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].astype(np.float16)}))
    assert "lm_head.weight" in refusal(tmp_path)
    edit(tmp_path, lambda tensors: {name: x for name, x in tensors.items() if name != "lm_head.weight"})
    assert "decoder.lm_head.kernel" not in converted(tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert "missing: lm_head.weight." in refusal(tmp_path)


# What is wrong with the weights, all at once.


def test_everything_wrong_is_named_in_one_error(tmp_path):
    save_tiny(tmp_path, "qwen2_5_vl")

    def spoil(tensors):
        for layer in (0, 1, 3):
            del tensors[f"model.layers.{layer}.mlp.gate_proj.weight"]
        del tensors["visual.merger.ln_q.weight"]
        tensors["model.layers.2.mlp.gate_proj.weight_scale"] = np.ones(1, np.float32)
        tensors["visual.merger.ln_q.bias"] = np.ones(32, np.float32)
        tensors[UP] = tensors[UP].T.copy()
        tensors["visual.patch_embed.proj.weight"] = tensors["visual.patch_embed.proj.weight"].swapaxes(1, 2).copy()
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].astype(np.int8)
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"]

    edit(tmp_path, spoil)
    message = refusal(tmp_path)
    for part in (
        "its qwen2_5_vl model",
        "missing: model.layers.[0-1, 3].mlp.gate_proj.weight, visual.merger.ln_q.weight",
        "unknown: model.layers.2.mlp.gate_proj.weight_scale, visual.merger.ln_q.bias",
        "misshapen: ",
        f"{UP} (64, 96) instead of (96, 64)",
        "visual.patch_embed.proj.weight (32, 2, 3, 4, 4) instead of (32, 3, 2, 4, 4)",
        "neither F32, BF16, F16: model.layers.0.mlp.down_proj.weight I8",
        "the same tensor: model.norm.weight and model.language_model.norm.weight",
    ):
        assert part in message


@pytest.mark.parametrize(("config", "weights"), [("qwen2_vl", "qwen2_5_vl"), ("gemma3", "qwen2_vl")])
def test_weights_of_another_family_are_refused(tmp_path, config, weights):
    for family in (config, weights):
        save_tiny(tmp_path / family, family)
    (tmp_path / weights / FILE).replace(tmp_path / config / FILE)
    message = refusal(tmp_path / config)
    assert f"its {config} model" in message
    assert "missing: " in message
    assert "unknown: " in message


class Headers:
    """What `Conversion` looks at before it reads."""

    folder = Path("checkpoint")

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors


def family_sources(family: str):
    config = ModelConfig.from_hf(tiny_models.make_model(family).config)
    flat = jax.tree_util.tree_leaves_with_path(abstract_weights(config, np.float32))
    sources = [NAMES[family].source(path_name(path), leaf.shape, config) for path, leaf in flat]
    return config, {source.name: source.shape for source in sources}


TABLES = {family: family_sources(family) for family in FAMILIES}


@given(st.data(), st.sampled_from(FAMILIES))
def test_any_set_of_faults_is_told_completely(data, family):
    config, shapes = TABLES[family]
    chosen = st.sets(st.sampled_from(sorted(shapes)), max_size=6)
    lost, misshapen = data.draw(chosen), data.draw(chosen)
    new = data.draw(st.sets(st.text("abc.0_", min_size=1).map(lambda s: f"more.{s}"), max_size=3))
    tensors = {
        name: TensorInfo(Path(FILE), (*shape, 7) if name in misshapen else shape, "BF16")
        for name, shape in shapes.items()
    }
    tensors = {name: info for name, info in tensors.items() if name not in lost} | {
        name: TensorInfo(Path(FILE), (1,), "BF16") for name in new
    }
    if not (lost or new or misshapen):
        assert Conversion(Headers(tensors), config).unused == []
        return
    with pytest.raises(WeightsError) as error:
        Conversion(Headers(tensors), config)
    message = str(error.value)
    assert ("missing" in message) == bool(lost)
    assert listed(name for name in shapes if name in lost) in message
    assert ("unknown" in message) == bool(new)
    assert listed(name for name in tensors if name in new) in message
    for name in misshapen - lost:
        assert f"{name} {(*shapes[name], 7)} instead of {shapes[name]}" in message


def test_what_the_model_does_not_read_is_told(tmp_path):
    save_tiny(tmp_path, "gemma3")
    conversion = Conversion(TensorFiles(tmp_path), ModelConfig.from_hf(AutoConfig.from_pretrained(tmp_path)))
    assert len(conversion.unused) == 11
    assert all(name.startswith("vision_tower.head.") for name in conversion.unused)


def test_names_are_listed_by_layer():
    names = [f"a.{i}.b" for i in (3, 0, 1, 7)] + ["c.d", "a.2.x", "norm"]
    assert listed(names) == "a.[0-1, 3, 7].b, c.d, a.2.x, norm"
    assert listed(["mlp.0"]) == "mlp.0"
    assert listed([]) == ""


# Files.


def test_a_cut_shard_is_refused(tmp_path):
    save_tiny(tmp_path, "qwen2_vl").save_pretrained(tmp_path / "many", max_shard_size="64KB")
    shard = sorted((tmp_path / "many").glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    message = refusal(tmp_path / "many")
    assert f"{shard} must be a whole safetensors file" in message
    shard.write_bytes(b"")
    assert str(shard) in refusal(tmp_path / "many")
    shard.unlink()
    assert f"Not there: {shard.name}" in refusal(tmp_path / "many")


def test_an_index_must_tell_what_the_shards_hold(tmp_path):
    save_tiny(tmp_path, "qwen2_vl").save_pretrained(tmp_path / "many", max_shard_size="64KB")
    path = tmp_path / "many" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = index["weight_map"]
    first, last = min(files.values()), max(files.values())
    norm = files.pop("model.norm.weight")
    files["model.layers.9.x"] = norm
    files[UP] = last if files[UP] == first else first
    path.write_text(json.dumps(index))
    message = refusal(tmp_path / "many")
    assert "named but in no shard: model.layers.9.x" in message
    assert "in a shard but not named: model.norm.weight" in message
    assert f"in another shard than named: {UP}" in message
    for text in ("{", "[]", "{}", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}'):
        path.write_text(text)
        assert str(path) in refusal(tmp_path / "many")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_tiny(tmp_path, "qwen2_vl").save_pretrained(tmp_path / "many", max_shard_size="64KB")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    name, x = next(iter(load_file(shards[0]).items()))
    save_file({**load_file(shards[1]), name: x}, shards[1])
    assert f"Got {name} in {shards[0].name} and {shards[1].name}" in refusal(tmp_path / "many")


def test_folders_that_hold_no_checkpoint(tmp_path):
    assert "there is no such folder" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "there is no config.json" in refusal(tmp_path / "empty")
    save_tiny(tmp_path / "bin", "qwen2_vl")
    (tmp_path / "bin" / FILE).rename(tmp_path / "bin" / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(tmp_path / "bin")
    config = tmp_path / "bin" / "config.json"
    edit_json(config, dtype="float33")  # fails in transformers; the next one in what we read
    assert "must be a valid configuration. Got: module 'torch' has no attribute 'float33'" in refusal(tmp_path / "bin")
    edit_json(
        config, dtype="float32", text_config=json.loads(config.read_text())["text_config"] | {"num_attention_heads": 0}
    )
    assert "must be a valid configuration. Got: integer division" in refusal(tmp_path / "bin")
    edit_json(config, model_type="llama")
    assert "'llama'" in refusal(tmp_path / "bin")
    config.write_text("{")
    assert "must be JSON" in refusal(tmp_path / "bin")
    with pytest.raises(ValueError, match="dtype must be auto or one of"):
        load(tmp_path / "bin", dtype="int8")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_configuration_as_the_hub_has_it(tmp_path, family):
    save_tiny(tmp_path, family)
    new = converted(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text = {key: value for key, value in text.items() if key not in ("model_type", "layer_types", "dtype")}
    config |= text | dict(
        torch_dtype=config.pop("dtype"),
        rope_theta=rope["rope_theta"],
        rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]),
    )
    path.write_text(json.dumps(config))  # one level, older names
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    params = load(tmp_path)
    assert params.fingerprint == fingerprint(model)
    assert params.config == ModelConfig.from_hf(model.config)
    old = leaves(params.weights)
    assert all(bits(new[path]) == bits(old[path]) for path in new)
