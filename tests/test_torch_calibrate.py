"""Calibration: the statistics are what a direct computation gives, a run can be interrupted, and errors are clear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from shared_profiles import SPARSE, Category, Layout, SinkTemplate, category_mask
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.sink_statistics import SinkMass, learn_template
from shared_profiles.state_files import one_writer
from shared_profiles.statistics import Statistics
from tiny_models import (
    IMAGE_TOKENS,
    double_model,
    family_names,
    in_double,
    make_ids,
    make_inputs,
    make_model,
    make_video_inputs,
    mixed_profile,
    patch,
)
from torch_blindsight import calibrate, fingerprint, observe
from torch_blindsight.sinks import measure_sinks

SMALL = SinkTemplate((0, 1), (1, 2), 8)
QUIET = dict(template=SMALL, progress=False, thresholds=Thresholds())


@pytest.fixture
def model(family):
    """A fresh model, which must come out of the test as it went in."""
    fresh = make_model(family)
    yield fresh
    assert not hasattr(fresh, "_blindsight_handle")
    assert fresh.config.text_config._attn_implementation == "sdpa"
    assert not fresh._forward_hooks


def prompts_of(family, n):
    return [make_inputs(family, [make_ids(2 + i % 3, seed=i)], seed=i) for i in range(n)]


class Counted:
    """Counts a model's forwards."""

    def __init__(self, model):
        self.n, self._hook = 0, model.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.n += 1


captured: dict[int, tuple] = {}


def capturing_attention(module, query, key, value, attention_mask, **kwargs):
    captured[module.layer_idx] = *(x[0].numpy() for x in (query, key, value)), kwargs
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("capturing", capturing_attention)
AttentionMaskInterface.register("capturing", sdpa_mask)


