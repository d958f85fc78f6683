"""Any sequence of what people do with a patched model and its caches, against the whole history computed at once.

Promised after every forward (`conversations.py` says what a conversation is):

- its logits are those of the history, in which each token sees what its own forward let it see;
- it ran sparse if docs/limits.md has no reason against it, and dense for one of those reasons if it has.

A failure prints the steps as Python calls. A turn is a text per row: letters are words, digits pictures of some size.
"""

from __future__ import annotations

import io
import pickle
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule, run_state_machine_as_test
from transformers import DynamicCache, StaticCache

from conversations import Conversation, Turn, runs
from shared_profiles import Category
from shared_profiles.profile import Profile
from tiny_models import END, FAMILIES, IMAGE, START, VIDEO, make_model, mixed_profile, patch
from torch_blindsight import fingerprint

CAPACITY = 400  # tokens of a static cache
# To shrink a failure takes minutes: add Phase.shrink for that.
SETTINGS = settings(max_examples=40, stateful_step_count=25, phases=[Phase.explicit, Phase.generate])
LONGEST = 120  # tokens after which a conversation does not go on
PROFILES = ("mixed", "other", "dense")
MODES = "plain", "in inference mode", "in a thread", "without a mask", "without types", "embedded", "past the patch"

talks = Bundle("talks")
seeds = st.integers(0, 1)
text = st.text("a123", min_size=1, max_size=6)
turns = st.one_of(text.map(lambda row: [row] * 3), st.tuples(text, text, text))
caches = st.sampled_from(["dynamic", "without windows", "static"])
prompts = st.lists(st.text("a123", min_size=2, max_size=6), min_size=1, max_size=3)
cuts = st.lists(st.integers(1, 40), max_size=2)
modes = st.sampled_from(["plain", *MODES])


@cache
def shared_model(family: str, seed: int) -> Any:
    """A model in float64 that the machines patch and unpatch."""
    return make_model(family, seed).double()


@cache
def shared_profile(family: str, seed: int, name: str) -> Profile:
    model = shared_model(family, seed)
    if name == "dense":
        return Profile.uniform(Category.DENSE, fingerprint(model))
    return mixed_profile(model, seed=PROFILES.index(name))


def well_formed(ids: np.ndarray, real: np.ndarray) -> bool:
    """Whether every picture is between its delimiters, but for one that goes on behind these tokens."""
    marks = "".join({START: "<", END: ">", IMAGE: "."}.get(token, "a") for token in ids[real].tolist())
    return re.fullmatch(r"([^.]|(?<=<)\.+(>|$))*", marks) is not None


class Interrupted(BaseException):
    """Goes past the hooks that end a forward, as Ctrl-C does."""


