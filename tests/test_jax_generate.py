"""Generation: the tokens that transformers writes, sampling, stopping, second turns; nothing compiles per step."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import blindsight_cli
import jax_blindsight.generation
from blindsight_cli.loading import load_checkpoint
from blindsight_cli.smallvlm.evaluate import make_puzzles, to_inputs
from jax_blindsight import decode_step, load, write
from jax_blindsight.generation import _attend_one, _sample
from jax_parity import assert_as_exact
from parity_model import greedy_tokens
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile
from tiny_jax import generate, in_numpy, sparse_prefill, twin
from tiny_models import FAMILIES, VIDEO, in_double, make_ids, make_inputs, make_video_inputs, patch

SHIPPED = Path(blindsight_cli.__file__).parent / "models" / "blindsight-tiny-qwen2_5_vl"
N_NEW = 64


def batch(family):
    return make_inputs(family, [make_ids(3), make_ids(2, seed=1)])


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_are_the_whole_prompt(family):
    """Tokens of all kinds, fed one by one: their logits are those of the prompt with the tokens in it."""
    model = twin(family)
    prompts, tokens = [make_ids(3), make_ids(2, seed=1)], np.random.default_rng(0).integers(10, 96, (2, N_NEW))
    inputs, whole = (
        make_inputs(family, [[*p, *t] for p, t in zip(prompts, tail, strict=True)])
        for tail in (tokens[:, :0].tolist(), tokens.tolist())
    )
    expected = model.expect(whole, model.params.profile)
    n = inputs["input_ids"].shape[1]
    cache, logits = sparse_prefill(model.params, in_numpy(inputs), capacity=n + N_NEW).cache, []
    for token in tokens.T:
        row, cache = decode_step(model.params, token, cache)
        logits.append(row)
    got = np.zeros_like(expected.plain)
    got[:, n:] = np.stack(logits, axis=1)
    expected.check(got, (slice(None), slice(n, None)))


@pytest.fixture(scope="module")
def trained():
    """The shipped model, in both frameworks, its processor and its profile."""
    model, processor = load_checkpoint(SHIPPED)
    return model, processor, load(SHIPPED)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_the_trained_model_answers_as_in_transformers(trained, dense):
    """Its own profile, found beside it; puzzles of 2 and of 6 images in one batch, as its processor gives them."""
    model, processor, params = trained
    puzzles = [make_puzzles(n, 1, 1_000_000 + n)[0] for n in (2, 6)]
    inputs = to_inputs(processor, puzzles)
    profile = Profile.load(SHIPPED / FILE_NAME)
    assert params.profile == profile and profile.categories.any()
    handle = None if dense else patch(model, profile, impl="portable")
    with torch.no_grad():
        plain, expected = model(**inputs, logits_to_keep=1).logits.numpy(), greedy_tokens(model, inputs)
        if handle is not None:
            handle.unpatch()
        double = copy.deepcopy(model).double()
        with nullcontext() if dense else patch(double, profile, impl="portable"):
            truth = double(**in_double(inputs), logits_to_keep=1).logits.numpy()
    start = sparse_prefill(params, in_numpy(inputs), capacity=inputs["input_ids"].shape[1] + N_NEW, dense=dense)
    assert_as_exact(start.logits, plain[:, 0], truth[:, 0])
    got, cache = write(params, start, max_new_tokens=N_NEW, eos=())
    np.testing.assert_array_equal(got, expected)
    assert cache.length == inputs["input_ids"].shape[1] + N_NEW - 1
    words = processor.tokenizer.convert_ids_to_tokens(got[:, 0].tolist())
    assert words == [puzzle.question.answer for puzzle in puzzles]


def test_a_second_turn_with_another_image():
    """After prompts padded on the right and an answer: what the whole conversation in one prompt would give."""
    model, inputs = twin("gemma3"), make_inputs("gemma3", [make_ids(3), make_ids(2, seed=1)], left=False)
    start = sparse_prefill(model.params, in_numpy(inputs), capacity=inputs["input_ids"].shape[1] + N_NEW)
    answers, cache = write(model.params, start, max_new_tokens=6, eos=())
    turns = [[int(answer[-1]), *make_ids(1, seed=b)] for b, answer in enumerate(answers)]
    turn = make_inputs("gemma3", turns, seed=5)
    done = sparse_prefill(model.params, in_numpy(turn), cache=cache)
    assert done.how == "sparse"
    prompts = [make_ids(3), make_ids(2, seed=1)]
    whole = make_inputs("gemma3", [[*p, *a[:-1].tolist(), *t] for p, a, t in zip(prompts, answers, turns, strict=True)])
    old, new = inputs["pixel_values"], turn["pixel_values"]
    whole["pixel_values"] = torch.cat([old[:3], new[:1], old[3:], new[1:]])
    expected = model.expect(whole, model.params.profile)
    assert_as_exact(done.logits, expected.plain[:, -1], expected.truth[:, -1])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_turns_after_answers_about_videos(family):
    """A video's time runs beyond the text after it: what is written follows the time, and so does the next turn.

    A prompt in two pieces, then twice an answer of three tokens and a turn; rows of other lengths. Transformers takes
    the prompt at once, then all else by its own `rope_deltas`.
    """
    model, rng = twin(family), np.random.default_rng(1)
    prompts = [make_video_inputs([12]), make_video_inputs([2, 9])]
    rows = [prompt["input_ids"][0] for prompt in prompts]
    given = {
        name: torch.cat([prompt[name] for prompt in prompts]) for name in ("pixel_values_videos", "video_grid_thw")
    }
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side="left")
        for x in (rows, [torch.ones_like(row) for row in rows])
    )
    types = 2 * (ids == VIDEO).long()
    given |= dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=types)
    parts = [rng.integers(10, 96, (2, n)) for n in (3, 4, 3, 5)]  # answer, turn, answer, turn

    def of_transformers(model, given):
        out = model(**given, use_cache=True)
        found, seen = [out.logits[:, -1:]], given["attention_mask"]
        for part in parts:
            where = seen.sum(-1, keepdim=True) + model.model.rope_deltas + torch.arange(part.shape[1])
            seen = torch.cat([seen, torch.ones(part.shape, dtype=torch.long)], dim=1)
            more = dict(input_ids=torch.tensor(part), attention_mask=seen, position_ids=where.expand(3, -1, -1))
            out = model(**more, past_key_values=out.past_key_values)
            found.append(out.logits)
        return torch.cat(found, dim=1).numpy()

    with torch.no_grad():
        plain, truth = of_transformers(model.single, given), of_transformers(model.double, in_double(given))
    head = {name: x[:, :-1] if x.shape == ids.shape else x for name, x in in_numpy(given).items()}
    cache = sparse_prefill(model.params, head, dense=True, capacity=320).cache
    logits = []
    for turn, answer in zip((ids[:, -1:].numpy(), *parts[1::2]), (*parts[::2], parts[0][:, :0]), strict=True):
        done = sparse_prefill(model.params, {"input_ids": turn}, cache=cache, dense=True, all_logits=True)
        logits, cache = [*logits, done.logits], done.cache
        for token in answer.T:
            step, cache = decode_step(model.params, token, cache)
            logits.append(step[:, None])
    assert_as_exact(np.concatenate(logits, axis=1), plain, truth)


def test_the_log_says_what_the_prefill_was(caplog):
    params, inputs = twin("qwen2_vl").params, in_numpy(batch("qwen2_vl"))
    with caplog.at_level("INFO", logger="jax_blindsight"):
        for options in ({}, {"dense": True}, {"break_even": True}):
            generate(params, inputs, max_new_tokens=1, **options)
    told = [f"the prefill of 2 rows ran {how}" for how in ("sparse", "dense: asked for", "dense: too short to gain")]
    assert caplog.messages == told


def test_no_step_compiles_again(monkeypatch):
    params, traces = twin("qwen2_5_vl").params, []
    traced = jax_blindsight.generation.decode

    def counted(*args):
        traces.append(len(traces))
        return traced(*args)

    monkeypatch.setattr(jax_blindsight.generation, "decode", counted)
    start = sparse_prefill(params, in_numpy(batch("qwen2_5_vl")), capacity=67 + N_NEW)
    logits, cache = start.logits, start.cache
    while cache.length < cache.capacity:  # the last slot is used as well
        logits, cache = decode_step(params, jnp.argmax(logits, axis=-1), cache)
    assert cache.length >= 67 + N_NEW and len(traces) <= 1
    with pytest.raises(ValueError, match="consumed already"):
        decode_step(params, np.array([9, 9]), start.cache)


def test_a_row_stops_at_eos_and_the_batch_when_all_have():
    params, inputs = twin("gemma3").params, in_numpy(batch("gemma3"))
    options = dict(max_new_tokens=N_NEW, temperature=2.0)
    whole = generate(params, inputs, eos=(), **options)
    stops = [int(whole[0, 3]), int(whole[1, 7])]
    ends = [int(np.flatnonzero(np.isin(row, stops))[0]) for row in whole]
    got = generate(params, inputs, eos=stops, **options)
    assert np.array_equal(generate(replace(params, eos=tuple(stops)), inputs, **options), got), "the checkpoint's own"
    assert ends[0] != ends[1] and got.shape == (2, max(ends) + 1)
    for b, end in enumerate(ends):
        np.testing.assert_array_equal(got[b, : end + 1], whole[b, : end + 1])
        assert (got[b, end:] == whole[b, end]).all()


def test_numbers_may_be_of_numpy_and_tokens_of_any_kind():
    params, inputs = twin("gemma3").params, in_numpy(batch("gemma3"))
    want = generate(params, inputs, max_new_tokens=3, eos=())
    stop = want[0, 1]
    got = generate(params, inputs, max_new_tokens=np.int64(3), eos=stop)
    np.testing.assert_array_equal(got, generate(params, inputs, max_new_tokens=3, eos=int(stop)))
    start = sparse_prefill(params, inputs, all_logits=True)
    with pytest.raises(ValueError, match=r"logits of the last tokens, \[B, V\]. Got \(2, 67, 96\)"):
        write(params, start, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"in \[0, 96\).* Got \[5, 96\]"):
        decode_step(params, [5, 96], start.cache)
    steps = [
        decode_step(params, tokens, sparse_prefill(params, inputs, capacity=np.int64(70)).cache)[0]
        for tokens in (jnp.array([0, 95]), [0, 95], torch.tensor([0, 95]))  # the first and the last there are
    ]
    assert all(np.array_equal(step, steps[0]) for step in steps)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"eos": x}, "eos must be a token id") for x in (2.5, [2.5], [None], "12")]
    + [({"seed": x}, "seed must be an integer of 64 bits") for x in (1.5, 2**63)],
    ids=str,
)
def test_ids_and_seeds_that_are_none_are_refused_before_the_prefill(monkeypatch, option, message):
    monkeypatch.setattr("jax_blindsight.generation.sparse_prefill", None)
    with pytest.raises(ValueError, match=message):
        generate(twin("gemma3").params, {}, max_new_tokens=2, **option)


def test_sampling_is_seeded():
    params, inputs = twin("gemma3").params, in_numpy(batch("gemma3"))
    options = dict(max_new_tokens=N_NEW, temperature=1.5, top_k=20, top_p=0.9)
    one, same, other = (generate(params, inputs, seed=seed, eos=(), **options) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    greedy = generate(params, inputs, max_new_tokens=N_NEW, eos=())
    everything = dict(max_new_tokens=N_NEW, temperature=1.5, eos=())
    np.testing.assert_array_equal(*(generate(params, inputs, top_k=k, **everything) for k in (None, 2**40)))
    for narrow in (dict(top_k=1), dict(top_p=1e-60)):
        options = dict(max_new_tokens=N_NEW, temperature=1.5) | narrow
        np.testing.assert_array_equal(generate(params, inputs, eos=(), **options), greedy)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, 5, 1.0, [4, 3, 2, 0.5, 0.5]),
        (0.5, 5, 1.0, [16, 9, 4, 0.25, 0.25]),
        (1.0, 2, 1.0, [4, 3]),
        (1.0, 5, 0.65, [4, 3]),
        (1.0, 5, 0.71, [4, 3, 2]),
        (1.0, 3, 0.75, [4, 3]),
    ],
)
def test_samples_follow_the_distribution(temperature, top_k, top_p, kept):
    """`top_p` counts after `top_k` has been applied: 0.4 and 0.3 are 0.78 of what three leave."""
    probabilities = np.array([0.2, 0.05, 0.4, 0.3, 0.05])
    logits = jnp.asarray(np.tile(np.log(probabilities), (20_000, 1)), dtype=jnp.float32)
    drawn = np.asarray(_sample(logits, jax.random.key(0), temperature, top_k, top_p))
    frequencies = np.bincount(drawn, minlength=5)[[2, 3, 0, 1, 4]] / len(drawn)
    wanted = np.zeros(5)
    wanted[: len(kept)] = kept
    np.testing.assert_allclose(frequencies, wanted / wanted.sum(), atol=0.015)


def test_the_fewest_tokens_that_add_up_to_top_p_are_kept():
    """Exactly to it: one of two that have half each."""
    assert not np.asarray(_sample(jnp.zeros((100, 2)), jax.random.key(0), 1.0, 2, 0.5)).any()


def test_a_steps_attention_sums_in_float32():
    """In bfloat16, too: within a rounding of the weights, where scores of that precision are seven times as far off."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(2 * rng.standard_normal((1, h, n, 64)), jnp.bfloat16) for h, n in ((4, 1), (2, 128), (2, 128))
    )
    seen = np.arange(128)[None] < 100
    got = _attend_one(q, k, v, seen, 0.3)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k.repeat(2, axis=1), v.repeat(2, axis=1)))
    weights = np.where(seen, np.exp(q @ k.swapaxes(2, 3) * 0.3), 0.0)
    exact = (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(1, 2)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0, atol=0.02)
