"""Sinks are learned: bins of offsets, what a row sees of them, and the template that measured mass leads to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_strategies import fingerprint
from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.sink_statistics import (
    MOST,
    SinkMass,
    SinkRows,
    learn_template,
    learned_from,
    offset_bins,
    sink_heads,
    visible_pairs,
)
from shared_profiles.state_files import origin_of, read_origin
from shared_profiles.statistics import Statistics
from strategies import layouts, windows

REACH, N_BINS = 3, 7


def test_bins_are_counted_from_the_nearer_end():
    """The drawing of the module: delimiters at the ends, the middle in between, text and padding outside."""
    layout = Layout(16, 1, 15, np.array([[2, 3, 13, 14]]))
    assert offset_bins(layout, 2).tolist() == [-1, -1, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4, -1, -1]
    assert offset_bins(layout, 6).tolist() == [-1, -1, 0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, -1, -1]


@given(layouts(), st.integers(1, 9))
def test_a_bin_holds_what_a_template_of_its_offset_calls_a_sink(layout, reach):
    """Every token of every image is in exactly one bin, and that bin's offset names it."""
    bins = offset_bins(layout, reach)
    assert (bins[layout.text] == -1).all()
    for image_begin, first, last, image_end in layout.images.tolist():
        begin, end = min(image_begin, first - 1), max(image_end, last + 1)  # as if it had its delimiters
        for p in range(image_begin, image_end):
            expected = reach
            if p - begin < end - p and p - begin < reach:
                expected = p - begin
            elif p - begin >= end - p and end - p <= reach:
                expected = 2 * reach + 1 - (end - p)
            assert bins[p] == expected


@given(layouts().filter(lambda x: x.n_images >= 2), windows)
def test_visible_pairs_are_those_of_the_dense_mask(layout, window):
    """Counted pair by pair from the definition of what a row may see."""
    mask = category_mask(layout, Category.DENSE, SinkTemplate(), window=window)
    bins = offset_bins(layout, REACH)
    counts = [
        [(mask[p, :begin] & (bins[:begin] == b)).sum() for b in range(N_BINS)]
        for begin, first, last, _ in layout.images[1:].tolist()
        for p in range(first, last)
    ]
    np.testing.assert_allclose(visible_pairs(layout, window, REACH), np.mean(counts, axis=0))


@given(layouts().filter(lambda x: x.n_images >= 2))
def test_what_is_measured_of_a_prompt(layout):
    """Rows with an earlier image; of the keys that any of them may see, all but the middles of images."""
    found, bins, later = SinkRows.of(layout, REACH), offset_bins(layout, REACH), layout.images[1:].tolist()
    assert found.rows.tolist() == [p for _, first, last, _ in later for p in range(first, last)]
    assert found.stops.tolist() == [begin for begin, first, last, _ in later for _ in range(first, last)]
    keys = {p: bins[p] if bins[p] >= 0 else N_BINS for p in range(layout.start, later[-1][0])}
    assert dict(zip(found.keys, found.bins, strict=True)) == {p: b for p, b in keys.items() if b != REACH}


