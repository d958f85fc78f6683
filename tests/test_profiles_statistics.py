"""Calibration statistics: merging is exact, summaries mean what they say, bad numbers and bad files are refused."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profile_strategies import records
from shared_profiles.categories import SPARSE, Category
from shared_profiles.statistics import PromptStatistics, Statistics
from shared_profiles.summary import LEVELS

L, H = 2, 3


def record(value: float = 0.5, **changes: object) -> PromptStatistics:
    fields = dict(n_tokens=50, n_images=2, n_rows=20, mass=np.full((3, L, H), value), error=np.full((3, L, H), 0.1))
    return PromptStatistics(**{**fields, "pairs": np.array([[100, 60], [10, 6], [20, 12], [30, 18]]), **changes})


def state(**prompts: PromptStatistics) -> Statistics:
    statistics = Statistics(L, H)
    for prompt_id, one in prompts.items():
        statistics.add(prompt_id, one)
    return statistics


def file_of(statistics: Statistics, folder: Path) -> bytes:
    statistics.save(folder / "part.npz")
    return (folder / "part.npz").read_bytes()


@st.composite
def parts(draw) -> list[Statistics]:
    """Three states over one pool of prompts, which may share prompts or be empty."""
    pool = draw(st.dictionaries(st.text("abcdef0123", min_size=1, max_size=6), records(L, H), max_size=6))
    states = [Statistics(L, H, origin="model x") for _ in range(3)]
    for prompt_id, one in draw(st.permutations(list(pool.items()))):
        for index in draw(st.sets(st.integers(0, 2), min_size=1)):
            states[index].add(prompt_id, one)
    return states


@given(parts())
@settings(max_examples=40)
def test_merge_is_associative_commutative_and_idempotent_to_the_bit(tmp_path_factory, parts):
    a, b, c = parts
    folder = tmp_path_factory.mktemp("merge")
    reference = a.merge(b).merge(c)
    others = [a.merge(b.merge(c)), c.merge(a).merge(b), reference.merge(b), reference.merge(reference)]
    expected = file_of(reference, folder)
    for other in others:
        assert other == reference
        assert file_of(other, folder) == expected
        if len(reference):
            assert other.summarize() == reference.summarize()


@given(parts())
@settings(max_examples=20)
def test_save_and_load_keep_every_bit(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("round") / "part.npz"
    for statistics in parts:
        statistics.save(path)
        loaded = Statistics.load(path)
        assert loaded == statistics
        assert (loaded.n_layers, loaded.n_heads, loaded.origin, len(loaded)) == (L, H, "model x", len(statistics))
        assert file_of(loaded, path.parent) == path.read_bytes()


def test_merge_leaves_its_arguments_alone():
    a, b = state(p=record()), state(q=record(0.7))
    merged = a.merge(b)
    assert ("p" in merged, "q" in merged, len(merged)) == (True, True, 2)
    assert ("q" in a, "p" in b) == (False, False)
    assert merged.prompt_ids == ("p", "q")
    assert repr(merged) == "Statistics(2, 3, origin='', 2 prompts)"


def test_adding_a_prompt_again_changes_nothing_unless_it_differs():
    statistics = state(p=record(0.0))
    statistics.add("p", record(-0.0))
    assert len(statistics) == 1
    assert record(-0.0).mass.tobytes() == record(0.0).mass.tobytes()
    with pytest.raises(ValueError, match=r"prompt p must have the same values.*two different records"):
        statistics.add("p", record(0.6))
    assert statistics == state(p=record(0.0))
    with pytest.raises(ValueError, match=r"prompt p must have the same values"):
        statistics.merge(state(p=record(0.7)))


@pytest.mark.parametrize("other", [Statistics(L, H + 1), Statistics(L + 1, H), Statistics(L, H, origin="model y")])
def test_states_of_different_shape_or_origin_do_not_merge(other):
    with pytest.raises(ValueError, match=r"must have one \(n_layers, n_heads, origin, rankings\)"):
        Statistics(L, H).merge(other)
    assert Statistics(L, H) != other and other != {}


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, v) for name in ("mass", "error") for v in (np.nan, np.inf, -np.inf, -1e-6, 1e300)), ("mass", 1.01)],
)
def test_bad_values_name_prompt_layer_head_and_category(name, value):
    bad = np.full((3, L, H), 0.5)
    bad[2, 1, 2] = value
    with pytest.raises(ValueError, match=rf"prompt p7, layer 1, head 2, INTRA_IMAGE_SINK: {name} must be .* Got "):
        state(p7=record(**{name: bad}))


@pytest.mark.parametrize(
    "pairs",
    [
        [[9, 9], [1, 1], [10, 1], [1, 1]],  # more than DENSE
        [[9, 9], [-1, 2], [1, 1], [1, 1]],
        [[9, 9], [0, 0], [1, 1], [1, 1]],
    ],
)
def test_bad_pairs_name_the_prompt(pairs):
    with pytest.raises(ValueError, match="prompt p: pairs must be at least 0, at most those of DENSE, and not all 0"):
        state(p=record(pairs=np.array(pairs)))


def test_harm_is_measured_for_all_prompts_or_none():
    table = np.full((3, L, H), 0.25)
    with pytest.raises(ValueError, match=r"prompt p: harm must have the rankings \(\). Got \['gradient'\]"):
        state(p=record(harm={"gradient": table}))
    both = Statistics(L, H, rankings=("residual", "gradient"))
    with pytest.raises(ValueError, match=r"harm must have the rankings \('gradient', 'residual'\)"):
        both.add("p", record())
    bad = table.copy()
    bad[1, 1, 0] = np.nan
    with pytest.raises(ValueError, match="prompt p, layer 1, head 0, INTRA_IMAGE: residual harm must be finite"):
        both.add("p", record(harm={"gradient": table, "residual": bad}))
    both.add("p", record(harm={"gradient": table, "residual": 2 * table}))
    with pytest.raises(ValueError, match="rankings"):
        both.merge(Statistics(L, H))
    with pytest.raises(ValueError, match=r"rankings must be of gradient, residual\. Got luck"):
        Statistics(L, H, rankings=("luck",))
    with pytest.raises(ValueError, match=r"harm may have the rankings gradient, residual\. Got luck"):
        record(harm={"luck": table})


def test_a_prompt_counts_by_the_root_of_its_harm():
    """A hundred times the harm is ten times the weight; a prompt without harm counts as one."""
    rng = np.random.default_rng(4)
    quiet, loud = rng.random((2, 3, L, H)).astype(np.float32)
    quiet, loud = quiet / quiet.sum(), 100 * loud / loud.sum()
    statistics = Statistics(L, H, rankings=("gradient",))
    for name, table in (("quiet", quiet), ("loud", loud), ("none", np.zeros((3, L, H)))):
        statistics.add(name, record(harm={"gradient": table}))
    want = (quiet + 10 * (loud / 100)) / 3
    got = statistics.summarize().harm_of("gradient")[..., 1:]
    np.testing.assert_allclose(got, np.moveaxis(want, 0, -1), rtol=1e-5)


def test_a_summary_has_the_mean_harm_and_pairs():
    rng = np.random.default_rng(3)
    tables = rng.random((2, 2, 3, L, H)).astype(np.float32)  # prompt, ranking
    statistics = Statistics(L, H, rankings=("gradient", "residual"))
    for i, (gradient, residual) in enumerate(tables):
        pairs = np.array([[100, 60], [10, 6], [20, 12], [30, 18]]) * (i + 1)
        statistics.add(f"p{i}", record(pairs=pairs, harm={"residual": residual, "gradient": gradient}))
    summary = statistics.summarize()
    for r, ranking in enumerate(("gradient", "residual")):
        harm = summary.harm_of(ranking)
        assert harm.shape == (L, H, 4) and not harm[..., Category.DENSE].any()
        weighed = [x / np.sqrt(x.sum()) for x in tables[:, r].astype(np.float64)]
        np.testing.assert_allclose(harm[..., 1:], np.moveaxis(np.mean(weighed, axis=0), 0, -1), rtol=1e-5)
    np.testing.assert_array_equal(summary.pairs[Category.INTRA_IMAGE], [30, 18])
    np.testing.assert_allclose(summary.harm_of("error")[..., 1:], 0.01, rtol=1e-5)
    with pytest.raises(ValueError, match=r"that was measured: error\. Got 'gradient'"):
        state(p=record()).summarize().harm_of("gradient")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_images=1), "n_images must be an integer of at least 2. Got 1. Skip such a prompt"),
        (dict(n_rows=0), "n_rows must be an integer of at least 1"),
        (dict(n_rows=51), "n_rows must be at most n_tokens. Got 51 rows of 50 tokens"),
        (dict(n_tokens=True), "n_tokens must be an integer"),
        (dict(mass=np.zeros((2, L, H))), r"must have one shape \(3, L, H\)"),
        (dict(error=np.zeros((3, L, H + 1))), r"must have one shape \(3, L, H\)"),
        (dict(pairs=np.ones((4, L + 1), int)), r"pairs must be integers of shape \(4, L\)=\(4, 2\)"),
        (dict(pairs=np.ones((4, L))), "pairs must be integers of shape"),
    ],
)
def test_a_record_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        record(**changes)


def test_a_state_refuses():
    with pytest.raises(ValueError, match=r"n_layers and n_heads must be positive integers. Got 0, 3"):
        Statistics(0, 3)
    with pytest.raises(ValueError, match="origin must be printable ASCII"):
        Statistics(1, 1, origin="a\0")
    for prompt_id in ("", "a\n", "é", "a\0"):
        with pytest.raises(ValueError, match="prompt_id must be one or more printable ASCII"):
            Statistics(L, H).add(prompt_id, record())
    with pytest.raises(ValueError, match=r"prompt p: mass must have shape \(3, L, H\)=\(3, 2, 4\). Got \(3, 2, 3\)"):
        Statistics(2, 4).add("p", record())
    with pytest.raises(ValueError, match="at least one prompt"):
        Statistics(L, H).summarize()


def test_records_are_read_only_copies():
    mass = np.full((3, L, H), 0.5, dtype=np.float32)
    one = record(mass=mass)
    mass[0] = 9
    assert one.mass.max() == 0.5
    with pytest.raises(ValueError, match="read-only"):
        one.mass[0] = 1


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 39, 40])
def test_quantiles_count_prompts(n):
    """The quantile at q is the largest value that at least 1 - q of the prompts reach."""
    values = np.random.default_rng(n).permutation(np.arange(1, n + 1) / 64)
    summary = state(**{f"p{i}": record(float(v), n_rows=i + 1) for i, v in enumerate(values)}).summarize()
    assert (summary.n_prompts, summary.levels) == (n, LEVELS)
    for i, level in enumerate(LEVELS):
        reached = [v for v in values if 20 * (values >= v).sum() >= (20 - i) * n]
        assert summary.mass[Category.SINK][1, 2, summary.level_index(level)] == pytest.approx(max(reached), rel=1e-5)
    assert summary.mass_mean[Category.SINK][0, 0] == pytest.approx(values.mean(), rel=1e-5)
    assert summary.kept == {Category.SINK: 0.1, Category.INTRA_IMAGE: 0.2, Category.INTRA_IMAGE_SINK: 0.3}


def test_what_is_kept_counts_every_prompt_alike():
    """A prompt of a hundred times the pairs weighs no more."""
    short, long = (np.array([[2, 8], [1, 1], [2, 2], [2, 3]]), np.array([[200, 800], [0, 400], [0, 500], [100, 800]]))
    kept = state(a=record(pairs=short), b=record(pairs=long)).summarize().kept
    assert list(kept.values()) == pytest.approx([0.3, 0.45, 0.7])


def test_every_number_of_a_summary_stands_where_it_belongs():
    rng = np.random.default_rng(1)
    stack = rng.random((2, 3, L, H)).astype(np.float32)
    summary = state(a=record(mass=stack[0]), b=record(mass=stack[1], error=3 * stack[0])).summarize()
    for index, category in enumerate(SPARSE):
        np.testing.assert_allclose(summary.mass[category][:, :, 0], stack[:, index].min(axis=0), rtol=1e-5)
        np.testing.assert_allclose(summary.mass[category][:, :, -1], stack[:, index].max(axis=0), rtol=1e-5)
        mean = (3 * stack[0, index] + 0.1) / 2
        np.testing.assert_allclose(summary.error_mean[category], mean, rtol=1e-5)


def test_mass_that_rounding_took_past_one_counts_as_one():
    assert state(p=record(1.0009)).summarize().mass[Category.SINK].max() == 1.0


# --- files


def damage(content: bytes, kind: str) -> bytes:
    with np.load(io.BytesIO(content)) as file:
        members = dict(file)
    buffer = io.BytesIO()
    match kind:
        case "empty":
            return b""
        case "truncated":
            return content[: len(content) // 2]
        case "a lost block":
            return content[:100] + content[164:]
        case "a flipped bit":
            at = content.index(members["mass"].tobytes()) + 5
            return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        case "pickle":
            return pickle.dumps(members)
        case "objects inside":
            np.savez(buffer, **{**members, "mass": np.array([{}], dtype=object)})
        case "single array":
            np.save(buffer, members["mass"])
        case "a newer version":
            np.savez(buffer, **{**members, "schema": np.array("blindsight.statistics/4")})
        case "an older version":
            kept = {name: x for name, x in members.items() if not name.startswith("sink_")}
            np.savez(buffer, **{**kept, "schema": np.array("blindsight.statistics/2")})
        case "a missing member":
            np.savez(buffer, **{k: v for k, v in members.items() if k != "error"})
        case "too few counts":
            np.savez(buffer, **{**members, "counts": members["counts"][:1]})
        case "too few masses":
            np.savez(buffer, **{**members, "mass": members["mass"][:1]})
        case "ids that are numbers":
            np.savez(buffer, **{**members, "prompt_ids": np.arange(2)})
        case "NaN":
            np.savez(buffer, **{**members, "mass": members["mass"] * np.nan})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "no whole .npz archive"),
        ("truncated", "no whole .npz archive"),
        ("a lost block", "Invalid argument"),
        ("a flipped bit", "Bad CRC-32"),
        ("pickle", "no whole .npz archive"),
        ("objects inside", "allow_pickle"),
        ("single array", "no whole .npz archive"),
        ("a newer version", "the schema 'blindsight.statistics/4'"),
        ("an older version", "the schema 'blindsight.statistics/2'"),
        ("a missing member", "the members"),
        ("too few counts", "arrays of shapes"),
        ("too few masses", "."),
        ("ids that are numbers", "arrays of shapes"),
        ("NaN", "prompt p, layer 0, head 0, SINK: mass"),
    ],
)
def test_damaged_files_are_refused(tmp_path, kind, reason):
    path = tmp_path / "part.npz"
    path.write_bytes(damage(file_of(state(p=record(), q=record(0.6)), tmp_path), kind))
    with pytest.raises(ValueError, match=rf"(?s)part\.npz must be a whole file .*Got: .*{reason}.* Measure this part"):
        Statistics.load(path)


def test_a_missing_file_stays_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "absent.npz")


def fail_with(error: BaseException):
    def fail(*args: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch, step, error):
    path = tmp_path / "part.npz"
    old = state(p=record())
    old.save(path)
    monkeypatch.setattr(os, step, fail_with(error))
    with pytest.raises(type(error)):
        state(q=record()).save(path)
    assert Statistics.load(path) == old
    assert os.listdir(tmp_path) == ["part.npz"]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """The real thing: the kernel refuses the bytes, in a process whose files may not pass 1000 bytes."""
    path = tmp_path / "part.npz"
    path.write_bytes(b"old")
    program = (
        "import resource, sys; from shared_profiles.statistics import Statistics;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); Statistics(4, 4).save(sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["part.npz"]


def test_save_follows_links_and_the_umask(tmp_path):
    real, link = tmp_path / "real.npz", tmp_path / "link.npz"
    link.symlink_to(real)
    state(p=record()).save(link)
    assert link.is_symlink()
    (tmp_path / "plain").touch()
    assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode
