"""A calibration dealt out, killed, resumed and merged in any way gives the bits of one undisturbed process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from profile_strategies import fingerprint
from shared_profiles import SinkTemplate, state_files
from shared_profiles.budget import retune_by_thresholds
from shared_profiles.classifier import Thresholds
from shared_profiles.collection import Collector, check_local_block
from shared_profiles.processes import ALONE, Processes
from shared_profiles.provenance import make_profile
from shared_profiles.sink_statistics import LEARN_FROM, SinkMass, learn_template
from shared_profiles.split import Given, Split
from shared_profiles.state_files import StateFiles, one_writer, origin_of, read_origin
from shared_profiles.statistics import PromptStatistics, Statistics

PAIRS = np.outer([10, 3, 4, 5], [1, 1])
N = 40


class Threads(Processes):
    """Processes played by threads; one that fails takes the others with it, as closed connections do."""

    def __init__(self, rank, n, barrier, board):
        self.rank, self.n, self._barrier, self._board = rank, n, barrier, board

    def gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait(10)
        values = list(self._board)
        self._barrier.wait(10)
        return values


class Killed(Exception):
    """A process ends in the middle."""


class Machine:
    """Measures prompts, numbers whose even ones have one image, and counts what it measured."""

    def __init__(self, sinks=False):
        self.measured, self.looked, self.with_sinks = Counter(), Counter(), sinks

    def measure(self, prompt):
        self.measured[prompt] += 1
        table = np.random.default_rng(prompt).random((3, 2, 3))
        return PromptStatistics(50, 2, 20, table, table, PAIRS) if prompt % 2 else None

    def look(self, prompt):
        self.looked[prompt] += 1
        rng = np.random.default_rng(prompt)
        others = rng.random((2, 3, 17)) / 100
        others[..., (0, 3, 16)] = 0.2  # sinks: both delimiters, and the third token
        return SinkMass(rng.random((2, 3)), rng.random((2, 3)), others, np.full((2, 17), 5.0)) if prompt % 2 else None

    def run(self, prompts, *, template=None, split=None, processes=ALONE, **options):
        collector = Collector(
            iter(prompts), lambda x: {"ids": np.array([x])}, fingerprint(), split=split, processes=processes, **options
        )
        if template is None and self.with_sinks:
            template = collector.learn(self.look, 8)
        return collector.collect(self.measure, template or SinkTemplate())

    def run_on(self, n, prompts_of, split_of=None, **options):
        """What each of n processes returned or raised; `prompts_of` gives each its prompts."""
        barrier, board, ended = threading.Barrier(n), [None] * n, [None] * n

        def work(rank):
            try:
                own = {"split": split_of(rank)} if split_of else {}
                processes = Threads(rank, n, barrier, board)
                ended[rank] = self.run(prompts_of(rank), processes=processes, **options, **own)
            except (ValueError, threading.BrokenBarrierError) as error:  # of all of them
                ended[rank] = error
            except (Killed, OSError) as error:
                ended[rank] = error
                barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ended


def killed_after(n_prompts, who):
    """Prompts that end a process of rank `who` once it has been given so many."""

    def prompts_of(rank):
        for i, prompt in enumerate([*range(N), 3, 5]):  # two come twice
            if rank == who and i == n_prompts:
                raise Killed
            yield prompt

    return prompts_of


@pytest.mark.parametrize("sinks", [False, True], ids=["given-template", "learned-template"])
@pytest.mark.parametrize(
    "runs",
    [
        [(1, None)],
        [(2, None)],
        [(3, None)],
        [(2, (25, 1)), (2, None)],
        [(3, (30, 2)), (1, (36, 0)), (4, None)],
        [(1, (20, 0)), (2, (33, 0)), (1, None)],
    ],
    ids=lambda runs: "-then-".join(f"{n}{'-killed' if kill else ''}" for n, kill in runs),
)
def test_every_prompt_counts_once_and_every_bit_is_the_same(runs, sinks, tmp_path):
    """However many processes, killed wherever, resumed by however many."""
    split, state, one = Split(0.3), tmp_path / "state.npz", Machine(sinks)
    whole = one.run(range(N), split=split, state=tmp_path / "whole.npz")
    machine = Machine(sinks)
    for n, kill in runs:
        ended = machine.run_on(n, killed_after(*(kill or (None, None))), split=Split(0.3), state=state, save_every=1)
        if kill:
            assert all(isinstance(x, Killed | threading.BrokenBarrierError) for x in ended)
        else:
            assert all(x == whole for x in ended)
    assert state.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.npz", "whole.npz"], "no part is left"
    assert {x for x in machine.measured if x % 2} == {x for x in range(N) if x % 2} - set(split.prompts.values())
    assert all(n == 1 for x, n in machine.measured.items() if x % 2), "no prompt is measured twice"
    assert machine.looked.keys() == one.looked.keys(), "a run killed while it learns learns again"
    if len(runs) == 1:
        assert machine.looked == one.looked, "one process looks for all"


def test_a_state_is_on_the_disk_as_it_grows(tmp_path):
    """A process that the kernel kills writes no more: what it has measured by then is in the file."""
    state, on_disk = tmp_path / "state.npz", []

    def prompts():
        for prompt in range(1, 20, 2):
            on_disk.append(len(Statistics.load(state)) if state.exists() else 0)
            yield prompt

    assert len(Machine().run(prompts(), state=state, save_every=3)) == 10
    assert on_disk == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]


def test_no_part_goes_before_the_whole_is_on_the_disk(tmp_path):
    """The first process cannot write the state: a folder is in its place by now."""
    state = tmp_path / "state.npz"

    def prompts_of(rank):
        yield from range(N)
        if rank == 0:
            state.mkdir()

    ended = Machine().run_on(3, prompts_of, state=state, save_every=1)
    assert all(isinstance(x, OSError | threading.BrokenBarrierError) for x in ended)
    state.rmdir()
    again = Machine()
    assert again.run(range(N), state=state) == Machine().run(range(N))
    assert not any(x % 2 for x in again.measured), "all of it was there"


def test_a_run_that_died_before_it_could_clean_up(tmp_path):
    """The state and the parts that it was made of lie side by side: their union is the state."""
    state = tmp_path / "state.npz"
    whole = Machine().run(range(N), state=state)
    whole.save(tmp_path / "state.rank0.npz")
    Machine().run(range(9), state=tmp_path / "state.rank17.npz")
    (tmp_path / "state.rankings.npz").write_bytes(b"someone else's")
    machine = Machine()
    assert machine.run([], state=state) == whole and not machine.measured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.npz", "state.rankings.npz"]


def test_states_of_other_machines_are_merged(tmp_path):
    """Whoever reads them, in any order, and with prompts in common."""
    whole = Machine().run(range(N))
    for name, prompts in {"a": range(0, 21), "b": range(17, 30), "c": range(25, N)}.items():
        Machine().run(prompts, state=tmp_path / f"{name}.npz")
    before = (tmp_path / "b.npz").read_bytes()
    for state, first, second in (("a", "b", "c"), ("c", "b", "a"), ("new", "c", "a")):
        path, machine = tmp_path / f"{state}-of-all.npz", Machine()
        if (tmp_path / f"{state}.npz").exists():
            path.write_bytes((tmp_path / f"{state}.npz").read_bytes())
        both = [tmp_path / f"{name}.npz" for name in (first, second)]
        assert machine.run(range(N), state=path, merge=both) == whole == Statistics.load(path)
        assert {x for x in machine.measured if x % 2} == ({21, 23} if state == "new" else set())
    assert (tmp_path / "b.npz").read_bytes() == before, "what is merged is only read"


@pytest.mark.parametrize("name", ["a[1].npz", "a+.npz", "a.b", "*.npz"])
def test_a_state_may_have_any_name(name, tmp_path):
    """None is taken for a pattern, and none for another's."""
    Machine().run(range(9), state=tmp_path / name)
    for other in ("a.npz", "a1.npz", "aa.npz", "axb", "a.rank0x.npz", "ab.rank0.npz", f"{name}.bak"):
        (tmp_path / other).write_text("another's")
    again = Machine()
    again.run(range(9), state=tmp_path / name)
    assert not [x for x in again.measured if x % 2]


