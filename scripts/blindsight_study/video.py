"""Frames as images: the puzzles' pictures as pictures and as videos, and what each category keeps of them.

    pictures     1 <start> . . . <end> 2 <start> . . . <end> question   as the model was trained
    films        the same, each picture a video of its own              delimiters and a text per frame, as Qwen3-VL
    unnumbered   <start> . . . <end> <start> . . . <end> question       delimiters per frame, no text
    film         <start> . . . . . . <end> question                     one video, as Qwen2-VL and Qwen2.5-VL write it

Videos go through the model's real video processor. It makes one group of tokens of two frames, so every picture is
shown for two frames; a group looks to the model exactly as the picture does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blindsight_cli.backends import next_tokens
from blindsight_cli.backends.torch_backend import TorchBackend
from blindsight_cli.loading import load_processor
from blindsight_cli.smallvlm import evaluate
from blindsight_cli.smallvlm.puzzles import KINDS, Puzzle
from blindsight_cli.smallvlm.vocabulary import IMAGE_PAD, START, VIDEO_PAD, VISION_END, VISION_START
from blindsight_study.page import effect
from shared_profiles import SPARSE, Category, Layout, SinkTemplate, count_pairs
from shared_profiles.budget import Budget
from shared_profiles.classifier import Thresholds, classify
from shared_profiles.profile import Profile
from shared_profiles.sink_statistics import SinkMass
from shared_profiles.summary import Summary
from torch_blindsight.sinks import measure_sinks

FORMS = ("pictures", "films", "unnumbered", "film")
APART = ("pictures", "unnumbered", "film")  # films are pictures
# Pictures have 16 tokens; local blocks of half a picture tell SINK from INTRA_IMAGE_SINK.
TEMPLATES = {
    "delimiters": SinkTemplate((0,), (1,), 8),
    "delimiters, first and last token": SinkTemplate((0, 1), (1, 2), 8),
}
BATCH, N_PICTURES = 32, 6
LENIENT = Thresholds(
    gamma_sink=0.5, gamma_intra=0.5, gamma_dense=0.5
)  # the default ones leave all heads of a film DENSE


def to_inputs(processor: Any, puzzles: Sequence[Puzzle], form: str) -> dict[str, Tensor]:
    """What the model takes, padded on the left."""
    as_video = form in ("films", "film")
    picture = VISION_START + (VIDEO_PAD if as_video else IMAGE_PAD) + VISION_END
    texts: list[str] = []
    films: list[np.ndarray] = []
    for puzzle in puzzles:
        n = len(puzzle.images)
        numbered = "".join(f"{i + 1}{picture}" for i in range(n))
        shown = {"unnumbered": picture * n, "film": picture}.get(form, numbered)
        texts.append(START + shown + puzzle.question.text)
        frames = [np.stack([np.asarray(image)] * 2) for image in puzzle.images]
        films += [np.concatenate(frames)] if form == "film" else frames
    given: dict[str, Any] = {"images": [image for puzzle in puzzles for image in puzzle.images]}
    if as_video:
        timing = [{"fps": 2, "total_num_frames": len(x), "frames_indices": range(len(x))} for x in films]
        given = {"videos": films, "videos_kwargs": {"video_metadata": timing}}
    return dict(processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **given))


@dataclass(frozen=True)
class Asked:
    """Questions in one form, and what the dense model answers."""

    batches: list[dict[str, Tensor]]
    dense: np.ndarray  # [N, V] log-probabilities
    expected: np.ndarray  # [N] token ids
    layouts: list[Layout]


class VideoStudy:
    """A model, questions and calibration prompts in every form.

    Args:
        checkpoint: the model's folder.
        n_prompts: prompts to calibrate on, of two to six pictures.
        n_questions: about six pictures each.
    """

    def __init__(self, checkpoint: Path, n_prompts: int, n_questions: int) -> None:
        self.backend = TorchBackend(checkpoint, "auto", "cpu")
        self.processor = load_processor(checkpoint)
        seen = evaluate.make_mixed_puzzles(n_prompts, evaluate.CALIBRATION_SEEDS)
        self.prompts = {form: [to_inputs(self.processor, [puzzle], form) for puzzle in seen] for form in APART}
        self.puzzles = evaluate.make_puzzles(N_PICTURES, n_questions, evaluate.EVALUATION_SEEDS)
        self.asked = {form: self._ask(form) for form in FORMS}

    def _ask(self, form: str) -> Asked:
        parts = [self.puzzles[i : i + BATCH] for i in range(0, len(self.puzzles), BATCH)]
        batches = [to_inputs(self.processor, part, form) for part in parts]
        words = [puzzle.question.answer for puzzle in self.puzzles]
        layouts = [x for batch in batches for x in self.backend.facts.layouts(batch)]
        expected = np.array(self.processor.tokenizer.convert_tokens_to_ids(words))
        return Asked(batches, next_tokens(self.backend, batches, None), expected, layouts)

    def measure(self, form: str, profile: Profile) -> dict[str, Any]:
        """What a profile does to the answers in one form."""
        asked = self.asked[form]
        sparse = next_tokens(self.backend, asked.batches, profile)
        kept, dense = (sum(self.backend.facts.pairs(x, way).total for x in asked.layouts) for way in (profile, None))
        return {"kept": kept / dense} | effect(asked.dense, sparse, asked.expected)


def answers(study: VideoStudy) -> list[dict[str, Any]]:
    """How often the dense model is right in every form."""
    kinds = np.array([puzzle.question.kind for puzzle in study.puzzles])
    trained, rows = study.asked["pictures"], []
    for form, asked in study.asked.items():
        right = asked.dense.argmax(-1) == asked.expected
        rows.append(
            {
                "form": form,
                "tokens": int(np.mean([layout.stop - layout.start for layout in asked.layouts])),
                "right": float(right.mean()),
                "kinds": {kind: float(right[kinds == kind].mean()) for kind in KINDS},
                "from_pictures": float(np.abs(asked.dense - trained.dense).max()),
            }
        )
    commonest = [np.unique(trained.expected[kinds == kind], return_counts=True)[1].max() for kind in KINDS]
    return [*rows, {"form": "the commonest answer to each kind", "right": float(sum(commonest) / len(kinds))}]


def looks(study: VideoStudy) -> list[dict[str, Any]]:
    """Where image rows look: mass, and mass per token over that of an average token of other pictures."""
    rows = []
    for form, prompts in study.prompts.items():
        mass = SinkMass.mean([reading.mass for reading in measure_sinks(study.backend.model, prompts, reach=2)])
        pairs = mass.pairs[0].astype(float)  # of every bin; no layer has a window
        others = mass.others.mean((0, 1)).astype(float)
        each = np.divide(others, pairs, out=np.zeros_like(others), where=pairs > 0) * pairs.sum() / others.sum()
        names = ("start delimiter", "first token", "middle", "last token", "end delimiter")
        rows.append(
            {
                "form": form,
                "own": float(mass.own.mean()),
                "text": float(mass.text.mean()),
                "others": dict(zip(names, others.tolist(), strict=True)),
                "per_token": dict(zip(names, each.tolist(), strict=True)),
            }
        )
    return rows


def categories(study: VideoStudy) -> dict[str, Any]:
    """Retained mass in every form, what thresholds make of it, and how alike the forms are, head by head."""
    summaries: dict[tuple[str, str], Summary] = {}
    rows = []
    for form, prompts in study.prompts.items():
        for name, template in TEMPLATES.items():
            made = study.backend.calibrate(prompts, dataset=form, template=template, thresholds=LENIENT)
            assert made.summary is not None
            summaries[form, name] = summary = made.summary
            for category in SPARSE:
                rows.append(
                    {
                        "form": form,
                        "sinks": name,
                        "category": category.name,
                        "mass": float(summary.mass_mean[category].mean()),
                        "kept": summary.kept[category],
                        "kl": study.measure(form, _uniform(study, category, template))["kl"],
                    }
                )
    chosen = []
    for gammas, thresholds in (("0.95, 0.95, 0.9", Thresholds()), ("0.5, 0.5, 0.5", LENIENT)):
        for name in TEMPLATES:
            made_of = {form: classify(summaries[form, name], thresholds) for form in APART}
            for form, found in made_of.items():
                counts = {category.name: int((found == category).sum()) for category in Category}
                same = float((found == made_of["pictures"]).mean())
                chosen.append({"gammas": gammas, "sinks": name, "form": form, "heads": counts, "same": same})
    return {"rows": rows, "thresholds": chosen, "alike": _alike(summaries)}


def _uniform(study: VideoStudy, category: Category, template: SinkTemplate) -> Profile:
    return Profile.uniform(category, study.backend.facts.fingerprint, template)


def _alike(summaries: dict[tuple[str, str], Summary]) -> dict[str, float]:
    """Correlation over heads of the mass that INTRA_IMAGE_SINK retains, of every form with pictures."""
    mass = {form: summaries[form, "delimiters"].mass_mean[Category.INTRA_IMAGE_SINK].ravel() for form in APART}
    return {form: float(np.corrcoef(mass["pictures"], mass[form])[0, 1]) for form in APART}


def profiles(study: VideoStudy, shipped: Profile) -> list[dict[str, Any]]:
    """Profiles made by a budget in one form, and the shipped one, asked in every form."""
    made = {"shipped (pictures)": shipped}
    template = shipped.template
    for form in ("pictures", "film"):
        prompts = study.prompts[form]
        made[form] = study.backend.calibrate(prompts, dataset=form, template=template, budget=Budget(evaluate.BUDGET))
    rows = []
    for name, profile in made.items():
        sparse_heads = int((profile.categories != Category.DENSE).sum())
        same = float((profile.categories == made["pictures"].categories).mean())
        for form in APART:
            row = study.measure(form, replace(profile, curve=()))
            rows.append({"profile": name, "sparse_heads": sparse_heads, "same": same, "form": form, **row})
    return rows


def long_video(n_frames: int = 64, n_tokens: int = 180) -> list[dict[str, Any]]:
    """Share of pairs that each category keeps of a long video, one pair of delimiters around all, or one per frame."""
    template, rows = SinkTemplate(), []
    first = 16 + np.arange(n_frames) * n_tokens
    one = np.stack([first, first, first + n_tokens, first + n_tokens], axis=1)
    one[0, 0] -= 1
    one[-1, 3] += 1
    first = 16 + np.arange(n_frames) * (n_tokens + 2)
    each = np.stack([first - 1, first, first + n_tokens, first + n_tokens + 1], axis=1)
    for form, images in (("film", one), ("unnumbered", each)):
        layout = Layout(int(images[-1, 3]) + 32, 0, int(images[-1, 3]) + 32, images)
        dense = count_pairs(layout, Category.DENSE, template).total
        kept = {c.name: count_pairs(layout, c, template).total / dense for c in SPARSE}
        rows.append({"form": form, "frames": n_frames, "tokens": layout.n_tokens, "kept": kept})
    return rows
