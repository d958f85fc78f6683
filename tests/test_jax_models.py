"""The JAX decoder against transformers' own modules: in float32, module by module, as exact as transformers is."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2VLConfig
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from jax_blindsight import model as jax_model
from jax_blindsight.config import ACTIVATIONS, ModelConfig
from jax_blindsight.decoder import Attention, DecoderLayer, rope_rotation
from jax_blindsight.layers import GatedMLP, LayerNorm, Linear, RMSNorm, activation, inverse_frequencies
from jax_blindsight.portable import _dot
from jax_blindsight.positions import rope_positions
from jax_blindsight.tower import encode_images
from jax_blindsight.vision_inputs import prepare_vision
from jax_parity import Pair, assert_as_exact, make, pair
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from tiny_models import FAMILIES, make_ids, make_inputs, make_model, make_video_inputs, positions_of

families = pytest.mark.parametrize("family", FAMILIES)


def dense(config: ModelConfig, masks: dict[int | None, np.ndarray]) -> Any:
    """Plain softmax attention over the whole prompt, `masks` `[B, N, N]` by window."""

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k, precision="highest", preferred_element_type=jnp.float32)
        mask = masks[config.text.windows[layer]][:, None]
        weights = jax.nn.softmax(jnp.where(mask, scores * config.text.scale, -1e30), axis=-1).astype(v.dtype)
        out = jnp.einsum("bhts,bhsd->bthd", weights, v, precision="highest", preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    return attend


def masks_of(config: ModelConfig, ids: np.ndarray, valid: np.ndarray, frames: list[int]) -> dict[Any, np.ndarray]:
    """What a dense head sees, by window."""
    make_layout = partial(Layout.from_ids, special=config.special, bidirectional=config.bidirectional)
    layouts = [make_layout(row, valid=real, frames=frames) for row, real in zip(ids, valid, strict=True)]
    see = partial(category_mask, category=Category.DENSE, template=SinkTemplate())
    return {w: np.stack([see(layout, window=w) for layout in layouts]) for w in set(config.text.windows)}


def hidden_of(config: ModelConfig, weights: Any, inputs: dict[str, torch.Tensor]) -> tuple[jax.Array, np.ndarray]:
    """Final hidden states of a whole prompt with its pictures `[B, N, E]`, and which rows are real."""
    arrays = {name: x.numpy() for name, x in inputs.items()}
    ids, valid = arrays["input_ids"], arrays["attention_mask"] != 0
    videos = arrays.get("video_grid_thw")
    positions, *_ = rope_positions(config, ids, valid, arrays.get("image_grid_thw"), videos)
    masks = masks_of(config, ids, valid, [] if videos is None else videos[:, 0].tolist())
    vision, place = prepare_vision(config, arrays)

    @jax.jit
    def run(weights, vision):
        features = encode_images(weights, config, vision)
        hidden = jax_model.embed_tokens(weights, config, ids)
        hidden = jnp.where(place[..., None] >= 0, features[place], hidden)
        return jax_model.decode(weights, config, hidden, positions, dense(config, masks))

    return run(weights, vision), valid


def run_whole(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """transformers' final hidden states of the real rows, `[n, E]`."""
    hidden = model.model(**inputs, position_ids=positions_of(model, inputs)).last_hidden_state
    return hidden[inputs["attention_mask"] != 0]


@families
def test_norms(family):
    p, x = pair(family), torch.randn(2, 5, 64)
    ours = make(RMSNorm, 64, p.config.text.norm_eps, p.config.text.norm_offset, weights=p.weights["decoder"]["norm"])
    p.check(ours(x.numpy()), lambda model, x: model.model.language_model.norm(x), dict(x=x))


