"""Layouts from token ids: every structure is read back as it was written, and what is malformed is refused by name."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_profiles import FAMILIES, Category, Layout, SinkTemplate, SpecialTokens, category_mask, family_of
from shared_profiles.layout import NO_IMAGE_TOKENS, why_dense
from strategies import pruned_layouts, templates

START, END, IMAGE, VIDEO, PAD = 3, 4, 5, 6, 0
SPECIAL = SpecialTokens(START, END, IMAGE, VIDEO)
WORDS = st.lists(st.sampled_from([10, 11, 12, START, END]), max_size=5)  # a delimiter by itself is text


class Written(NamedTuple):
    """A prompt's ids, the images in it, and the frame groups of its videos."""

    ids: list[int]
    rows: list[tuple[int, int, int, int]]
    frames: list[int]


@st.composite
def prompts(draw, videos: bool = True) -> Written:
    ids, rows, frames = draw(WORDS), [], []
    for is_video in draw(st.lists(st.booleans() if videos else st.just(False), max_size=5)):
        groups, tokens = draw(st.integers(1, 4)) if is_video else 1, draw(st.integers(1, 6))
        begin = len(ids)
        ids += [START, *[VIDEO if is_video else IMAGE] * (groups * tokens), END]
        for g in range(groups):
            first = begin + 1 + g * tokens
            last = first + tokens
            rows.append((begin if g == 0 else first, first, last, last + 1 if g == groups - 1 else last))
        frames += [groups] * is_video
        ids += draw(WORDS)
    return Written(ids, rows, frames)


