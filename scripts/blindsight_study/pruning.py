"""Token pruning and sparse heads together: the same questions with fewer tokens, all heads dense and by a profile."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blindsight_cli.evaluation.statistics import INTERVAL
from blindsight_cli.folders import write_json
from blindsight_cli.loading import load_checkpoint
from blindsight_cli.smallvlm import evaluate
from shared_profiles import Category, Layout, count_model_pairs
from shared_profiles.lookup import FILE_NAME
from shared_profiles.profile import Profile
from torch_blindsight import DivPrune, FastV, Pruner, Seen, patch
from torch_blindsight.models import inspect_model

SHARES = (0.75, 0.5, 0.25, 0.125)  # of the image tokens; an image has about 16
PRUNERS: dict[str, Callable[[float], Pruner]] = {
    "DivPrune": DivPrune,
    "FastV, layer 2": FastV,  # the paper's layer, of 32
    "FastV, layer 4": lambda share: FastV(share, layer=4),
}
IMAGES = 6


@dataclass
class Noting:
    """A pruner, and what it has seen and kept last; without one, everything is kept."""

    pruner: Pruner | None = None
    layout: Layout | None = None
    kept: Layout | None = None

    @property
    def layer(self) -> int:
        """See `Pruner`."""
        return 0 if self.pruner is None else self.pruner.layer

    def __call__(self, seen: Seen) -> np.ndarray:
        """See `Pruner`."""
        kept = np.arange(seen.layout.n_tokens) if self.pruner is None else self.pruner(seen)
        self.layout, self.kept = seen.layout, seen.layout.keep(kept)
        return kept


class PruningStudy:
    """The model, its questions, and the points measured so far.

    Args:
        checkpoint: the model's folder, with its profile.
        n_questions: about `IMAGES` pictures each.
        path: file of the results.

    Raises:
        ValueError: it holds those of another model, profile or number of questions.
    """

    def __init__(self, checkpoint: Path, n_questions: int, path: Path) -> None:
        self.model, self.processor = load_checkpoint(checkpoint, dtype="float32")
        self.profile = Profile.load(checkpoint / FILE_NAME)
        self.windows = inspect_model(self.model).windows
        self.puzzles = evaluate.make_puzzles(IMAGES, n_questions, evaluate.EVALUATION_SEEDS)
        self.path = path
        about = {
            "model": checkpoint.name,
            "weights": self.profile.fingerprint.digest,
            "profile": json.loads(self.profile.to_json())["checksum"],
            "heads": f"{(self.profile.categories != Category.DENSE).sum()} of {self.profile.categories.size} sparse",
            "questions": n_questions,
            "images": IMAGES,
            "interval": INTERVAL,
        }
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        if self.results.setdefault("about", about) != about:
            raise ValueError(
                f"{path} must be of this model, profile and number of questions. Got {self.results['about']}. "
                "Name another --out, or remove the file."
            )
        self.results.setdefault("points", {})

    def measure_all(self) -> None:
        """Every pruner at every share, and the whole prompt, all heads dense and by the profile."""
        ways = {"dense": np.full_like(self.profile.categories, Category.DENSE), "sparse": self.profile.categories}
        for way, categories in ways.items():
            self.measure(f"whole 1 {way}", None, categories)
            for name, pruner in PRUNERS.items():
                for share in SHARES:
                    self.measure(f"{name} {share} {way}", pruner(share), categories)

    @torch.no_grad()
    def measure(self, key: str, pruner: Pruner | None, categories: np.ndarray) -> None:
        """Asks all questions, unless the point is known, and writes the results."""
        if key in self.results["points"]:
            return
        noting = Noting(pruner)
        profile = Profile(categories, self.profile.template, self.profile.fingerprint, None, {"method": "manual"})
        right, pairs, tokens = "", np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
        with patch(self.model, profile, break_even=False, pruner=noting) as handle:
            for puzzle in self.puzzles:
                inputs = evaluate.to_inputs(self.processor, [puzzle])
                said = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1].argmax().item()
                right += "01"[self.processor.tokenizer.convert_ids_to_tokens(said) == puzzle.question.answer]
                assert noting.layout is not None and noting.kept is not None
                pairs += self._pairs(noting.layout, noting.kept, noting.layer, categories)
                tokens += [(layout.images[:, 2] - layout.images[:, 1]).sum() for layout in (noting.kept, noting.layout)]
            ran = handle.report()["forwards"]
        expected = "sparse, pruned" if categories.any() else "dense: all heads are Dense, pruned"
        if ran != {expected: len(self.puzzles)}:
            raise RuntimeError(f"all {len(self.puzzles)} prompts must have run as {expected!r}. Got {ran}.")
        point = {"pairs": pairs[0] / pairs[1], "image_tokens": tokens[0] / tokens[1], "right": right}
        self.results["points"][key] = point
        print(f"{key}: {right.count('1') / len(right):.2%} at {point['pairs']:.1%} of the pairs", flush=True)
        write_json(self.path, self.results)

    def _pairs(self, whole: Layout, kept: Layout, layer: int, categories: np.ndarray) -> np.ndarray:
        """Query-key pairs of a pruned prompt, and of the whole one with all heads dense."""

        def count(layout: Layout, layers: slice, some: np.ndarray) -> int:
            heads = some[layers] if layout.n_images > 1 else np.full_like(some[layers], Category.DENSE)
            return count_model_pairs(layout, heads, self.profile.template, windows=self.windows[layers]).total

        dense = np.full_like(categories, Category.DENSE)
        before, after = slice(0, layer), slice(layer, None)
        return np.array(
            [count(whole, before, categories) + count(kept, after, categories), count(whole, slice(None), dense)]
        )
