"""Conversion holds the model and about one tensor: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig

from jax_blindsight.config import ModelConfig
from jax_blindsight.convert import path_name
from jax_blindsight.model import abstract_weights
from jax_blindsight.names import NAMES
from jax_checkpoints import FILE, save_tiny

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
