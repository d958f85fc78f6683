"""Models split over eight virtual devices answer like models on one, and send neither weights nor keys around."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jax_blindsight.config import ModelConfig
from jax_blindsight.sharding import make_mesh, param_shardings
from tiny_models import make_model

HIDDEN = "f32[1,128,64]"  # [B, T, E] of one of the four devices along the data axis


def run(family: str, folder: Path) -> dict[str, Any]:
    """What `mesh_run` found."""
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("mesh_run.py")), family, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return run("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3"])
def either(request, tmp_path_factory):
    if request.param == "qwen2_5_vl":
        return request.getfixturevalue("qwen")
    return run(request.param, tmp_path_factory.mktemp("gemma"))


def test_a_prefill_gives_what_one_device_gives(either):
    assert either["largest"] > 1
    assert either["difference"] < 1e-5 * either["largest"]  # sums in another order, float32


def test_a_prefill_sends_sums_only(either):
    programs = either["collectives"]
    assert programs["_begin"] == programs["_by_category"] == {}
    assert programs["_end"] == {f"all-reduce {HIDDEN}": 2}  # all that a layer needs
    for name in ("_embed", "_block" if "_block" in programs else "_siglip"):
        assert programs[name], "nothing is split"
        assert all(kind.startswith("all-reduce ") for kind in programs[name])


def test_the_cache_is_dealt_out_by_row_and_kv_head(either):
    assert either["cache"] == [1, 1]  # of [4, 2, S, D]


def test_decode_steps_send_sums_only(qwen):
    assert qwen["generate"]["equal"]
    assert qwen["collectives"]["_step"]
    assert all(kind.startswith("all-reduce ") for kind in qwen["collectives"]["_step"])


def test_calibration_measures_what_it_does_on_one_device(qwen):
    assert 0 <= qwen["measured"]["sinks"] < 1e-6
    assert 0 <= qwen["measured"]["statistics"] < 1e-5


def test_projections_are_split_and_norms_are_not(qwen):
    shares = qwen["shares"]
    for path, share in shares.items():
        split = any(x in path for x in ("_proj.kernel", "embedding", "lm_head", "gate_proj.bias", "up_proj.bias"))
        split |= "decoder" in path and path.endswith("_proj.bias")
        assert share == (2 if split else 1), path


def test_the_attention_needs_its_wrapper(qwen):
    attention = qwen["attention"]
    assert attention["close"] == [True, True]
    assert attention["wrapped"] == {}
    assert any(kind.startswith("all-gather") for kind in attention["plain"])  # what the other tests look for is seen


def test_a_split_model_is_saved_whole(qwen):
    assert qwen["saved"] == {"bits": True, "shardings": True, "marks": True}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("batch", "must divide the batch of 1. Got 4 devices"),
        ("kv heads", "must divide the model's 2 kv heads: heads are not copied. Got 4"),
        ("axes", "must have the axes data and model. Got ('model',)"),
        ("explicit", "must be Auto, so that XLA places what lies between. Got (Explicit, Explicit)"),
        ("devices", "the number of devices, 8. Got 3 x 3"),
    ],
)
def test_what_does_not_fit_is_refused(qwen, what, message):
    assert message in qwen["refusals"][what]


def test_a_mesh_of_one_device():
    assert make_mesh().devices.tolist() == [[jax.devices()[0]]]


def test_what_cannot_be_split_evenly_is_on_every_device():
    """As 3,420 columns of Qwen2.5-VL's tower over eight; the decoder's must be split, or the mesh is refused."""
    mesh = AbstractMesh((1, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    config = make_model("qwen2_5_vl").config
    for more in (0, 1):
        config.text_config.vocab_size, config.vision_config.intermediate_size = 96 + more, 48 + more
        placed = param_shardings(ModelConfig.from_hf(config), mesh)
        decoder, block = placed["decoder"], placed["vision"]["blocks"][0]
        assert decoder["embed_tokens"]["embedding"].spec == (P() if more else P("model", None))
        assert decoder["lm_head"]["kernel"].spec == block["mlp"]["gate_proj"]["kernel"].spec
        assert decoder["lm_head"]["kernel"].spec == (P() if more else P(None, "model"))
        assert block["mlp"]["gate_proj"]["bias"].spec == (P() if more else P("model"))
        assert block["mlp"]["down_proj"]["kernel"].spec == decoder["embed_tokens"]["embedding"].spec
        assert decoder["layers"][0]["mlp"]["down_proj"]["kernel"].spec == P("model", None)