def softmax(scores, mask):
    weights = np.where(mask, np.exp(scores - scores.max(axis=1, keepdims=True)), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


@family_names
def test_the_statistics_are_those_of_a_direct_computation(family):
    """From queries, keys and values of the model itself, with whole S x S softmaxes in float64."""
    model = double_model(family)
    inputs = in_double(make_inputs(family, [make_ids(3)]))
    summary = calibrate(model, [inputs], **QUIET).summary

    model.set_attn_implementation({"text_config": "capturing"})
    with torch.no_grad():
        model(**inputs)
    model.set_attn_implementation({"text_config": "sdpa"})
    begin = 4 + np.arange(3) * (IMAGE_TOKENS + 2 + 3)
    images = np.stack([begin, begin + 1, begin + 1 + IMAGE_TOKENS, begin + 2 + IMAGE_TOKENS], axis=1)
    n = inputs["input_ids"].shape[1]
    layout = Layout(n, 0, n, images, family == "gemma3")
    rows = np.concatenate([np.arange(first, last) for _, first, last, _ in images[1:]])
    pairs = np.zeros(4)
    for layer in range(4):
        q, k, v, options = captured[layer]
        masks = [category_mask(layout, c, SMALL, window=options.get("sliding_window")) for c in Category]
        pairs += [mask.sum() for mask in masks]
        for head in range(4):
            scores = q[head] @ k[head // 2].T * options["scaling"]
            dense = softmax(np.where(masks[0], scores, -np.inf), masks[0])
            reference = dense @ v[head // 2]
            for category in SPARSE:
                mask = masks[category]
                change = softmax(np.where(mask, scores, -np.inf), mask) @ v[head // 2] - reference
                mass = (dense * mask).sum(axis=1)[rows].mean()
                error = (np.linalg.norm(change, axis=1) / np.linalg.norm(reference, axis=1))[rows].mean()
                # Records are float32 and a summary keeps six digits.
                assert summary.mass_mean[category][layer, head] == pytest.approx(mass, rel=2e-5)
                assert summary.error_mean[category][layer, head] == pytest.approx(error, rel=2e-5, abs=1e-6)
    for category in SPARSE:
        assert summary.kept[category] == pytest.approx(pairs[category] / pairs[0], rel=1e-5)
    assert 0.05 < summary.mass_mean[Category.INTRA_IMAGE].min() < summary.mass_mean[Category.SINK].max() < 0.999


@family_names
def test_rows_are_measured_a_few_at_a_time(family, monkeypatch):
    """However few: what is averaged is the same, so a prompt's length bounds no memory but that of its outputs."""
    model, inputs = double_model(family), in_double(make_inputs(family, [make_ids(3)]))
    whole = calibrate(model, [inputs], **QUIET).summary
    seen = []
    rows = observe._rows
    monkeypatch.setattr(observe, "_rows", lambda *args: seen.append(len(args[2])) or rows(*args))
    monkeypatch.setattr(observe, "_ROWS", 5)
    pieces = calibrate(model, [inputs], **QUIET).summary
    assert max(seen) <= 5
    for category in SPARSE:
        np.testing.assert_allclose(pieces.mass_mean[category], whole.mass_mean[category], rtol=1e-5)
        np.testing.assert_allclose(pieces.error_mean[category], whole.error_mean[category], rtol=1e-5)


@family_names
def test_the_profile(model, family):
    prompts = prompts_of(family, 3)
    thresholds = Thresholds(gamma_intra=0.5)
    options = QUIET | dict(dataset="puzzles", thresholds=thresholds)
    profile = calibrate(model, iter(prompts), **options)
    np.testing.assert_array_equal(profile.categories, classify(profile.summary, thresholds))
    assert profile.choice == thresholds.to_choice()
    assert profile.template == SMALL
    assert profile.fingerprint == fingerprint(model)
    made = profile.provenance
    assert (made.dataset, made.n_prompts) == ("puzzles", 3)
    assert made.n_tokens == sum(x["input_ids"].shape[1] for x in prompts)
    assert set(made.versions) == {"blindsight-vlm", "torch", "transformers", "numpy"}
    again = calibrate(model, prompts[::-1] + prompts[:1], **options)
    assert again.summary == profile.summary, "neither the order nor repetitions matter"
    assert again.provenance.dataset_hash == made.dataset_hash
    assert calibrate(model, prompts[:2], **QUIET).provenance.dataset_hash != made.dataset_hash
    with patch(model, profile) as handle:
        assert handle.profile is profile


@family_names
def test_an_interrupted_run_continues_where_it_stopped(model, family, tmp_path):
    prompts = prompts_of(family, 5)
    whole = calibrate(model, prompts, state=tmp_path / "whole.npz", **QUIET)
    counted = Counted(model)

    def interrupted(after):
        yield from prompts[:after]
        raise KeyboardInterrupt

    state = tmp_path / "state.npz"
    for after in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, interrupted(after), state=state, **QUIET)
        assert counted.n == len(Statistics.load(state)) == after
        assert not hasattr(model, "_blindsight_handle")
    resumed = calibrate(model, prompts, state=state, **QUIET)
    assert counted.n == 5, "no prompt is measured twice"
    assert state.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert resumed.summary == whole.summary
    np.testing.assert_array_equal(resumed.categories, whole.categories)
    assert resumed.provenance.dataset_hash == whole.provenance.dataset_hash
    assert calibrate(model, [], state=state, **QUIET).summary == whole.summary
    without = [prompt | {"pixel_values_videos": None} for prompt in prompts]
    assert calibrate(model, without, state=state, **QUIET).summary == whole.summary
    assert counted.n == 5, "what is None does not make a prompt another one"


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_the_state_is_written_every_few_prompts_and_on_errors(model, tmp_path):
    state, seen = tmp_path / "state.npz", []

    def prompts():
        for x in prompts_of("qwen2_5_vl", 5):
            seen.append(len(Statistics.load(state)) if state.exists() else None)
            yield x
        yield {"input_ids": torch.zeros(2, 3, dtype=torch.long)}

    with pytest.raises(ValueError, match="one prompt"):
        calibrate(model, prompts(), state=state, save_every=2, **QUIET)
    assert seen == [None, None, 2, 2, 4]
    assert len(Statistics.load(state)) == 5


@pytest.mark.parametrize("family", ["qwen2_vl"])
def test_a_state_that_does_not_fit_is_refused(model, tmp_path):
    state, prompts = tmp_path / "state.npz", prompts_of("qwen2_vl", 1)
    calibrate(model, prompts, state=state, **QUIET)
    with pytest.raises(ValueError, match=r"state.npz must have been measured with this template: .* Got .* 8\)\. Cal"):
        calibrate(model, prompts, state=state, **QUIET | dict(template=SinkTemplate()))
    with pytest.raises(ValueError, match=r"state.npz must have been measured with this model: sha256:"):
        calibrate(make_model("qwen2_vl", seed=1), prompts, state=state, **QUIET)
    with one_writer(state), pytest.raises(ValueError, match=r"one writer\. Another run writes .*state\.npz\."):
        calibrate(model, prompts, state=state, **QUIET)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state.npz must be a whole file written by Statistics.save"):
        calibrate(model, prompts, state=state, **QUIET)
    with pytest.raises(OSError):
        calibrate(model, prompts, state=tmp_path / "absent" / "state.npz", **QUIET)


@family_names
def test_data_that_shows_nothing(model, family):
    with pytest.raises(ValueError, match=r"at least two images. Got none \(0 prompts with fewer\). Pass multi-image"):
        calibrate(model, [], **QUIET)
    single = [make_inputs(family, [make_ids(1, seed=i)]) for i in range(2)]
    with pytest.raises(ValueError, match=r"Got none \(2 prompts with fewer\)"):
        calibrate(model, single, **QUIET)
    assert calibrate(model, single + prompts_of(family, 1), **QUIET).summary.n_prompts == 1


@family_names
def test_prompts_that_are_none(model, family):
    good = prompts_of(family, 1)[0]
    batch = make_inputs(family, [make_ids(2), make_ids(2)])
    with pytest.raises(ValueError, match=r"for one prompt with return_tensors=.pt., input_ids \[1, N\]. Got \(2, 46\)"):
        calibrate(model, [good, batch], **QUIET)
    with pytest.raises(ValueError, match=r"input_ids \[1, N\]. Got \(46,\)"):
        calibrate(model, [{"input_ids": batch["input_ids"][0]}], **QUIET)
    with pytest.raises(ValueError, match=r"input_ids \[1, N\]. Got NoneType"):
        calibrate(model, [{"inputs_embeds": torch.zeros(1, 3, 64)}], **QUIET)
    with pytest.raises(ValueError, match=r"input_ids \[1, N\]. Got list"):
        calibrate(model, [good | {"input_ids": good["input_ids"].tolist()}], **QUIET)
    with pytest.raises(
        ValueError, match=r"^prompt 0: prompts must be a list .*Got a str\. Put a single prompt in a list"
    ):
        calibrate(model, good, **QUIET)
    few = good | {"pixel_values": good["pixel_values"][: len(good["pixel_values"]) // 2]}
    with pytest.raises(Exception) as raised:
        calibrate(model, [good, few], **QUIET)
    assert "prompt 1 (" in str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
    elsewhere = good | {name: good[name].to("meta") for name in ("input_ids", "pixel_values")}
    with pytest.raises(ValueError, match=r"device, cpu. Got input_ids, pixel_values elsewhere: call .to\('cpu'\)"):
        calibrate(model, [elsewhere], **QUIET)
    cut = good | {name: good[name][:, :25] for name in good if good[name].shape[:1] == (1,) and good[name].ndim == 2}
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        calibrate(model, [cut], **QUIET)


@family_names
def test_prompts_that_could_not_run_sparse_are_refused_and_not_left_out(model, family):
    """They were skipped in silence, as if they had fewer than two images."""
    good, other = prompts_of(family, 2)
    n = other["input_ids"].shape[1]
    hole = other["attention_mask"].clone()
    hole[0, 2] = 0
    last = 4 + 2 * (IMAGE_TOKENS + 2) + 3 - 1  # the second image's end delimiter
    short = {name: x[:, :last] for name, x in good.items() if x.shape == good["input_ids"].shape}
    wrong = {
        "padding inside a row": other | {"attention_mask": hole},
        "attention_mask is not": other | {"attention_mask": torch.ones(1, 1, n, n)},
        "an image without its end": good | short,
    }
    if family == "gemma3":
        wrong["token_type_ids are not"] = other | {"token_type_ids": other["token_type_ids"] * 0}
    else:
        video = make_video_inputs([2, 2])
        wrong["frames of a video are unknown"] = {name: x for name, x in video.items() if name != "video_grid_thw"}
    for reason, prompt in wrong.items():
        with pytest.raises(ValueError, match=rf"^prompt 1: a prompt must be one sequence .* Got: {reason}.*unchanged"):
            calibrate(model, [good, prompt], **QUIET)
        with pytest.raises(ValueError, match=rf"^held-out prompt 0: .* Got: {reason}"):
            calibrate(model, [good], held_out=[prompt], template=SMALL, progress=False)


@family_names
def test_weights_that_are_not_numbers_are_named(model, family):
    with torch.no_grad():
        model.get_submodule("model.language_model.layers.2.self_attn.q_proj").weight[16:32] = torch.nan
    with pytest.raises(ValueError, match=r"^prompt 0 \(\w+\): .*layer 2, head 1, SINK: mass must be in .* Got nan"):
        calibrate(model, prompts_of(family, 1), **QUIET)
    with pytest.raises(ValueError, match=r"^prompt 0 \(\w+\): what image rows look at, .* nan\. Are prompt and w"):
        calibrate(model, prompts_of(family, 1), **QUIET | dict(template=None))


@family_names
def test_a_pruned_head_loses_nothing(model, family):
    """Values of zero give outputs of zero under every category: no error, and no division by zero."""
    with torch.no_grad():
        model.get_submodule("model.language_model.layers.1.self_attn.v_proj").weight[:16] = 0
        bias = model.get_submodule("model.language_model.layers.1.self_attn.v_proj").bias
        if bias is not None:
            bias[:16] = 0
    summary = calibrate(model, prompts_of(family, 1), **QUIET).summary
    for category in SPARSE:
        assert (summary.error_mean[category][1, :2] == 0).all()
        assert (summary.error_mean[category][1, 2:] > 0).all()
        assert (summary.mass_mean[category][1, :2] < 1).all()


@family_names
def test_a_patched_model_is_refused_and_a_training_one_is_given_back_as_it_was(model, family):
    with patch(model, mixed_profile(model)) as handle:
        with pytest.raises(ValueError, match=r"must not be patched while it is calibrated. Call unpatch\(\)"):
            calibrate(model, prompts_of(family, 1), **QUIET)
        assert handle.report()["state"] == "sparse"
    want = calibrate(model, prompts_of(family, 1), **QUIET).summary
    model.train()
    model.lm_head.eval()  # frozen by its owner
    flags = [module.training for module in model.modules()]
    assert calibrate(model, prompts_of(family, 1), **QUIET).summary == want
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(ValueError, match="at least two images"):
        calibrate(model, [], **QUIET)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_videos_and_low_precision(model, family):
    summary = calibrate(model, [make_video_inputs([2, 2])], **QUIET).summary
    low = {name: x.bfloat16() if x.is_floating_point() else x for name, x in make_video_inputs([2, 2]).items()}
    rough = calibrate(model.bfloat16(), [low], **QUIET).summary
    for category in SPARSE:
        np.testing.assert_allclose(rough.mass_mean[category], summary.mass_mean[category], atol=0.1)
        assert rough.kept[category] == summary.kept[category]


@pytest.mark.parametrize("family", ["gemma3"])
def test_without_a_template_one_is_learned(model, family, tmp_path):
    """From the first 8 prompts; a resumed run has the same, whatever it would learn."""
    prompts, state = prompts_of(family, 10), tmp_path / "state.npz"
    options = QUIET | dict(template=None, state=state)
    masses = [reading.mass for reading in measure_sinks(model, prompts[:8])]
    counted = Counted(model)
    profile = calibrate(model, iter(prompts), local_block=8, **options)
    assert counted.n == 18
    assert profile.template == learn_template(SinkMass.mean(masses), 8)
    learned = profile.choice["sinks"]
    received = np.mean([mass.others for mass in masses], axis=(0, 1, 2))
    assert learned["prompts"] == 8
    assert learned["from_start"] == pytest.approx(received[list(profile.template.from_start)], rel=1e-5)
    assert learned["from_end"] == pytest.approx(received[[17 - x for x in profile.template.from_end]], rel=1e-5)
    again = calibrate(model, prompts[5:], **options)
    assert counted.n == 18
    assert (again.template, again.choice, again.summary) == (profile.template, profile.choice, profile.summary)
    with pytest.raises(ValueError, match=r"have been measured with this template: .*, 16\)\. Got .*, 8\)"):
        calibrate(model, prompts, local_block=16, **options)
    with pytest.raises(ValueError, match="local_block must be left out where a template is given"):
        calibrate(model, prompts, local_block=16, **QUIET)
    with pytest.raises(ValueError, match="at least two images"):
        calibrate(model, [make_inputs(family, [make_ids(1)])], **options | dict(state=None))


@pytest.mark.parametrize("family", ["gemma3"])
def test_progress_is_shown_where_asked_for(model, capsys):
    calibrate(model, prompts_of("gemma3", 1), thresholds=Thresholds(), progress=False)
    assert capsys.readouterr() == ("", "")
    calibrate(model, prompts_of("gemma3", 1), thresholds=Thresholds(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "calibrating" in err