def test_the_middle_of_images_is_what_is_left_over():
    """Per layer, by its window; rounding may leave less than nothing, of the middle and of the own image."""
    layout = Layout(24, 0, 24, np.array([[0, 1, 10, 11], [12, 13, 22, 23]]))
    bins = [0.01, 0.02, 0.03, 9.0, 0.04, 0.05, 0.05]
    told = np.array([[[*bins, 0.1]], [[*bins, 0.5]]])
    mass = SinkMass.of(layout, [None, 12], told, np.array([[0.6], [0.5 - 1e-9]]))
    np.testing.assert_allclose(mass.own, [[0.5], [0.0]], rtol=1e-6)
    np.testing.assert_allclose(mass.text, [[0.1], [0.5]], rtol=1e-6)
    np.testing.assert_allclose(mass.others[:, 0, REACH], [0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(mass.others[0, 0, [0, 1, 2, 4, 5, 6]], np.delete(bins, REACH), rtol=1e-6)
    assert (mass.pairs[0] == [1, 1, 1, 5, 1, 1, 1]).all() and (mass.pairs[1] < mass.pairs[0])[:6].all()
    assert SinkMass.of(layout, [None], told[:1], np.array([[0.9]])).others[0, 0, REACH] == 0


def measured(others, pairs=(1, 1, 1, 10, 1, 1, 1)):
    """One layer of heads with this mass on each bin of other images, the rest on their own."""
    others = np.array([others], dtype=np.float64)
    own = 1 - others.sum(-1)
    return SinkMass(own, np.zeros_like(own), others, np.array([pairs]))


def test_a_head_that_looks_everywhere_alike_has_no_sinks():
    """Uniform mass per token: strength 1 in every bin, and the ends alone are the template."""
    mass = measured([np.array([1, 1, 1, 10, 1, 1, 1]) / 40])
    np.testing.assert_allclose(mass.strength, 1.0, rtol=1e-6)
    assert learn_template(mass, 16) == SinkTemplate((0, 1), (1, 2), 16)


@pytest.mark.parametrize(
    ("planted", "expected"),
    [(0, ((0, 1), (1, 2))), (2, ((0, 1, 2), (1, 2))), (4, ((0, 1), (1, 2, 3))), (3, ((0, 1), (1, 2)))],
)
def test_a_planted_sink_is_found_at_its_offset(planted, expected):
    """One bin draws three quarters of the mass: it joins the ends; the middle is no offset and never does."""
    others = np.array([1, 1, 1, 10, 1, 1, 1]) / 160
    others[planted] += 0.3
    template = learn_template(measured([others] * 4))
    assert (template.from_start, template.from_end) == expected


def test_heads_that_look_away_or_are_few_decide_nothing():
    """A sink of heads that give other images next to nothing is none, nor is one of a head in thirty."""
    flat = np.array([1, 1, 1, 10, 1, 1, 1]) / 40
    sink = np.eye(N_BINS)[2] * 0.3
    assert learn_template(measured([flat] * 10 + [sink])).from_start == (0, 1, 2)
    assert learn_template(measured([flat] * 30 + [sink])).from_start == (0, 1)
    assert learn_template(measured([flat] * 10 + [sink / 100] * 30)).from_start == (0, 1)
    assert sink_heads(measured([flat] * 3 + [sink] + [sink / 100] * 30))[2] == 0.25


def test_the_most_shared_sinks_fill_the_template_first():
    """More sinks than there is room for: those of most heads win, in ascending order of offset."""
    reach = 8
    others = np.zeros((1, 100, 17))
    for head in range(100):
        others[0, head, [2, 3, 4, 5] if head < 50 else [6, 7, 13, 14]] = 0.1
    others[0, :5, 2] = 0
    zeros = np.zeros((1, 100))
    mass = SinkMass(zeros, zeros, others, np.array([[1.0] * reach + [1000] + [1.0] * reach]))
    template = learn_template(mass)
    assert len(template.from_start) + len(template.from_end) - 4 == MOST
    assert 2 not in template.from_start
    assert {3, 4, 5} < set(template.from_start)


def test_what_a_profile_says_of_a_learned_template():
    """The mass at every offset, a mean over heads; that of an offset that was not told apart is not known."""
    mass = measured([np.arange(N_BINS) / 40, np.arange(N_BINS) / 80])
    told = learned_from({"p": mass, "q": mass}, SinkTemplate((0, 2, 3), (1, 3, 4, 9)))
    seen = np.arange(N_BINS) * 0.75 / 40
    assert told == {
        "prompts": 2,
        "from_start": [0.0, pytest.approx(seen[2]), None],
        "from_end": [pytest.approx(seen[6]), pytest.approx(seen[4]), None, None],
    }


@pytest.mark.parametrize("name", ["sink_ids", "sink_own", "sink_text", "sink_others", "sink_pairs"])
def test_a_state_whose_sinks_do_not_go_together_is_refused(name, tmp_path):
    """A prompt too few in one of the members."""
    path, state = tmp_path / "state.npz", Statistics(1, 2)
    for prompt_id in ("p", "q"):
        state.add_sinks(prompt_id, measured([np.full(N_BINS, 0.1)] * 2))
    state.save(path)
    assert Statistics.load(path) == state
    with np.load(path) as file:
        members = dict(file)
    np.savez(path, **members | {name: members[name][:1]})
    with pytest.raises(ValueError, match=r"must be a whole file .* sinks of shapes"):
        Statistics.load(path)


def test_the_mean_is_over_prompts_and_refuses_none():
    """Two prompts of one shape average; no prompt, or prompts of two shapes, are an error."""
    a, b = measured([np.full(N_BINS, 0.1)]), measured([np.full(N_BINS, 0.02)])
    np.testing.assert_allclose(SinkMass.mean([a, b]).others, 0.06, rtol=1e-6)
    assert SinkMass.mean([a]) == a
    with pytest.raises(ValueError, match="one or more of one shape"):
        SinkMass.mean([])
    with pytest.raises(ValueError, match="one or more of one shape"):
        SinkMass.mean([a, measured([np.full(N_BINS, 0.1)] * 2)])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(own=np.full((1, 1), np.nan)),
        dict(others=[[[0, 0, 0, 0, 0, 0, np.nan]]]),
        dict(text=-np.ones((1, 1))),
        dict(pairs=[[1, 1, 1, -1, 1, 1, 1]]),
        dict(pairs=[[1.0]]),
    ],
)
def test_wrong_values_are_refused(wrong):
    """NaN, negative mass, and shapes that do not go together."""
    values = dict(own=np.ones((1, 1)), text=np.zeros((1, 1)), others=np.zeros((1, 1, 7)), pairs=np.ones((1, 7)))
    with pytest.raises(ValueError, match="must be"):
        SinkMass(**values | wrong)


def test_a_template_is_plain_integers_that_a_state_gives_back():
    """A state names its template in text: what is written must be what is read."""
    numbers = np.array([0, 3])
    for wanted in ((numbers, [1, 2], np.int64(16)), (list(numbers), range(1, 3), 16), ((0, 3), numbers[1:] - [2], 16)):
        template = SinkTemplate(*wanted)
        values = (*template.from_start, *template.from_end, template.local_block)
        assert {type(value) for value in values} == {int} and hash(template) == hash(SinkTemplate(*wanted))
        assert read_origin(origin_of(fingerprint().digest, template)) == (fingerprint().digest, template)
    for name, wrong in (
        ("from_start", [(0, 1.0), (True,), np.array([True]), "12", 3, np.array(3), None, (2**31,), (2**64,), [[0]]]),
        ("from_end", [(2, True), (1, np.float32(2)), (np.uint64(2**64 - 1),)]),
        ("local_block", [8.0, True, "8", (8,), None, 2**31, 2**64]),
    ):
        for value in wrong:
            with pytest.raises(ValueError, match=rf"{name} must .* integers? below 2\^31\. Got "):
                SinkTemplate(**{name: value})
