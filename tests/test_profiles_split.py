"""The held-out split: disjoint, decided by content alone, and never what was calibrated on."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from profile_strategies import fingerprint
from shared_profiles.collection import Collector
from shared_profiles.provenance import dataset_hash, prompt_digest
from shared_profiles.sink_statistics import LEARN_FROM, SinkMass
from shared_profiles.split import Given, Split, is_held_out, require_held_out
from shared_profiles.state_files import origin_of
from shared_profiles.statistics import PromptStatistics, Statistics
from shared_profiles.template import SinkTemplate

PAIRS = np.outer([10, 3, 4, 5], [1, 1])


def measure(prompt: int) -> PromptStatistics | None:
    """Prompts of even numbers have one image."""
    table = np.full((3, 2, 3), prompt / 1000)
    return PromptStatistics(50, 2, 20, table, table, PAIRS) if prompt % 2 else None


def run(prompts, **options) -> Statistics:
    collector = Collector(prompts, lambda prompt: {"input_ids": np.array([prompt])}, fingerprint(), **options)
    return collector.collect(measure, SinkTemplate())


def by_digest(prompts) -> dict[str, int]:
    return {prompt_digest({"input_ids": np.array([prompt])}): prompt for prompt in prompts}


def test_a_prompt_is_known_by_its_values_alone():
    prompt = {"a": np.arange(6).reshape(2, 3), "b": np.array(["x"])}
    same = {"b": np.array(["x"]), "a": np.asfortranarray(prompt["a"], np.int32)}
    assert prompt_digest(prompt) == prompt_digest(same)
    less, renamed = {"a": prompt["a"]}, {"a": prompt["a"], "c": prompt["b"]}
    for other in (less, renamed, prompt | {"a": np.arange(6)}):
        assert prompt_digest(other) != prompt_digest(prompt)
    for value in (None, [object()], np.zeros(1, [("x", object)])):
        with pytest.raises(ValueError, match=r"must hold numbers or texts.* Got Python objects in b"):
            prompt_digest(prompt | {"b": np.asarray(value)})


def test_a_data_set_is_known_by_its_prompts_in_any_order():
    assert dataset_hash(["a", "b"]) == dataset_hash(["b", "a"]) != dataset_hash(["a"])


def test_the_halves_are_disjoint_whole_and_the_same_in_every_order():
    split, again = Split(0.25), Split(0.25)
    calibrated = run(range(400), split=split)
    assert run([*reversed(range(400)), *range(9)], split=again) == calibrated
    assert set(split.prompts) == set(again.prompts)
    assert not set(split.prompts) & set(calibrated.prompt_ids)
    odd = sum(prompt % 2 for prompt in split.prompts.values())
    assert len(calibrated) + odd == 200
    assert 70 < len(split.prompts) < 130
    # A larger data set moves nobody.
    grown = Split(0.25)
    run(range(500), split=grown)
    assert {i for i, prompt in grown.prompts.items() if prompt < 400} == set(split.prompts)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_kept(share):
    held = [is_held_out(f"{i:032x}", share) for i in range(4000)]
    assert np.mean(held) == pytest.approx(share, abs=0.03)


def test_what_is_held_out_while_sinks_are_learned_is_kept_where_the_split_keeps_it():
    """On the CPU: a prompt's pictures are gigabytes, and many may be held out before eight are not."""

    class Prompt:
        def __init__(self, number):
            self.number = number

    class Aside(Split):
        def holds_out(self, prompt_id, prompt):
            held = super().holds_out(prompt_id, prompt)
            if held:
                self.prompts[prompt_id] = Prompt(prompt.number)
            return held

    made = []

    def prompts():
        for number in range(1, 40, 2):
            made.append(weakref.ref(prompt := Prompt(number)))
            yield prompt
            del prompt

    split = Aside(0.5)
    collector = Collector(prompts(), lambda x: {"input_ids": np.array([x.number])}, fingerprint(), split=split)
    mass = SinkMass(*(np.ones(shape) for shape in ((2, 3), (2, 3), (2, 3, 17), (2, 17))))
    collector.learn(lambda prompt: mass, 8)
    assert len(made) == LEARN_FROM + len(split.prompts) and len(split.prompts) > 3
    assert sum(prompt() is not None for prompt in made) == LEARN_FROM
    assert len(collector.collect(lambda x: measure(x.number), SinkTemplate())) + len(split.prompts) == 20


