"""Which criterion ranks heads best? Kept FLOPs against divergence and accuracy, on the shipped small model.

PYTHONPATH=.:kernels:scripts python scripts/compare_criteria.py --state criteria.npz

Every criterion gives a harm per head and category, and that a path from all-Dense to all-cheapest
(`shared_profiles.path`); points of each path are measured on the same questions. Then: how stable the gradient's choice
is over prompts, and what it is worth on questions unlike those it was calibrated on. Writes `criteria.json`,
`criteria.md` and `criteria.svg`; figures that are in `criteria.json` already are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blindsight_cli.backends import Backend, load_backend
from blindsight_cli.commands.demo import SHIPPED_MODEL
from blindsight_cli.held_out import HeldOut
from blindsight_cli.loading import load_processor
from blindsight_cli.smallvlm import evaluate
from blindsight_cli.smallvlm.puzzles import KINDS, Puzzle, make_puzzle
from shared_profiles import SPARSE, Category, SinkTemplate, count_model_pairs
from shared_profiles._atomic import write_atomically
from shared_profiles.budget import Budget, divergence
from shared_profiles.path import Path as HeadPath
from shared_profiles.path import kept_pairs, pairs_of
from shared_profiles.profile import Profile
from shared_profiles.profile_parts import heads_of
from shared_profiles.provenance import prompt_digest
from shared_profiles.statistics import Statistics
from shared_profiles.summary import Summary

ROOT = Path(__file__).resolve().parents[1]
# Images have about 16 tokens: local blocks as wide as an image, and the delimiters as sinks.
TEMPLATE = SinkTemplate(from_start=(0,), from_end=(1,), local_block=128)
KEPT = (0.75, 0.6, 0.52, 0.48, 0.465, 0.45)  # shares of pairs that are asked of every path; the end is 0.43
LOOKING, COMPARING = ("color", "shape", "count"), ("which", "same color", "same shape")
BATCH, BOOTSTRAPS, IMAGES, BUDGET = 32, 100, (2, 3, 4, 5, 6), 0.0015


@dataclass(frozen=True)
class Asked:
    """Questions of one sort, and what the dense model answers."""

    puzzles: list[Puzzle]
    held: HeldOut
    expected: np.ndarray  # [N] token ids
    layouts: list[Any]


class Study:
    """The model, what its calibration prompts showed, and the measurements so far.

    Args:
        checkpoint: the model's folder.
        n_prompts: prompts to calibrate on, held-out ones included.
        state: file of their statistics; the profile that they gave lies beside it, as `.json`.
        out: folder of the results.
    """

    def __init__(self, checkpoint: Path, n_prompts: int, state: Path, out: Path) -> None:
        self.model: Backend = load_backend("torch", checkpoint)
        self.processor = load_processor(checkpoint)
        self.out = out / "criteria.json"
        self.results: dict[str, Any] = json.loads(self.out.read_text()) if self.out.exists() else {}
        first = evaluate.CALIBRATION_SEEDS
        puzzles = [make_puzzle(IMAGES[i % 5], first + i, KINDS[i % len(KINDS)]) for i in range(n_prompts)]
        prompts = [evaluate.to_inputs(self.processor, [puzzle]) for puzzle in puzzles]
        dataset = f"synthetic puzzles {first}..{first + n_prompts - 1}"
        made = state.with_suffix(".json")
        if not made.exists():
            budget = Budget(BUDGET)
            self.model.calibrate(prompts, dataset=dataset, template=TEMPLATE, budget=budget, state=state).save(made)
        self.profile = Profile.load(made)
        self.statistics = Statistics.load(state)
        ids = [prompt_digest({name: x.numpy() for name, x in prompt.items()}) for prompt in prompts]
        self.puzzle_of = dict(zip(ids, puzzles, strict=True))

    def subset(self, ids: Sequence[str]) -> Summary:
        """The statistics of some of the prompts."""
        with_ids = Statistics(
            self.statistics.n_layers,
            self.statistics.n_heads,
            origin=self.statistics.origin,
            rankings=self.statistics.rankings,
        )
        for i, prompt_id in enumerate(ids):  # one drawn twice counts twice
            with_ids.add(f"{prompt_id}-{i}", self.statistics[prompt_id])
        return with_ids.summarize()

    def chosen(self, wanted: Any) -> list[str]:
        """The calibration prompts whose puzzles are wanted."""
        return [i for i in self.statistics.prompt_ids if wanted(self.puzzle_of[i])]

    def ask(self, puzzles: list[Puzzle], side: int | None = None) -> Asked:
        """Asks questions densely; `side` pixels of a picture instead of the processor's own size."""
        size = self.processor.image_processor.size
        if side is not None:
            self.processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
        batches = [evaluate.to_inputs(self.processor, puzzles[i : i + BATCH]) for i in range(0, len(puzzles), BATCH)]
        self.processor.image_processor.size = size
        words = [puzzle.question.answer for puzzle in puzzles]
        expected = np.array(self.processor.tokenizer.convert_tokens_to_ids(words))
        layouts = self.model.facts.layouts(batches[0])
        return Asked(puzzles, HeldOut(self.model, self.profile, batches), expected, layouts)

    def measure(self, name: str, asked: Asked, categories: np.ndarray) -> dict[str, Any]:
        """The figures of one choice on some questions, from the results file if they are there."""
        key = f"{name} {len(asked.puzzles)} {'/'.join(heads_of(categories))}"
        known = self.results.setdefault("measured", {})
        if key not in known:
            sparse = asked.held.log_probs(categories)
            right, dense = (x.argmax(-1) == asked.expected for x in (sparse, asked.held.dense))
            difference = right.astype(int) - dense.astype(int)
            counts = [
                [count_model_pairs(x, c, TEMPLATE, windows=self.model.facts.windows) for x in asked.layouts]
                for c in (categories, np.zeros_like(categories))
            ]
            inter, total = ([sum(getattr(p, k) for p in some) for some in counts] for k in ("inter", "total"))
            known[key] = {
                "kept": total[0] / total[1],
                "inter_kept": inter[0] / inter[1],
                "kl": max(float(divergence(asked.held.dense, sparse).kl.mean()), 0.0),
                "agreement": float((sparse.argmax(-1) == asked.held.dense.argmax(-1)).mean()),
                "dense": float(dense.mean()),
                "sparse": float(right.mean()),
                "difference": float(difference.mean()),
                "margin": float(1.96 * difference.std() / np.sqrt(len(difference))),
                "lost": int((difference < 0).sum()),
                "won": int((difference > 0).sum()),
                "questions": len(difference),
            }
            self.save()
        return {**known[key], "dense_heads": int((categories == Category.DENSE).sum())}

    def save(self) -> None:
        """Writes the results."""
        write_atomically(self.out, (json.dumps(self.results, indent=1) + "\n").encode())


