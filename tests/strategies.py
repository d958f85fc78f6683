"""Random layouts for the property tests: the shapes that break planners, drawn by hypothesis."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from shared_profiles.layout import Layout
from shared_profiles.template import SinkTemplate


@st.composite
def layouts(
    draw, max_images: int = 5, max_image: int = 40, bidirectional: bool | None = None, padded: bool = True
) -> Layout:
    """Zero to `max_images` images: adjacent, first, last, of one token, with and without delimiters, padded."""
    start = draw(st.integers(0, 5)) if padded else 0
    position, rows = start, []
    for _ in range(draw(st.integers(0, max_images))):
        begin = position + draw(st.integers(0, 6))
        first = begin + draw(st.integers(0, 2))
        last = first + draw(st.integers(1, max_image))
        position = last + draw(st.integers(0, 2))
        rows.append((begin, first, last, position))
    stop = position + draw(st.integers(0, 6))
    n_tokens = stop + (draw(st.integers(0, 3)) if padded else 0)
    both_ways = draw(st.booleans()) if bidirectional is None else bidirectional
    return Layout(n_tokens, start, stop, np.array(rows, dtype=np.int64).reshape(-1, 4), both_ways)


@st.composite
def pruned_layouts(draw) -> Layout:
    """What is left of such a prompt after some of its tokens are dropped, wherever they stood."""
    whole = draw(layouts().filter(lambda layout: layout.n_tokens))
    dropped = draw(st.sets(st.integers(0, whole.n_tokens - 1), max_size=whole.n_tokens - 1))
    return whole.keep(np.setdiff1d(np.arange(whole.n_tokens), list(dropped)))


templates = st.builds(
    SinkTemplate,
    from_start=st.sets(st.integers(0, 9), max_size=3).map(lambda s: tuple(sorted(s))),
    from_end=st.sets(st.integers(1, 9), max_size=3).map(lambda s: tuple(sorted(s))),
    local_block=st.sampled_from([8, 16, 24]),
)
windows = st.none() | st.integers(1, 60)


def cut(layout: Layout, stop: int) -> Layout:
    """The prompt of which only `[0, stop)` exists so far."""
    images = np.minimum(layout.images, stop)
    images = images[images[:, 1] < images[:, 2]]
    return Layout(stop, min(layout.start, stop), min(layout.stop, stop), images, layout.bidirectional)


@st.composite
def chunks(draw, layout: Layout) -> tuple[int, int]:
    """Queries `[q_start, q_stop)` of a prompt: all of it, or a chunk of a chunked prefill."""
    if draw(st.booleans()):
        return 0, layout.n_tokens
    q_start = draw(st.integers(0, layout.n_tokens))
    return q_start, draw(st.integers(q_start, layout.n_tokens))
