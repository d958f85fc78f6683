"""`Params`: one argument of jitted functions, found with its profile, saved and loaded again to the bit."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_models
from jax_blindsight import calibrate, checkpoint
from jax_blindsight.params import load, save
from jax_checkpoints import edit_json, save_tiny
from shared_profiles import Category
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile, ProfileMismatchError
from tiny_models import FAMILIES


@pytest.fixture
def tiny(tmp_path):
    """A checkpoint folder and a profile of its model."""
    model = save_tiny(tmp_path / "tiny", "qwen2_5_vl")
    return tmp_path / "tiny", tiny_models.mixed_profile(model)


def same(a, b) -> bool:
    """Whether two models are equal, weights to the bit."""
    weights = zip(jax.tree.leaves(a.weights), jax.tree.leaves(b.weights), strict=True)
    equal = all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in weights)
    return equal and jax.tree.structure(a) == jax.tree.structure(b)


# One argument.


def test_params_are_one_argument_of_a_jitted_function(tiny):
    folder, profile = tiny
    params = load(folder, profile)
    traced = []

    @jax.jit
    def total(p):
        traced.append(p.profile)
        return sum(x.sum() for x in jax.tree.leaves(p))

    first = total(params)
    assert total(jax.tree.map(lambda x: 2 * x, params)) == pytest.approx(2 * float(first), rel=1e-4)
    total(replace(params, profile=Profile.from_json(profile.to_json())))  # another object, the same profile
    assert traced == [profile]
    dense = Profile.uniform(Category.DENSE, params.fingerprint)
    total(replace(params, profile=dense))
    total(replace(params, profile=None))
    assert traced == [profile, dense, None]


def test_a_params_comes_back_from_its_leaves(tiny):
    params = load(*tiny)
    leaves, structure = jax.tree.flatten(params)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert same(params, jax.tree.unflatten(structure, leaves))
    assert jax.tree.map(jnp.zeros_like, params).profile == params.profile


def test_weights_are_on_the_default_device(tiny):
    device = jax.devices()[-1]
    with jax.default_device(device):
        params = load(tiny[0])
    assert all(x.devices() == {device} and x.committed for x in jax.tree.leaves(params))


# The weights that were loaded, or others.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_cast_or_moved_are_those_that_were_loaded(tiny, dtype):
    loaded = load(tiny[0], dtype=dtype)
    for names in itertools.product(("float32", "bfloat16", "float16"), repeat=3):
        params = loaded
        for name in names:
            params = jax.tree.map(lambda x, name=name: x.astype(name), params)
        params.require_loaded()
    jax.device_get(loaded).require_loaded()
    moved = jax.device_put(pickle.loads(pickle.dumps(loaded)), jax.devices()[0])
    jax.jit(lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p))(moved).require_loaded()


@pytest.mark.parametrize("tower", ["decoder", "vision"])
def test_other_weights_are_another_model(tiny, tmp_path, tower):
    """Their fingerprint would be that of the old ones, and so their profile and what a state has measured."""
    params = load(*tiny)
    tuned = jax.tree.map(lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params.weights[tower])
    other = replace(params, weights=params.weights | {tower: tuned})
    for use in (lambda: save(other, tmp_path / "saved"), lambda: calibrate(other, [], state=tmp_path / "state.npz")):
        with pytest.raises(ValueError, match=r"must be those that were loaded: .* Got others .* load that"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    save(replace(other, marks=frozenset()), tmp_path / "saved")  # as one that was never loaded


# Its profile.


def test_a_profile_is_found_beside_the_checkpoint(tiny):
    folder, profile = tiny
    assert load(folder).profile is None
    profile.save(folder / FILE_NAME)
    assert load(folder).profile == profile
    assert load(folder, search=False).profile is None
    dense = Profile.uniform(Category.DENSE, profile.fingerprint)
    assert load(folder, dense).profile == dense  # a given one goes before
    dense.save(folder / "other.json")
    assert load(folder, folder / "other.json").profile == dense
    assert load(folder, str(folder / "other.json")).profile == dense


def test_a_profile_of_another_model_is_refused(tiny, tmp_path):
    folder, profile = tiny
    other = replace(profile, fingerprint=replace(profile.fingerprint, digest="sha256:" + "0" * 64))
    with pytest.raises(ProfileMismatchError, match="digest"):
        load(folder, other)
    assert load(folder, other, allow_mismatch=True).profile == other
    other.save(folder / FILE_NAME)
    with pytest.raises(ProfileMismatchError, match=FILE_NAME):
        load(folder)
    fewer = Profile(
        profile.categories[:2], profile.template, replace(profile.fingerprint, n_layers=2), None, profile.choice
    )
    with pytest.raises(ProfileMismatchError):
        load(folder, fewer, allow_mismatch=True)


# Saved.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same_to_the_bit(tmp_path, family, dtype):
    model = save_tiny(tmp_path / "tiny", family)
    beside = {"chat_template.jinja": "x", "generation_config.json": json.dumps({"eos_token_id": 7, "top_k": 3})}
    for name, text in beside.items():
        (tmp_path / "tiny" / name).write_text(text)
    params = load(tmp_path / "tiny", tiny_models.mixed_profile(model), dtype=dtype)
    save(params, tmp_path / "saved", beside=[tmp_path / "tiny" / name for name in beside])
    shutil.rmtree(tmp_path / "tiny")
    assert {name: (tmp_path / "saved" / name).read_text() for name in beside} == beside
    again = load(tmp_path / "saved")
    assert same(params, again)
    assert again.profile == params.profile
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(("stated", "want"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_where_an_answer_ends_is_the_checkpoints(tmp_path, stated, want):
    save_tiny(tmp_path / "hf", "qwen2_vl")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    params = load(tmp_path / "hf")
    assert params.eos == want
    save(params, tmp_path / "saved")
    assert load(tmp_path / "saved").eos == want
    (tmp_path / "hf" / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json must be a JSON object"):
        load(tmp_path / "hf")


def test_the_configuration_says_where_an_answer_ends_if_nothing_else_does(tmp_path):
    save_tiny(tmp_path, "gemma3")
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).eos == (2,)  # of its text
    edit_json(tmp_path / "config.json", eos_token_id=0)
    assert load(tmp_path).eos == (0,)


def test_a_saved_model_loads_in_another_dtype(tiny, tmp_path):
    params = load(tiny[0])
    save(params, tmp_path / "saved")
    assert same(load(tmp_path / "saved", dtype="bfloat16"), load(tiny[0], dtype="bfloat16"))


def test_a_folder_in_use_is_left_alone(tiny, tmp_path):
    params = load(tiny[0])
    before = sorted(path.name for path in tiny[0].iterdir())
    with pytest.raises(ValueError, match="it exists"):
        save(params, tiny[0])
    assert sorted(path.name for path in tiny[0].iterdir()) == before
    with pytest.raises(ValueError, match="there is no folder"):
        save(params, tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    save(params, tmp_path / "empty")
    assert same(params, load(tmp_path / "empty"))


def test_a_link_is_followed_and_the_working_folder_is_left_alone(tiny, tmp_path, monkeypatch):
    params = load(tiny[0])
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", tmp_path / "link"):
        with pytest.raises(ValueError, match="it is the working folder"):
            save(params, folder)
    monkeypatch.chdir(tmp_path)
    save(params, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and same(params, load(tmp_path / "here"))


def test_weights_of_no_or_several_dtypes_are_not_saved(tiny, tmp_path):
    params = load(tiny[0])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params.weights["decoder"])
    mixed = replace(params, weights=params.weights | {"decoder": half})
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    for wrong, named in ((mixed, "bfloat16, float32"), (double, "float64")):
        with pytest.raises(ValueError, match=rf"one dtype, float32, bfloat16, float16\. Got {named}\. Cast all"):
            save(wrong, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_hidden_files_beside_the_weights_are_let_be(tiny, tmp_path):
    params = load(tiny[0])
    save(params, tmp_path / "saved")
    for name in (".DS_Store", ".nfs0001"):
        (tmp_path / "saved" / "weights" / name).write_text("x")
    assert same(params, load(tmp_path / "saved"))


@pytest.mark.parametrize("step", ["weights", "sizes", "name"])
def test_a_failed_save_leaves_nothing(tiny, tmp_path, monkeypatch, step):
    params = load(tiny[0])

    def fail(*_, **__):
        raise KeyboardInterrupt

    where = {
        "weights": (checkpoint.ocp.StandardCheckpointer, "save"),
        "sizes": (checkpoint, "_sizes"),
        "name": (os, "replace"),
    }
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(*where[step], fail)
        save(params, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


KILLED = """
import os, sys
from jax_blindsight import calibrate, checkpoint
from jax_blindsight.params import load, save
params = load(sys.argv[1])
checkpoint._sizes = lambda folder: os._exit(9)  # weights are written, the process is gone
save(params, sys.argv[2])
"""


def test_a_full_disk_is_no_wrong_input(tiny, tmp_path, monkeypatch):
    """Orbax raises a ValueError, and logs hundreds of lines."""
    params = load(*tiny)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match=r"room for [\d,]+ bytes. Got .*saved, where 1,000 are free"):
            save(params, tmp_path / "saved")

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", full)
    with pytest.raises(OSError, match="saved could not be written: RESOURCE_EXHAUSTED"):
        save(params, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_killed_save_never_looks_whole(tiny, tmp_path):
    folder = tmp_path / "saved"
    done = subprocess.run([sys.executable, "-c", KILLED, tiny[0], folder], check=False, capture_output=True)
    assert done.returncode == 9, done.stderr
    assert not folder.exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    with pytest.raises(ValueError, match=r"must hold model\.safetensors|no config\.json"):
        load(left)


def cut(folder: Path) -> None:
    file = max((folder / "weights").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(file, file.stat().st_size // 2)


SPOILED = {
    "cut": (cut, "must hold the files that blindsight_jax.json names"),
    "lost": (lambda folder: shutil.rmtree(folder / "weights"), "missing"),
    "more": (lambda folder: (folder / "weights" / "stray").write_text("x"), "missing or not named: stray"),
    "manifest": (lambda folder: (folder / "blindsight_jax.json").write_text("{}"), "must be a manifest"),
    "schema": (lambda folder: edit_json(folder / "blindsight_jax.json", schema="blindsight-jax/9"), "blindsight-jax/9"),
    "dtype": (lambda folder: edit_json(folder / "blindsight_jax.json", dtype="int4"), "int4"),
    "fingerprint": (lambda folder: edit_json(folder / "blindsight_jax.json", fingerprint={}), "must be a manifest"),
    "tied": (
        lambda folder: edit_json(folder / "config.json", tie_word_embeddings=True),
        "not of that model: .*lm_head",
    ),
    "shape": (lambda folder: larger(folder), r"weights of the model in config.json\. Of another shape.*embedding"),
}


def larger(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | {"vocab_size": 97})


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_folder_is_refused(tiny, tmp_path, how):
    save(load(tiny[0]), tmp_path / "saved")
    spoil, message = SPOILED[how]
    spoil(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "saved")


# Repositories of the hub.


def test_a_repository_is_taken_from_the_hub(tiny, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    repository = hub / "models--some-one--tiny.model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    shutil.copytree(tiny[0], repository / "snapshots" / "0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(load("some-one/tiny.model"), load(tiny[0]))
    with pytest.raises(ValueError, match="a model must be a folder, or a repository"):
        load("some-one/other")
