"""Profiles: files round trip to the byte, writing is atomic, foreign models are refused, differences are named."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shared_profiles
from profile_strategies import fingerprint, plain_profile, profiles, summary_of
from shared_profiles.categories import Category
from shared_profiles.profile import (
    CurvePoint,
    HeadChange,
    Profile,
    ProfileError,
    ProfileMismatchError,
    Provenance,
    diff,
)
from shared_profiles.template import SinkTemplate

# --- round trips


@given(profiles())
@settings(max_examples=60)
def test_round_trip_to_the_byte(tmp_path_factory, profile):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded == profile
    loaded.save(path.with_name("again.json"))
    content = path.read_bytes()
    assert path.with_name("again.json").read_bytes() == content
    assert content == profile.to_json().encode("ascii")
    assert content.endswith(b"}\n") and content.count(b"\n") == 1
    assert not diff(profile, loaded)


def test_the_text_is_canonical_json_with_six_digits():
    profile = replace(
        plain_profile(), choice={"method": "budget", "kl": 0.123456789, "tries": (1, np.float32(0.1), -0.0)}
    )
    text = profile.to_json()
    document = json.loads(text)
    assert text == json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
    assert document["choice"] == {"method": "budget", "kl": 0.123457, "tries": [1, 0.1, 0.0]}
    assert "-0.0" not in text
    assert document["schema"] == "blindsight.profile/4"
    assert document["categories"][0][0] in Category.__members__


def test_spaces_and_line_breaks_do_not_matter():
    profile = plain_profile()
    assert Profile.from_json(json.dumps(json.loads(profile.to_json()), indent=2)) == profile


def test_offsets_from_numpy_are_stored_as_numbers():
    template = SinkTemplate(tuple(np.array([0, 3])), (1,), 64)
    profile = replace(plain_profile(), template=template)
    assert Profile.from_json(profile.to_json()).template == SinkTemplate((0, 3), (1,), 64)


def test_equality_is_by_value():
    a, b = plain_profile(), plain_profile()
    assert a == b and a.summary is not b.summary
    assert a != replace(b, categories=(a.categories + 1) % 4)
    assert a != replace(b, summary=summary_of(np.random.default_rng(8), 2, 3, (0.0, 0.5, 1.0)))
    assert a != replace(b, summary=None)
    assert a != "profile"
    assert copy.deepcopy(a) == a == pickle.loads(pickle.dumps(a))


def test_arrays_are_read_only_copies():
    categories = np.zeros((2, 3), dtype=np.int8)
    profile = replace(plain_profile(), categories=categories)
    categories[0] = 1
    assert profile.categories.dtype == np.int8 and not profile.categories.any()
    with pytest.raises(ValueError, match="read-only"):
        profile.categories[0] = 1


def test_uniform_and_counts():
    profile = Profile.uniform(Category.SINK, fingerprint(), SinkTemplate((0,), (), 64))
    assert list(profile.counts().items()) == [(category, 6 * (category == Category.SINK)) for category in Category]
    assert profile.choice == {"method": "manual", "category": "SINK"}
    assert (profile.template.local_block, profile.summary, profile.provenance, profile.curve) == (64, None, None, ())
    assert Profile.uniform(Category.DENSE, fingerprint()).template == SinkTemplate()
    assert Profile.from_json(profile.to_json()) == profile


# --- construction


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(categories=np.zeros((3, 2), dtype=int)), r"shape \(n_layers, n_heads\)=\(2, 3\). Got \(3, 2\)"),
        (dict(categories=np.full((2, 3), 4)), r"categories must be integers in \[0, 3\]. Got \[4\]"),
        (dict(categories=np.full((2, 3), -1)), r"categories must be integers in \[0, 3\]"),
        (dict(categories=np.full((2, 3), 0.5)), r"categories must be integers in \[0, 3\]"),
        (dict(fingerprint=fingerprint(4, 3)), "categories must have shape"),
        (dict(summary=summary_of(np.random.default_rng(0), 3, 2, (0.5,))), "summary must have shape"),
        (dict(choice={"method": "guess"}), "choice must be a dict whose 'method' is one of"),
        (dict(choice={}), "choice must be a dict"),
        (dict(choice={"method": "manual", "x": float("nan")}), "choice.x must be a JSON value"),
        (dict(choice={"method": "manual", "x": [1, {2: 3}]}), r"choice.x\[1\] must be a JSON value"),
        (dict(choice={"method": "manual", "x": 2**53}), r"choice.x must be an integer below 2\^53"),
    ],
)
def test_a_profile_refuses(changes, message):
    with pytest.raises(ProfileError, match=message):
        replace(plain_profile(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(family=""), "family must be a string that is not empty"),
        (dict(n_layers=0), "n_layers must be a positive integer. Got 0"),
        (dict(head_dim=16.0), "head_dim must be a positive integer. Got 16.0"),
        (dict(n_heads=4, n_kv_heads=3), "n_kv_heads must divide n_heads. Got 3 and 4"),
        (dict(digest="5e" * 32), "digest must be 'sha256:' and 64"),
    ],
)
def test_a_fingerprint_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        fingerprint(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dataset=""), "dataset must be a string that is not empty"),
        (dict(n_tokens=0), "n_tokens must be a positive integer"),
        (dict(created="2026-11-21 03:40"), "created must be a UTC time such as"),
        (dict(created="2026-11-21T03:40:49+02:00"), "created must be a UTC time such as"),
        (dict(created="2026-02-30T03:40:49Z"), "created must be a UTC time such as"),
        (dict(versions={"torch": 2}), "versions must map names to version strings"),
    ],
)
def test_a_provenance_refuses(changes, message):
    good = plain_profile().provenance
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.1, 0.0), r"kept must be in \[0, 1\]. Got 1.1"),
        ((0.5, -1e-9), "kl must be finite and at least 0"),
        ((0.5, float("inf")), "kl must be finite and at least 0"),
        ((0.5, 0.0, 1.5), r"accuracy must be in \[0, 1\]"),
        ((float("nan"), 0.0), "kept must be"),
        ((0.5, 0.0, None, 1.5), r"agreement must be in \[0, 1\]"),
        ((0.5, 0.0, None, None, 0), "n_prompts must be a positive integer"),
        ((0.5, 0.0, None, None, 1, ("DD", "D")), "heads must be equally long rows of the letters DSIB"),
        ((0.5, 0.0, None, None, 1, ("DX",)), "heads must be equally long rows of the letters DSIB"),
        (
            (0.5, 0.0, None, None, 1, None, (6, 2)),
            r"n_images must be the fewest and the most.* Got \(6, 2\)",
        ),
        ((0.5, 0.0, None, None, 1, None, (1, 2)), "n_images must be the fewest and the most, at least 2"),
        ((0.5, 0.0, None, None, 1, None, (2, 3, 4)), "n_images must be the fewest and the most"),
    ],
)
def test_a_curve_point_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        CurvePoint(*values)


# --- writing


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch, step, error):
    path = tmp_path / "profile.json"
    plain_profile().save(path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    named = re.escape(f"No space left on device: '{path}'") if isinstance(error, OSError) else None
    with pytest.raises(type(error), match=named):
        Profile.uniform(Category.SINK, fingerprint()).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["profile.json"]


def test_saving_into_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent/profile\.json'$"):
        plain_profile().save(tmp_path / "absent" / "profile.json")


@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, link):
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if link:
        (path := tmp_path / "link").symlink_to(pipe)
    with pytest.raises(OSError, match=rf"Got {pipe}, a folder, device or pipe"):
        plain_profile().save(path)
    assert pipe.is_fifo() and not list(tmp_path.glob(".*"))


# --- foreign models, and differences


def test_the_right_model_is_accepted():
    plain_profile().require(fingerprint())


def test_a_foreign_model_is_refused_unless_allowed():
    other = fingerprint(head_dim=32, digest="sha256:" + "00" * 32)
    with pytest.raises(ProfileMismatchError) as caught:
        plain_profile().require(other)
    message = str(caught.value)
    assert "head_dim: the profile says 16, the model has 32" in message
    assert f"digest: the profile says 'sha256:{'5e' * 32}', the model has 'sha256:{'00' * 32}'" in message
    assert "family" not in message
    assert "run calibrate" in message and "pass allow_mismatch=True" in message
    plain_profile().require(other, allow_mismatch=True)


@pytest.mark.parametrize("changes", [dict(n_layers=3), dict(n_heads=4)])
@pytest.mark.parametrize("allow_mismatch", [False, True])
def test_another_shape_is_always_refused(changes, allow_mismatch):
    (name, value), *_ = changes.items()
    expected = rf"(?s){name}: the profile says \d, the model has {value}.*allow_mismatch or not\."
    with pytest.raises(ProfileMismatchError, match=expected):
        plain_profile().require(fingerprint(**changes), allow_mismatch=allow_mismatch)


def test_diff_names_heads_and_fields():
    a = plain_profile()
    categories = a.categories.copy()
    categories[1, 2] = (categories[1, 2] + 1) % 4
    b = replace(
        a,
        categories=categories,
        template=SinkTemplate((0,), (1, 2), 64),
        choice={"method": "manual"},
        fingerprint=fingerprint(head_dim=32),
        provenance=None,
        curve=(),
    )
    change = diff(a, b)
    assert change
    before, after = Category(a.categories[1, 2]), Category(categories[1, 2])
    assert change.heads == (HeadChange(1, 2, before, after),)
    assert change.fields["template.local_block"] == (128, 64)
    assert change.fields["template.from_start"] == ([0, 1], [0])
    assert change.fields["model.head_dim"] == (16, 32)
    assert change.fields["choice.method"] == ("thresholds", "manual")
    assert change.fields["choice.gamma_sink"] == (0.5, "(absent)")
    assert change.fields["provenance"] == ("(absent)", None)
    assert change.fields["curve"][1] == []
    assert "statistics" not in change.fields
    assert f"layer 1, head 2: {before.name} -> {after.name}" in str(change).splitlines()
    assert "template.local_block: 128 -> 64" in str(change).splitlines()


def test_diff_of_equals_and_of_strangers():
    same = diff(plain_profile(), plain_profile())
    assert not same and str(same) == "no difference"
    with pytest.raises(ProfileError, match=r"one shape \(L, H\). Got \(2, 3\) and \(3, 3\)"):
        diff(plain_profile(), Profile.uniform(Category.DENSE, fingerprint(3, 3)))


@given(profiles(), st.data())
@settings(max_examples=30)
def test_a_difference_is_found_wherever_profiles_differ(a, data):
    parts = {
        "template": SinkTemplate((8,), (9,), 8),
        "summary": None,
        "choice": {"method": "manual", "unlike": "any"},
        "provenance": Provenance("x", "y", 1, 1, "2000-01-01T00:00:00Z", {}),
        "curve": (CurvePoint(0.125, 7.0),),
        "categories": np.zeros_like(a.categories),
    }
    name = data.draw(st.sampled_from(sorted(parts)))
    b = replace(a, **{name: parts[name]})
    assert bool(diff(a, b)) == (a != b)


# --- places


def test_bundled_profiles_are_the_last_place(tmp_path):
    """In a copy of the library that has two: only this very model's is one, and the user's own goes before it."""
    library, cache = tmp_path / "shared_profiles", tmp_path / "cache"
    shutil.copytree(Path(shared_profiles.__file__).parent, library, ignore=shutil.ignore_patterns("__pycache__"))
    (library / "bundled").mkdir()
    mine, other = plain_profile(), fingerprint(digest="sha256:" + "6f" * 32)
    replace(mine, fingerprint=other).save(library / "bundled" / "a.json")
    mine.save(library / "bundled" / "b.json")
    program = (
        "import sys; from shared_profiles.profile import Profile\n"
        "from shared_profiles.lookup import cache_path, find_profile\n"
        "mine = Profile.load(sys.argv[1]); own = cache_path(mine.fingerprint)\n"
        "print(find_profile(mine.fingerprint, None) == (mine, type(own)(sys.argv[1])))\n"
        "own.parent.mkdir(parents=True); mine.save(own)\n"
        "print(find_profile(mine.fingerprint, None) == (mine, own))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(library / "bundled" / "b.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "BLINDSIGHT_CACHE": str(cache)},
        cwd=tmp_path,
    )
    assert result.stdout.split() == ["True", "True"], result.stderr