class Conversations(RuleBasedStateMachine):
    """Two patched models of one family, and conversations with them."""

    family: str
    checked: Counter[str]  # forwards, by how they ran

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)
        self.models = [shared_model(self.family, seed) for seed in range(2)]
        self.handles: list[Any] = [None, None]
        self.counted: list[dict[str, int]] = [{}, {}]
        self.seen: list[list[dict[str, Any]]] = [[], []]  # of the forwards of a call: what they got and gave
        self.hooks = []
        for seed, model in enumerate(self.models):
            for module, hook in ((model.model, self._starts), (model.model.language_model, self._attends)):
                self.hooks.append(module.register_forward_pre_hook(partial(hook, seed), with_kwargs=True))
            self.hooks.append(model.lm_head.register_forward_hook(partial(self._ends, seed)))
            self.patch_again(seed, "mixed")

    def teardown(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for seed, model in enumerate(self.models):
            self.patch_again(seed, None)
            model.eval()

    # What is seen of forwards.

    def _starts(self, seed: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache, ids, types = (kwargs.get(name) for name in ("past_key_values", "input_ids", "token_type_ids"))
        handle, how = self.handles[seed], "past the patch"
        if handle is not None:
            now = handle.report()["forwards"]
            how = next((name for name, n in now.items() if n > self.counted[seed].get(name, 0)), how)
            self.counted[seed] = now
        ids, types = (None if x is None else x.numpy().copy() for x in (ids, types))
        past = 0 if cache is None else int(cache.get_seq_length())
        self.seen[seed].append(dict(how=how, past=past, ids=ids, types=types))

    def _attends(self, seed: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs["position_ids"]  # [B, T] or mRoPE [3 or 4, B, T]
        positions = positions[None] if positions.ndim == 2 else positions[-3:]
        self.seen[seed][-1]["positions"] = positions.clone()

    def _ends(self, seed: int, module: Any, args: Any, logits: torch.Tensor) -> None:
        self.seen[seed][-1]["logits"] = logits

    @contextmanager
    def watching(self, seed: int) -> Iterator[list[dict[str, Any]]]:
        """What is seen of the forwards in this block, none within one of them."""
        before, self.seen[seed] = self.seen[seed], []
        try:
            yield self.seen[seed]
        finally:
            self.seen[seed] = before

    # What must hold.

    def reasons(self, c: Conversation, seen: dict[str, Any]) -> set[str]:
        """Those of docs/limits.md for a dense forward of the latest tokens."""
        past, handle = seen["past"], self.handles[c.seed]
        images = [len(runs(row == IMAGE)) for row in c.ids]
        found = {
            "no input_ids": seen["ids"] is None,
            "decode step": c.n - past == 1,
            "training mode": self.models[c.seed].training,
            "all heads are Dense": not handle.profile.categories.any(),
            "fewer than two images": max(images) < 2,
            "no image tokens among the queries": not any(
                (row[past:] == IMAGE).any() for row, n in zip(c.ids, images, strict=True) if n > 1
            ),
            "padding inside a row": any(len(runs(row)) > 1 for row in c.real),
            "placeholders behind the first prompt that mark no image": past > 0
            and not all(map(well_formed, c.ids, c.real)),
            "token_type_ids are not those of all tokens": seen["types"] is not None
            and not np.array_equal(seen["types"] == 1, c.ids == IMAGE),
            "tokens in the cache are unknown": past > 0 and not c.known,
        }
        return {f"dense: {reason}" for reason, holds in found.items() if holds}

    def check(self, c: Conversation, forwards: list[dict[str, Any]], turn: Turn, counted: bool = True) -> None:
        """What the forwards of a call did: that of a turn, and after it those of single words."""
        for i, seen in enumerate(forwards):
            c.cut(seen["past"])
            if i == 0:
                ids, real, embeds = turn.ids, turn.real, turn.embeds
            else:
                ids, real = seen["ids"], np.ones_like(seen["ids"], dtype=bool)
                embeds = self.models[c.seed].get_input_embeddings()(torch.from_numpy(ids)).detach()
            c.add(ids, real, embeds, seen["positions"].expand(len(c.positions), c.n_rows, -1))
            how, handle = seen["how"], self.handles[c.seed]
            if counted and handle is not None:
                reasons = self.reasons(c, seen)
                assert how in (reasons or {"sparse"}), f"{how}, not {reasons or 'sparse'}"
            traced = not (isinstance(c.cache, StaticCache) and c.cache.layers[0].keys.is_inference())
            c.known = (c.known or not seen["past"]) and traced and how != "past the patch" and seen["ids"] is not None
            c.note(handle.profile if how == "sparse" else None, seen["types"])
            type(self).checked[how] += 1
            n = seen["logits"].shape[1]
            real = torch.from_numpy(c.real[:, -n:])
            got, want = seen["logits"].clone()[real], c.recompute()[:, -n:][real]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # norms round to float32
        if c.cache is not None:
            c.cut(int(c.cache.get_seq_length()))

    def call(self, c: Conversation, mode: str, function: Callable[[], Any]) -> None:
        """Calls a model, as inference is done."""
        keys = getattr(c.cache.layers[0], "keys", None) if isinstance(c.cache, StaticCache) else None
        inference = mode == "in inference mode" or (keys is not None and keys.is_inference())  # to be written to
        errors: list[BaseException] = []

        def go() -> None:
            try:
                with torch.inference_mode() if inference else torch.no_grad():
                    function()
            except BaseException as error:
                errors.append(error)

        if mode == "in a thread":
            thread = threading.Thread(target=go)
            thread.start()
            thread.join()
        else:
            go()
        if errors:
            raise errors[0]

    def forward(self, c: Conversation, turn: Turn, mode: str) -> None:
        """One forward of a turn's tokens, and what must hold of it."""
        model, gemma = self.models[c.seed], self.family == "gemma3"
        mask, ids = np.concatenate([c.real, turn.real], 1), np.concatenate([c.ids, turn.ids], 1)
        positions = torch.from_numpy((mask.cumsum(1) - 1).clip(0)[:, c.n :])
        inputs = dict(position_ids=positions if gemma else positions.expand(3, -1, -1))
        inputs |= dict(past_key_values=c.cache, use_cache=c.cache is not None)
        if mode == "embedded":
            inputs["inputs_embeds"] = turn.embeds.clone()
        else:
            inputs |= dict(input_ids=torch.from_numpy(turn.ids.copy()), **turn.pictures())
        if mode != "without a mask" or not mask.all():
            inputs["attention_mask"] = torch.from_numpy(mask).long()
        if gemma and mode != "without types":
            inputs["token_type_ids"] = torch.from_numpy(ids == IMAGE).long()
        with self.watching(c.seed) as seen:
            if mode == "past the patch":  # elsewhere than a forward that was interrupted: docs/limits.md
                self.call(c, "in a thread", lambda: model.lm_head(model.model(**inputs)[0]))
            else:
                self.call(c, mode, lambda: model(**inputs))
        self.check(c, seen, turn, counted=mode != "past the patch")

    # What people do.

    @initialize(target=talks, cache=caches, rows=prompts)
    def first(self, cache, rows):
        return self.begin(0, cache, rows, True, (), "plain")

    @rule(target=talks, seed=seeds, cache=st.none() | caches, rows=prompts, left=st.booleans(), cuts=cuts, mode=modes)
    def begin(self, seed, cache, rows, left, cuts, mode):
        """A prompt, perhaps in pieces; with no cache that is all."""
        config = self.models[seed].config
        make = {
            "dynamic": partial(DynamicCache, config=config),
            "without windows": DynamicCache,
            "static": partial(StaticCache, config=config, max_cache_len=CAPACITY),
        }
        c = Conversation(self.family, seed, len(rows), make[cache]() if cache else None)
        self.say(c, rows, left, cuts if cache else (), mode)
        return c if cache else multiple()

    @rule(c=talks, rows=turns, left=st.booleans(), cuts=cuts, mode=modes)
    def say(self, c, rows, left, cuts, mode):
        if c.n < LONGEST:
            turn = Turn(self.family, c.seed, list(rows[: c.n_rows]), left, self.random)
            for piece in turn.pieces(cuts):
                self.forward(c, piece, mode)

    @rule(c=talks, rows=turns, left=st.booleans(), n=st.integers(1, 3), mode=modes)
    def generate(self, c, rows, left, n, mode):
        if c.n >= LONGEST or mode in ("embedded", "past the patch"):
            return
        turn, model = Turn(self.family, c.seed, list(rows[: c.n_rows]), left, self.random), self.models[c.seed]
        ids = torch.from_numpy(np.concatenate([c.ids, turn.ids], 1))
        mask = torch.from_numpy(np.concatenate([c.real, turn.real], 1)).long()
        inputs = dict(input_ids=ids, attention_mask=mask, **turn.pictures())
        inputs["token_type_ids" if self.family == "gemma3" else "mm_token_type_ids"] = (ids == IMAGE).long()
        model.model.rope_deltas = torch.zeros(c.n_rows, 1, dtype=torch.long)  # of a Qwen's latest prompt
        options = dict(do_sample=False, min_new_tokens=n, max_new_tokens=n)
        options |= dict(suppress_tokens=[START, END, IMAGE, VIDEO], past_key_values=c.cache)
        with self.watching(c.seed) as seen:
            self.call(c, mode, lambda: model.generate(**inputs, **options))
        self.check(c, seen, turn)

    @rule(target=talks, c=talks)
    def fork(self, c):
        return c.fork()

    @rule(c=talks, share=st.sampled_from([0.0, 0.3, 0.6, 0.8, 0.9, 0.95]), row=text)
    def crop(self, c, share, row):
        """Back, and on differently."""
        stop = c.uncut(int(c.n * share))
        if type(c.cache) is DynamicCache and not any(layer.is_sliding for layer in c.cache.layers) and stop < c.n:
            c.cache.crop(stop - c.n)
            c.cut(stop)
            self.say(c, [row] * 3, True, (), "plain")

    @rule(
        c=talks,
        method=st.sampled_from(["reorder_cache", "batch_select_indices", "batch_repeat_interleave"]),
        chosen=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        row=text,
    )
    def rearrange(self, c, method, chosen, row):
        """Other rows, or the same in another order; and on with them."""
        if not c.n or (isinstance(c.cache, StaticCache) and method != "reorder_cache"):
            return
        if method == "batch_repeat_interleave":
            if c.n_rows == 1:
                c.cache.batch_repeat_interleave(2)
                c.select([0, 0])
                self.say(c, [row] * 3, True, (), "plain")
            return
        chosen = [b % c.n_rows for b in chosen]
        if method == "reorder_cache":  # as many as before
            chosen = (chosen * 3)[: c.n_rows]
        getattr(c.cache, method)(torch.tensor(chosen))
        c.select(chosen)
        self.say(c, [row] * 3, True, (), "plain")

    @rule(c=talks, saved=st.booleans(), row=text)
    def pickle(self, c, saved, row):
        if saved:
            file = io.BytesIO()
            torch.save(c.cache, file)
            file.seek(0)
            c.cache = torch.load(file, weights_only=False)
        else:
            c.cache = pickle.loads(pickle.dumps(c.cache))
        c.known = False
        self.say(c, [row] * 3, True, (), "plain")

    @rule(c=talks)
    def reset(self, c):
        if isinstance(c.cache, StaticCache) and c.n and not c.cache.layers[0].keys.is_inference():
            c.cache.reset()
            c.cut(0)

    @rule(seed=seeds, name=st.sampled_from([None, *PROFILES]))
    def patch_again(self, seed, name):
        """With the same profile or another; not at all with None."""
        if self.handles[seed] is not None:
            self.handles[seed].unpatch()
        self.handles[seed], self.counted[seed] = None, {}
        if name is not None:
            self.handles[seed] = patch(self.models[seed], shared_profile(self.family, seed, name))

    @rule(seed=seeds, training=st.booleans())
    def train(self, seed, training):
        self.models[seed].train(training)

    @rule(
        c=talks,
        rows=turns,
        where=st.sampled_from(["pictures", "first layer", "within it", "last layer"]),
        error=st.sampled_from([Interrupted, RuntimeError]),
        mode=modes,
    )
    def interrupt(self, c, rows, where, error, mode):
        """A forward that does not end, and another. Its cache is given up where something was written to it."""
        if c.n >= LONGEST:
            return

        def stop(*_: Any) -> None:
            raise error("stop")

        model, backup = self.models[c.seed].model, c.fork()
        layers = model.language_model.layers
        module = {
            "pictures": model.vision_tower if self.family == "gemma3" else model.visual,
            "first layer": layers[0],
            "within it": layers[0].mlp,
            "last layer": layers[-1],
        }[where]
        hook = module.register_forward_pre_hook(stop)
        try:
            self.forward(c, Turn(self.family, c.seed, list(rows[: c.n_rows]), True, self.random), mode)
        except (Interrupted, RuntimeError) as e:
            if str(e) != "stop":
                raise
            if where in ("within it", "last layer"):
                c.cache = backup.cache
        finally:
            hook.remove()
        self.say(c, rows, True, (), mode)

    @rule(c=talks, other=talks, rows=turns, more=turns, mode=modes)
    def meanwhile(self, c, other, rows, more, mode):
        """In the midst of a forward another conversation goes on, in a thread of its own if it is the same model's."""
        if c is other or c.n >= LONGEST:
            return

        def go_on(*_: Any) -> None:
            hook.remove()
            self.say(other, more, True, (), "in a thread" if c.seed == other.seed else mode)

        hook = self.models[c.seed].model.language_model.layers[1].register_forward_pre_hook(go_on)
        try:
            self.say(c, rows, True, (), mode)
        finally:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations(family):
    machine = type(f"Conversations_{family}", (Conversations,), dict(family=family, checked=Counter()))
    run_state_machine_as_test(machine, settings=SETTINGS)
    # Draws depend on the modules that hypothesis finds loaded: 88 to 167 were seen.
    assert machine.checked["sparse"] > 20, f"little was checked: {machine.checked}"