def test_layer_norm():
    """Of large rows, and of rows so small that eps counts."""
    p, x = pair("qwen2_vl"), (torch.randn(2, 5, 32) + 0.3) * torch.tensor([3.0, 1e-3])[:, None, None]
    ours = make(LayerNorm, 32, 1e-6, weights=p.weights["vision"]["blocks"][0]["norm1"])
    p.check(ours(x.numpy()), lambda model, x: model.model.visual.blocks[0].norm1(x), dict(x=x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = torch.linspace(-12, 12, 999)
    function = ACT2FN[name]
    assert_as_exact(activation(name)(jnp.asarray(x)), function(x).numpy(), function(x.double()).numpy())


@families
def test_mlp(family):
    p, x = pair(family), torch.randn(2, 5, 64)
    ours = make(GatedMLP, 64, 96, p.config.text.activation, weights=p.weights["decoder"]["layers"][0]["mlp"])
    p.check(ours(x.numpy()), lambda model, x: model.model.language_model.layers[0].mlp(x), dict(x=x))


@pytest.mark.parametrize(("n", "theta"), [(16, 1e4), (128, 1e6), (256, 1e6), (40, 1e4)])
def test_frequencies_are_those_of_transformers(n, theta):
    want = 1.0 / (theta ** (torch.arange(0, n, 2, dtype=torch.float) / n))
    np.testing.assert_allclose(inverse_frequencies(n, theta), want.numpy(), rtol=np.finfo(np.float32).eps, atol=0)


@families
@pytest.mark.parametrize("layer", [0, 2])
def test_rotation(family, layer):
    p = pair(family)
    text, three = p.config.text, p.config.text.mrope_section is not None
    positions = torch.randint(0, 500, (3, 2, 7) if three else (2, 7))
    ours = jnp.concatenate(rope_rotation(text, text.ropes[layer], positions.numpy()), axis=-1)[:, 0]  # [B, T, D]
    kind = () if three else (p.single.config.text_config.layer_types[layer],)
    cos, sin = p.single.model.language_model.rotary_emb(torch.zeros(1), positions, *kind)
    want = torch.cat([cos[..., :8], sin[..., 8:]], dim=-1)
    np.testing.assert_allclose(ours, want.numpy(), atol=500 * np.finfo(np.float32).eps)


def test_linear_scaling_is_that_of_transformers():
    """As in the checkpoints of Gemma 3: positions of the full layers are divided, of the sliding ones not."""
    config = make_model("gemma3").config
    config.text_config.rope_parameters["full_attention"] |= dict(rope_type="linear", factor=8.0)
    text = ModelConfig.from_hf(config).text
    positions = torch.arange(0, 800, 7)[None]
    for layer, kind in enumerate(config.text_config.layer_types):
        cos, sin = Gemma3RotaryEmbedding(config.text_config)(torch.zeros(1), positions, kind)
        ours = rope_rotation(text, text.ropes[layer], positions.numpy())
        for mine, theirs in zip(ours, (cos, sin), strict=True):
            np.testing.assert_allclose(mine[:, 0], theirs[..., :8], atol=800 * np.finfo(np.float32).eps)


def test_sliding_layers_of_qwen():
    text = dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    config = Qwen2VLConfig(
        text_config=make_model("qwen2_vl").config.text_config.to_dict() | text | {"layer_types": None}
    )
    assert ModelConfig.from_hf(config).text.windows == (None, 32, 32)


@families
@pytest.mark.parametrize("layer", [0, 2])
def test_attention_and_layer(family, layer):
    """Projections, q/k norms, rotation and residuals; both sides attend by the same plain masks."""
    p = pair(family)
    text, x = p.config.text, torch.randn(2, 7, 64)
    positions = torch.randint(0, 30, (3, 2, 7) if text.mrope_section else (2, 7))
    causal = np.tril(np.ones((2, 7, 7), dtype=bool))
    attend = dense(p.config, {window: causal for window in text.windows})
    by = rope_rotation(text, text.ropes[layer], positions.numpy())
    weights = p.weights["decoder"]["layers"][layer]

    def run(part, model, x, positions):
        decoder = model.model.language_model
        kind = () if text.mrope_section else (model.config.text_config.layer_types[layer],)
        rotation = decoder.rotary_emb(x, positions, *kind)
        module = decoder.layers[layer] if part == "layer" else decoder.layers[layer].self_attn
        mask = torch.tensor(causal)[:, None]
        out = module(hidden_states=x, position_embeddings=rotation, attention_mask=mask)
        return out if part == "layer" else out[0]

    inputs = dict(x=x, positions=positions)
    attention = make(Attention, text, weights=weights["attention"])
    attended = attention.merge(attend(layer, *attention.project(jnp.asarray(x), by)))
    p.check(attended, partial(run, "attention"), inputs)
    whole = make(DecoderLayer, text, weights=weights)
    p.check(whole(jnp.asarray(x), by, layer, attend), partial(run, "layer"), inputs)


@families
def test_embedding_and_logits(family):
    p = pair(family)
    ids, hidden = torch.randint(0, 96, (2, 9)), torch.randn(2, 9, 64)
    embed = partial(jax_model.embed_tokens, p.weights, p.config)
    p.check(embed(ids.numpy()), lambda model, ids: model.model.language_model.embed_tokens(ids), dict(ids=ids))
    logits = jax_model.unembed(p.weights, p.config, jnp.asarray(hidden))
    assert logits.dtype == jnp.float32
    p.check(logits, lambda model, hidden: model.lm_head(hidden), dict(hidden=hidden))
    outside = embed(np.array([[-1, 200]]))
    assert np.isfinite(outside).all(), "placeholders may lie outside the vocabulary"


@families
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_whole_model(family, left):
    """Images in, final hidden states out: two padded prompts, windows and both ways of looking included."""
    p = pair(family)
    inputs = make_inputs(family, [make_ids(3), make_ids(1, seed=1)], left=left)
    hidden, valid = hidden_of(p.config, p.weights, inputs)
    p.check(np.asarray(hidden)[valid], run_whole, inputs)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_whole_model_on_videos(family):
    p, inputs = pair(family), make_video_inputs([2, 3], seed=1)
    hidden, valid = hidden_of(p.config, p.weights, inputs)
    p.check(np.asarray(hidden)[valid], run_whole, inputs)


@families
def test_bfloat16_is_as_exact_as_transformers(family):
    p, inputs = pair(family), make_inputs(family, [make_ids(2)])
    narrow = copy.deepcopy(p.single).bfloat16()
    truth = copy.deepcopy(narrow).double()
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), p.weights)
    hidden, valid = hidden_of(p.config, weights, inputs)
    assert hidden.dtype == jnp.bfloat16
    with torch.no_grad():
        plain, exact = (
            run_whole(m, **{n: x.to(m.dtype) if x.is_floating_point() else x for n, x in inputs.items()})
            .double()
            .numpy()
            for m in (narrow, truth)
        )
    assert_as_exact(np.asarray(hidden, np.float32)[valid], plain, exact)