def test_states_that_disagree_are_named(tmp_path):
    """A prompt that two machines, or frameworks, have measured: hardly ever to the same bits."""
    Machine().run(range(9), state=tmp_path / "a.npz")
    one = Machine()
    one.measure = lambda prompt: Machine().measure(prompt + 2)
    one.run(range(7, 9), state=tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"b\.npz: prompt \w+ must have the same values wherever"):
        Machine().run(range(9), state=tmp_path / "a.npz", merge=[tmp_path / "b.npz"])


def test_processes_send_each_other_only_what_not_all_have_read(tmp_path):
    """On one disk all read the same states; each would be sent all of them n times."""
    sent = []

    class Watched(Threads):
        def gather(self, value):
            sent.append(value)
            return super().gather(value)

    for name, prompts in {"a": range(9), "b": range(9, 19)}.items():
        Machine().run(prompts, state=tmp_path / f"{name}.npz")
    for names, n_parts in (("aa", 1), ("ab", 2)):
        barrier, board, found = threading.Barrier(2), [None] * 2, [None] * 2
        sent.clear()

        def work(rank, names=names, barrier=barrier, board=board, found=found):
            files = StateFiles(None, [tmp_path / f"{names[rank]}.npz"], Watched(rank, 2, barrier, board))
            found[rank] = files.begin(fingerprint(), SinkTemplate(), ())

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] == found[1] and len(found[0]) == len(Machine().run(range(9 if n_parts == 1 else 19)))
        assert sum(isinstance(value, list) for value in sent) == (0 if n_parts == 1 else 2)


