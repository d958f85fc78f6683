"""Generation on a patched model: sparse prefill, dense decode, and every way of filling a cache piece by piece."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from shared_profiles import Category, SinkTemplate
from shared_profiles.profile import Profile
from tiny_models import (
    END,
    IMAGE,
    IMAGE_TOKENS,
    START,
    VIDEO,
    double_model,
    family_names,
    in_double,
    make_ids,
    make_inputs,
    make_video_inputs,
    mixed_profile,
    patch,
    positions_of,
    qwens,
)
from torch_blindsight import fingerprint

pytestmark = pytest.mark.usefixtures("no_grad")

EXACT = dict(rtol=0, atol=1e-9)
# A random model would write placeholders, and then the same word for ever.
GREEDY = dict(do_sample=False, suppress_tokens=[IMAGE, VIDEO], no_repeat_ngram_size=2)


@pytest.fixture
def model(family):
    shared = double_model(family)
    yield shared
    assert not hasattr(shared, "_blindsight_handle"), "a test left the shared model patched"


@pytest.fixture
def profile(model):
    return mixed_profile(model, seed=3)


def write(model, inputs, n=16, **options):
    """The `n` tokens that a model writes: `[B, n]`."""
    options = GREEDY | dict(max_new_tokens=n, min_new_tokens=n) | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def one_prompt(family, n_images=3, **options):
    return in_double(make_inputs(family, [make_ids(n_images, **options)]))


def everything_kept(model):
    template = SinkTemplate(tuple(range(IMAGE_TOKENS + 2)), (), 8)
    return Profile.uniform(Category.INTRA_IMAGE_SINK, fingerprint(model), template)


def without_sink(profile):
    """SINK alone changes the first image too, and a first piece with fewer than two images runs dense."""
    categories = np.where(profile.categories == Category.SINK, Category.INTRA_IMAGE_SINK, profile.categories)
    return replace(profile, categories=categories)


class Pieces:
    """Runs a prompt through a model in pieces on one cache, as chunked prefill or several turns do."""

    def __init__(self, model, inputs, pictures=True):
        self.model, self.inputs, self.pictures = model, inputs, pictures
        self.positions = positions_of(model, inputs)

    def run(self, *borders, cache=None):
        """Logits of the whole prompt, `[N, V]`, computed in pieces that end at the borders."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        done, out = 0, []
        cache = cache or DynamicCache(config=self.model.config)
        for stop in (*borders, ids.shape[1]):
            piece = dict(input_ids=ids[:, done:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            piece["position_ids"] = self.positions[..., done:stop]
            if "token_type_ids" in self.inputs:  # of all tokens so far: transformers counts the blocks from the first
                piece["token_type_ids"] = self.inputs["token_type_ids"][:, :stop]
            if self.pictures:
                piece |= self._pictures(int((ids[0, :done] == START).sum()), int((ids[0, :stop] == START).sum()))
            out.append(self.model(**piece).logits[0])
            done = stop
        return torch.cat(out)

    def _pictures(self, start, stop):
        if start == stop:
            return {}
        size = 1 if "token_type_ids" in self.inputs else 64
        pictures = {"pixel_values": self.inputs["pixel_values"][start * size : stop * size]}
        if size > 1:
            pictures["image_grid_thw"] = self.inputs["image_grid_thw"][start:stop]
        return pictures


@family_names
def test_64_tokens_of_the_unpatched_model(model, family):
    """Through the sparse path with everything kept, and with every head Dense."""
    inputs = one_prompt(family)
    want = write(model, inputs, 64)
    assert len(want[0].unique()) > 10, "a model that repeats itself proves little"
    with patch(model, everything_kept(model)) as handle:
        assert torch.equal(write(model, inputs, 64), want)
        assert handle.report()["forwards"] == {"sparse": 1, "dense: decode step": 63}
    with patch(model, Profile.uniform(Category.DENSE, fingerprint(model))):
        assert torch.equal(write(model, inputs, 64), want)


@family_names
def test_with_and_without_a_cache(model, family, profile):
    """Without a cache every step prefills sparsely; what a text row sees is the same, so the tokens are."""
    inputs = one_prompt(family)
    with patch(model, profile) as handle:
        got = write(model, inputs)
        assert handle.report()["forwards"] == {"sparse": 1, "dense: decode step": 15}
        assert torch.equal(write(model, inputs, use_cache=False), got)
        assert handle.report()["forwards"] == {"sparse": 17, "dense: decode step": 15}
    assert not torch.equal(write(model, inputs), got), "the profile must matter for these tokens"


@family_names
def test_a_left_padded_batch_writes_what_each_prompt_writes_alone(model, family, profile):
    prompts = [make_ids(2, seed=1), make_ids(4, seed=2, text=1), make_ids(1, seed=3)]
    batch = in_double(make_inputs(family, prompts))
    done = 0
    with patch(model, profile) as handle:
        together = write(model, batch, 12)
        assert handle.report()["forwards"]["sparse"] == 1
        for row, prompt in enumerate(prompts):
            alone = in_double(make_inputs(family, [prompt]))
            n = len(alone["pixel_values"])
            alone["pixel_values"] = batch["pixel_values"][done : done + n]
            assert torch.equal(write(model, alone, 12)[0], together[row])
            done += n
    assert done == len(batch["pixel_values"])


@family_names
@pytest.mark.parametrize(
    "options",
    [dict(do_sample=True, temperature=2.0), dict(num_beams=3), dict(num_beams=2, do_sample=True)],
    ids=["sampling", "beams", "sampled-beams"],
)
def test_sampling_and_beams(model, family, profile, options):
    """Equal to the reference implementation's, from the same seed."""
    inputs, results = in_double(make_inputs(family, [make_ids(3), make_ids(2, seed=5)])), []
    for impl in ("portable", "reference"):
        with patch(model, profile, impl=impl) as handle:
            torch.manual_seed(1)
            results.append(write(model, inputs, 8, **options))
            assert handle.report()["forwards"]["sparse"] == 1
    assert torch.equal(*results)


@family_names
@pytest.mark.parametrize("lengths", [[3], [3, 2]], ids=["alone", "padded"])
def test_a_static_cache(model, family, profile, lengths):
    """Its masks are made before the forward; of a padded batch they are 4-D."""
    inputs = in_double(make_inputs(family, [make_ids(n) for n in lengths]))
    with patch(model, profile) as handle:
        want = write(model, inputs, 8)
        assert torch.equal(write(model, inputs, 8, cache_implementation="static"), want)
        assert handle.report()["forwards"] == {"sparse": 2, "dense: decode step": 14}


@family_names
def test_pieces_on_a_static_cache(model, family, profile):
    """Which gives more keys than there are tokens, and for sliding layers the last ones only."""
    inputs = one_prompt(family, 5, text=4)
    pieces, n = Pieces(model, inputs), inputs["input_ids"].shape[1]
    image = IMAGE_TOKENS + 2 + 4
    with patch(model, profile) as handle:
        want = model(**inputs).logits[0]
        for borders in ([], [5 + 2 * image - 2], [3, 5 + 3 * image - 1, 5 + 5 * image - 3]):
            cache = StaticCache(config=model.config, max_cache_len=n + 9)
            torch.testing.assert_close(pieces.run(*borders, cache=cache), want, **EXACT)
        assert handle.report()["forwards"]["sparse"] == 6


def test_a_static_cache_that_somebody_wrote_to_is_unknown():
    """Its storage stays the same, whatever it holds."""
    model, inputs = double_model("qwen2_vl"), one_prompt("qwen2_vl", 4)
    pieces, ids = Pieces(model, inputs), inputs["input_ids"]
    border = int((ids[0] == END).nonzero()[1]) + 1
    cache = StaticCache(config=model.config, max_cache_len=200)

    def piece(start, stop):
        new = dict(input_ids=ids[:, start:stop], position_ids=pieces.positions[..., start:stop])
        n_before, n = (int((ids[0, :end] == START).sum()) for end in (start, stop))
        return model(**new, **pieces._pictures(n_before, n), past_key_values=cache)

    with patch(model, mixed_profile(model)) as handle:
        piece(0, border)
        cache.layers[0].keys.neg_()
        piece(border, ids.shape[1])
        assert handle.report()["forwards"] == {"sparse": 1, "dense: tokens in the cache are unknown": 1}


@family_names
def test_prompt_lookup_decoding(model, family, profile):
    """Candidates are looked at in one forward and mostly thrown away: the cache is cropped again and again."""
    inputs, options = one_prompt(family), dict(suppress_tokens=[START, IMAGE, VIDEO], no_repeat_ngram_size=0)
    with patch(model, profile):
        want = write(model, inputs, 24, **options)
    with patch(model, profile) as handle:
        assert torch.equal(write(model, inputs, 24, prompt_lookup_num_tokens=3, **options), want)
        assert handle.report()["forwards"]["dense: no image tokens among the queries"] > 0


@family_names
def test_pieces_that_end_between_images(model, family, profile):
    """Chunks, or turns that bring text, or turns that bring text and images: as one long prefill."""
    inputs = one_prompt(family, 5, text=4)
    image = IMAGE_TOKENS + 2 + 4  # an image, and the text after it
    pieces = Pieces(model, inputs)
    with patch(model, profile) as handle:
        want = model(**inputs).logits[0]
        for borders in ([], [5 + 2 * image - 2], [3, 5 + 3 * image - 1, 5 + 5 * image - 3]):
            torch.testing.assert_close(pieces.run(*borders), want, **EXACT)
        assert handle.report()["forwards"] == {
            "sparse": 6,
            "dense: fewer than two images": 1,
            "dense: no image tokens among the queries": 1,
        }
    with patch(model, without_sink(profile)) as handle:
        want = pieces.run()
        torch.testing.assert_close(pieces.run(5 + image, 5 + 4 * image), want, **EXACT)
        assert handle.report()["forwards"] == {"sparse": 3, "dense: fewer than two images": 1}


@qwens
@pytest.mark.parametrize("size", [7, 20, 33, 50])
def test_chunks_that_cut_images(model, family, profile, size):
    """Wherever the borders fall. The pictures themselves come whole or not at all, so the images are bare here."""
    inputs = one_prompt(family, 4, text=2)
    pieces = Pieces(model, inputs, pictures=False)
    first_piece_has_two_images = size > 3 + (IMAGE_TOKENS + 2 + 2) + 1
    profile = profile if first_piece_has_two_images else without_sink(profile)
    with patch(model, profile) as handle:
        want = pieces.run()
        borders = range(size, inputs["input_ids"].shape[1], size)
        torch.testing.assert_close(pieces.run(*borders), want, **EXACT)
        assert handle.report()["forwards"]["sparse"] > 1
    assert (pieces.run() - want).abs().max() > 0.1


def test_a_chunk_of_gemma_sees_of_its_image_what_exists():
    """A border inside an image hides the image's later tokens from its earlier ones, as in the model's own chunks.

    `category_mask` says so of the layout of the tokens so far, and the reference follows it.
    """
    model = double_model("gemma3")
    pieces = Pieces(model, one_prompt("gemma3", 3), pictures=False)
    border = 4 + 20 + 10  # ten tokens into the second image
    dense = pieces.run(border)
    assert (dense - pieces.run()).abs().max() > 0.1
    window = 24  # a first piece of which the sliding layers' caches lack one key
    after_window = pieces.run(window)
    with patch(model, everything_kept(model)) as handle:
        torch.testing.assert_close(pieces.run(border), dense, **EXACT)
        assert handle.report()["forwards"] == {"sparse": 2}
        torch.testing.assert_close(pieces.run(window), after_window, **EXACT)
        assert handle.report()["forwards"] == {"sparse": 3, "dense: fewer than two images": 1}
    profile = mixed_profile(model)
    with patch(model, profile):
        got = pieces.run(border)
    with patch(model, profile, impl="reference"):
        torch.testing.assert_close(pieces.run(border), got, **EXACT)


def test_generate_in_chunks_gemma():
    """Transformers 5.17 leaves pictures and token types out of chunks: the images are bare and causal, ours too."""
    model = double_model("gemma3")
    inputs = one_prompt("gemma3", 3)
    want = write(model, inputs, prefill_chunk_size=20)
    with patch(model, everything_kept(model)) as handle:
        assert torch.equal(write(model, inputs, prefill_chunk_size=20), want)
        assert handle.report()["forwards"]["sparse"] == 3
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with patch(model, without_sink(mixed_profile(model))):
        assert torch.equal(write(model, bare, prefill_chunk_size=20), write(model, bare))


@qwens
def test_generate_in_chunks_qwen(model, family, profile):
    """Transformers 5.17 cuts mRoPE positions along the batch and fails; a patch neither hides that nor makes it worse.

    Later ones encode pictures first and hand them out chunk by chunk.
    """
    inputs = one_prompt(family)

    def in_chunks() -> torch.Tensor | None:
        try:
            return write(model, inputs, prefill_chunk_size=20)
        except RuntimeError as error:
            assert "Sizes of tensors must match" in str(error)
            return None

    want = in_chunks()
    with patch(model, everything_kept(model)) as handle:
        got = in_chunks()
        if want is None:
            assert got is None
        else:
            assert torch.equal(got, want) and handle.report()["forwards"]["sparse"] > 1
    with patch(model, profile):
        whole = write(model, inputs)
    with patch(model, profile) as handle:
        in_chunks()
        before = handle.report()["forwards"].get("sparse", 0)
        assert torch.equal(write(model, inputs), whole)
        assert handle.report()["forwards"]["sparse"] == before + 1


@family_names
def test_a_second_turn_by_generate(model, family, profile):
    """Text after an answer: `generate` continues on the cache that the first turn left."""
    inputs = one_prompt(family)
    with patch(model, profile) as handle:
        cache = DynamicCache(config=model.config)
        first = write(model, inputs, 6, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], first, torch.tensor([[40, 41, 42]])], dim=1)
        second = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        got = write(model, second, 6, past_key_values=cache)
        assert handle.report()["forwards"] == {
            "sparse": 1,
            "dense: decode step": 10,
            "dense: no image tokens among the queries": 1,
        }
        kinds = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
        again = inputs | second | {kinds: (ids == IMAGE).long()}
        assert torch.equal(write(model, again, 6), got)