@families
def test_weights_are_made_once_per_configuration(family):
    p: Pair = pair(family)
    abstract = jax_model.abstract_weights(p.config, jnp.bfloat16)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract, is_leaf=lambda x: hasattr(x, "dtype"))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, jnp.bfloat16), p.weights)
    again = ModelConfig.from_hf(make_model(family).config)
    assert again == p.config and hash(again) == hash(p.config)
    assert jax_model._split(again) is jax_model._split(p.config)


def test_tied_weights_have_one_table():
    config = Qwen2VLConfig(**make_model("qwen2_vl").config.to_dict() | {"tie_word_embeddings": True})
    assert "lm_head" not in jax_model.abstract_weights(ModelConfig.from_hf(config), jnp.float32)["decoder"]


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2_vl", lambda c: c.text_config.rope_parameters.update(rope_type="yarn"), "rope_type must be default or"),
        ("gemma3", lambda c: setattr(c.text_config, "attn_logit_softcapping", 50.0), "attn_logit_softcapping must be"),
        ("gemma3", lambda c: setattr(c.text_config, "use_bidirectional_attention", True), "must be False .* Got True"),
        (
            "gemma3",
            lambda c: setattr(c.text_config, "attention_bias", True),
            "attention_bias must be False .* Got True",
        ),
        ("qwen2_5_vl", lambda c: setattr(c.vision_config, "hidden_act", "relu"), "activation function .* Got relu"),
        ("qwen2_5_vl", lambda c: setattr(c.text_config, "hidden_act", "relu"), "activation function .* Got relu"),
        ("gemma3", lambda c: setattr(c.text_config, "layer_types", ["chunked_attention"]), "layer_types must be"),
        ("qwen2_vl", lambda c: setattr(c, "quantization_config", {"quant_method": "awq"}), r"plain weights.*\(awq\)"),
    ],
    ids=[
        "yarn",
        "softcap",
        "bidirectional-text",
        "bias",
        "vision-activation",
        "text-activation",
        "chunked",
        "quantized",
    ],
)
def test_what_the_models_do_not_compute_is_refused(family, change, message):
    config = make_model(family).config
    change(config)
    with pytest.raises(NotImplementedError, match=message):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "qwen2_5_vl",
            lambda c: c.text_config.rope_parameters.update(mrope_section=[1]),
            r"half the head dimension.*Got \(1,\)",
        ),
        ("qwen2_5_vl", lambda c: setattr(c.vision_config, "window_size", 7), "at least the 8 pixels of a token. Got 7"),
        (
            "qwen2_vl",
            lambda c: setattr(c.text_config, "layer_types", ["sliding_attention"] * 4),
            "at least 1 .*Got None",
        ),
        ("gemma3", lambda c: setattr(c.text_config, "sliding_window", 0), "sliding_window must be .* Got 0"),
        ("gemma3", lambda c: setattr(c.text_config, "sliding_window", -1), "sliding_window must be .* Got -1"),
        ("gemma3", lambda c: setattr(c, "mm_tokens_per_image", 9), "8 x 8 patches add up to. Got 9"),
        ("gemma3", lambda c: setattr(c, "mm_tokens_per_image", 81), "8 x 8 patches add up to. Got 81"),
        ("gemma3", lambda c: setattr(c, "mm_tokens_per_image", 0), "8 x 8 patches add up to. Got 0"),
    ],
    ids=["sections", "windows", "no-window", "window-of-0", "window-of-minus-1", "tokens", "more-tokens", "no-tokens"],
)
def test_sizes_that_contradict_each_other_are_refused(family, change, message):
    config = make_model(family).config
    change(config)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config)