def as_rows(rows: list[tuple[int, int, int, int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


@given(prompts(), st.lists(st.sampled_from([PAD, START, IMAGE, END]), max_size=4), st.booleans(), st.booleans())
def test_a_written_prompt_is_read_back(written, padding, left, bidirectional):
    """Padding may hold any id: the mask alone says what is real."""
    shift = len(padding) if left else 0
    real, pad = [1] * len(written.ids), [0] * len(padding)
    ids, valid = (padding + written.ids, pad + real) if left else (written.ids + padding, real + pad)
    got = Layout.from_ids(ids, SPECIAL, valid=valid, frames=written.frames, bidirectional=bidirectional)
    start, stop = (shift, shift + len(real)) if real else (0, 0)
    want = Layout(len(ids), start, stop, as_rows(written.rows) + shift, bidirectional)
    assert got == want
    assert hash(got) == hash(want)
    assert got.n_images == len(written.rows)


@given(prompts(videos=False), st.data())
def test_the_beginning_of_a_prompt_ends_in_an_unfinished_image(written, data):
    stop = data.draw(st.integers(0, len(written.ids)))
    got = Layout.from_ids(written.ids[:stop], SPECIAL, unfinished=True)
    rows = [(b, f, min(last, stop), min(end, stop)) for b, f, last, end in written.rows if f < stop]
    cut = any(f < stop <= last for _, f, last, _ in written.rows)
    assert got == Layout(stop, 0, stop, as_rows(rows), unfinished=cut)


def test_an_unfinished_image_has_no_sinks_counted_from_its_end():
    template = SinkTemplate((0, 1), (1, 2))
    cut = Layout.from_ids([10, START, *[IMAGE] * 5], SPECIAL, unfinished=True)
    assert cut.sinks(template).tolist() == [1, 2]
    whole = Layout.from_ids([10, START, *[IMAGE] * 5, END], SPECIAL, unfinished=True)
    assert whole.sinks(template).tolist() == [1, 2, 6, 7]
    assert cut != Layout(7, 0, 7, cut.images)


def test_the_drawing_in_the_docstring():
    ids = [10, 11, START, *[IMAGE] * 3, END, 12, START, *[IMAGE] * 2, END, 13]
    layout = Layout.from_ids(ids, SPECIAL)
    assert layout.images.tolist() == [[2, 3, 6, 7], [8, 9, 11, 12]]
    assert layout.text.tolist() == [0, 1, 7, 12]
    assert layout.textual_rows.tolist() == [0, 1, 2, 6, 7, 8, 11, 12]
    assert layout.sinks(SinkTemplate((0, 1), (1, 2))).tolist() == [2, 3, 5, 6, 8, 9, 10, 11]
    assert layout.sinks(SinkTemplate((), (9,))).tolist() == [2, 6, 8, 11]  # delimiters always, the rest where it fits


def test_frame_groups_share_the_delimiters_of_their_video():
    ids = [10, START, *[VIDEO] * 6, END, START, *[IMAGE] * 2, END, START, *[VIDEO] * 2, END]
    layout = Layout.from_ids(ids, SPECIAL, frames=[3, 1])
    assert layout.images.tolist() == [[1, 2, 4, 4], [4, 4, 6, 6], [6, 6, 8, 9], [9, 10, 12, 13], [13, 14, 16, 17]]


def test_offsets_of_sinks_skip_the_delimiters_that_a_frame_lacks():
    """The drawing of `SinkTemplate`: an offset is the same token of a picture with and without delimiters."""
    layout = Layout.from_ids([10, START, *[VIDEO] * 15, END], SPECIAL, frames=[3])  # frames at 2, 7 and 12
    assert layout.sinks(SinkTemplate((0,), (1,))).tolist() == [1, 17]
    assert layout.sinks(SinkTemplate((0, 1), (1, 2))).tolist() == [1, 2, 6, 7, 11, 12, 16, 17]
    assert layout.sinks(SinkTemplate((2, 9), (3,))).tolist() == [1, 3, 5, 8, 10, 13, 15, 17]


def test_crops_of_one_picture_are_images_of_their_own():
    """Gemma 3's pan and scan writes every crop between delimiters; its tokens look both ways."""
    crop = [START, *[IMAGE] * 4, END]
    layout = Layout.from_ids([10, *crop, 11, 11, *crop, *crop], SpecialTokens(START, END, IMAGE), bidirectional=True)
    assert layout.images.tolist() == [[1, 2, 6, 7], [9, 10, 14, 15], [15, 16, 20, 21]]
    assert layout.bidirectional


def test_a_sequence_of_padding_only():
    layout = Layout.from_ids([PAD] * 4, SPECIAL, valid=[0] * 4)
    assert (layout.n_tokens, layout.start, layout.stop, layout.n_images) == (4, 0, 0, 0)
    assert Layout.from_ids([], SPECIAL).n_tokens == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([10, IMAGE, IMAGE, END], r"image 0, placeholders at \[1, 3\), with no start before it"),
        ([START, IMAGE, IMAGE, 10], r"image 0, placeholders at \[1, 3\), with no end after it"),
        ([START, IMAGE, IMAGE], r"image 0, placeholders at \[1, 3\), with no end after it"),
        (
            [START, IMAGE, END, 10, IMAGE, 10],
            r"image 1, placeholders at \[4, 5\), with no start before and end after it",
        ),
        ([START, IMAGE, 10, IMAGE, END], r"image 0, placeholders at \[1, 2\), with no end after it"),
        ([START, 10, IMAGE, END], r"image 0, placeholders at \[2, 3\), with no start before it"),
        ([START, VIDEO, 10], r"image 0, placeholders at \[1, 2\), with no end after it"),
        ([IMAGE], r"image 0, placeholders at \[0, 1\), with no start before and end after it"),
        ([START, VIDEO, IMAGE, END], r"image 0, placeholders at \[1, 2\), with no end after it"),
        ([START, IMAGE, VIDEO, END], r"image 0, placeholders at \[1, 2\), with no end after it"),
    ],
    ids=[
        "no-start",
        "no-end",
        "cut",
        "bare",
        "run-too-short",
        "run-too-late",
        "video",
        "placeholder-alone",
        "video-touches-image",
        "image-touches-video",
    ],
)
def test_placeholders_that_do_not_fit_their_delimiters(ids, message):
    with pytest.raises(ValueError, match=message + r"\. Use the ids that the model's processor returns, uncut"):
        Layout.from_ids(ids, SPECIAL, frames=[1] * (VIDEO in ids))


def test_a_delimiter_in_the_padding_does_not_count():
    with pytest.raises(ValueError, match=r"placeholders at \[1, 2\), with no start before it"):
        Layout.from_ids([START, IMAGE, END], SPECIAL, valid=[0, 1, 1])
    with pytest.raises(ValueError, match=r"placeholders at \[1, 2\), with no end after it"):
        Layout.from_ids([START, IMAGE, END], SPECIAL, valid=[1, 1, 0])


def test_only_the_last_image_may_be_unfinished():
    ids = [START, IMAGE, IMAGE, 10, START, IMAGE]
    with pytest.raises(ValueError, match=r"image 0, placeholders at \[1, 3\), with no end after it"):
        Layout.from_ids(ids, SPECIAL, unfinished=True)
    with pytest.raises(ValueError, match=r"image 0, placeholders at \[0, 2\), with no start before it"):
        Layout.from_ids([IMAGE, IMAGE], SPECIAL, unfinished=True)


def test_refuses_what_is_no_sequence():
    with pytest.raises(ValueError, match=r"one sequence \[N\]. Got shape \(2, 3\). Build one layout per row"):
        Layout.from_ids(np.zeros((2, 3), dtype=int), SPECIAL)
    with pytest.raises(ValueError, match=r"valid must have shape \(3,\) like ids. Got \(2,\)"):
        Layout.from_ids([1, 2, 3], SPECIAL, valid=[1, 1])
    with pytest.raises(ValueError, match=r"on the left or right of a sequence. Got an attention mask with holes"):
        Layout.from_ids([1, 2, 3], SPECIAL, valid=[1, 0, 1])


def test_refuses_frames_that_do_not_fit_the_videos():
    ids = [START, *[VIDEO] * 6, END]
    for frames in ([], [2, 3]):
        with pytest.raises(ValueError, match=rf"of the 1 videos. Got {len(frames)} numbers. Pass the first column"):
            Layout.from_ids(ids, SPECIAL, frames=frames)
    with pytest.raises(ValueError, match=r"each of the 0 videos. Got 1 numbers"):
        Layout.from_ids([START, IMAGE, END], SPECIAL, frames=[1])
    for groups in (4, 0, -1, 7):
        with pytest.raises(ValueError, match=rf"divide evenly .* Got 6 tokens at \[1, 7\) for {groups} groups"):
            Layout.from_ids(ids, SPECIAL, frames=[groups])


@pytest.mark.parametrize(
    ("bounds", "rows", "message"),
    [
        ((5, 0, 6), [], r"0 <= start <= stop <= n_tokens must hold. Got 0, 6, 5"),
        ((5, 3, 2), [], r"Got 3, 2, 5"),
        ((9, 0, 9), [(0, 1, 1, 2)], r"images must be rows .* Got \[\[0, 1, 1, 2\]\]"),
        ((9, 0, 9), [(4, 5, 6, 7), (1, 2, 3, 4)], r"in order, apart, inside \[0, 9\)"),
        ((9, 0, 9), [(0, 1, 3, 4), (3, 4, 5, 6)], r"in order, apart, inside \[0, 9\)"),
        ((9, 1, 9), [(0, 1, 3, 4)], r"inside \[1, 9\)"),
        ((9, 0, 6), [(4, 5, 6, 7)], r"inside \[0, 6\)"),
    ],
    ids=["stop-beyond", "start-after-stop", "empty-image", "out-of-order", "overlap", "in-left-pad", "in-right-pad"],
)
def test_refuses_impossible_layouts(bounds, rows, message):
    with pytest.raises(ValueError, match=message):
        Layout(*bounds, as_rows(rows))


def test_a_layout_cannot_be_changed():
    rows = as_rows([(0, 1, 3, 4)])
    layout = Layout(4, 0, 4, rows)
    rows[0, 0] = 9
    assert layout.images.tolist() == [[0, 1, 3, 4]]
    for array in (layout.images, layout.keep([1, 2]).kept):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_prefill_runs_dense_only_where_no_row_has_anything_to_save():
    none, one, two = (Layout(20, 0, 20, as_rows([(2, 3, 5, 6), (9, 10, 14, 15)][:n])) for n in range(3))
    assert why_dense([two], 0) is why_dense([none, two, one], 0) is why_dense([two], 13) is None
    assert why_dense([none, one], 0) == "fewer than two images"
    for behind in (14, 15, 19):
        assert why_dense([two], behind) == why_dense([none, two], behind) == NO_IMAGE_TOKENS
    first_image = Layout(20, 0, 20, as_rows([(15, 16, 18, 19)]))  # new, but nothing to save in it
    assert why_dense([two, first_image], 15) == NO_IMAGE_TOKENS
    later = Layout(20, 0, 20, as_rows([(2, 3, 5, 6), (9, 10, 18, 19)]))
    assert why_dense([two, later], 14) is None


@given(pruned_layouts(), templates, st.data())
def test_a_pruned_prompt_is_masked_as_in_the_whole(pruned, template, data):
    """Rows and columns that are left are as they were; delimiters of an image that is gone are text."""
    whole, kept = pruned.whole or pruned, np.arange(pruned.n_tokens) if pruned.kept is None else pruned.kept
    orphans = np.isin(kept, whole.text, invert=True) & np.isin(np.arange(len(kept)), pruned.text)
    for category in (Category.DENSE, Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK):
        want = category_mask(whole, category, template)[np.ix_(kept, kept)]
        want[:, orphans] |= category_mask(whole, Category.DENSE, template)[np.ix_(kept, kept[orphans])]
        np.testing.assert_array_equal(category_mask(pruned, category, template), want)
    sinks = np.setdiff1d(whole.sinks(template), kept[orphans])
    assert kept[pruned.sinks(template)].tolist() == np.intersect1d(kept, sinks).tolist()
    again = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(kept), max_size=len(kept))))
    if len(again):
        assert pruned.keep(again) == whole.keep(kept[again])
        assert (pruned.keep(again) == pruned) == (len(again) == len(kept))


