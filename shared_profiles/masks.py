"""The definition of every category: slow, obvious, and what everything else is tested against.

Two images of three tokens between text, delimiters as the only sinks, causal, one category::

    INTRA_IMAGE_SINK   keys   a <s> .  .  . <e> b <s> .  .  . <e> c
    queries  a                1
             <s>              1  1
             .                1  1  1
             .                1  1  1  1
             .                1  1  1  1  1
             <e>              1  1  1  1  1  1
             b                1  1  1  1  1  1  1
             <s>              1  1  1  1  1  1  1  1
             .                1  1           1  1  1  1
             .                1  1           1  1  1  1  1
             .                1  1           1  1  1  1  1  1
             <e>              1  1  1  1  1  1  1  1  1  1  1  1
             c                1  1  1  1  1  1  1  1  1  1  1  1  1

`INTRA_IMAGE` drops the first image's delimiters from the second image's rows as well; `SINK` keeps them, and of
its own image the sinks and the local block alone. Not for use on long prompts: the mask has T * S entries.
"""

from __future__ import annotations

import numpy as np

from shared_profiles.categories import Category
from shared_profiles.layout import Layout
from shared_profiles.template import SinkTemplate


def category_mask(
    layout: Layout,
    category: Category,
    template: SinkTemplate,
    *,
    window: int | None = None,
    q_start: int = 0,
) -> np.ndarray:
    """Which keys each query may look at.

    Args:
        layout: the sequence.
        category: the head's category.
        template: sinks and local blocks.
        window: sliding window in tokens: a query at p sees keys after `p - window` only.
        q_start: position of the first query; the queries are all tokens from there on.

    Returns:
        `[T, S]` bool with `T = n_tokens - q_start` and `S = n_tokens`; rows of padding are all False.

    Raises:
        ValueError: what is given is no category.
    """
    category = Category(category)
    keys = np.arange(layout.n_tokens)  # [S]
    exists = (keys >= layout.start) & (keys < layout.stop)
    is_text = np.isin(keys, layout.text)
    is_sink = np.isin(keys, layout.sinks(template))
    mask = np.zeros((layout.n_tokens - q_start, layout.n_tokens), dtype=bool)

    for p in range(max(q_start, layout.start), layout.stop):
        allowed = keys <= p
        keep = exists
        image = next((row for row in layout.images.tolist() if row[1] <= p < row[2]), None)
        if image is not None:
            begin, first, last, _ = image
            if layout.bidirectional:
                allowed = allowed | ((keys >= first) & (keys < last))
            own = (keys >= begin) & (keys < last)
            match category:
                case Category.DENSE:
                    pass
                case Category.INTRA_IMAGE:
                    keep = own | is_text
                case Category.INTRA_IMAGE_SINK:
                    keep = own | is_text | is_sink
                case Category.SINK:
                    block = first + (p - first) // template.local_block * template.local_block
                    local = (keys >= block) & (keys < min(block + template.local_block, last))
                    keep = local | ((is_text | is_sink) & (keys < block))
        if window is not None:
            allowed = allowed & (keys > p - window)
        mask[p - q_start] = exists & allowed & keep
    return mask
