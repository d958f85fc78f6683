"""The definition of the categories, against drawings made by hand, a second definition, and its own docstring."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_profiles import Category, Layout, SinkTemplate, SpecialTokens, category_mask, masks
from strategies import chunks, cut, layouts, templates, windows

START, END, IMAGE = 3, 4, 5
SPECIAL = SpecialTokens(START, END, IMAGE)

# An image of nine tokens and one of two, local blocks of eight, the sinks of the default template: each image's
# delimiters, first token and last token. Columns: DENSE, SINK, INTRA_IMAGE, INTRA_IMAGE_SINK.
CAUSAL = """
    keys  a<.........>b<..>c  a<.........>b<..>c  a<.........>b<..>c  a<.........>b<..>c
    a     1.................  1.................  1.................  1.................
    <s>   11................  11................  11................  11................
    .     111...............  111...............  111...............  111...............
    .     1111..............  1111..............  1111..............  1111..............
    .     11111.............  11111.............  11111.............  11111.............
    .     111111............  111111............  111111............  111111............
    .     1111111...........  1111111...........  1111111...........  1111111...........
    .     11111111..........  11111111..........  11111111..........  11111111..........
    .     111111111.........  111111111.........  111111111.........  111111111.........
    .     1111111111........  1111111111........  1111111111........  1111111111........
    .     11111111111.......  111.......1.......  11111111111.......  11111111111.......
    <e>   111111111111......  111111111111......  111111111111......  111111111111......
    b     1111111111111.....  1111111111111.....  1111111111111.....  1111111111111.....
    <s>   11111111111111....  11111111111111....  11111111111111....  11111111111111....
    .     111111111111111...  111.......11111...  1...........111...  111.......11111...
    .     1111111111111111..  111.......111111..  1...........1111..  111.......111111..
    <e>   11111111111111111.  11111111111111111.  11111111111111111.  11111111111111111.
    c     111111111111111111  111111111111111111  111111111111111111  111111111111111111
"""
CAUSAL_WINDOW_6 = """
    keys  a<.........>b<..>c  a<.........>b<..>c  a<.........>b<..>c  a<.........>b<..>c
    a     1.................  1.................  1.................  1.................
    <s>   11................  11................  11................  11................
    .     111...............  111...............  111...............  111...............
    .     1111..............  1111..............  1111..............  1111..............
    .     11111.............  11111.............  11111.............  11111.............
    .     111111............  111111............  111111............  111111............
    .     .111111...........  .111111...........  .111111...........  .111111...........
    .     ..111111..........  ..111111..........  ..111111..........  ..111111..........
    .     ...111111.........  ...111111.........  ...111111.........  ...111111.........
    .     ....111111........  ....111111........  ....111111........  ....111111........
    .     .....111111.......  ..........1.......  .....111111.......  .....111111.......
    <e>   ......111111......  ......111111......  ......111111......  ......111111......
    b     .......111111.....  .......111111.....  .......111111.....  .......111111.....
    <s>   ........111111....  ........111111....  ........111111....  ........111111....
    .     .........111111...  ..........11111...  ............111...  ..........11111...
    .     ..........111111..  ..........111111..  ............1111..  ..........111111..
    <e>   ...........111111.  ...........111111.  ...........111111.  ...........111111.
    c     ............111111  ............111111  ............111111  ............111111
"""
BIDIRECTIONAL = """
    keys  a<.........>b<..>c  a<.........>b<..>c  a<.........>b<..>c  a<.........>b<..>c
    a     1.................  1.................  1.................  1.................
    <s>   11................  11................  11................  11................
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  111.......1.......  11111111111.......  11111111111.......
    <e>   111111111111......  111111111111......  111111111111......  111111111111......
    b     1111111111111.....  1111111111111.....  1111111111111.....  1111111111111.....
    <s>   11111111111111....  11111111111111....  11111111111111....  11111111111111....
    .     1111111111111111..  111.......111111..  1...........1111..  111.......111111..
    .     1111111111111111..  111.......111111..  1...........1111..  111.......111111..
    <e>   11111111111111111.  11111111111111111.  11111111111111111.  11111111111111111.
    c     111111111111111111  111111111111111111  111111111111111111  111111111111111111
"""
BIDIRECTIONAL_WINDOW_6 = """
    keys  a<.........>b<..>c  a<.........>b<..>c  a<.........>b<..>c  a<.........>b<..>c
    a     1.................  1.................  1.................  1.................
    <s>   11................  11................  11................  11................
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     11111111111.......  1111111111........  11111111111.......  11111111111.......
    .     .1111111111.......  .111111111........  .1111111111.......  .1111111111.......
    .     ..111111111.......  ..11111111........  ..111111111.......  ..111111111.......
    .     ...11111111.......  ...1111111........  ...11111111.......  ...11111111.......
    .     ....1111111.......  ....111111........  ....1111111.......  ....1111111.......
    .     .....111111.......  ..........1.......  .....111111.......  .....111111.......
    <e>   ......111111......  ......111111......  ......111111......  ......111111......
    b     .......111111.....  .......111111.....  .......111111.....  .......111111.....
    <s>   ........111111....  ........111111....  ........111111....  ........111111....
    .     .........1111111..  ..........111111..  ............1111..  ..........111111..
    .     ..........111111..  ..........111111..  ............1111..  ..........111111..
    <e>   ...........111111.  ...........111111.  ...........111111.  ...........111111.
    c     ............111111  ............111111  ............111111  ............111111
