"""Trains the small model from scratch on puzzles: `python -m blindsight_cli.smallvlm.train --out DIR`.

The pictures of a prompt cost most of the time, so each prompt carries `QUESTIONS` questions that do not see one
another: a block mask lets every question attend to the pictures and to itself, at the positions it would have if
it stood alone. The layout of a step depends on the number of pictures only, so mask and positions are shared by
the batch. Everything is drawn from the seed; the schedule counts steps, never seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

from blindsight_cli.smallvlm import build
from blindsight_cli.smallvlm.puzzles import COLORS, IMAGE_SIZE, KINDS, SHAPES, ask, draw

QUESTIONS = 14  # per prompt
SLOT = 5  # tokens of the longest question plus its answer
GRID = IMAGE_SIZE // build.PATCH_SIZE
KIND_WEIGHTS = np.array([1, 1, 1.5, 1.5, 2, 2])


def image_to_patches(images: np.ndarray) -> torch.Tensor:
    """Flattens pictures exactly as `Qwen2VLImageProcessor` does.

    Args:
        images: `[n, IMAGE_SIZE, IMAGE_SIZE, 3]` uint8.

    Returns:
        `[n * GRID**2, 3 * 2 * PATCH_SIZE**2]` float32.
    """
    p, m = build.PATCH_SIZE, build.MERGE_SIZE
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    x = x.reshape(-1, 3, GRID // m, m, p, GRID // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # a still image fills both frames
    return x.reshape(len(images) * GRID**2, -1)


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
    """Ids, positions and mask of a prompt with `n` pictures and `QUESTIONS` independent questions."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, n: int):
        v = build.VOCAB
        prefix = [v[build.START]]
        for i in range(n):
            image = [v[build.VISION_START], *[v[build.IMAGE_PAD]] * build.IMAGE_TOKENS, v[build.VISION_END]]
            prefix += [v[str(i + 1)], *image]
        ids = torch.tensor([prefix])
        self.prefix = ids[0]
        self.is_image = ids[0] == v[build.IMAGE_PAD]
        grid = torch.tensor([[1, GRID, GRID]] * n)
        positions, _ = model.model.get_rope_index(ids, self.is_image[None].int(), grid)
        start = int(positions.max()) + 1
        slot_positions = (start + torch.arange(SLOT)).repeat(QUESTIONS)[None, None].expand(3, 1, -1)
        self.positions = torch.cat([positions, slot_positions], -1)  # [3, 1, T]
        slot = torch.cat([torch.zeros(len(prefix)), torch.arange(QUESTIONS).repeat_interleave(SLOT) + 1])
        causal = torch.ones(len(slot), len(slot), dtype=torch.bool).tril()
        self.mask = (causal & ((slot[:, None] == slot[None]) | (slot[None] == 0)))[None, None]  # [1, 1, T, T]
        self.grid = grid


def make_batch(layout: PackedLayout, bank: PictureBank, kinds: list[str], size: int, rng: np.random.Generator):
    """One training batch: ids `[B, T]`, targets `[B, T]` (-100 where none), patches, and the kind of each slot."""
    n = len(layout.grid)
    v = build.VOCAB
    weights = np.array([w for k, w in zip(KINDS, KIND_WEIGHTS, strict=True) if k in kinds])
    slots = np.full((size, QUESTIONS, SLOT), v[build.END])
    targets = np.full((size, QUESTIONS, SLOT), -100)
    pixels = []
    drawn = rng.choice(len(kinds), (size, QUESTIONS), p=weights / weights.sum())
    for b in range(size):
        colors, shapes = rng.integers(len(COLORS), size=n), rng.integers(len(SHAPES), size=n)
        pixels.append(bank.pick(colors, shapes, rng))
        for q in range(QUESTIONS):
            question = ask(kinds[drawn[b, q]], colors, shapes, rng)
            words = [v[w] for w in question.text.lower().rstrip("?").split() if w in v]
            slots[b, q, : len(words) + 1] = [*words, v[question.answer]]
            targets[b, q, len(words) - 1 : len(words) + 1] = v[question.answer], v[build.TURN_END]
    ids = torch.cat([layout.prefix.expand(size, -1), torch.from_numpy(slots.reshape(size, -1))], 1)
    goal = torch.cat([torch.full((size, len(layout.prefix)), -100), torch.from_numpy(targets.reshape(size, -1))], 1)
    return ids, goal, image_to_patches(np.concatenate(pixels)), drawn