def harms(summary: Summary, n_random: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each criterion's name and harm `[L, H, 4]`."""
    for ranking in ("gradient", "residual", "error"):
        yield ranking, summary.harm_of(ranking)
    lost = np.stack([np.zeros(summary.shape), *(1 - summary.mass_mean[c] for c in SPARSE)], axis=-1)
    yield "mass", lost
    for seed in range(n_random):
        harm = np.random.default_rng(seed).random((*summary.shape, len(Category)))
        harm[..., Category.DENSE] = 0
        yield f"random {seed}", harm


def at_kept(path: HeadPath, kept: float) -> np.ndarray:
    """The first choice of a path that keeps no more than this."""
    steps = (path.categories(step) for step in range(len(path) + 1))
    return next((c for c in steps if path.kept(c) <= kept), path.categories(len(path)))


def compare(study: Study, asked: Asked, n_random: int) -> list[dict[str, Any]]:
    """Every criterion at every share of pairs."""
    summary, rows = study.statistics.summarize(), []
    for name, harm in harms(summary, n_random):
        path = HeadPath(harm, pairs_of(summary))
        for kept in KEPT:
            rows.append({"criterion": name, "asked": kept, **study.measure("6 images", asked, at_kept(path, kept))})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def stability(study: Study, asked: Asked) -> dict[str, Any]:
    """How far the gradient's choice depends on which prompts were drawn, at the chosen share of pairs."""
    ids, rng = list(study.statistics.prompt_ids), np.random.default_rng(0)
    share = kept_pairs(study.profile.categories, pairs_of(study.statistics.summarize()))

    def choose(some: Sequence[str]) -> np.ndarray:
        summary = study.subset(some)
        return at_kept(HeadPath(summary.harm_of("gradient"), pairs_of(summary)), share)

    whole, found = choose(ids), {}
    for n in (len(ids) // 16, len(ids) // 4, len(ids)):
        draws = [choose(rng.choice(ids, n).tolist()) for _ in range(BOOTSTRAPS)]
        same = [float((draw == whole).mean()) for draw in draws]
        found[str(n)] = {"heads_the_same": float(np.mean(same)), "least": float(np.min(same))}
    shuffled = rng.permutation(ids).tolist()
    halves = [choose(shuffled[: len(ids) // 2]), choose(shuffled[len(ids) // 2 :])]
    return {
        "kept": share,
        "bootstrap": found,
        "halves_the_same": float((halves[0] == halves[1]).mean()),
        "halves": [study.measure("6 images", asked, half) for half in halves],
        "whole": study.measure("6 images", asked, whole),
    }


def transfer(study: Study, n_questions: int) -> list[dict[str, Any]]:
    """The gradient's choice from one sort of prompts, measured on another, at the same shares of pairs."""

    def puzzles(n_images: int, kinds: Sequence[str]) -> list[Puzzle]:
        first = evaluate.EVALUATION_SEEDS + 500_000
        return [make_puzzle(n_images, first + i, kinds[i % len(kinds)]) for i in range(n_questions)]

    sources = {
        "all": lambda puzzle: True,
        "color, shape, count": lambda puzzle: puzzle.question.kind in LOOKING,
        "which, same": lambda puzzle: puzzle.question.kind in COMPARING,
        "2-3 images": lambda puzzle: len(puzzle.images) <= 3,
        "5-6 images": lambda puzzle: len(puzzle.images) >= 5,
    }
    targets = {
        "6 images: color, shape, count": study.ask(puzzles(6, LOOKING)),
        "6 images: which, same": study.ask(puzzles(6, COMPARING)),
        "2 images": study.ask(puzzles(2, KINDS)),
        "9 images, never seen": study.ask(puzzles(9, KINDS)),
        "6 images of 4x the tokens, never seen": study.ask(puzzles(6, KINDS), side=128),
    }
    rows = []
    for source, wanted in sources.items():
        summary = study.subset(study.chosen(wanted))
        path = HeadPath(summary.harm_of("gradient"), pairs_of(study.statistics.summarize()))
        for target, asked in targets.items():
            row = study.measure(target, asked, at_kept(path, 0.465))
            rows.append({"from": source, "on": target, "prompts": summary.n_prompts, **row})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def target(study: Study, n_questions: int) -> list[dict[str, Any]]:
    """The measured points of the profile's own curve on many questions about six images."""
    asked = study.ask(evaluate.make_puzzles(6, n_questions, evaluate.EVALUATION_SEEDS))
    points = [point for point in study.profile.curve if point.heads is not None and point.kept < 0.6]
    rows = []
    for point in points:
        assert point.categories is not None
        row = study.measure("6 images", asked, point.categories)
        rows.append({"held_out": asdict(replace(point, heads=None)), **row})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def write_page(results: dict[str, Any], out: Path) -> None:
    """The tables in Markdown."""
    lines = ["# Criteria compared", "", results["about"], "", "## Pairs kept against divergence and accuracy", ""]
    lines += _table(
        ("criterion", "pairs kept", "inter-image kept", "dense heads", "KL (nats)", "accuracy: points", "same answer"),
        [
            (r["criterion"], *_shares(r), r["dense_heads"], f"{r['kl']:.5f}", _points(r), f"{r['agreement']:.2%}")
            for r in results.get("criteria", ())
        ],
    )
    lines += ["", "![curves](../criteria.svg)", "", "## The budget's own points, six images", ""]
    lines += _table(
        ("held-out KL", "pairs kept", "inter-image kept", "KL (nats)", "dense", "accuracy: points", "lost / won of"),
        [
            (
                f"{r['held_out']['kl']:.5f}",
                *_shares(r),
                f"{r['kl']:.5f}",
                f"{r['dense']:.2%}",
                _points(r),
                f"{r['lost']} / {r['won']} of {r['questions']:,}",
            )
            for r in results.get("target", ())
        ],
    )
    if stable := results.get("stability"):
        lines += ["", "## Stability", ""]
        lines += [
            f"At {stable['kept']:.1%} of the pairs, heads that get the category that all prompts give them: "
            + "; ".join(
                f"{n} prompts drawn with replacement: {x['heads_the_same']:.1%} on average, {x['least']:.1%} at least"
                for n, x in stable["bootstrap"].items()
            )
            + f". Two disjoint halves agree on {stable['halves_the_same']:.1%} of the heads; their KL is "
            + " and ".join(f"{x['kl']:.5f}" for x in stable["halves"])
            + f" nats, that of all prompts {stable['whole']['kl']:.5f}."
        ]
    lines += ["", "## Transfer", ""]
    lines += _table(
        ("calibrated on", "prompts", "asked", "KL (nats)", "dense", "accuracy: points"),
        [
            (r["from"], r["prompts"], r["on"], f"{r['kl']:.5f}", f"{r['dense']:.1%}", _points(r))
            for r in results.get("transfer", ())
        ],
    )
    write_atomically(out / "criteria.md", ("\n".join(lines) + "\n").encode())


def _shares(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['kept']:.1%}", f"{row['inter_kept']:.1%}"


def _points(row: dict[str, Any]) -> str:
    return f"{100 * row['difference']:+.2f} ± {100 * row['margin']:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---:"] * len(head), *rows] if rows else [["not measured"], ["---"]]
    return ["| " + " | ".join(map(str, row)) + " |" for row in lines]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Divergence over the pairs kept, a line per criterion."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "criteria"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name in dict.fromkeys(row["criterion"] for row in rows):
        mine = [row for row in rows if row["criterion"] == name]
        random = name.startswith("random")
        style = dict(color="#999999", linewidth=0.8) if random else dict(linewidth=1.6)
        label = None if random and name != "random 0" else name.removesuffix(" 0")
        for axis, key in zip(axes, ("kl", "difference"), strict=True):
            scale = 100 if key == "difference" else 1
            axis.plot(
                [100 * row["kept"] for row in mine],
                [scale * row[key] for row in mine],
                "o-",
                ms=3,
                label=label,
                **style,
            )
    axes[0].set_yscale("log")
    axes[0].set_ylabel("KL of the next token (nats)")
    axes[1].set_ylabel("accuracy, sparse minus dense (points)")
    axes[0].legend()
    for axis in axes:
        axis.set_xlabel("query-key pairs kept (%)")
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measures what is asked for and renders everything that is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--state", type=Path, required=True, help="statistics of the calibration prompts")
    parser.add_argument("--prompts", type=int, default=576, help="to calibrate on, held-out ones included")
    parser.add_argument("--questions", type=int, default=480, help="per measured point")
    parser.add_argument("--target-questions", type=int, default=4200, help="for the budget's own points")
    parser.add_argument("--random", type=int, default=3, help="random rankings")
    parser.add_argument("--parts", nargs="+", default=["criteria", "target", "stability", "transfer"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    asked = parser.parse_args()
    study = Study(asked.checkpoint, asked.prompts, asked.state, asked.out)
    shape = study.profile.fingerprint
    study.results["about"] = (
        f"`{asked.checkpoint.name}`, {shape.n_layers} layers of {shape.n_heads} heads, calibrated on "
        f"{len(study.statistics)} prompts of 2 to 6 images; {asked.questions} other questions a point, six images "
        "unless said otherwise. Intervals are 95%, of paired differences. Made by `scripts/compare_criteria.py`."
    )
    six = study.ask(evaluate.make_puzzles(6, asked.questions, evaluate.EVALUATION_SEEDS))
    for part in asked.parts:
        study.results[part] = {
            "criteria": lambda: compare(study, six, asked.random),
            "target": lambda: target(study, asked.target_questions),
            "stability": lambda: stability(study, six),
            "transfer": lambda: transfer(study, asked.questions),
        }[part]()
        study.save()
    write_page(study.results, asked.out)
    if rows := study.results.get("criteria"):
        draw(rows, asked.out.parent / "criteria.svg")


if __name__ == "__main__":
    main()