def test_the_smallest_sizes_there_can_be():
    gemma, qwen = (make_model(family).config for family in ("gemma3", "qwen2_5_vl"))
    gemma.text_config.sliding_window, gemma.mm_tokens_per_image, qwen.vision_config.window_size = 1, 1, 8
    config = ModelConfig.from_hf(gemma)
    assert min(w for w in config.text.windows if w is not None) == 1 and config.vision.merge == 8
    assert ModelConfig.from_hf(qwen).vision.window_size == 8


def test_rotary_sections_that_a_configuration_leaves_out():
    """As the first Qwen2-VL had them, whose heads have 128 dimensions."""
    config = make_model("qwen2_vl").config
    del config.text_config.rope_parameters["mrope_section"]
    config.text_config.hidden_size = 128 * config.text_config.num_attention_heads
    sections = Qwen2VLRotaryEmbedding(config.text_config).mrope_section
    assert ModelConfig.from_hf(config).text.mrope_section == tuple(sections)


def test_another_family_is_refused():
    class Llava:
        def to_dict(self):
            return {"model_type": "llava"}

    with pytest.raises(ValueError, match="model_type must be one of"):
        ModelConfig.from_hf(Llava())


def test_products_of_float32_are_not_rounded_to_tf32():
    """As a GPU would by default, and a CPU does not show."""
    x = jax.ShapeDtypeStruct((1, 8, 8), jnp.float32)
    for product in (lambda x: make(Linear, 8, 8, weights=dict(kernel=x[0]))(x), lambda x: _dot(x, x, 2)):
        assert "HIGHEST" in str(jax.make_jaxpr(product)(x))


def test_a_bias_is_added_before_rounding():
    weights = dict(kernel=jnp.ones((2, 1), jnp.bfloat16), bias=jnp.full(1, -256, jnp.bfloat16))
    linear = make(Linear, 2, 1, bias=True, weights=weights)
    assert linear(jnp.array([[128, 129]], jnp.bfloat16))[0, 0] == 1, "257 has no bfloat16"
