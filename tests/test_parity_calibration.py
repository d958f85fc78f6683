"""Any sequence of what happens to a calibration, in torch and in JAX, against what each prompt shows on its own.

Calibrating on real prompts takes hours: it is killed, resumed, continued by the other framework, shared by several
processes, merged, begun anew, chosen from differently. After every run, whatever came before:

- the state holds the records of the prompts that count, each as it is measured alone, and nothing else;
- the profile is what a plain computation makes of these; by a budget, that of one undisturbed run;
- what was measured before an interruption is kept, and is not measured again;
- what must be refused is refused by a ValueError, and leaves every file as it was.

A failure prints the steps as Python calls. A prompt is its number in `calibrations.POOL`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from calibrations import (
    DIGESTS,
    LEARN_FROM,
    POOL,
    STOPS,
    TELLING,
    WAYS,
    Kind,
    Known,
    calibrate,
    check_profile,
    interrupted,
    is_held_out,
    learned,
    models,
    noted,
    run_on,
)
from shared_profiles import SinkTemplate, budget
from shared_profiles.budget import Budget, rankings_for
from shared_profiles.profile import Profile
from shared_profiles.statistics import Statistics

# To shrink a failure takes minutes: add Phase.shrink for that.
SETTINGS = settings(max_examples=4, stateful_step_count=6, phases=[Phase.explicit, Phase.generate])
SMALL, OTHER = SinkTemplate((0, 1), (1, 2), 8), SinkTemplate((0,), (1,), 16)
SHARES = (0.2, 0.4)

frameworks = st.sampled_from(["torch", "jax"])
numbers = st.integers(0, len(POOL) - 1)
files = st.sampled_from("abc")
merges = st.just(()) | st.lists(files, min_size=1, max_size=2)
stops = st.sampled_from([*[None] * 5, *STOPS, "prompts"])
counts = st.sampled_from([1, 1, 1, 2, 3])
splits = st.sampled_from([None, None, *SHARES, (1, 4), (5, 8, 9), (9,)])


class Calibrations(RuleBasedStateMachine):
    """States a, b and c, runs that write them, and what happens to them between the runs."""

    done: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="calibrations-"))
        self.held: dict[str, Known | None] = {}  # by a file's name, those of single processes included; None is damaged
        self.whole: dict[str, tuple[Known, bytes]] = {}  # what was damaged

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def bytes(self) -> dict[str, bytes]:
        return {path.stem: path.read_bytes() for path in self.folder.iterdir()}

    def of_state(self, state: str | None) -> list[str]:
        """The files of a state, in the order in which they are read."""
        return sorted(name for name in self.held if state is not None and name.split(".")[0] == state)

    @initialize(
        way=st.sampled_from(["gradient", "gradient", "error", "loose"]),
        template=st.sampled_from([SMALL, SMALL, None]),
        share=st.sampled_from(SHARES),
        order=st.permutations(["torch", "jax"]),
        other=frameworks,
    )
    def first(self, way, template, share, order, other):
        """What most runs have in common; a state that both frameworks write, another, and both merged by processes."""
        self.way, self.template, self.share = way, template, share
        self.go_on(order[0], "a", (), [0, 1, 9, 2], "prompts", 4, 2, 1)
        self.go_on(order[1], "a", (), [6, 0, 1, 2], None, 0, 2, 1)
        self.go_on(other, "b", (), [3, 4, 5], None, 0, 2, 1)
        self.go_on("torch", "c", ["a", "b"], [7, 8], "prompts", 3, 2, 2)
        self.go_on(other, "c", ["b", "a"], [7, 8], None, 0, 2, 1)

    @rule(
        framework=frameworks,
        state=files,
        merge=merges,
        given=st.lists(numbers, min_size=1, max_size=4),
        where=stops,
        n=st.integers(0, 7),
        save_every=st.integers(1, 3),
        n_processes=counts,
    )
    def go_on(self, framework, state, merge, given, where, n, save_every, n_processes):
        """As this calibration was begun."""
        given = [*given, *(i for i in TELLING if is_held_out(i, self.share))]
        merge = [name for name in merge if self.held.get(name) is not None]
        if state in self.held and self.held[state] is None:
            self.restore(state)
        common = None, self.template, None, 0
        self.run(framework, state, merge, given, *common, where, n, save_every, n_processes)

    @rule(
        framework=frameworks,
        state=st.none() | files | files,
        merge=merges,
        given=st.lists(numbers, max_size=6) | st.just([*reversed(TELLING), 9, 0]),
        way=st.sampled_from([None, None, None, *WAYS]),
        template=st.sampled_from([SMALL, SMALL, OTHER, None]),
        split=splits,
        seed=st.sampled_from([0, 0, 0, 0, 1]),
        where=stops,
        n=st.integers(0, 7),
        save_every=st.integers(1, 3),
        n_processes=counts,
    )
    def run(self, framework, state, merge, given, way, template, split, seed, where, n, save_every, n_processes):
        """Any run at all: with another choice, template, split or model, with files that are damaged."""
        way, merge = way or self.way, [name for name in merge if name in self.held]
        how = WAYS[way]
        rankings = rankings_for(how if isinstance(how, Budget) else None)
        split = (split or self.share) if isinstance(how, Budget) else ()
        n_processes = n_processes if framework == "torch" else 1
        options: dict[str, Any] = dict(template=template, save_every=save_every)
        options |= dict(state=state and self.path(state), merge=[self.path(name) for name in merge])
        if isinstance(how, Budget):
            options |= dict(budget=how, held_out=split if isinstance(split, float) else [POOL[i] for i in split])
        else:
            options |= dict(thresholds=how)

        def claims(i: int) -> bool:
            return is_held_out(i, split) if isinstance(split, float) else i in split

        counted = [i for i in dict.fromkeys(given) if i in TELLING and not claims(i)]
        held = {i for i in (given if isinstance(split, float) else split) if claims(i) and i in TELLING}
        found = [self.held[name] for name in (*self.of_state(state), *merge)]
        begun, refusals = self.begun(framework, seed, template, rankings, found, counted, claims)
        if isinstance(how, Budget) and not isinstance(split, float) and not held:
            refusals.add("the held-out split must have a prompt")
        before = self.bytes()
        models(seed)  # threads would make one each
        with interrupted(where, n, seed) as stop, noted() as measured:

            def prompts(rank: int) -> Iterator[Any]:
                for i in [*given, None]:
                    if rank == n_processes - 1:
                        stop()
                    if i is not None:
                        yield dressed(i) if i % 2 else POOL[i]

            ended = run_on(n_processes, lambda rank: calibrate(framework, seed, prompts(rank), rank, **options))
        kinds = (KeyboardInterrupt, ValueError, Exception, Profile)
        outcome = min(ended, key=lambda x: next(i for i, kind in enumerate(kinds) if isinstance(x, kind)))
        after = self.bytes()
        self.done[f"{framework} {type(outcome).__name__}"] += 1
        assert not any("lock" in name or "tmp" in name for name in after)
        assert {k: v for k, v in after.items() if k.split(".")[0] != state} == {
            k: v for k, v in before.items() if k.split(".")[0] != state
        }, "files of other states are only read"
        if refusals:
            assert isinstance(outcome, ValueError) and any(text in str(outcome) for text in refusals), ended
            assert after == before
            return
        assert begun is not None
        assert len(set(measured)) == len(measured) and not set(measured) & set(begun.records), "measured twice"
        now = Known(begun.kind, {**begun.records, **dict.fromkeys(measured, framework)}, begun.sinks)
        if not isinstance(outcome, Profile):
            if isinstance(outcome, ValueError):
                if any(claims(i) for i in given) and not isinstance(split, float):
                    assert "must not be calibrated on" in str(outcome), ended
                else:
                    assert "at least two images" in str(outcome), ended
                    assert not (begun.records or counted) or not held
            else:
                assert isinstance(outcome, KeyboardInterrupt), ended
            self.keeps(state, now, measured, save_every if where == STOPS[2] else 0)
            return
        assert set(now.records) == {*begun.records, *counted}
        for profile in ended:
            check_profile(profile, now, framework, way, held)
        if state is not None:
            for name in self.of_state(state):
                del self.held[name]
            self.held[state] = now
            assert Statistics.load(self.path(state)) == now.statistics()
            assert self.bytes().keys() == self.held.keys(), "no part is left"
            self.done["resumed"] += bool(begun.records and measured)
            self.done["merged"] += len({frozenset(each.records) for each in found if each is not None}) > 1
            self.done["by both"] += len({*now.records.values()}) > 1

    def begun(
        self,
        framework: str,
        seed: int,
        template: SinkTemplate | None,
        rankings: tuple[str, ...],
        found: list[Known | None],
        counted: list[int],
        claims: Callable[[int], bool],
    ) -> tuple[Known | None, set[str]]:
        """What a run begins with, and what it may say if it must be refused."""
        states = [each for each in found if each is not None]
        refusals = {"must be a whole file written by"} if len(states) < len(found) else set()
        if any(claims(i) for each in states for i in (*each.records, *each.sinks)):
            refusals.add("must not be calibrated on")
        sinks: dict[int, str] = {}
        if template is None and states:
            template = states[0].kind.template
        elif template is None:
            sinks = dict.fromkeys(counted[:LEARN_FROM], framework)
            template = learned(framework, seed, [*sinks])
        begun: Known | None = Known(Kind(seed, template, rankings), {}, sinks)
        for each in states:
            if each.kind != Kind(seed, template, rankings):
                refusals.add("must have been measured with this")
            elif begun is not None:
                begun = begun.union(each)
        if begun is None:
            refusals.add("must have the same values")
        return begun, refusals

    def keeps(self, state: str | None, now: Known, measured: list[int], may_be_lost: int) -> None:
        """What was measured is in the files, or what a save that was itself interrupted would have added."""
        if state is None:
            return
        kept = set().union(*(each.records for name in self.of_state(state) if (each := self.held[name]) is not None))
        for name in self.of_state(state):
            del self.held[name]
        for path in self.folder.iterdir():
            if path.stem.split(".")[0] == state:
                part = Statistics.load(path)
                has = {i: by for i, by in now.records.items() if DIGESTS[i] in part}
                sinks = {i: by for i, by in now.sinks.items() if DIGESTS[i] in part.sinks}
                self.held[path.stem] = Known(now.kind, has, sinks)
                assert part == self.held[path.stem].statistics()
        has = set().union(*(self.held[name].records for name in self.of_state(state)))
        assert has >= kept
        lost = [i for i in measured if i not in has]
        assert len(lost) <= may_be_lost and lost == measured[len(measured) - len(lost) :]
        self.done["interrupted"] += bool(measured)

    @precondition(lambda self: self.held)
    @rule(name=files, to=files)
    def copy(self, name, to):
        if name in self.held and name != to:
            shutil.copy(self.path(name), self.path(to))
            self.held[to] = self.held[name]

    @precondition(lambda self: self.held)
    @rule(name=files)
    def remove(self, name):
        for each in self.of_state(name):
            del self.held[each]
            self.path(each).unlink()

    @precondition(lambda self: self.held)
    @rule(name=files, share=st.sampled_from([0.0, 0.3, 0.99]))
    def truncate(self, name, share):
        if (known := self.held.get(name)) is not None:
            data = self.path(name).read_bytes()
            self.whole[name], self.held[name] = (known, data), None
            self.path(name).write_bytes(data[: int(len(data) * share)])

    @precondition(lambda self: None in self.held.values())
    @rule(name=files)
    def restore(self, name):
        if name in self.held and self.held[name] is None and name in self.whole:
            self.held[name], data = self.whole[name]
            self.path(name).write_bytes(data)


def dressed(i: int) -> dict[str, Any]:
    """The same prompt in another order, and with what is not there."""
    return dict(reversed(POOL[i].items())) | {"pixel_values_videos": POOL[i].get("pixel_values_videos")}


def test_calibrations(monkeypatch):
    monkeypatch.setattr(budget, "EVALUATIONS", 2)  # JAX compiles a program for each
    machine = type("CalibrationsOfBoth", (Calibrations,), dict(done=Counter()))
    run_state_machine_as_test(machine, settings=SETTINGS)
    # Draws depend on the modules that hypothesis finds loaded.
    for what in ("interrupted", "resumed", "by both", "merged"):
        assert machine.done[what] >= 1, f"little was checked: {machine.done}"
