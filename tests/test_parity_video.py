"""A prompt of videos and a picture has one layout, in torch and in JAX."""

from __future__ import annotations

from jax_blindsight.config import ModelConfig
from jax_blindsight.inputs import read_inputs
from tiny_models import make_model, qwens
from tiny_videos import ROWS, make_film_inputs
from torch_blindsight.models import inspect_model
from torch_blindsight.prompts import read_layouts


@qwens
def test_one_layout(family):
    model, inputs = make_model(family), make_film_inputs(family)
    info, config = inspect_model(model), ModelConfig.from_hf(model.config)
    in_torch, _ = read_layouts(inputs, info.family, info.special)
    in_jax = read_inputs(config, {name: x.numpy() for name, x in inputs.items()}).tokens.layouts(config)
    assert in_jax == in_torch
    assert in_jax[0].images.tolist() == ROWS