"""


def picture(drawing: str) -> list[np.ndarray]:
    """The masks of a drawing, one per category."""
    lines = [line.split()[1:] for line in drawing.strip().splitlines()[1:]]
    return [np.array([[cell == "1" for cell in row[c]] for row in lines]) for c in Category]


@pytest.mark.parametrize("category", Category, ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("drawing", "bidirectional", "window"),
    [
        (CAUSAL, False, None),
        (CAUSAL_WINDOW_6, False, 6),
        (BIDIRECTIONAL, True, None),
        (BIDIRECTIONAL_WINDOW_6, True, 6),
    ],
    ids=["causal", "causal-window", "bidirectional", "bidirectional-window"],
)
def test_the_drawing(drawing, bidirectional, window, category):
    layout = Layout(18, 0, 18, np.array([(1, 2, 11, 12), (13, 14, 16, 17)]), bidirectional)
    got = category_mask(layout, category, SinkTemplate((0, 1), (1, 2), 8), window=window)
    np.testing.assert_array_equal(got, picture(drawing)[category])


def test_the_drawing_in_the_docstring():
    """Every 1 stands under its key; rows and keys bear the same names in the same order."""
    lines = [line for line in masks.__doc__.splitlines() if re.match(r"\s+(INTRA_IMAGE_SINK|queries|\S+\s+1)\b", line)]
    keys = [(m.group(), (m.start() + m.end() - 1) // 2) for m in re.finditer(r"\S+", lines[0])][2:]
    rows = [line.replace("queries", " " * 7) for line in lines[1:]]
    assert [row.split()[0] for row in rows] == [name for name, _ in keys]
    ids = [{"<s>": START, "<e>": END, ".": IMAGE}.get(name, 10) for name, _ in keys]
    drawn = np.array([[row[at : at + 1] == "1" for _, at in keys] for row in rows])
    assert drawn.sum() == sum(row.count("1") for row in rows)
    layout = Layout.from_ids(ids, SPECIAL)
    template = SinkTemplate((0,), (1,))
    np.testing.assert_array_equal(category_mask(layout, Category.INTRA_IMAGE_SINK, template), drawn)

    # The sentence below the drawing: what INTRA_IMAGE drops, and what SINK keeps.
    first, second = layout.images
    drawn[second[1] : second[2], [first[0], first[3] - 1]] = False
    np.testing.assert_array_equal(category_mask(layout, Category.INTRA_IMAGE, template), drawn)


def may_look(layout: Layout, category: Category, template: SinkTemplate, window: int | None, p: int, k: int) -> bool:
    """One cell, from the table of categories and nothing else."""
    if not (layout.start <= p < layout.stop and layout.start <= k < layout.stop):
        return False
    if window is not None and k <= p - window:
        return False
    rows = [tuple(row) for row in layout.images.tolist()]
    own = [row for row in rows if row[1] <= p < row[2]]  # the image whose token p is
    held = [row for row in rows if row[0] <= k < row[3]]  # the image, delimiters included, that k belongs to
    if k > p and not (layout.bidirectional and own and own[0][1] <= k < own[0][2]):
        return False
    if not own or category is Category.DENSE or not held:
        return True  # text and delimiters look everywhere, everything looks at text
    begin, first, last, end = held[0]
    from_start, from_end = k - min(begin, first - 1), max(end, last + 1) - k  # as if it had its delimiters
    is_sink = k < first or k >= last or from_start in template.from_start or from_end in template.from_end
    if category is Category.SINK:
        block = (p - own[0][1]) // template.local_block * template.local_block + own[0][1]
        in_block = held == own and block <= k < block + template.local_block
        return in_block or (is_sink and k < block)
    return held == own or (is_sink and category is Category.INTRA_IMAGE_SINK)


@given(layouts(max_images=3, max_image=14), templates, windows, st.data())
def test_every_cell_by_the_table(layout, template, window, data):
    """A second definition, cell by cell; a chunk has the layout of the tokens so far."""
    q_start, stop = data.draw(chunks(layout))
    layout = cut(layout, stop)
    for category in Category:
        got = category_mask(layout, category, template, window=window, q_start=q_start)
        want = [
            [may_look(layout, category, template, window, p, k) for k in range(layout.n_tokens)]
            for p in range(q_start, layout.n_tokens)
        ]
        np.testing.assert_array_equal(got, np.array(want, dtype=bool).reshape(got.shape))


near_templates = st.builds(
    SinkTemplate,
    from_start=st.sets(st.integers(0, 9), max_size=3).map(tuple),
    from_end=st.sets(st.integers(1, 2)).map(tuple),
    local_block=st.sampled_from([8, 16]),
)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), near_templates, windows, st.data())
def test_the_beginning_of_a_causal_prompt_is_masked_as_in_the_whole(images, template, window, data):
    """Chunked prefill reads a chunk's ids only: cutting the last image must not change what its tokens see."""
    ids = [10]
    for n in images:
        ids += [START, *[IMAGE] * n, END, 11]
    stop = data.draw(st.integers(1, len(ids)))
    whole, cut = Layout.from_ids(ids, SPECIAL), Layout.from_ids(ids[:stop], SPECIAL, unfinished=True)
    for category in Category:
        want = category_mask(whole, category, template, window=window)[:stop, :stop]
        np.testing.assert_array_equal(category_mask(cut, category, template, window=window), want)


@given(layouts(bidirectional=False), templates, windows)
def test_a_sparser_category_never_sees_more(layout, template, window):
    dense, sink, intra, both = (category_mask(layout, c, template, window=window) for c in Category)
    assert (sink <= both).all()
    assert (intra <= both).all()
    assert (both <= dense).all()
