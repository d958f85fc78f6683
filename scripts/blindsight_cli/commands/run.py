"""`blindsight run`: one question about some pictures or videos, answered sparse, dense, or both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from blindsight_cli.backends import NO_PROFILE, Answer, Backend, BackendName, Prompt, load_backend
from blindsight_cli.errors import ExitCode
from blindsight_cli.folders import check_family, named_or_found
from blindsight_cli.loading import ask, load_image, load_processor
from blindsight_cli.output import note, print_json, results
from blindsight_cli.report import figures
from blindsight_cli.timing import median_pair
from blindsight_cli.videos import check_video, load_video
from shared_profiles import Layout
from shared_profiles.collection import of_prompt
from shared_profiles.measured import divergence_of_one
from shared_profiles.profile import Profile

COMPARE_REPEATS = 3


@dataclass(frozen=True)
class Run:
    """One way of answering.

    Attributes:
        mode: "dense" or "sparse": what was asked for.
        ran: what the prefill really was: "sparse", "measured", or "dense" and why.
        answer: the text.
        prefill_seconds: one forward over the whole prompt, warm; the median of several under `--compare`.
        attention_flops: floating-point operations of the language model's prefill attention.
        kept: those, as a share of dense attention's.
    """

    mode: str
    ran: str
    answer: str
    prefill_seconds: float
    attention_flops: int
    kept: float


def run_question(
    *,
    checkpoint: Path,
    images: list[Path],
    videos: list[Path],
    fps: float | None,
    question: str,
    profile: Path | None,
    dense: bool,
    compare: bool,
    max_new_tokens: int,
    backend: BackendName,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> int:
    """Answers one question.

    Args:
        checkpoint: a checkpoint folder.
        images: the pictures' files.
        videos: the videos' files.
        fps: frames that are taken of a second of them; default: what the checkpoint says.
        question: the text.
        profile: the profile to use; default: the one that the library finds.
        dense: answer with the unpatched model.
        compare: answer both ways, and compare.
        max_new_tokens: length limit of the answer.
        backend, dtype, device: how the model is loaded.
        as_json: print a JSON document instead of a table.

    Returns:
        The exit code.

    Raises:
        ValueError, OSError: a file or an option is wrong, there is no profile to compare with, or the model gives no
            probabilities to compare.
        IncompatibleError, ProfileError: model, profile and versions do not go together.
    """
    if not (images or videos):
        raise ValueError("a question must be about something: give --image or --video.")
    if fps is not None and not videos:
        raise ValueError("--fps chooses frames of videos: give --video, or leave it out.")
    check_family(checkpoint)
    pictures = [load_image(path) for path in images]
    for video in videos:
        check_video(video)
    found = None if profile is None else Profile.load(profile)
    model = load_backend(backend, checkpoint, dtype=dtype, device=device)
    processor = load_processor(checkpoint)
    with of_prompt("--question, --image and --video"):
        films = [load_video(video, processor, fps) for video in videos]
        inputs = ask(processor, pictures, question, model.device, films)
    session = _Session(model, processor, inputs, max_new_tokens)
    path = None
    if not dense:
        found, path = named_or_found(found, profile, model.facts.fingerprint, checkpoint)
    if compare and found is None:
        raise ValueError(
            f"--compare needs a profile of this model. Found none. Run `blindsight calibrate {checkpoint} DATA`, "
            "or name one with --profile."
        )
    if dense:
        runs, kl = [session.dense()], None
    elif compare:
        assert found is not None
        runs, kl = session.both(found)
    else:
        runs, kl = [session.sparse(found)], None
    _tell(checkpoint, question, len(images), len(videos), session.layout, path, runs, kl, as_json=as_json)
    return ExitCode.OK


class _Session:
    """One model and one prompt."""

    def __init__(self, model: Backend, processor: Any, inputs: Prompt, max_new_tokens: int) -> None:
        self.model, self.processor, self.inputs = model, processor, inputs
        self.max_new_tokens = max_new_tokens
        (self.layout,) = model.facts.layouts(inputs)

    def dense(self) -> Run:
        """The dense answer."""
        return self._run("dense", self._answer(None), self._prefill_seconds(None), None)

    def sparse(self, profile: Profile | None) -> Run:
        """The sparse answer; with no profile, what the backend does without one."""
        if profile is not None:
            return self._run("sparse", self._answer(profile), self._prefill_seconds(profile), profile)
        # Timed dense: measuring costs several attentions, and a measured prompt answers like a dense one.
        answer = self.model.answer_unprofiled(self.inputs, self.max_new_tokens)
        return self._run("sparse", answer, self._prefill_seconds(None), None)

    def both(self, profile: Profile) -> tuple[list[Run], float]:
        """Dense and sparse, and the KL divergence of the answer's first token; prefills are timed in turns."""
        dense, sparse = self._answer(None), self._answer(profile)
        kl = divergence_of_one(dense.log_probs, sparse.log_probs)
        seconds = median_pair(
            lambda: self._prefill_seconds(None), lambda: self._prefill_seconds(profile), COMPARE_REPEATS
        )
        runs = [self._run("dense", dense, seconds[0], None), self._run("sparse", sparse, seconds[1], profile)]
        return runs, kl

    def _answer(self, profile: Profile | None) -> Answer:
        return self.model.answer(self.inputs, profile, self.max_new_tokens)

    def _prefill_seconds(self, profile: Profile | None) -> float:
        return self.model.prefill_seconds(self.inputs, profile)

    def _run(self, mode: str, answer: Answer, seconds: float, profile: Profile | None) -> Run:
        """With its FLOPs: four per query-key pair and element of a head."""
        text = self.processor.batch_decode([answer.ids], skip_special_tokens=True)[0].strip()
        facts, ran = self.model.facts, profile if answer.ran == "sparse" else None
        dense, kept = (facts.pairs(self.layout, way).total for way in (None, ran))
        return Run(mode, answer.ran, text, seconds, 4 * facts.fingerprint.head_dim * kept, kept / dense)


