"""What the machine of `test_parity_calibration.py` calibrates on, how it is interrupted, and what must come of it."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import jax_blindsight
import torch_blindsight
from shared_profiles import SPARSE, Category, SinkTemplate, collection
from shared_profiles.budget import Budget, retune_by_thresholds
from shared_profiles.classifier import Thresholds
from shared_profiles.processes import Processes
from shared_profiles.profile import Profile
from shared_profiles.provenance import prompt_digest
from shared_profiles.sink_statistics import SinkMass, learn_template
from shared_profiles.state_files import origin_of
from shared_profiles.statistics import PromptStatistics, Statistics
from tiny_models import make_ids, make_inputs, make_model, make_video_inputs

FAMILY, LAYERS, HEADS = "qwen2_5_vl", 2, 4
LEARN_FROM = 3  # prompts that a template is learned from here
WAYS: dict[str, Thresholds | Budget] = {
    "loose": Thresholds(0.5, 0.4, 0.3),
    "strict": Thresholds(quantile=0.0),
    "error": Budget(0.05, "error"),
    "gradient": Budget(0.05, "gradient"),
}
STOPS = "prompts", "prefill", "before a file has its name", "after a file has its name"


def _pool() -> list[dict[str, torch.Tensor]]:
    plain = [make_inputs(FAMILY, [make_ids(2 + i % 2, seed=i)], seed=i) for i in range(6)]
    padded = []
    for sides, prompt in zip(((3, 0), (0, 3)), plain, strict=False):
        rows = {name: x for name, x in prompt.items() if x.shape == prompt["input_ids"].shape}
        padded.append(prompt | {name: torch.nn.functional.pad(x, sides) for name, x in rows.items()})
    lone = [make_inputs(FAMILY, [make_ids(1, seed=i)], seed=i) for i in range(2)]
    return [*plain, *padded, make_video_inputs([2, 1]), *lone]


POOL = _pool()
"""Prompts of two and three images, two of them again with padding, a video, and two that show nothing."""
TELLING = range(len(POOL) - 2)
DIGESTS = [prompt_digest({name: x.numpy() for name, x in prompt.items()}) for prompt in POOL]
N_TOKENS = [int(prompt["attention_mask"].sum()) for prompt in POOL]


def is_held_out(i: int, share: float) -> bool:
    """Whether a share of the prompts, by their content, has prompt i."""
    return int(hashlib.sha256(DIGESTS[i].encode()).hexdigest()[:16], 16) < share * 2**64


@cache
def models(seed: int) -> tuple[Any, ...]:
    """One model three times, for as many processes."""
    model = make_model(FAMILY, seed, n_layers=LAYERS)
    return model, copy.deepcopy(model), copy.deepcopy(model)


@cache
def params(seed: int) -> jax_blindsight.Params:
    with tempfile.TemporaryDirectory() as folder:
        models(seed)[0].save_pretrained(folder)
        return jax_blindsight.load(folder)


def in_numpy(prompt: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if x is None else x.numpy() for name, x in prompt.items()}


def calibrate(framework: str, seed: int, prompts: Any, rank: int = 0, **options: Any) -> Profile:
    """Either framework's, of prompts and held-out ones in torch."""
    if framework == "torch":
        return torch_blindsight.calibrate(models(seed)[rank], prompts, progress=False, **options)
    if isinstance(options.get("held_out"), list):
        options["held_out"] = list(map(in_numpy, options["held_out"]))
    return jax_blindsight.calibrate(params(seed), map(in_numpy, prompts), progress=False, **options)


@dataclass(frozen=True)
class Kind:
    """What a state's numbers were measured on."""

    seed: int
    template: SinkTemplate
    rankings: tuple[str, ...]


@cache
def record_of(framework: str, kind: Kind, i: int) -> PromptStatistics:
    """What a run of one prompt alone measures."""
    how: dict[str, Any] = dict(thresholds=Thresholds())
    if kind.rankings:
        how = dict(budget=Budget(1e9, kind.rankings[0]), held_out=[POOL[0 if i else 1]])
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.npz"
        calibrate(framework, kind.seed, [POOL[i]], template=kind.template, state=state, **how)
        return Statistics.load(state)[DIGESTS[i]]


@cache
def sinks_of(framework: str, seed: int, i: int) -> SinkMass:
    if framework == "torch":
        return torch_blindsight.sinks.measure_sinks(models(seed)[0], [POOL[i]])[0].mass
    return jax_blindsight.sinks.measure_sinks(params(seed), in_numpy(POOL[i]))


def learned(framework: str, seed: int, prompts: list[int]) -> SinkTemplate:
    """The template that these prompts lead to."""
    in_order = sorted(prompts, key=DIGESTS.__getitem__)
    return learn_template(SinkMass.mean(sinks_of(framework, seed, i) for i in in_order)) if prompts else SinkTemplate()