def test_what_does_not_belong_to_this_run_is_refused(tmp_path):
    other = dict(model=dict(digest="sha256:" + "6f" * 32), template={}, rankings={})
    for what, changes in other.items():
        template = SinkTemplate((0,), (1,), 8) if what == "template" else SinkTemplate()
        origin = origin_of(fingerprint(**changes).digest, template)
        path = tmp_path / f"{what}.npz"
        Statistics(2, 3, origin=origin, rankings=["residual"] if what == "rankings" else []).save(path)
        with pytest.raises(ValueError, match=rf"{what}\.npz must have been measured with this {what}: .* Got .* name"):
            Machine().run(range(9), state=tmp_path / "state.npz", merge=[path], template=SinkTemplate())
    Statistics(2, 3, origin="someone's own").save(tmp_path / "own.npz")
    with pytest.raises(ValueError, match=r"own\.npz must hold the statistics of a calibration\..* \"someone's own\""):
        Machine().run(range(9), merge=[tmp_path / "own.npz"], template=SinkTemplate())
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(ValueError, match=r"profile\.json must be a whole file written by Statistics\.save"):
        Machine().run(range(9), state=tmp_path / "profile.json")
    for path in (tmp_path / "other.npz", str(tmp_path / "other.npz")):
        with pytest.raises(ValueError, match=r"must be a list of paths. Got '.*other\.npz'. Put it in a list"):
            Machine().run(range(9), merge=path)
    with pytest.raises(FileNotFoundError):
        Machine().run(range(9), merge=[tmp_path / "absent.npz"])
    assert not (tmp_path / "state.npz").exists() and (tmp_path / "profile.json").read_text() == "{}"


def test_processes_must_be_given_the_same_prompts(tmp_path):
    """Who deals prompts out beforehand would lose most of them in silence."""
    ended = Machine().run_on(2, lambda rank: range(rank, N, 2), state=tmp_path / "state.npz")
    assert all("every process must be given the same prompts" in str(error) for error in ended)
    ended = Machine().run_on(2, lambda rank: range(0, N, 2))
    assert all("Got none (20 prompts with fewer)" in str(error) for error in ended), "counted over all processes"
    assert not (tmp_path / "state.npz").exists()