def packed_logits(model, layout: PackedLayout, ids: torch.Tensor, patches: torch.Tensor, goal: torch.Tensor):
    """Logits `[targets, vocab]` at the positions of `goal` that are not -100."""
    size = len(ids)
    features = model.model.visual(patches, grid_thw=layout.grid.repeat(size, 1)).pooler_output
    embeds = model.get_input_embeddings()(ids)
    where = F.pad(layout.is_image, (0, ids.shape[1] - len(layout.is_image))).expand(size, -1)
    embeds = embeds.masked_scatter(where[..., None], features)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": layout.mask},
        position_ids=layout.positions.expand(-1, size, -1),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[goal != -100])


def _equal_length_attention(module, query, key, value, attention_mask, scaling, max_length_q, **_):
    """Vision attention of equal-sized pictures as one batched call, in place of one call per picture."""
    q, k, v = (x[0].unflatten(1, (-1, max_length_q)).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # [pictures, H, T, D]
    return out.transpose(1, 2).flatten(0, 1)[None], None


def curriculum(step: int, rng: np.random.Generator) -> tuple[int, int, list[str]]:
    """Number of pictures, batch size and kinds of questions at a step: one picture first, then a few, then many."""
    if step < 300:
        return 1, 128, ["color", "shape"]
    if step < 900:
        return int(rng.integers(2, 4)), 64, list(KINDS)
    return int(rng.choice([2, 3, 4, 5, 6], p=[0.1, 0.15, 0.2, 0.2, 0.35])), 32, list(KINDS)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, constant to half of the run, then a cosine to 2% of the peak."""
    progress = max(0.0, step / steps - 0.5) * 2
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(out: Path, steps: int, seed: int, peak: float) -> None:
    """Trains for `steps` steps and writes the checkpoint, its processor and `training.json` into `out`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    AttentionInterface.register("equal_length_flash", _equal_length_attention)
    model = build.make_model()
    model.config.vision_config._attn_implementation = "equal_length_flash"
    torch._dynamo.config.recompile_limit = 64  # one graph per number of pictures and layer
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=0.05), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    bank = PictureBank(600, rng)
    layouts = {n: PackedLayout(model, n) for n in range(1, 7)}
    start = time.perf_counter()
    log = []
    for step in range(steps):
        n, size, kinds = curriculum(step, rng)
        ids, goal, patches, drawn = make_batch(layouts[n], bank, kinds, size, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        logits = packed_logits(model, layouts[n], ids, patches, goal)
        targets = goal[goal != -100]
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            right = (logits.argmax(-1) == targets).view(size, QUESTIONS, 2)[..., 0].numpy()
            by_kind = {k: round(float(right[drawn == i].mean()), 3) for i, k in enumerate(kinds)}
            log.append(dict(step=step, images=n, loss=round(loss.item(), 4), **by_kind))
            print(json.dumps(log[-1] | {"seconds": round(time.perf_counter() - start)}), flush=True)
        if step % 250 == 249 or step == steps - 1:
            save(model, out, dict(steps=step + 1, of=steps, seed=seed, peak_learning_rate=peak, log=log))


def save(model: Qwen2_5_VLForConditionalGeneration, out: Path, record: dict) -> None:
    """Writes weights, configuration, processor and the training record."""
    model.save_pretrained(out)
    build.make_processor().save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=1.5e-3, help="peak learning rate")
    args = parser.parse_args()
    train(args.out, args.steps, args.seed, args.peak)


if __name__ == "__main__":
    main()