@family_names
def test_delimiters_that_somebody_wrote_are_text(model, family, profile):
    """A user may type them and a model may write them; the next prefill must not trip over it."""
    ids = [*make_ids(2), START, 40, END, END, START, START, *make_ids(2, seed=4)[1:], START]
    inputs = in_double(make_inputs(family, [ids]))
    n = 4 if family == "gemma3" else 4 * 64
    inputs["pixel_values"] = inputs["pixel_values"][:n]
    if "image_grid_thw" in inputs:
        inputs["image_grid_thw"] = inputs["image_grid_thw"][:4]
    want = model(**inputs).logits
    with patch(model, everything_kept(model)) as handle:
        torch.testing.assert_close(model(**inputs).logits, want, **EXACT)
        assert handle.report()["forwards"] == {"sparse": 1}


@family_names
def test_caches_that_were_changed_between_forwards(model, family, profile):
    """Cropped or copied: still known. Repeated, reordered or pickled: not known any more, so dense, and counted."""
    inputs = one_prompt(family, 2)
    positions = positions_of(model, inputs)
    more = one_prompt(family, 1, seed=9)["input_ids"][:, 1:]

    def first_turn():
        return model(**inputs, past_key_values=DynamicCache()).past_key_values

    def next_turn(cache, rows=1):
        past, n = cache.get_seq_length(), more.shape[1]
        where = int(positions.max()) + 1 - inputs["input_ids"].shape[1] + past + torch.arange(n)
        return model(
            input_ids=more.expand(rows, -1),
            attention_mask=torch.ones(rows, past + n, dtype=torch.long),
            position_ids=where.expand(*positions.shape[:-2], rows, -1),
            past_key_values=cache,
        ).logits

    with patch(model, profile) as handle:
        cache = first_turn()
        want = [next_turn(cache), next_turn(cache)]
        cache.crop(-2 * more.shape[1])
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        copies = copy.deepcopy(cache), copy.deepcopy(cache)  # two conversations after one beginning
        for each in (cache, *copies):
            for logits in want:
                torch.testing.assert_close(next_turn(each), logits, **EXACT)
        assert handle.report()["forwards"] == {"sparse": 9}

    def changed(cache):
        cache.layers[0].keys.neg_()
        return copy.deepcopy(cache)

    reordered = lambda c: c.reorder_cache(torch.tensor([0]))  # noqa: E731
    pickled = lambda c: pickle.loads(pickle.dumps(c))  # noqa: E731
    copied = lambda c: reordered(c := copy.deepcopy(c)) or c  # noqa: E731
    for change, rows in (
        (lambda c: c.batch_repeat_interleave(2), 2),
        *((x, 1) for x in (reordered, pickled, copied, changed)),
    ):
        results = []
        with patch(model, profile) as handle:
            cache = first_turn()
            cache = change(cache) or cache
            before = copy.deepcopy(cache)
            results += [next_turn(cache, rows), next_turn(cache, rows)]
            assert handle.report()["forwards"] == {"sparse": 1, "dense: tokens in the cache are unknown": 2}
        assert torch.equal(torch.stack(results), torch.stack([next_turn(before, rows), next_turn(before, rows)]))