def test_processes_must_be_given_the_same_held_out_prompts():
    """Each would measure its share of another list, and some prompts of either would be measured by nobody."""
    given = [{"one": 101, "two": 103}, {"two": 103, "one": 101}, {"one": 101, "three": 105}]
    assert all(len(s) == N // 2 for s in Machine().run_on(2, lambda rank: range(N), lambda rank: Given(given[rank])))
    splits = [(Given(given[1]), Given(given[2])), (Split(0.25), Split(0.5)), (Split(0.25), None)]
    for each in splits:
        ended = Machine().run_on(2, lambda rank: range(N), each.__getitem__)
        assert all("and the same held-out ones. Got 2 kinds of them in 2" in str(error) for error in ended)


def test_a_template_is_learned_from_the_first_prompts_that_are_calibrated_on(tmp_path):
    split, machine, state = Split(0.3), Machine(sinks=True), tmp_path / "state.npz"
    statistics = machine.run(range(N), split=split, state=state)
    expected = [x for x in range(N) if x % 2 and x not in split.prompts.values()][:LEARN_FROM]
    assert [x for x in machine.looked if x % 2] == expected and len(statistics.sinks) == LEARN_FROM
    assert all(n == 1 for x, n in (machine.measured + machine.looked).items() if x % 2 == 0), "read once for all"
    mass = SinkMass.mean(statistics.sinks[i] for i in sorted(statistics.sinks))
    template = learn_template(mass, 8)
    assert template == SinkTemplate((0, 1, 3), (1, 2), 8) == read_origin(statistics.origin)[1]

    profile = make_profile(statistics, Thresholds(), template, fingerprint(), "numbers", [])
    told = profile.choice["sinks"]
    seen = mass.others.mean((0, 1))
    received = {"from_start": pytest.approx([0.2, seen[1], 0.2]), "from_end": pytest.approx([0.2, seen[15]])}
    assert told == {"prompts": 8} | received
    assert retune_by_thresholds(profile, Thresholds(gamma_dense=0.1)).choice["sinks"] == told

    again = Machine(sinks=True)
    assert again.run(range(N + 20), split=Split(0.3), state=state).origin == statistics.origin
    assert not again.looked, "the state has the template"
    stored = Collector([], again.look, fingerprint(), state=state)
    for block in (8, 16):
        assert stored.learn(again.look, block) == SinkTemplate((0, 1, 3), (1, 2), block)
    assert stored.learn(again.look, None) == template
    with pytest.raises(ValueError, match=r"this template: SinkTemplate\(\(0, 1\), \(1, 2\), 128\). Got S"):
        again.run(range(N), split=Split(0.3), state=state, template=SinkTemplate())
    with pytest.raises(ValueError, match=r"Got none \(20 prompts with fewer\)"):
        Machine(sinks=True).run(range(0, N, 2))


def test_sinks_merge_like_records(tmp_path):
    look = Machine().look
    a, b = (Statistics(2, 3) for _ in range(2))
    a.add_sinks("p", look(1))
    b.add_sinks("q", look(3))
    b.add_sinks("p", look(1))
    assert a.merge(b) == b.merge(a) == b.merge(b) == b != a
    b.save(tmp_path / "b.npz")
    assert Statistics.load(tmp_path / "b.npz") == b
    with pytest.raises(ValueError, match="prompt p must have the same values"):
        a.add_sinks("p", look(3))
    with pytest.raises(ValueError, match=r"prompt r: sinks must have shape \(2, 3, 17\). Got \(2, 3, 5\)"):
        a.add_sinks("r", SinkMass(*(np.ones(s) for s in ((2, 3), (2, 3), (2, 3, 5), (2, 5)))))
    with pytest.raises(ValueError, match=r"prompt p: sinks must have shape \(2, 4, 17\). Got \(2, 3, 17\)"):
        Statistics(2, 4).add_sinks("p", look(1))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_a_state_has_one_writer(tmp_path):
    state, link, others = tmp_path / "state.npz", tmp_path / "link.npz", Processes()
    link.symlink_to(state)
    others.rank, others.n = 1, 2
    with one_writer(state), one_writer(tmp_path / "another.npz"), one_writer(None), one_writer(state, others):
        for same in (state, str(state), link):
            with (
                pytest.raises(ValueError, match=r"one writer\. Another run writes .*\.npz"),
                one_writer(same),
            ):
                pass
    with pytest.raises(Killed), one_writer(state):
        raise Killed
    assert [path.name for path in tmp_path.iterdir()] == ["link.npz"], "no lock is left"

    program = (
        "import sys; from shared_profiles.state_files import one_writer\n"
        "with one_writer(sys.argv[1]): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(state)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as run:
        assert run.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="must have one writer"), one_writer(state):
            pass
        run.send_signal(signal.SIGKILL)
    assert (tmp_path / "state.npz.lock").exists()
    with one_writer(state):
        pass
    assert not (tmp_path / "state.npz.lock").exists(), "a killed run does not hold it, and the next one cleans up"


@pytest.mark.parametrize("another", [False, True], ids=["none", "anothers"])
def test_a_lock_that_its_owner_has_just_removed_is_none(another, tmp_path, monkeypatch):
    state = tmp_path / "state.npz"
    before = state_files.try_lock

    def after_the_owner_ended(file):
        (tmp_path / "state.npz.lock").unlink()
        if another:  # began at once
            (tmp_path / "state.npz.lock").touch()
        return before(file)

    monkeypatch.setattr(state_files, "try_lock", after_the_owner_ended)
    with pytest.raises(ValueError, match="must have one writer"), one_writer(state):
        pass


def test_a_width_is_refused_beside_a_template():
    check_local_block(None, 16)
    check_local_block(SinkTemplate(), None)
    with pytest.raises(ValueError, match="local_block must be left out where a template is given"):
        check_local_block(SinkTemplate(), 128)
    with pytest.raises(ValueError, match="positive multiple of 8"):
        check_local_block(None, 12)