def test_a_prompt_never_changes_sides():
    """A state outlives the version that began it: of these, by `sha256sum`, 3 (19d8...) and 5 (2dc3...) are lowest."""
    assert [i for i in range(20) if is_held_out(f"{i:032x}", 0.25)] == [3, 5]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), True])
def test_a_share_refuses(share):
    with pytest.raises(ValueError, match=r"held_out must be a share of the prompts in \(0, 1\)"):
        Split(share)


def test_an_interrupted_run_goes_on_with_the_same_split(tmp_path):
    whole, state = run(range(99), split=Split(0.3)), tmp_path / "state.npz"

    def interrupted(n):
        yield from range(n)
        raise KeyboardInterrupt

    for n in (20, 60):
        with pytest.raises(KeyboardInterrupt):
            run(interrupted(n), split=Split(0.3), state=state)
    split = Split(0.3)
    assert run(range(99), split=split, state=state) == whole == Statistics.load(state)
    assert not set(split.prompts) & set(whole.prompt_ids)


def test_what_is_calibrated_on_is_never_measured_on():
    with pytest.raises(ValueError, match=r"Got none \(0 prompts with fewer, 9 held out\)"):
        run(range(9), split=Split(0.999999))
    with pytest.raises(ValueError, match=r"^prompt 0 \(\w+\): held-out prompts must not .*on\. Got prompt .* in both"):
        run(range(9), split=Given(by_digest(range(9))))
    assert len(run(range(9, 19), split=Given(by_digest(range(9))))) == 5


@pytest.mark.parametrize("how", ["state", "merge"])
@pytest.mark.parametrize("split", ["given", "share", "larger-share"])
def test_a_state_with_held_out_prompts_is_refused_before_anything_is_read(split, how, tmp_path):
    path = tmp_path / "old.npz"
    run(range(99), split=Split(0.1) if split == "larger-share" else None, state=path)
    kinds = {"given": Given(by_digest(range(90, 120))), "share": Split(0.3), "larger-share": Split(0.5)}
    again = {"state": path} if how == "state" else {"merge": [path]}
    with pytest.raises(ValueError, match=r"must not be calibrated on\. .*old\.npz has .* begun without this split"):
        run(None, split=kinds[split], **again)


def test_what_is_wrong_with_a_prompt_names_it():
    def arrays(prompt):
        return {"input_ids": np.array([prompt])}

    def refuse(prompt):
        if prompt == 7:
            raise ValueError("it is seven")

    (digest,) = by_digest([7])
    for method in (lambda c: c.learn(refuse, 8), lambda c: c.collect(refuse, SinkTemplate())):
        with pytest.raises(ValueError, match=rf"^prompt 1 \({digest}\): it is seven"):
            method(Collector([5, 7], arrays, fingerprint()))
    with pytest.raises(ValueError, match=r"^prompt 0: it is seven"):
        Collector([7], refuse, fingerprint()).learn(refuse, 8)

    def fail(prompt):
        raise MemoryError(f"of {prompt}")

    for method in (lambda c: c.learn(fail, 8), lambda c: c.collect(fail, SinkTemplate())):
        with pytest.raises(MemoryError, match=rf"^of 7\nin prompt 0 \({digest}\)$"):
            method(Collector([7], arrays, fingerprint()))


def test_sinks_of_held_out_prompts_are_refused(tmp_path):
    """A run that was killed early has learned from more prompts than it measured."""
    path, (prompt_id, prompt) = tmp_path / "old.npz", next(iter(by_digest(range(9)).items()))
    killed = Statistics(2, 3, origin=origin_of(fingerprint().digest, SinkTemplate()))
    killed.add_sinks(prompt_id, SinkMass(*(np.ones(shape) for shape in ((2, 3), (2, 3), (2, 3, 5), (2, 5)))))
    killed.save(path)
    with pytest.raises(ValueError, match=rf"old\.npz has prompt {prompt_id}"):
        run(range(9), split=Given({prompt_id: prompt}), state=path)


def test_an_empty_half_is_refused():
    require_held_out(1, 1)
    with pytest.raises(ValueError, match=r"at least two images. Got none \(3 prompts held out\). Pass more prompts"):
        require_held_out(0, 3)
    with pytest.raises(ValueError, match=r"the held-out split must have a prompt.*\(0 prompts held out\)"):
        Given({})
