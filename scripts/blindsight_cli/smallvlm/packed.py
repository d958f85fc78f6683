"""Many questions about the same pictures in one forward pass, each as if it stood alone.

The pictures of a prompt cost most of the time, so each prompt carries several questions that do not see one another:
a block mask lets every question attend to the pictures and to itself, at the positions it would have if it stood
alone. The layout of a step depends on the numbers of pictures and questions only, so mask and positions are shared by
the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from blindsight_cli.smallvlm.build import FAMILIES, IMAGE_TOKENS, SmallFamily
from blindsight_cli.smallvlm.puzzles import COLORS, KINDS, SHAPES, ask, draw
from blindsight_cli.smallvlm.vocabulary import END, IMAGE_PAD, START, TURN_END, VISION_END, VISION_START, VOCAB
from shared_profiles.families import FAMILIES as MODEL_FAMILIES

SLOT = 5  # tokens of the longest question plus its answer


class PictureBank:
    """Pictures drawn once, so that a training step only picks: `variants` of each (color, shape)."""

    def __init__(self, variants: int, rng: np.random.Generator):
        self.pixels = np.stack(
            [
                np.stack([np.stack([np.asarray(draw(c, s, rng)) for _ in range(variants)]) for s in range(len(SHAPES))])
                for c in range(len(COLORS))
            ]
        )  # [color, shape, variant, H, W, 3]

    def pick(self, colors: np.ndarray, shapes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random picture for each (color, shape): `[n]`, `[n]` -> `[n, H, W, 3]`."""
        return self.pixels[colors, shapes, rng.integers(self.pixels.shape[2], size=len(colors))]


class PackedLayout:
    """Ids, positions and masks of a prompt with `n` pictures and some independent questions.

    Attributes:
        n: number of pictures.
        questions: number of questions.
        prefix: token ids before the questions, `[P]`.
        is_image: which of them are image tokens, `[P]`.
        positions: position ids of prefix and questions, `[..., 1, T]`.
        masks: what sees what in each type of layer of the model, `[1, 1, T, T]` bool.
    """

    def __init__(self, model: Any, n: int, questions: int):
        family = model.config.model_type
        prefix = [VOCAB[START]]
        for i in range(n):
            picture = [VOCAB[VISION_START], *[VOCAB[IMAGE_PAD]] * IMAGE_TOKENS, VOCAB[VISION_END]]
            prefix += [VOCAB[str(i + 1)], *picture]
        self.n, self.questions = n, questions
        self.prefix = torch.tensor(prefix)
        self.is_image = self.prefix == VOCAB[IMAGE_PAD]
        positions = FAMILIES[family].positions(model, self.prefix[None])
        start = int(positions.max()) + 1
        slot_positions = (start + torch.arange(SLOT)).repeat(questions).expand(*positions.shape[:-1], -1)
        self.positions = torch.cat([positions, slot_positions], -1)

        slot = torch.cat([torch.zeros(len(prefix)), torch.arange(questions).repeat_interleave(SLOT) + 1])
        place = torch.cat([torch.arange(len(prefix)), (len(prefix) + torch.arange(SLOT)).repeat(questions)])  # alone
        sees = place[None] <= place[:, None]
        if MODEL_FAMILIES[family].bidirectional:
            first = self.is_image & ~F.pad(self.is_image, (1, 0))[:-1]
            image = F.pad(first.cumsum(0) * self.is_image, (0, questions * SLOT))  # 1, 2, ... in pictures, else 0
            sees = sees | ((image[:, None] == image[None]) & (image[None] > 0))
        sees = sees & ((slot[:, None] == slot[None]) | (slot[None] == 0))
        masks = {"full_attention": sees}
        text = model.config.get_text_config()
        if "sliding_attention" in text.layer_types:
            masks["sliding_attention"] = sees & (place[None] > place[:, None] - text.sliding_window)
        self.masks = {name: mask[None, None] for name, mask in masks.items()}


def prepare(model: Any) -> None:
    """Makes the vision tower attend to all pictures, which are of one size, in one batched call."""
    AttentionInterface.register("equal_length_flash", _equal_length_attention)
    if model.config.model_type.startswith("qwen"):  # Gemma's tower batches by itself
        model.config.vision_config._attn_implementation = "equal_length_flash"


def _equal_length_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Vision attention of equal-sized pictures as one batched call, in place of one call per picture."""
    q, k, v = (x[0].unflatten(1, (-1, max_length_q)).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # [pictures, H, T, D]
    return out.transpose(1, 2).flatten(0, 1)[None], None


def make_batch(
    family: SmallFamily,
    layout: PackedLayout,
    bank: PictureBank,
    weights: Sequence[float],
    size: int,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """One training batch, its questions of kinds drawn with `weights`.

    Returns:
        Ids `[B, T]`, targets `[B, T]` (-100 where none), pixels, and the index in `KINDS` of each question `[B, Q]`.
    """
    slots = np.full((size, layout.questions, SLOT), VOCAB[END])
    targets = np.full((size, layout.questions, SLOT), -100)
    pictures = []
    drawn = rng.choice(len(KINDS), (size, layout.questions), p=np.array(weights) / sum(weights))
    for b in range(size):
        colors, shapes = rng.integers(len(COLORS), size=layout.n), rng.integers(len(SHAPES), size=layout.n)
        pictures.append(bank.pick(colors, shapes, rng))
        for q in range(layout.questions):
            question = ask(KINDS[drawn[b, q]], colors, shapes, rng)
            words = [VOCAB[w] for w in question.text.lower().rstrip("?").split() if w in VOCAB]
            slots[b, q, : len(words) + 1] = [*words, VOCAB[question.answer]]
            targets[b, q, len(words) - 1 : len(words) + 1] = VOCAB[question.answer], VOCAB[TURN_END]
    ids = torch.cat([layout.prefix.expand(size, -1), torch.from_numpy(slots.reshape(size, -1))], 1)
    goal = torch.cat([torch.full((size, len(layout.prefix)), -100), torch.from_numpy(targets.reshape(size, -1))], 1)
    return ids, goal, family.to_pixels(np.concatenate(pictures)), drawn


def packed_logits(
    model: Any, layout: PackedLayout, ids: torch.Tensor, pixels: torch.Tensor, goal: torch.Tensor
) -> torch.Tensor:
    """Logits `[targets, vocab]` at the positions of `goal` that are not -100."""
    size = len(ids)
    features = FAMILIES[model.config.model_type].see(model, pixels, size * layout.n)
    embeds = model.get_input_embeddings()(ids)
    where = F.pad(layout.is_image, (0, ids.shape[1] - len(layout.is_image))).expand(size, -1)
    embeds = embeds.masked_scatter(where[..., None], features)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=layout.masks,
        position_ids=layout.positions.expand(*layout.positions.shape[:-2], size, -1),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[goal != -100])
