"""Any sequence of prompts, pieces, turns, answers, copies and mistakes gives what one prompt from scratch would give.

One machine per family goes on with whichever of its conversations it likes, by any profile or densely. At the end all
that was computed for them is held against the oracle of `jax_oracle.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from jax_blindsight import Params, decode_step, write
from jax_conversations import VOCABULARY, WRONG, Talk, Told, arrays_of, copied, wrong_turn
from jax_oracle import WORD, Picture, Row, flatten, logits_of
from shared_profiles import Category, SinkTemplate
from shared_profiles.profile import Profile
from tiny_jax import generate, sparse_prefill, twin
from tiny_models import END, FAMILIES, IMAGE, START, VIDEO, mixed_profile

WIDTHS = (64, 40, 40, 110, 1)  # of first prompts
ROOMY = 192  # slots of some caches, as of a prompt of 64 tokens whose capacity nobody stated; the others have 128
TURNS = (25, 45, 3, 0)  # 0: all slots that are left
PICTURES = [  # Gemma's are all alike
    Picture((1, 3, 4)),
    Picture((1, 2, 3), seed=1),
    Picture((1, 3, 1), seed=2),
    Picture((2, 1, 2), is_video=True, seed=3),
    Picture((4, 1, 1), is_video=True, seconds=1.5, seed=4),
]


@cache
def profiles(family: str) -> dict[str, Profile | None]:
    model = twin(family)
    return {
        "mixed": model.params.profile,
        "another": mixed_profile(model.single, seed=7, template=SinkTemplate((2,), (1, 4), 8)),
        "all dense": Profile.uniform(Category.DENSE, model.params.fingerprint),
        "none": None,
    }


picture = st.tuples(st.integers(0, 4), st.sampled_from(PICTURES))
several = st.lists(picture, min_size=2, max_size=5)
pictures = several | several | st.lists(picture, max_size=1)
tells = st.tuples(*[st.builds(Told, pictures, st.sampled_from(["words", "pictures", "cut"]), st.integers(0, 9))] * 3)
columns = st.tuples(*[st.integers(0, 20)] * 3)
names = st.sampled_from([*["mixed", "another"] * 3, "all dense", "none"])
seldom = st.sampled_from([False, False, False, True])
masks = st.sampled_from(["of the turn", "of all", "none"])
FIRST = dict(tells=tells, width=st.sampled_from(WIDTHS), short=columns, offsets=columns, roomy=st.booleans())
HOW = dict(name=names, dense=seldom, all_logits=st.sampled_from([True, True, False]))
TURN = dict(tells=tells, n=st.sampled_from(TURNS), mask=masks) | HOW
ANSWER = dict(limit=st.sampled_from([4, 5, 2, 1]), every=st.sampled_from([2, 4, 0]))
SAMPLING = dict(temperature=st.sampled_from([0.0, 0.0, 2.0]), seed=st.integers(0, 3))
said = st.fixed_dictionaries(ANSWER | SAMPLING)
TOKENS = (WORD, START, END, IMAGE, VIDEO, START, 0)
steps = st.lists(st.tuples(*[st.sampled_from(TOKENS)] * 3), max_size=3)
copies = st.sampled_from(["deepcopy", "arrays", "host", "pickle"])


class Conversations(RuleBasedStateMachine):
    """What a user may do with conversations, in any order."""

    family: str
    n_rows: int
    checked: Counter[str]  # prefills, by how they ran
    talks = Bundle("talks")

    def __init__(self) -> None:
        super().__init__()
        self.model = twin(self.family)
        self.all: list[Talk] = []

    def teardown(self) -> None:
        for talk in self.all:
            talk.check(self.model)

    def params(self, name: str = "mixed", **changes: Any) -> Params:
        return replace(self.model.params, profile=profiles(self.family)[name], **changes)

    def first(self, tells: Any, width: int, short: Any, offsets: Any) -> tuple[Talk, list, list[int], dict]:
        """A new conversation, its rows of up to `width` tokens, the columns that they begin at, and the arrays."""
        talk = Talk([Row(self.family) for _ in range(self.n_rows)])
        turn = [told.fit(row, max(1, width - n)) for row, told, n in zip(talk.rows, tells, short, strict=False)]
        offsets = [min(first, width - len(flatten(row))) for row, first in zip(turn, offsets, strict=False)]
        return talk, turn, offsets, arrays_of(self.family, turn, offsets, width)

    def prefill(self, talk, turn, offsets, arrays, name, dense, all_logits, **options):
        """Of rows that stand at these columns; by the named profile, or densely without one."""
        profile = profiles(self.family)[name]
        if profile is None and not dense:
            with pytest.raises(ValueError, match="needs a profile of this model"):
                sparse_prefill(self.params(name), arrays, **options)
            dense = True
        done = sparse_prefill(self.params(name), arrays, dense=dense, all_logits=all_logits, **options)
        for array in arrays.values():
            array.fill(77)  # they are the caller's
        assert done.how == talk.run(turn, profile, dense)
        type(self).checked[done.how] += 1
        logits, last = np.asarray(done.logits), []
        for b, (row, items, first) in enumerate(zip(talk.rows, turn, offsets, strict=True)):
            n = len(flatten(items))
            given = logits[b, first : first + n] if all_logits else logits[b, None]
            talk.found += [(b, len(row.ids) - len(given) + i, x) for i, x in enumerate(given)]
            last.append(given[-1])
        talk.goes_on(done.cache, arrays["input_ids"].shape[1], np.stack(last))

    @precondition(lambda self: len(self.all) < 3)
    @rule(target=talks, **FIRST, **HOW)
    def begin(self, tells, width, short, offsets, roomy, name, dense, all_logits):
        """A batch with padding wherever it may be."""
        talk, *prompt = self.first(tells, width, short, offsets)
        with pytest.raises(ValueError, match=f"at least the prompt's {width} tokens"):
            sparse_prefill(self.params(), prompt[-1], capacity=width - 1)
        roomy &= self.n_rows == 1  # each capacity has programs of its own
        capacity = None if width == 64 and roomy else ROOMY if roomy else width
        self.prefill(talk, *prompt, name, dense, all_logits, capacity=capacity)
        assert talk.cache.capacity == (ROOMY if roomy else 128)
        self.all.append(talk)
        return talk

    @initialize(
        target=talks, first=st.fixed_dictionaries(FIRST | HOW), said=steps | said, turn=st.fixed_dictionaries(TURN)
    )
    def begin_and_go_on(self, first, said, turn):
        """Two pieces, or two turns with something said in between."""
        talk = self.begin(**first)
        if isinstance(said, dict):
            self.answer(talk, **said)
        else:
            self.decode(talk, said, "mixed", np.array)
        self.go_on(talk, **turn)
        return talk

    @rule(talk=talks, **TURN)
    def go_on(self, talk, tells, n, mask, name, dense, all_logits):
        """A piece or a turn of n tokens, or of all slots that are left."""
        n = n or max(talk.room, 1)
        turn = [told.fit(row, n) for row, told in zip(talk.rows, tells, strict=False)]
        arrays = arrays_of(self.family, turn)
        if mask == "of all":
            past = [np.arange(talk.length) >= talk.length - len(row.ids) for row in talk.rows]
            arrays["attention_mask"] = np.concatenate([past, arrays["attention_mask"]], axis=1)
        elif mask == "none":
            del arrays["attention_mask"]
        if n > talk.room:
            with pytest.raises(ValueError, match=f"at most the cache's capacity of {talk.cache.capacity} slots"):
                sparse_prefill(self.params(), arrays, cache=talk.cache)
        else:
            self.prefill(talk, turn, [0] * self.n_rows, arrays, name, dense, all_logits, cache=talk.cache)

    @rule(
        talk=talks,
        steps=steps,
        name=names,
        kind=st.sampled_from([np.array, jnp.array, list]),
    )
    def decode(self, talk, steps, name, kind):
        for step in steps:
            ids = [END if row.is_cut else token for row, token in zip(talk.rows, step, strict=False)]
            given = kind(ids)
            if not talk.room:
                with pytest.raises(ValueError, match="at most the cache's capacity"):
                    decode_step(self.params(name), given, talk.cache)
                return
            logits, after = decode_step(self.params(name), given, talk.cache)
            if kind is np.array:
                given.fill(WORD)  # a buffer for the next
            talk.add(ids)
            talk.goes_on(after, 1, logits)
            talk.found += [(b, len(row.ids) - 1, np.asarray(logits)[b]) for b, row in enumerate(talk.rows)]

    @rule(talk=talks, **ANSWER, **SAMPLING)
    def answer(self, talk, limit, every, temperature, seed):
        """Up to the last slot, every so-many-th token of the vocabulary ending a row; then its last tokens are read."""
        if talk.logits is None or any(row.is_cut for row in talk.rows):
            return
        limit, stops = min(limit, talk.room + 1), [*range(0, VOCABULARY, every)] if every else []
        options = dict(max_new_tokens=limit, temperature=temperature, seed=seed)
        ids, after = write(self.params(eos=tuple(stops)), talk.start, **options)
        talk.write(ids, stops, limit, greedy=not temperature)
        talk.goes_on(after, ids.shape[1] - 1, None)
        self.decode(talk, [ids[:, -1].tolist()], "mixed", np.array)

    @precondition(lambda self: len(self.all) < 3)
    @rule(**FIRST, **ANSWER, name=names)
    def ask(self, tells, width, short, offsets, roomy, name, limit, every):
        """`generate`, whose cache nobody sees."""
        tells = [replace(told, ending="words") for told in tells]
        talk, turn, _, arrays = self.first(tells, width, short, offsets)
        stops = [*range(0, VOCABULARY, every)] if every else []
        dense = name == "none"
        ids = generate(self.params(name), arrays, max_new_tokens=limit, dense=dense, eos=stops)
        talk.run(turn, profiles(self.family)[name], dense)
        talk.write(ids, stops, limit, greedy=True)
        self.all.append(talk)

    @rule(target=talks, talk=talks, how=copies)
    def branch(self, talk, how):
        other = replace(talk, rows=[row.copied() for row in talk.rows], found=[*talk.found])
        other.likeliest, other.cache, other.stale = [*talk.likeliest], copied(how, talk), None
        talk.is_viewed = other.is_viewed = talk.is_viewed or how == "host"
        self.all.append(other)
        return other

    @rule(talk=talks, kind=st.sampled_from(["turn", "consumed", "beyond the end"]), wrong=st.sampled_from(WRONG))
    def mistake(self, talk, kind, wrong):
        """Is refused, and changes nothing."""
        if kind == "turn" and talk.room >= 40:
            arrays, options, message = wrong_turn(talk, wrong)
            with pytest.raises(ValueError, match=message):
                sparse_prefill(self.params(), arrays, cache=talk.cache, **options)
        elif kind == "consumed" and talk.stale is not None:
            for go_on in (
                lambda: decode_step(self.params(), [END] * self.n_rows, talk.stale),
                lambda: sparse_prefill(self.params(), arrays_of(self.family, [[END]] * self.n_rows), cache=talk.stale),
            ):
                with pytest.raises(ValueError, match="consumed already"):
                    go_on()
        elif kind == "beyond the end" and talk.logits is not None and talk.room <= 12:
            start = replace(talk.start, cache=copied("arrays", talk))
            with pytest.raises(ValueError, match="at most the cache's capacity"):
                write(self.params(), start, max_new_tokens=talk.room + 2, eos=())


@pytest.mark.parametrize(("family", "n_rows"), [("qwen2_vl", 1), ("qwen2_5_vl", 2), ("gemma3", 2)])
def test_conversations(family, n_rows):
    about = dict(family=family, n_rows=n_rows, checked=Counter())
    machine = type(f"{family.title()}Conversations", (Conversations,), about)
    # To shrink a failure takes minutes: add Phase.shrink for that.
    options = dict(phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.too_slow])
    run_state_machine_as_test(machine, settings=settings(max_examples=18, stateful_step_count=12, **options))
    # Draws depend on the modules that hypothesis finds loaded: 10 to 27 were seen.
    assert machine.checked["sparse"] > 2, f"little was checked: {machine.checked}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_transformers_where_that_takes_the_prompt_at_once(family):
    model, row = twin(family), Row(family)
    items = Told([(2, picture) for picture in PICTURES[:4]], "words", seed=0).fit(row, 90)
    row.read(items)
    arrays = {name: torch.tensor(x) for name, x in arrays_of(family, [items]).items() if name != "second_per_grid_ts"}
    for profile in (None, profiles(family)["another"]):
        truth = logits_of(model.double, model.params.config, replace(row, ran=[profile] * 90))
        np.testing.assert_allclose(truth, model.expect(arrays, profile).truth[0], atol=1e-9)
