"""Trains a small model from scratch on puzzles: `python -m blindsight_cli.smallvlm.train --family F --out DIR`.

Every `STATE_EVERY` steps the checkpoint and the whole state of the training are written into DIR. The same command
goes on from that state, and ends with the same bits as a training that was never interrupted. Everything is drawn
from the seed; the schedule counts steps, never seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from blindsight_cli.arguments import count
from blindsight_cli.smallvlm.build import FAMILIES, make_model, make_processor
from blindsight_cli.smallvlm.curriculum import RECIPES, SHIPPED
from blindsight_cli.smallvlm.optimizers import OPTIMIZERS
from blindsight_cli.smallvlm.packed import PackedLayout, PictureBank, make_batch, packed_logits, prepare
from blindsight_cli.smallvlm.puzzles import KINDS
from shared_profiles._atomic import write_atomically

STATE = "training_state.pt"  # gone once the training has ended
RECORD = "training.json"
STATE_EVERY, LOG_EVERY = 250, 50  # steps
VARIANTS = 600  # pictures of each (color, shape)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, constant to half of the run, then a cosine to 2% of the peak."""
    progress = max(0.0, step / steps - 0.5) * 2
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def compile_layers(model: Any) -> None:
    """Compiles the language model's layers: one graph per number of pictures and layer."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)


class Training:
    """A training between two steps.

    Attributes:
        settings: what decides its course: family, number of steps, seed, optimizer, peak learning rate.
        step: steps done.
        log: one entry per `LOG_EVERY` steps.
        model: the model.
    """

    def __init__(self, family: str, optimizer: str, steps: int, seed: int):
        self.recipe = RECIPES[optimizer]
        peak = self.recipe.peak
        self.settings: dict[str, Any] = dict(
            family=family, of=steps, seed=seed, optimizer=optimizer, peak_learning_rate=peak
        )
        self.family, self.steps = FAMILIES[family], steps
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.model = make_model(family)
        prepare(self.model)
        compile_layers(self.model)
        self.optimizers = OPTIMIZERS[optimizer](self.model, peak)
        self.peaks = [group["lr"] for group in self._groups()]
        self.bank = PictureBank(VARIANTS, self.rng)
        self.layout = cache(partial(PackedLayout, self.model))
        self.step = 0
        self.log: list[dict[str, Any]] = []

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def advance(self) -> dict[str, Any] | None:
        """Takes one step; returns what it logged, if anything."""
        stage = self.recipe.stage_at(self.step)
        layout = self.layout(stage.draw_images(self.rng), stage.questions)
        ids, goal, pixels, drawn = make_batch(self.family, layout, self.bank, stage.weights, stage.prompts, self.rng)
        for group, peak in zip(self._groups(), self.peaks, strict=True):
            group["lr"] = learning_rate(self.step, self.steps, peak)
        logits = packed_logits(self.model, layout, ids, pixels, goal)
        targets = goal[goal != -100]
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        entry = None
        if self.step % LOG_EVERY == 0:
            right = (logits.argmax(-1) == targets).view(*drawn.shape, 2)[..., 0].numpy()
            by_kind = {k: round(float(right[drawn == i].mean()), 3) for i, k in enumerate(KINDS) if (drawn == i).any()}
            entry = dict(step=self.step, images=layout.n, loss=round(loss.item(), 4)) | by_kind
            self.log.append(entry)
        self.step += 1
        return entry

    def save(self, out: Path) -> None:
        """Writes the state, then the checkpoint, its processor and the record; removes the state when all is done."""
        out.mkdir(parents=True, exist_ok=True)
        if self.step < self.steps:
            self._save_state(out / STATE)
        self.model.save_pretrained(out)
        make_processor(self.settings["family"]).save_pretrained(out)
        record = dict(steps=self.step) | self.settings | dict(log=self.log)
        (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if self.step == self.steps:
            (out / STATE).unlink(missing_ok=True)

    def _save_state(self, path: Path) -> None:
        buffer = io.BytesIO()
        state = dict(
            settings=self.settings,
            step=self.step,
            log=self.log,
            model=self.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            numpy_rng=self.rng.bit_generator.state,
            torch_rng=torch.get_rng_state(),
        )
        torch.save(state, buffer)
        write_atomically(path, buffer.getbuffer())

    def restore(self, path: Path) -> None:
        """Goes on from a state.

        Raises:
            ValueError: the state is of a training with other settings.
        """
        state = torch.load(path, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(
                f"{path} must be the state of this training, {self.settings}. Got {state['settings']}. Repeat the "
                "command it was begun with, or choose another folder."
            )
        self.step, self.log = state["step"], state["log"]
        self.model.load_state_dict(state["model"])
        for optimizer, known in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(known)
        self.rng.bit_generator.state = state["numpy_rng"]
        torch.set_rng_state(state["torch_rng"])


def train(out: Path, family: str, optimizer: str, steps: int, seed: int) -> None:
    """Trains for `steps` steps, going on from a state in `out`; writes the checkpoint, processor and record into it.

    Raises:
        ValueError: `out` holds a finished training, the state of one with other settings, or something else.
    """
    if (out / RECORD).exists() and not (out / STATE).exists():
        raise ValueError(f"{out} holds a finished training. Choose another folder, or remove this one.")
    if out.exists() and not (out / STATE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} must be a new or empty folder, or hold a training's state. Choose another.")
    training = Training(family, optimizer, steps, seed)
    if (out / STATE).exists():
        training.restore(out / STATE)
    start = time.perf_counter()
    while training.step < steps:
        entry = training.advance()
        if entry:
            print(json.dumps(entry | {"seconds": round(time.perf_counter() - start)}), flush=True)
        if training.step % STATE_EVERY == 0 or training.step == steps:
            training.save(out)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="qwen2_5_vl")
    parser.add_argument("--optimizer", choices=tuple(RECIPES), help="default: the one of the family's shipped model")
    parser.add_argument("--steps", type=count, help="default: what the optimizer's recipe says")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    optimizer = args.optimizer or SHIPPED[args.family]
    train(args.out, args.family, optimizer, args.steps or RECIPES[optimizer].steps, args.seed)


if __name__ == "__main__":
    main()