def _tell(
    checkpoint: Path,
    question: str,
    n_images: int,
    n_videos: int,
    layout: Layout,
    profile: Path | None,
    runs: list[Run],
    kl: float | None,
    *,
    as_json: bool,
) -> None:
    """Prints the answers and what they took."""
    speedup = runs[0].prefill_seconds / runs[1].prefill_seconds if len(runs) == 2 else None
    for run in runs:
        _explain(run, checkpoint)
    if as_json:
        print_json(
            {
                "checkpoint": str(checkpoint),
                "question": question,
                "n_images": n_images,
                "n_videos": n_videos,
                "n_tokens": layout.n_tokens,
                "profile": None if profile is None else str(profile),
                "runs": [asdict(run) for run in runs],
                "prefill_repeats": COMPARE_REPEATS if len(runs) == 2 else 1,
                "kl_nats": kl,
                "speedup": speedup,
            }
        )
        return
    table = Table(box=None, pad_edge=False, show_header=len(runs) == 2)
    table.add_column("")
    for run in runs:
        table.add_column(run.mode, overflow="fold")
    table.add_row(Text("answer", "bold"), *(Text(run.answer or "(empty)", "bold green") for run in runs))
    table.add_row("prefill", *(f"{figures.seconds(run.prefill_seconds)}, {run.ran.split(':')[0]}" for run in runs))
    table.add_row("attention", *(f"{figures.flops(run.attention_flops)}, {_share(run)}" for run in runs))
    console = results()
    console.print(table)
    shown = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((n_images, "image"), (n_videos, "video")) if n]
    if n_videos:
        shown[-1] += f" ({layout.n_images - n_images} pairs of frames)"
    console.print(f"\n{figures.count(layout.n_tokens)} tokens, {', '.join(shown)}")
    if profile is not None:
        console.print(f"profile: {profile}", markup=False, soft_wrap=True)
    if speedup is not None and kl is not None:
        same = "the same answer" if runs[0].answer == runs[1].answer else "another answer"
        console.print(f"sparse gives {same}; KL of its first token {figures.nats(kl)} nats")
        console.print(f"prefill dense / sparse: {figures.ratio(speedup)} (medians of {COMPARE_REPEATS})")
        if speedup < 1 and runs[1].ran == "sparse":
            note("sparse was slower on this prompt: what it saves grows with the square of the length")


def _share(run: Run) -> str:
    return "all of it" if run.kept == 1 else f"{figures.percent(run.kept)} of dense"


def _explain(run: Run, checkpoint: Path) -> None:
    """Says so when a run that was to be sparse was not."""
    if run.ran == "measured" or run.ran.endswith(NO_PROFILE):
        and_measured = " and was measured, but one prompt is not enough to choose by, and nothing was kept"
        note(
            f"{NO_PROFILE}: the prompt ran dense{and_measured if run.ran == 'measured' else ''}. "
            f"Make a profile: blindsight calibrate {checkpoint} prompts.jsonl",
            style="yellow",
        )
    elif run.mode == "sparse" and run.ran != "sparse":
        note(f"this prompt ran dense: {run.ran.removeprefix('dense: ')}", style="yellow")
