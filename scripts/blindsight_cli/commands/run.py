"""`blindsight run`: one question about some pictures, answered sparse, dense, or both."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from blindsight_cli.errors import ExitCode, IncompatibleError
from blindsight_cli.loading import ask, check_family, load_checkpoint, load_image, pick_device
from blindsight_cli.output import note, print_json, results
from blindsight_cli.report import figures
from shared_profiles import Category, Layout, SinkTemplate, count_model_pairs
from shared_profiles.lookup import find_profile
from shared_profiles.profile import Profile
from torch_blindsight import Handle, fingerprint, patch
from torch_blindsight.models import inspect_model

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
    question: str,
    profile: Path | None,
    dense: bool,
    compare: bool,
    max_new_tokens: int,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> int:
    """Answers one question.

    Args:
        checkpoint: a checkpoint folder.
        images: the pictures' files.
        question: the text.
        profile: the profile to use; default: the one that `patch` finds.
        dense: answer with the unpatched model.
        compare: answer both ways, and compare.
        max_new_tokens: length limit of the answer.
        dtype, device: how the model is loaded.
        as_json: print a JSON document instead of a table.

    Returns:
        The exit code.

    Raises:
        ValueError, OSError: a file or an option is wrong, or there is no profile to compare with.
        IncompatibleError, ProfileError: model, profile and versions do not go together.
    """
    check_family(checkpoint)
    pictures = [load_image(path) for path in images]
    found = None if profile is None else Profile.load(profile)
    model, processor = load_checkpoint(checkpoint, dtype=dtype, device=pick_device(device))
    inputs = ask(processor, pictures, question, str(model.device))
    session = _Session(model, processor, inputs, max_new_tokens)
    path = profile
    if found is None and not dense:
        found, path = find_profile(fingerprint(model), str(checkpoint)) or (None, None)
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
    _tell(checkpoint, question, len(images), session.layout, path, runs, kl, as_json=as_json)
    return ExitCode.OK


class _Session:
    """One model and one prompt; every method leaves the model unpatched."""

    def __init__(self, model: Any, processor: Any, inputs: dict[str, Tensor], max_new_tokens: int) -> None:
        self.model, self.processor, self.inputs = model, processor, inputs
        self.max_new_tokens = max_new_tokens
        self.info = inspect_model(model)
        both_ways = self.info.family.bidirectional
        ids = inputs["input_ids"][0].cpu().numpy()
        self.layout = Layout.from_ids(ids, self.info.special, bidirectional=both_ways)

    def dense(self) -> Run:
        """The unpatched model's answer."""
        answer, _ = self._generate()
        return self._run("dense", "dense", answer, self._prefill(), None)

    def sparse(self, profile: Profile | None) -> Run:
        """The patched model's answer; with no profile, the prompt runs dense and is measured."""
        with self._patched(profile) as handle:
            answer, _ = self._generate()
            ran = _prefill_kind(handle)
            if profile is not None:
                return self._run("sparse", ran, answer, self._prefill(), profile)
        # Timed unpatched: measuring costs several attentions, and a measured prompt answers like a dense one.
        return self._run("sparse", ran, answer, self._prefill(), None)

    def both(self, profile: Profile) -> tuple[list[Run], float]:
        """Dense and sparse, and the KL divergence of the answer's first token; prefills are timed in turns."""
        dense_answer, dense_log_probs = self._generate()
        with self._patched(profile) as handle:
            sparse_answer, sparse_log_probs = self._generate()
            ran = _prefill_kind(handle)
            handle.unpatch()
            dense_seconds, sparse_seconds = [], []
            for _ in range(COMPARE_REPEATS):
                dense_seconds.append(self._prefill())
                handle.install()
                sparse_seconds.append(self._prefill())
                handle.unpatch()
        kl = float((dense_log_probs.exp() * (dense_log_probs - sparse_log_probs)).sum())
        runs = [
            self._run("dense", "dense", dense_answer, median(dense_seconds), None),
            self._run("sparse", ran, sparse_answer, median(sparse_seconds), profile),
        ]
        return runs, max(0.0, kl)

    def _patched(self, profile: Profile | None) -> Handle:
        try:
            return patch(self.model, profile)
        except RuntimeError as error:  # transformers did not take it
            raise IncompatibleError(str(error)) from error

    @torch.no_grad()
    def _generate(self) -> tuple[str, Tensor]:
        """The greedy answer, and the log-probabilities `[V]` of its first token, float64 on the CPU."""
        generated = self.model.generate(
            **self.inputs,
            max_new_tokens=self.max_new_tokens,
            # Greedy; what the checkpoint says about sampling would only be warned about.
            **dict(do_sample=False, temperature=None, top_p=None, top_k=None),
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = generated.sequences[:, self.inputs["input_ids"].shape[1] :]
        answer = self.processor.batch_decode(new, skip_special_tokens=True)[0].strip()
        return answer, generated.logits[0][0].double().cpu().log_softmax(-1)

    @torch.no_grad()
    def _prefill(self) -> float:
        """Seconds of one forward over the whole prompt."""
        begun = time.perf_counter()
        logits = self.model(**self.inputs, use_cache=True, logits_to_keep=1).logits
        logits[0, -1].argmax().item()  # waits for the device
        return time.perf_counter() - begun

    def _run(self, mode: str, ran: str, answer: str, seconds: float, profile: Profile | None) -> Run:
        """With its FLOPs: four per query-key pair and element of a head."""
        everything = np.full((self.info.n_layers, self.info.n_heads), Category.DENSE)
        template = SinkTemplate() if profile is None else profile.template
        dense = count_model_pairs(self.layout, everything, template, windows=self.info.windows).total
        kept = dense
        if profile is not None and ran == "sparse":
            kept = count_model_pairs(self.layout, profile.categories, template, windows=self.info.windows).total
        return Run(mode, ran, answer, seconds, 4 * self.info.head_dim * kept, kept / dense)


def _prefill_kind(handle: Handle) -> str:
    """How the one prefill of a patched `generate` ran."""
    forwards = handle.report()["forwards"]
    return next((kind for kind in forwards if kind != "dense: decode step"), "dense: decode step")


def _tell(
    checkpoint: Path,
    question: str,
    n_images: int,
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
    console.print(f"\n{figures.count(layout.n_tokens)} tokens, {n_images} image{'s' * (n_images != 1)}")
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
    if run.ran == "measured":
        note(
            "there is no profile of this model: the prompt ran dense and was measured, but one prompt is not enough to "
            f"choose by, and nothing was kept. Make a profile: blindsight calibrate {checkpoint} prompts.jsonl",
            style="yellow",
        )
    elif run.mode == "sparse" and run.ran != "sparse":
        note(f"this prompt ran dense: {run.ran.removeprefix('dense: ')}", style="yellow")