def test_the_drawing_of_a_pruned_prompt():
    ids = [10, START, *[IMAGE] * 4, END, 11, START, *[IMAGE] * 2, END, 12]
    layout, template = Layout.from_ids(ids, SPECIAL), SinkTemplate((0, 1), (1, 2))
    assert layout.sinks(template).tolist() == [1, 2, 5, 6, 8, 9, 10, 11]
    kept = layout.keep([0, 1, 3, 5, 6, 7, 8, 12])
    assert (kept.n_tokens, kept.start, kept.stop) == (8, 0, 8)
    assert kept.images.tolist() == [[1, 2, 4, 5]]
    assert kept.text.tolist() == [0, 5, 6, 7]
    assert kept.sinks(template).tolist() == [1, 3, 4]
    assert kept != Layout(8, 0, 8, kept.images), "other tokens would be its sinks"
    assert layout.keep(np.arange(13)) is layout
    assert layout.keep([2, 4, 12]).images.tolist() == [[0, 0, 2, 2]], "an image without delimiters"


def test_padding_and_an_unfinished_image_of_a_pruned_prompt():
    cut = Layout.from_ids([PAD, 10, START, *[IMAGE] * 3], SPECIAL, valid=[0, 1, 1, 1, 1, 1], unfinished=True)
    kept = cut.keep([0, 1, 4, 5])
    assert (kept.start, kept.stop, kept.unfinished) == (1, 4, True)
    assert kept.sinks(SinkTemplate((2,), (1,))).tolist() == [2], "no sink is counted from an end that is not there yet"
    assert not cut.keep([0, 1, 2]).unfinished
    assert (cut.keep([0]).start, cut.keep([0]).stop) == (1, 1)


