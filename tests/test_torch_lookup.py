"""`patch(model)` without a profile: the places it looks in, and the first prompts it measures when it finds none."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from shared_profiles import Category, SinkTemplate
from shared_profiles._profile_json import VERSION
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.lookup import FILE_NAME, cache_path
from shared_profiles.profile import Profile, ProfileError, ProfileMismatchError
from tiny_models import family_names, make_ids, make_inputs, make_model, make_video_inputs, mixed_profile, patch
from torch_blindsight import calibrate, fingerprint
from torch_blindsight.freeze import _prompts
from torch_blindsight.models import inspect_model

pytestmark = pytest.mark.usefixtures("no_grad")

SMALL = SinkTemplate((0, 1), (1, 2), 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder; nothing but it may be written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def log(caplog):
    """Messages of our logger, with their levels."""
    caplog.set_level(logging.INFO, logger="torch_blindsight")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "torch_blindsight"]


def prompts_of(family, n, first=0):
    return [make_inputs(family, [make_ids(2 + i % 2, seed=i)], seed=i) for i in range(first, first + n)]


@family_names
def test_measures_the_first_prompts_then_freezes_and_is_found_again(family, cache, log):
    model, prompts = make_model(family), prompts_of(family, 3)
    dense = [model(**x).logits for x in prompts]
    handle = patch(model, template=SMALL, measure_prompts=3)
    path = cache_path(fingerprint(model))
    looked = f"beside the checkpoint (folder unknown), in the user's cache folder ({path}), bundled"
    begins = "the first 3 multi-image prompts run dense while they are measured"
    assert log() == [("WARNING", f"found no profile of this model: looked {looked}; {begins}")]
    nothing_yet = {"profile": None, "categories": None, "forwards": {}}
    assert handle.report() == {"state": "measuring", "impl": "portable", **nothing_yet}
    assert handle.profile is None
    model(**make_inputs(family, [make_ids(1)]))  # shows nothing, so it does not count
    for x, want in zip(prompts, dense, strict=True):
        assert handle.report()["state"] == "measuring"
        torch.testing.assert_close(model(**x).logits, want, rtol=0, atol=1e-3)
    assert handle.report()["state"] == "sparse"
    profile = handle.profile
    counts = ", ".join(f"{n} {category.name}" for category, n in profile.counts().items())
    what = "are sparse from now on" if profile.categories.any() else "stay dense: no head may be sparse"
    froze = f"measured 3 prompts and froze a profile ({counts}); prefills {what}; saved as {path}"
    assert log()[1:] == [("WARNING", froze)]
    assert handle.report()["profile"] == str(path)
    assert profile.template == SMALL
    assert profile.fingerprint == fingerprint(model)
    assert profile.provenance.n_prompts == profile.summary.n_prompts == 3
    assert profile.provenance.n_tokens == sum(x["input_ids"].shape[1] for x in prompts)
    again = model(**prompts[0]).logits
    counted = {"measured": 3, "dense: fewer than two images": 1}
    how = "sparse" if profile.categories.any() else "dense: all heads are Dense"
    assert handle.report()["forwards"] == counted | {how: 1}
    handle.unpatch()

    assert [p for p in cache.rglob("*") if p.is_file()] == [path]
    with patch(make_model(family)) as found:
        assert found.profile == profile
        assert found.report()["profile"] == str(path)
        assert torch.equal(found.model(**prompts[0]).logits, again)
    assert log()[2:] == [("INFO", f"using the profile {path}")]
    with patch(make_model(family, seed=1)) as other:
        assert other.report()["state"] == "measuring", "another model's profile is no find"


@family_names
def test_measuring_equals_calibrating(family):
    """The statistics of the first prompts are those of `calibrate` on the same prompts."""
    model, prompts = make_model(family), prompts_of(family, 2)
    with patch(model, template=SMALL, measure_prompts=2) as handle:
        for x in prompts:
            model(**x)
        frozen = handle.profile
    profile = calibrate(model, prompts, template=SMALL, thresholds=Thresholds(), progress=False)
    assert frozen.summary == profile.summary
    np.testing.assert_array_equal(frozen.categories, profile.categories)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_batch_counts_each_of_its_prompts(family):
    """Also inside `generate`, also twice the same ids; rows with one image show nothing."""
    model = make_model(family)
    batch = make_inputs(family, [make_ids(3), make_ids(3), make_ids(1)])
    other = make_inputs(family, [make_ids(3), make_ids(3), make_ids(1)], seed=1)
    each = len(batch["pixel_values"]) // 7
    second = make_inputs(family, [make_ids(3)]) | {"pixel_values": batch["pixel_values"][3 * each : 6 * each]}
    short = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for run in (model, partial(model.generate, **short)):  # later transformers encode pictures before the forward
        with patch(model, measure_prompts=3) as handle:
            for known in (batch, batch, second):
                run(**known)
                assert handle.report()["state"] == "measuring", "they are known"
            assert handle.report()["forwards"]["measured"] == 3
            run(**other)
            assert handle.report()["state"] == "sparse"
            assert handle.profile.provenance.n_prompts == 4
        Path(handle.report()["profile"]).unlink()


@family_names
def test_a_prompt_with_an_answer_behind_it_is_known(family, log):
    """As `generate` passes it without a cache; and what cannot be measured is served and left out."""
    model, prompts = make_model(family), prompts_of(family, 3)
    with patch(model, measure_prompts=2) as handle:
        model.generate(**prompts[0], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
        model(**prompts[1] | {"pixel_values": prompts[1]["pixel_values"] * torch.nan})
        assert handle.report() | {"impl": 0} == {
            "state": "measuring",
            "impl": 0,
            "profile": None,
            "categories": None,
            "forwards": {"measured": 5},
        }
        model(**prompts[2])
        assert handle.profile.provenance.n_prompts == 2
    assert any("a prompt could not be measured, another one will be" in message for _, message in log())


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pictures_that_are_encoded_already_tell_prompts_apart(kind):
    """As `generate` of later transformers passes them: its forwards see no pixels."""
    special = inspect_model(make_model("qwen2_vl")).special
    ids = torch.tensor([make_ids(2)] * 2)
    ids[ids == special.image] = {"image": special.image, "video": special.video}[kind]
    rows = [SimpleNamespace(start=0, stop=ids.shape[1])] * 2
    n = int((ids[0] == ids[0].mode().values).sum())
    first, second = torch.randn(2, n, 4)
    shapes = ([first[:3], first[3:], second], torch.stack([first, second]))  # pictures of different sizes, of one
    for outputs in shapes:
        encoded = {kind: SimpleNamespace(pooler_output=outputs)}
        one, other = _prompts(rows, {"input_ids": ids, "mm_encoder_outputs": encoded}, special)
        again = _prompts(
            rows[:1],
            {"input_ids": ids[:1], "mm_encoder_outputs": {kind: SimpleNamespace(pooler_output=[first])}},
            special,
        )[0]
        assert again.repeats(one) and not other.repeats(one)


@pytest.mark.parametrize("rows", [[make_ids(3)], [make_ids(3), make_ids(3, text=9)]], ids=["alone", "beside another"])
def test_a_prompt_that_is_cut_within_an_image_is_not_measured(rows):
    """The other row of the batch is cut within its text."""
    model, inputs = make_model("gemma3"), make_inputs("gemma3", rows)
    with patch(model, measure_prompts=1) as handle:
        model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=58)
        assert handle.report()["forwards"] == {"dense: only whole prompts are measured": 2}
        assert handle.report()["state"] == "measuring"


# Not of Gemma 3: there transformers repeats pictures one by one, so that each row gets other ones.
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_return_sequences=3, do_sample=True)])
def test_rows_that_generate_repeats_count_once(family, options):
    model, (inputs,) = make_model(family), prompts_of(family, 1)
    with patch(model, measure_prompts=2) as handle:
        model.generate(**inputs, max_new_tokens=2, **options)
        assert handle.report()["state"] == "measuring"
        model.generate(**prompts_of(family, 1, first=1)[0], max_new_tokens=2, **options)
        assert handle.profile.summary.n_prompts == 2


@family_names
@pytest.mark.parametrize("left", [True, False])
def test_a_prompt_counts_once_however_it_is_padded(family, left):
    model = make_model(family)
    alone = make_inputs(family, [make_ids(2)], seed=1)
    tokens = {name: x for name, x in alone.items() if x.shape == alone["input_ids"].shape}
    padded = alone | {name: functional.pad(x, (5, 0) if left else (0, 5)) for name, x in tokens.items()}
    with patch(model, measure_prompts=2) as handle:
        for inputs in (alone, padded, alone):
            model(**inputs)
        assert handle.report()["state"] == "measuring"
        model(**make_inputs(family, [make_ids(2)], seed=2))
        assert handle.profile.summary.n_prompts == 2


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_videos_can_be_measured(family):
    model = make_model(family)
    with patch(model, measure_prompts=2) as handle:
        model.generate(**make_video_inputs([3]), max_new_tokens=1, num_beams=2)
        model(**make_video_inputs([3], seed=1))
        assert handle.profile.summary.n_prompts == 2


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_a_template_other_than_that_of_the_profile_is_refused(family):
    model, (inputs,) = make_model(family), prompts_of(family, 1)
    with patch(model, template=SMALL, measure_prompts=1):
        model(**inputs)
    patch(model, template=SMALL).unpatch()
    patch(model).unpatch()
    with pytest.raises(ValueError, match=r"a template is for a profile that is still to be measured. Got .*calibrate"):
        patch(model, template=SinkTemplate((0, 5), (1,), 64))
    assert torch.equal(model(**inputs).logits, make_model(family)(**inputs).logits), "left unpatched"


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_an_exception_while_measuring_counts_nothing(family):
    model, (inputs,) = make_model(family), prompts_of(family, 1)
    with patch(model, measure_prompts=1) as handle:
        with pytest.raises(RuntimeError):
            model(**inputs | {"pixel_values": inputs["pixel_values"][:-1]})
        assert handle.report()["state"] == "measuring"
        model(**inputs)
        assert handle.profile.summary.n_prompts == 1


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_a_cache_that_cannot_be_written_is_reported_and_serving_goes_on(family, cache, log, tmp_path):
    cache.write_text("in the way")
    model, (inputs,) = make_model(family), prompts_of(family, 1)
    with patch(model, measure_prompts=1, template=SMALL) as handle:
        model(**inputs)
        level, message = log()[-1]
        assert level == "ERROR" and "stays in memory" in message
        assert "froze a profile" in message
        assert str(cache) in message
        assert "handle.profile.save(path)" in message
        assert handle.report()["state"] == "sparse" and handle.report()["profile"] == "in memory"
        model(**inputs)
        handle.profile.save(tmp_path / "kept.json")
        assert Profile.load(tmp_path / "kept.json") == handle.profile
    assert cache.read_text() == "in the way"
    assert patch(model).report()["state"] == "measuring"


@family_names
def test_a_profile_beside_the_checkpoint(family, tmp_path, log):
    folder = tmp_path / "checkpoint"
    model = make_model(family)
    with patch(model, mixed_profile(model)):
        model.save_pretrained(folder)  # a patch does not go into the checkpoint
    profile = mixed_profile(model)
    profile.save(folder / FILE_NAME)
    other = Profile.uniform(Category.SINK, profile.fingerprint)
    cache_path(profile.fingerprint).parent.mkdir(parents=True)
    other.save(cache_path(profile.fingerprint))

    loaded = type(model).from_pretrained(folder)
    assert loaded.config.text_config._attn_implementation == "sdpa"
    with patch(loaded) as handle:
        assert handle.profile == profile, "what lies beside the checkpoint comes first"
    assert log() == [("INFO", f"using the profile {folder / FILE_NAME}")]
    (folder / FILE_NAME).unlink()
    with patch(loaded) as handle:
        assert handle.profile == other


@pytest.mark.parametrize("family", ["gemma3"])
def test_a_file_that_should_hold_the_profile_must(family, tmp_path):
    """Damaged or of another model: an error, never a silent miss."""
    folder, model = tmp_path / "checkpoint", make_model(family)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    (folder / FILE_NAME).write_text(mixed_profile(model).to_json()[:-30])
    with pytest.raises(ProfileError, match=rf"^{folder / FILE_NAME}: "):
        patch(loaded)
    mixed_profile(make_model(family, seed=1)).save(folder / FILE_NAME)
    with pytest.raises(ProfileMismatchError, match="digest: the profile says"):
        patch(loaded)
    (folder / FILE_NAME).unlink()
    path = cache_path(fingerprint(model))
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ProfileError, match=rf"^{path}: "):
        patch(loaded)
    assert not hasattr(loaded, "_blindsight_handle")


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_profiles_of_other_formats_in_the_cache_are_passed_over(family, cache):
    """What another version of this library froze there is neither read nor touched."""
    model, (inputs,) = make_model(family), prompts_of(family, 1)
    path = cache_path(fingerprint(model))
    older = mixed_profile(model).to_json().replace(f"profile/{VERSION}", "profile/3")
    path.parent.mkdir(parents=True)
    others = [path.with_name(path.name.replace(f".v{VERSION}.", name)) for name in (".", ".v3.", ".v99.")]
    for other in others:
        other.write_text(older)
    with patch(model, measure_prompts=1) as handle:
        model(**inputs)
        assert handle.report()["profile"] == str(path)
    assert sorted(path.parent.iterdir()) == sorted([*others, path])
    assert {other.read_text() for other in others} == {older}
    path.write_text(older)
    with pytest.raises(ProfileError, match=rf"^{path}: .*an older format"):
        patch(model)


@pytest.mark.parametrize("family", ["gemma3"])
def test_a_profile_beside_a_snapshot_is_found_by_the_name_on_the_hub(family, tmp_path, monkeypatch, log):
    revision, repository = "a" * 40, tmp_path / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / revision
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    make_model(family).save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = type(make_model(family)).from_pretrained(snapshot)
    model.config._name_or_path, model.config._commit_hash = "acme/tiny", revision  # as if loaded by that name
    patch(model).unpatch()
    assert f"beside the checkpoint ({snapshot})" in log()[-1][1]
    mixed_profile(model).save(snapshot / FILE_NAME)
    with patch(model) as handle:
        assert handle.report()["profile"] == str(snapshot / FILE_NAME)
    monkeypatch.chdir(tmp_path)
    Path("acme/tiny").mkdir(parents=True)
    with patch(model) as handle:
        assert handle.report()["state"] == "measuring", (
            "a folder of that name goes before the hub, as it does in loading"
        )
    for name in ("acme/other", "gone/a/folder"):
        model.config._name_or_path = name
        with patch(model) as handle:
            assert handle.report()["state"] == "measuring" and f"({name})" in log()[-1][1]


def no_home(monkeypatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)


def unreadable(monkeypatch):
    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: refused(path))


@pytest.mark.parametrize(("folder", "why"), [(no_home, "no home folder: Could not"), (unreadable, "Permission denied")])
def test_a_cache_that_cannot_be_read_counts_as_empty(folder, why, monkeypatch, caplog):
    for name in ("BLINDSIGHT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder(monkeypatch)
    model, (inputs,) = make_model("qwen2_5_vl"), prompts_of("qwen2_5_vl", 1)
    with patch(model, measure_prompts=1) as handle:
        model(**inputs)
        assert handle.report()["profile"] == "in memory"
    first, _, last = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert first.startswith("no profile is looked for in the user's cache folder: ") and why in first
    assert why in last and "stays in memory" in last
    assert all("BLINDSIGHT_CACHE" in message for message in (first, last))


def test_where_the_cache_is(tmp_path, monkeypatch):
    mine = fingerprint(make_model("gemma3"))
    name = f"profiles/gemma3-{mine.digest[7:31]}.v{VERSION}.json"
    assert cache_path(mine) == tmp_path / "cache" / name
    monkeypatch.setenv("BLINDSIGHT_CACHE", "")
    assert cache_path(mine) == tmp_path / "xdg" / "blindsight" / name
    monkeypatch.delenv("BLINDSIGHT_CACHE")
    assert cache_path(mine) == tmp_path / "xdg" / "blindsight" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_path(mine) == tmp_path / "home" / ".cache" / "blindsight" / name


@pytest.mark.parametrize("family", ["qwen2_vl"])
def test_frozen_categories_follow_from_the_measurements(family):
    """Not all one category, so that freezing has something to say; and the choice can be made again from the file."""
    model = make_model(family)
    with patch(model, measure_prompts=1, template=SinkTemplate(tuple(range(18)), (), 8)) as handle:
        model(**prompts_of(family, 1)[0])
        profile = handle.profile
    np.testing.assert_array_equal(classify(profile.summary, Thresholds()), profile.categories)
    assert (profile.categories != Category.DENSE).all(), "with every token a sink nothing is lost"