@dataclass(frozen=True)
class Known:
    """What a state must hold: prompts, by which framework measured them; and of which their sinks."""

    kind: Kind
    records: Mapping[int, str] = field(default_factory=dict)
    sinks: Mapping[int, str] = field(default_factory=dict)

    def record(self, i: int) -> PromptStatistics:
        return record_of(self.records[i], self.kind, i)

    def sink(self, i: int) -> SinkMass:
        return sinks_of(self.sinks[i], self.kind.seed, i)

    def union(self, other: Known) -> Known | None:
        """None where the two have measured one prompt differently."""
        both = [(self.record(i), other.record(i)) for i in self.records.keys() & other.records.keys()]
        sinks = [(self.sink(i), other.sink(i)) for i in self.sinks.keys() & other.sinks.keys()]
        if any(mine != theirs for mine, theirs in both + sinks):
            return None
        return Known(self.kind, {**other.records, **self.records}, {**other.sinks, **self.sinks})

    def statistics(self) -> Statistics:
        origin = origin_of(params(self.kind.seed).fingerprint.digest, self.kind.template)
        whole = Statistics(LAYERS, HEADS, origin=origin, rankings=self.kind.rankings)
        for i in self.records:
            whole.add(DIGESTS[i], self.record(i))
        for i in self.sinks:
            whole.add_sinks(DIGESTS[i], self.sink(i))
        return whole


def check_profile(profile: Profile, known: Known, framework: str, way: str, held: set[int]) -> None:
    """Holds a profile against the records of the prompts that count, and against the held-out ones."""
    assert profile.template == known.kind.template
    assert profile.fingerprint.digest == params(known.kind.seed).fingerprint.digest
    _check_summary(profile, known)
    _check_sinks(profile, known)
    ids, made = {*known.records, *held}, profile.provenance
    digests = "\n".join(sorted(DIGESTS[i] for i in ids))
    assert made.dataset_hash == "sha256:" + hashlib.sha256(digests.encode()).hexdigest()
    assert (made.n_prompts, made.n_tokens) == (len(ids), sum(N_TOKENS[i] for i in ids))
    for name in ("loose", "strict"):
        again = profile if name == way else retune_by_thresholds(profile, WAYS[name])
        np.testing.assert_array_equal(again.categories, _by_thresholds(profile, WAYS[name]))
    if isinstance(WAYS[way], Thresholds):
        assert not profile.curve
        return
    want = _undisturbed(framework, known.kind, frozenset(known.records.items()), frozenset(held), way)
    np.testing.assert_array_equal(profile.categories, want.categories)
    assert [point.heads for point in profile.curve] == [point.heads for point in want.curve]
    for name in ("kl", "kept", "agreement"):
        got, wanted = ([getattr(point, name) for point in each.curve] for each in (profile, want))
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-12)
    assert {point.n_prompts for point in profile.curve} == {profile.choice["held_out_prompts"]} == {len(held)}
    for name in ("method", "budget", "reached", "ranking", "held_out"):
        assert profile.choice[name] == want.choice[name]


def _check_summary(profile: Profile, known: Known) -> None:
    """Means and quantiles, by their definition."""
    summary, records = profile.summary, [known.record(i) for i in known.records]
    n = summary.n_prompts
    assert n == len(records) and set(summary.harm) == set(known.kind.rankings)
    picks = [min(int(np.floor(level * n + 1e-9)), n - 1) for level in summary.levels]
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-12)
    for c, category in enumerate(SPARSE):
        mass = np.sort(np.minimum([r.mass[c].astype(float) for r in records], 1), axis=0)
        error = np.sort([r.error[c].astype(float) for r in records], axis=0)
        close(summary.mass[category], np.moveaxis(mass[picks], 0, -1))
        close(summary.error[category], np.moveaxis(error[picks], 0, -1))
        close(summary.mass_mean[category], mass.mean(0))
        close(summary.error_mean[category], error.mean(0))
        close(summary.kept[category], np.mean([r.pairs[category].sum() / r.pairs[0].sum() for r in records]))
        for name in known.kind.rankings:
            shares = [r.harm[name][c] / (r.harm[name].sum(dtype=float) or 1) ** 0.5 for r in records]
            close(summary.harm[name][category], np.mean(shares, axis=0))
    for category in Category:
        close(summary.pairs[category], np.mean([r.pairs[category] for r in records], axis=0))


