"""Videos through the real processors: every group of frames is an image, in prompts, second turns and generation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from tiny_models import (
    END,
    IMAGE,
    START,
    VIDEO,
    double_model,
    in_double,
    make_video_inputs,
    mixed_profile,
    patch,
    positions_of,
    qwens,
)
from tiny_videos import ROWS, make_film_inputs
from torch_blindsight.known_tokens import Chunk, note_tokens
from torch_blindsight.models import inspect_model
from torch_blindsight.prompts import Dense, read_layouts

pytestmark = pytest.mark.usefixtures("no_grad")

EXACT = dict(rtol=0, atol=1e-9)
_PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


def layouts_of(model, arguments):
    info = inspect_model(model)
    return read_layouts(arguments, info.family, info.special)[0]


@qwens
def test_videos_and_a_picture(family):
    """Frames are images, in the first turn and in one on its cache; what is computed is what the masks say."""
    model, inputs = double_model(family), in_double(make_film_inputs(family))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rope = {name: x for name, x in inputs.items() if not name.startswith("pixel")}
    positions = model.model.get_rope_index(**rope)[0]
    (layout,) = layouts_of(model, inputs)
    assert layout.images.tolist() == ROWS
    assert layouts_of(model, dict(input_ids=ids, position_ids=positions)) == [layout]

    profile = mixed_profile(model)
    with patch(model, profile, impl="reference"):
        want = model(**inputs).logits
    assert (model(**inputs).logits - want).abs().max() > 0.1

    stop = ROWS[2][-1]
    first = dict(input_ids=ids[:, :stop], attention_mask=mask[:, :stop], position_ids=positions[..., :stop])
    first |= dict(pixel_values_videos=inputs["pixel_values_videos"][:108], video_grid_thw=inputs["video_grid_thw"][:1])
    second = dict(input_ids=ids[:, stop:], attention_mask=mask, position_ids=positions[..., stop:])
    second |= {name: inputs[name] for name in _PICTURES[:2]}
    second |= dict(pixel_values_videos=inputs["pixel_values_videos"][108:], video_grid_thw=inputs["video_grid_thw"][1:])
    words = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4, suppress_tokens=[IMAGE, VIDEO])
    with patch(model, profile) as handle:
        torch.testing.assert_close(model(**inputs).logits, want, **EXACT)
        cache = DynamicCache(config=model.config)
        turns = [model(**turn, past_key_values=cache).logits for turn in (first, second)]
        torch.testing.assert_close(torch.cat(turns, dim=1), want, **EXACT)
        assert handle.report()["forwards"] == {"sparse": 3}
        written = model.generate(**inputs, **words)
        assert handle.report()["forwards"] == {"sparse": 4, "dense: decode step": 3}
        assert torch.equal(model.generate(**inputs, **words, use_cache=False), written)
        assert handle.report()["forwards"]["sparse"] == 8


class FakeCache:
    """Knows its length, and shows keys that nobody writes to."""

    def __init__(self, length):
        self.length, self.layers = length, [SimpleNamespace(keys=torch.zeros(1))]

    def get_seq_length(self):
        return self.length


def test_frames_behind_a_cropped_cache():
    """Positions still tell frames of a chunk that was cut short; grids, listed for all rows together, do not."""
    model, film = double_model("qwen2_vl"), make_video_inputs([3, 2])
    ids, grids, positions = film["input_ids"], film["video_grid_thw"], positions_of(double_model("qwen2_vl"), film)
    images = layouts_of(model, film)[0].images.tolist()
    more = dict(input_ids=torch.tensor([[20, START, IMAGE, IMAGE, END]]))
    cache = FakeCache(ids.shape[1])
    for chunk in (Chunk(ids, grids), Chunk(ids, None, positions)):
        cache.length = ids.shape[1]
        note_tokens(cache, 0, chunk)
        assert layouts_of(model, more | dict(past_key_values=cache))[0].images.tolist()[:-1] == images
        cache.length = 56  # the second video is gone
        note_tokens(cache, 54, Chunk(ids[:, 53:55]))
        if chunk.positions is None:
            with pytest.raises(Dense, match="frames of a video are unknown"):
                layouts_of(model, more | dict(past_key_values=cache))
        else:
            assert layouts_of(model, more | dict(past_key_values=cache))[0].images.tolist()[:-1] == images[:3]


def test_a_video_that_the_padding_follows_is_cut():
    """As in the first piece of a batch: the video's other frames may come in the next."""
    film = make_video_inputs([3])
    positions = positions_of(double_model("qwen2_vl"), film)
    mask = torch.ones_like(film["input_ids"])
    mask[:, 4 + 2 * 16 :] = 0  # after two of three frame groups
    with pytest.raises(Dense, match="a video is cut"):
        layouts_of(
            double_model("qwen2_vl"),
            dict(input_ids=film["input_ids"] * mask, attention_mask=mask, position_ids=positions),
        )


@pytest.mark.parametrize("n_grids", [1, 3])
def test_grids_that_do_not_match_the_videos(n_grids):
    film = make_video_inputs([3, 2])
    film["video_grid_thw"] = film["video_grid_thw"][:1].repeat(n_grids, 1)
    with pytest.raises(ValueError, match=rf"a row per video. Got {n_grids} rows for 2 videos"):
        layouts_of(double_model("qwen2_vl"), film)
