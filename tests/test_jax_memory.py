"""What must stay small: conversion, in a process of its own, and a long prompt's MLP, by XLA's account."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig

from jax_blindsight import decoder
from jax_blindsight.config import ModelConfig
from jax_blindsight.convert import path_name
from jax_blindsight.model import abstract_weights, end_layer
from jax_blindsight.names import NAMES
from jax_checkpoints import FILE, save_tiny
from tiny_models import make_model

MEASURE = """
import sys
from pathlib import Path
import jax
from transformers import AutoConfig
from jax_blindsight.params import load

def status(name):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))

jax.block_until_ready(jax.numpy.zeros(1))
AutoConfig.from_pretrained(sys.argv[1])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
params = load(sys.argv[1])
print(1024 * (status("VmHWM") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_near_the_models_size(tmp_path):
    save_tiny(tmp_path, "qwen2_5_vl")
    text = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=2)
    hf_config = json.loads((tmp_path / "config.json").read_text())
    hf_config["text_config"] |= text | dict(num_hidden_layers=9, layer_types=["full_attention"] * 9, vocab_size=2048)
    hf_config["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    hf_config["vision_config"]["out_hidden_size"] = 1024
    (tmp_path / "config.json").write_text(json.dumps(hf_config | dict(dtype="bfloat16")))
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(tmp_path))
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_weights(config, np.float32)):
        source = NAMES["qwen2_5_vl"].source(path_name(path), leaf.shape, config)
        tensors[source.name] = np.zeros(source.shape, ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / FILE)
    size, largest = (f(x.nbytes for x in tensors.values()) for f in (sum, max))
    del tensors
    assert size > 200e6
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    growth = int(done.stdout)
    assert size < growth < size + 2 * largest + 20e6  # a tensor's pages of the file count while it is read


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_long_prompt_passes_the_mlp_in_blocks(family, monkeypatch):
    """The same numbers in less memory; the last block is shorter. Gradients pass as well."""
    config = ModelConfig.from_hf(make_model(family).config)
    text = replace(config.text, intermediate_size=1024)
    config, n, rng = replace(config, text=text), 1000, np.random.default_rng(0)
    shapes = abstract_weights(config, np.float32)["decoder"]["layers"][0]
    weights = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), shapes)
    hidden, out = (
        jnp.asarray(rng.standard_normal((2, n, *of_row)), jnp.float32)
        for of_row in ((text.hidden_size,), (text.n_heads, text.head_dim))
    )
    sizes, results = [], []
    for block, long in ((n, n), (96, n - 1)):
        monkeypatch.setattr(decoder, "_BLOCK", block)
        monkeypatch.setattr(decoder, "_LONG", long)
        run = jax.jit(partial(end_layer, weights, config)).lower(hidden, out).compile()
        sizes.append(run.memory_analysis().temp_size_in_bytes)
        ended, back = jax.vjp(partial(end_layer, weights, config), hidden, out)
        results.append([run(hidden, out), *back(ended)])
    assert sizes[1] < sizes[0] / 3
    for whole, blocks in zip(*results, strict=True):
        np.testing.assert_allclose(blocks, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