@qwens
def test_videos(model, family, profile):
    inputs = in_double(make_video_inputs([3, 2]))
    want = write(model, inputs)
    with patch(model, everything_kept(model)) as handle:
        assert torch.equal(write(model, inputs), want)
        assert handle.report()["forwards"] == {"sparse": 1, "dense: decode step": 15}
    with patch(model, profile) as handle:
        got = write(model, inputs)
        assert torch.equal(write(model, inputs, use_cache=False), got)
        assert handle.report()["forwards"]["sparse"] == 17
        write(model, inputs, 4, num_beams=2)
        assert handle.report()["forwards"]["sparse"] == 18
    assert not torch.equal(got, want)


@qwens
def test_videos_in_pieces(model, family, profile):
    """Frames of a video in the cache stay known; one that is cut between two pieces runs dense."""
    pieces = Pieces(model, in_double(make_video_inputs([3, 2])), pictures=False)
    dense = pieces.run(30)
    with patch(model, profile) as handle:
        torch.testing.assert_close(pieces.run(30), dense, **EXACT)
        assert handle.report()["forwards"] == {"dense: a video is cut": 2}
        torch.testing.assert_close(pieces.run(55), pieces.run(), **EXACT)
        assert handle.report()["forwards"] == {"dense: a video is cut": 2, "sparse": 3}