def test_refuses_to_keep_what_are_no_positions():
    layout = Layout(5, 0, 5, as_rows([(0, 1, 3, 4)]))
    for wrong in ([], [1, 1], [2, 1], [-1, 2], [3, 5], [[0, 1]], [True, False], [0.0, 1.0], np.uint8([2, 1])):
        with pytest.raises(ValueError, match=r"at least one position of \[0, 5\), ascending, each once. Got"):
            layout.keep(wrong)


QWEN = {"vision_start_token_id": 1, "vision_end_token_id": 2, "image_token_id": 3, "video_token_id": 4}


def test_special_tokens_by_either_name():
    assert FAMILIES["qwen2_vl"].special_tokens(QWEN) == SpecialTokens(1, 2, 3, 4)
    on_disk = {"boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9}
    in_memory = {"boi_token_id": 7, "eoi_token_id": 8, "image_token_id": 9, "image_token_index": None}
    assert FAMILIES["gemma3"].special_tokens(on_disk) == SpecialTokens(7, 8, 9, None)
    assert FAMILIES["gemma3"].special_tokens(in_memory) == SpecialTokens(7, 8, 9, None)


def test_a_missing_token_and_an_unknown_family_are_refused():
    with pytest.raises(ValueError, match=r"must have boi_token_index or boi_token_id. Got the keys \['a'\]"):
        FAMILIES["gemma3"].special_tokens({"a": 1})
    with pytest.raises(ValueError, match=r"a qwen2_5_vl model must have video_token_id"):
        FAMILIES["qwen2_5_vl"].special_tokens({k: v for k, v in QWEN.items() if k != "video_token_id"})
    with pytest.raises(ValueError, match=r"one of qwen2_vl, qwen2_5_vl, gemma3. Got 'llama'"):
        family_of({"model_type": "llama"})
    with pytest.raises(ValueError, match="Got None"):
        family_of({})
    assert family_of({"model_type": "gemma3"}).bidirectional
    assert not family_of({"model_type": "qwen2_vl"}).bidirectional
