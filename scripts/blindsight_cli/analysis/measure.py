"""From a model and prompts to everything that the page of an analysis shows.

prompts ──► where image rows look ──► mean over prompts ──► learned template
        ──► the same with every delimiter embedded as text ──► what changes
one short prompt ──► attention maps
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_profiles import Category, Layout, SinkTemplate, category_mask
from shared_profiles.measured import divergence_of_one
from shared_profiles.profile import Profile
from shared_profiles.sink_statistics import SinkMass, learn_template
from torch_blindsight.maps import attention_maps
from torch_blindsight.models import inspect_model
from torch_blindsight.prompts import read_layouts
from torch_blindsight.sinks import measure_sinks

DRAWN_TOKENS, DRAWN_IMAGES = 512, 4  # at most, and preferably at least, in the prompt that is drawn
ALL_HEADS, HEADS_EACH = 64, 12  # all heads of a small model are drawn, of a larger one so many of each category


@dataclass(frozen=True)
class HeadMap:
    """One head's attention on the drawn prompt.

    Attributes:
        layer, head: which.
        category: the one that is laid over it.
        weights: `[N, N]` float32.
        kept: `[N, N]` bool, the pairs that the category keeps of those that the model computes.
        retained: mean over image rows that have an earlier image of the weight on kept pairs.
    """

    layer: int
    head: int
    category: Category
    weights: np.ndarray
    kept: np.ndarray
    retained: float


@dataclass(frozen=True)
class Analysis:
    """What was measured.

    Attributes:
        n_prompts: prompts with at least two images.
        mass: where their image rows look.
        ablated: the same, image delimiters embedded as text tokens.
        learned: the template that `mass` leads to.
        template: the profile's; without a profile the learned one.
        categories: `[L, H]`, the profile's; None without one.
        kl: mean KL divergence in nats of the ablation's next token from the model's.
        same_answer: share of prompts on which both give the same token.
        right: share of prompts answered right with delimiters and without; None where no answers are known.
        drawn: layout of the prompt that the maps show, None if all are too long.
        maps: the maps.
    """

    n_prompts: int
    mass: SinkMass
    ablated: SinkMass
    learned: SinkTemplate
    template: SinkTemplate
    categories: np.ndarray | None
    kl: float
    same_answer: float
    right: tuple[float, float] | None
    drawn: Layout | None
    maps: tuple[HeadMap, ...]


def analyze(
    model: Any, prompts: Iterable[Any], profile: Profile | None, answers: Sequence[int] | None = None
) -> Analysis:
    """Measures a model; the prompts are read twice, and once more until one is found that can be drawn.

    Args:
        model: a supported Hugging Face model, not patched.
        prompts: what its processor returns, one prompt each; can be iterated over again.
        profile: whose categories are laid over the maps; None lays `INTRA_IMAGE_SINK` with learned sinks over all.
        answers: the right next token of every prompt, where they are known.

    Raises:
        ValueError: no prompt has two images, one is malformed, or the model gives no finite probabilities.
    """
    with_, without = (measure_sinks(model, prompts, delimiters=kept) for kept in (True, False))
    if not with_:
        raise ValueError("an analysis needs prompts with at least two images. Got none.")
    mass = SinkMass.mean(reading.mass for reading in with_)
    learned = learn_template(mass)
    template = profile.template if profile is not None else learned
    categories = profile.categories if profile is not None else np.full(mass.own.shape, Category.INTRA_IMAGE_SINK)
    drawn, maps = _draw(model, prompts, categories, template)
    first, second = (np.array([reading.log_probs.argmax() for reading in readings]) for readings in (with_, without))
    return Analysis(
        n_prompts=len(with_),
        mass=mass,
        ablated=SinkMass.mean(reading.mass for reading in without),
        learned=learned,
        template=template,
        categories=None if profile is None else profile.categories,
        kl=float(np.mean([divergence_of_one(a.log_probs, b.log_probs) for a, b in zip(with_, without, strict=True)])),
        same_answer=float((first == second).mean()),
        right=None if answers is None else (float((first == answers).mean()), float((second == answers).mean())),
        drawn=drawn,
        maps=maps,
    )


def chosen_heads(categories: np.ndarray) -> list[tuple[int, int]]:
    """The (layer, head) that are drawn, in that order: all, or of each category a few that are spread over the depth.

    Args:
        categories: `[L, H]`.
    """
    if categories.size <= ALL_HEADS:
        return [(int(layer), int(head)) for layer, head in np.ndindex(categories.shape)]
    chosen = []
    for category in Category:
        heads = np.argwhere(categories == category)
        places = np.linspace(0, len(heads) - 1, min(HEADS_EACH, len(heads))).round().astype(int)
        chosen += [(int(layer), int(head)) for layer, head in heads[places]]
    return sorted(chosen)


def _draw(
    model: Any, prompts: Iterable[Any], categories: np.ndarray, template: SinkTemplate
) -> tuple[Layout | None, tuple[HeadMap, ...]]:
    """The maps of the first short prompt of `DRAWN_IMAGES` images or more, else of the one that comes nearest."""
    info = inspect_model(model)
    best, chosen = 1, None
    for prompt in prompts:
        (layout,), _ = read_layouts(prompt, info.family, info.special)
        if layout.n_tokens <= DRAWN_TOKENS and layout.n_images > best:
            best, chosen = layout.n_images, prompt
            if best >= DRAWN_IMAGES:
                break
    if chosen is None:
        return None, ()
    layout, weights = attention_maps(model, chosen, chosen_heads(categories))
    rows = np.concatenate([np.arange(first, last) for _, first, last, _ in layout.images[1:]])
    maps = []
    for (layer, head), weight in sorted(weights.items()):
        category = Category(int(categories[layer, head]))
        kept = category_mask(layout, category, template, window=info.windows[layer])
        maps.append(HeadMap(layer, head, category, weight, kept, float((weight * kept)[rows].sum(-1).mean())))
    return layout, tuple(maps)