def _check_sinks(profile: Profile, known: Known) -> None:
    told = profile.choice.get("sinks")
    assert (told["prompts"] if told else 0) == len(known.sinks)
    if told:
        others = np.mean([known.sink(i).others for i in known.sinks], axis=(0, 1, 2), dtype=float)
        np.testing.assert_allclose(told["from_start"], [others[x] for x in profile.template.from_start], rtol=1e-5)
        np.testing.assert_allclose(told["from_end"], [others[17 - x] for x in profile.template.from_end], rtol=1e-5)


def _by_thresholds(profile: Profile, thresholds: Thresholds) -> list[list[int]]:
    """The cheapest of the categories that pass, head by head."""
    summary, at = profile.summary, round(thresholds.quantile * 20)
    gammas = (thresholds.gamma_sink, thresholds.gamma_intra, thresholds.gamma_dense)

    def choose(layer: int, head: int) -> int:
        mass = [summary.mass[category][layer, head, at] for category in SPARSE]
        passing = [c for c, kept, gamma in zip(SPARSE, mass, gammas, strict=True) if kept >= gamma]
        if Category.INTRA_IMAGE_SINK not in passing:
            return Category.DENSE
        return min(passing, key=lambda c: (summary.kept[c], -c))

    return [[choose(layer, head) for head in range(HEADS)] for layer in range(LAYERS)]


@cache
def _undisturbed(
    framework: str, kind: Kind, records: frozenset[tuple[int, str]], held: frozenset[int], way: str
) -> Profile:
    """By a budget: a run of one process; with no state, unless the other framework has measured some prompts."""
    options: Any = dict(template=kind.template, budget=WAYS[way], held_out=[POOL[i] for i in sorted(held)])
    if {by for _, by in records} <= {framework}:
        return calibrate(framework, kind.seed, [POOL[i] for i, _ in sorted(records)], **options)
    with tempfile.TemporaryDirectory() as folder:
        Known(kind, dict(records)).statistics().save(Path(folder) / "all.npz")
        return calibrate(framework, kind.seed, [], merge=[Path(folder) / "all.npz"], **options)


class Threads(Processes):
    """Processes played by threads; one that fails takes the others with it."""

    mine = threading.local()

    def __init__(self, rank: int, n: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.n, self._barrier, self._board = rank, n, barrier, board

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(60)
        values = list(self._board)
        self._barrier.wait(60)
        return values


@contextmanager
def _joined() -> Iterator[Processes]:
    yield Threads.mine.processes


def run_on(n: int, run: Callable[[int], Any]) -> list[Any]:
    """What processes return or raise that run this with their rank."""
    barrier, board, ended = threading.Barrier(n), [None] * n, [None] * n

    def work(rank: int) -> None:
        Threads.mine.processes = Threads(rank, n, barrier, board)
        try:
            ended[rank] = run(rank)
        except BaseException as error:
            ended[rank] = error
            barrier.abort()

    with (
        mock.patch.object(collection, "LEARN_FROM", LEARN_FROM),
        mock.patch.object(torch_blindsight.calibration, "joined_processes", _joined),
    ):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, n)]
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()
    return ended


@contextmanager
def interrupted(where: str | None, n: int, seed: int) -> Iterator[Callable[[], None]]:
    """In this context the n-th prefill or save ends in Ctrl-C; gives what is to be called before every prompt."""
    left, name_file = [n], os.replace

    def stop() -> None:
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt

    with ExitStack() as stack:
        if where == "prefill":
            for model in models(seed):
                hook = model.get_decoder().layers[1].register_forward_pre_hook(lambda *_: stop())
                stack.callback(hook.remove)
            for module in (jax_blindsight.observe, jax_blindsight.prefill):
                run = partial(lambda run, *args, **kwargs: (stop(), run(*args, **kwargs))[1], module.run_layers)
                stack.enter_context(mock.patch.object(module, "run_layers", run))
        elif where == "before a file has its name":
            stack.enter_context(mock.patch("os.replace", lambda *args: (stop(), name_file(*args))))
        elif where == "after a file has its name":
            stack.enter_context(mock.patch("os.replace", lambda *args: (name_file(*args), stop())))
        yield stop if where == "prompts" else lambda: None


@contextmanager
def noted() -> Iterator[list[int]]:
    """The prompts that are measured in this context, in their order."""
    found: list[int] = []

    def noting(measure: Callable[..., Any], at: int) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            record = measure(*args)
            if record is not None:
                found.append(
                    DIGESTS.index(prompt_digest({k: np.asarray(x) for k, x in args[at].items() if x is not None}))
                )
            return record

        return measured

    theirs, ours = torch_blindsight.calibration, jax_blindsight.calibration
    with (
        mock.patch.object(theirs, "_measure", noting(theirs._measure, 2)),
        mock.patch.object(ours, "measure", noting(ours.measure, 1)),
    ):
        yield found
