"""`blindsight convert`: a checkpoint becomes a folder that stands alone, or the reason why not is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import tiny_models
from blindsight_cli.commands import doctor
from blindsight_cli.main import app
from jax_blindsight.params import load
from jax_checkpoints import FILE, edit, edit_json, save_tiny


def convert(*args: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, args)], catch_exceptions=False)


@pytest.fixture
def tiny(tmp_path):
    """A checkpoint folder with a file of its processor, and its profile."""
    model = save_tiny(tmp_path / "tiny", "gemma3", "bfloat16")
    (tmp_path / "tiny" / "chat_template.jinja").write_text("template")
    tiny_models.mixed_profile(model).save(tmp_path / "profile.json")
    return tmp_path / "tiny"


def test_a_converted_folder_stands_alone(tiny, tmp_path):
    done = convert(tiny, tmp_path / "out", "--profile", tmp_path / "profile.json")
    assert done.exit_code == 0, done.output
    assert "gemma3" in done.stdout
    assert "bfloat16" in done.stdout
    got, want = load(tmp_path / "out"), load(tiny, tmp_path / "profile.json")
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "template"
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_what_needs_torch_says_that_a_folder_is_for_jax(tiny, tmp_path):
    out, picture = tmp_path / "out", tmp_path / "a.png"
    assert convert(tiny, out).exit_code == 0
    Image.new("RGB", (8, 8)).save(picture)
    for command in (("run", out, "--image", picture, "--question", "?"), ("analyze", out, "--puzzles", 2)):
        done = CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False)
        assert done.exit_code == 2 and "wrote for JAX. Use --backend jax" in done.stderr
    (found,) = doctor._check_checkpoint(out)
    assert found.status == "info" and "use it with --backend jax" in found.detail


def test_json_and_dtype(tiny, tmp_path):
    done = convert(tiny, tmp_path / "out", "--dtype", "float32", "--json")
    told = json.loads(done.stdout)
    leaves = jax.tree.leaves(load(tmp_path / "out"))
    assert {leaf.dtype.name for leaf in leaves} == {told["dtype"]} == {"float32"}
    assert told["bytes"] == sum(leaf.nbytes for leaf in leaves)
    assert told["parameters"] == sum(leaf.size for leaf in leaves)
    assert told["has_profile"] is False
    # Converted once more, from what the first wrote.
    again = convert(tmp_path / "out", tmp_path / "out2", "--dtype", "bfloat16", "--json")
    assert json.loads(again.stdout)["digest"] == told["digest"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(tmp_path / "out2"))} == {"bfloat16"}


def test_wrong_input_exits_with_2(tiny, tmp_path):
    assert convert(tmp_path / "none", tmp_path / "out").exit_code == 2
    assert convert(tiny, tmp_path / "out", "--dtype", "int8").exit_code == 2
    in_use = convert(tiny, tiny)
    assert in_use.exit_code == 2
    assert "it exists" in in_use.stderr
    edit(tiny, lambda tensors: {name: x for name, x in tensors.items() if "multi_modal" not in name})
    lacking = convert(tiny, tmp_path / "out")
    assert lacking.exit_code == 2
    for name in ("mm_input_projection_weight", "mm_soft_emb_norm.weight"):
        assert f"multi_modal_projector.{name}" in lacking.stderr
    os.truncate(tiny / FILE, 100)
    cut = convert(tiny, tmp_path / "out")
    assert cut.exit_code == 2
    assert FILE in cut.stderr
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together_exits_with_3(tiny, tmp_path):
    save_tiny(tmp_path / "other", "qwen2_vl")
    foreign = convert(tmp_path / "other", tmp_path / "out", "--profile", tmp_path / "profile.json")
    assert foreign.exit_code == 3
    edit_json(tiny / "config.json", model_type="llama")
    other = convert(tiny, tmp_path / "out")
    assert other.exit_code == 3
    assert "llama" in other.stderr
    edit_json(tiny / "config.json", model_type="gemma3")
    text = json.loads((tiny / "config.json").read_text())["text_config"]
    edit_json(tiny / "config.json", text_config=text | {"attn_logit_softcapping": 50.0})
    unknown = convert(tiny, tmp_path / "out")
    assert unknown.exit_code == 3
    assert "attn_logit_softcapping" in unknown.stderr
    assert not (tmp_path / "out").exists()


def test_it_needs_no_torch(tiny, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from blindsight_cli.main import app\n"
        f"app(['convert', {str(tiny)!r}, {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
