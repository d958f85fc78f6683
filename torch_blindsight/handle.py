"""A patched model: two hooks that decide, forward by forward, whether this is a prefill that a profile can speed up.

Nothing of transformers or of the model is replaced. An attention function and a mask function are registered and
selected, and the hooks, on the outermost module, tell them what the forward is::

    pre-hook    reads the layouts; sparse, measured or dense?     announces the `Prefill`, or none; notes the forward
    masks       `blindsight_mask`, for each kind of layers        none for an announced prefill, else transformers' own
    layers      `blindsight_attention`, once each                 the prefill's `attend`, else transformers' own SDPA
    post-hook   did all layers come by?                           takes both back; notes the tokens behind the cache

`generate` makes a static cache's masks before the pre-hook. A forward that is interrupted (Ctrl-C) has no post-hook:
the next pre-hook finds it in `_running`. A hook in one model may call another: it holds both, the inner one last.
Forwards that run dense (decode steps, prompts with one image, ...) are counted with their reason in `Handle.report()`.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache

from shared_profiles import Category
from shared_profiles.profile import Profile
from torch_blindsight.attention import NAME, Prefill, announce, lost_padding, register, registered
from torch_blindsight.implementations import Implementation, attention_devices
from torch_blindsight.known_tokens import Chunk, forget_changed, length_of, note_tokens
from torch_blindsight.models import ModelInfo
from torch_blindsight.modes import Mode, SparseMode
from torch_blindsight.prompts import Dense, read_layouts, worth_it
from torch_blindsight.pruning import REFUSAL, PrunedPrefill, Pruner, Pruning

logger = logging.getLogger("torch_blindsight")

HANDLE = "_blindsight_handle"  # the attribute of a patched model that holds its handle


@dataclass(frozen=True)
class _Forward:
    """A forward of a patched model in progress.

    Attributes:
        handle: of the model.
        past: length of its cache.
        arguments: by name.
        prefill: how it is computed; None where dense.
    """

    handle: Handle
    past: int
    arguments: dict[str, Any]
    prefill: Prefill | None


# Those of this thread, the innermost last: a hook in one model may call another.
_running: ContextVar[tuple[_Forward, ...]] = ContextVar("blindsight_running", default=())


class Handle:
    """A patched model: how to take the patch off again, and what it did. Also a context manager.

    Attributes:
        model: the patched model.
        info: its attention-relevant facts.
        mode: how the next prefill is computed.
        implementation: what computes its attention.
        asked: what `patch` was asked for, to know the same call again.
        kept: positions that the latest pruned prompt went on with, None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo,
        mode: Mode,
        implementation: Implementation,
        pruner: Pruner | None = None,
    ) -> None:
        self.model: Any = model  # nn.Module does not know transformers' methods
        self.info, self.mode, self.implementation = info, mode, implementation
        self.asked: tuple | None = None
        self.kept: np.ndarray | None = None
        self._pruning = None if pruner is None else Pruning(model, info, pruner)
        self._counts: Counter[str] = Counter()
        self._signature = inspect.signature(model.forward)
        config: Any = model.config
        self._previous = config.get_text_config()._attn_implementation
        self._hooks: list[Any] = []
        self._devices = {device.type for device in attention_devices(info)}

    @property
    def profile(self) -> Profile | None:
        """The profile in force, None while the first prompts are being measured."""
        return self.mode.profile if isinstance(self.mode, SparseMode) else None

    def install(self) -> None:
        """Selects our attention function for the language model and hangs the hooks.

        Raises:
            ValueError: a patched model shares this one's configuration.
            RuntimeError: transformers did not take it.
        """
        if NAME in (self._previous, *(attention.config._attn_implementation for attention in self.info.attentions)):
            raise ValueError(
                "the model must not share its configuration with a patched model, or be part of one. "
                "Got a configuration that selects BlindSight already. Unpatch the other model first, or "
                "load this one with its own."
            )
        register()
        self.model.set_attn_implementation({"text_config": NAME})
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            *(self._pruning.hooks() if self._pruning is not None else ()),
        ]
        setattr(self.model, HANDLE, self)
        taken = [m.config._attn_implementation == NAME for m in self.info.attentions]
        if not all(taken) or not registered():
            self.unpatch()
            raise RuntimeError(
                f"all {len(taken)} layers must call BlindSight's attention. {sum(taken)} do, so the model "
                "is left unpatched. "
                "`blindsight doctor` shows the versions in use."
            )

    def unpatch(self) -> None:
        """Restores the model as it was before `patch`; harmless to repeat.

        A patched model and its handle hold each other: unpatch it before it is deleted, and its memory is free at once.
        """
        if getattr(self.model, HANDLE, None) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._leave()
        self.model.set_attn_implementation({"text_config": self._previous})
        delattr(self.model, HANDLE)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a patched model that was pickled, perhaps in another process."""
        self.__dict__.update(state)
        register()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    def report(self) -> dict[str, Any]:
        """What the patch did so far.

        Returns:
            `state`: "sparse", "measuring" or "unpatched"; `impl`: what computes prefills; `profile`: the path of the
            one in force, "in memory" if it has none; `categories`: per layer, heads of each category (both None while
            measuring); `forwards`: how many ran `"sparse"`, `"measured"`, or
            `"dense: <reason>"`; `", pruned"` follows where a pruner dropped tokens.
        """
        patched = getattr(self.model, HANDLE, None) is self
        source = categories = None
        if isinstance(mode := self.mode, SparseMode):
            source = mode.source
            categories = [{c.name: int((layer == c).sum()) for c in Category} for layer in mode.profile.categories]
        return {
            "state": "unpatched" if not patched else "measuring" if source is None else "sparse",
            "impl": self.implementation.name,
            "profile": source,
            "categories": categories,
            "forwards": dict(self._counts),
        }

    @torch.compiler.disable  # it reads ids: a model that is compiled as a whole goes on behind it in another graph
    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        left = self._leave()
        padding = lost_padding(left.prefill if left and not args else None, kwargs)  # generate names all
        kwargs = kwargs if padding is None else kwargs | {"attention_mask": padding}
        arguments = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {}) | arguments.pop("lm_kwargs", {})
        self._refuse(arguments)
        cache = arguments.get("past_key_values")
        past = length_of(cache)
        forget_changed(cache)
        must_prune = self._pruning is not None and self._pruning.must_prune(arguments, module.training)
        prefill = None
        try:
            how, prefill = self._prefill(arguments, module.training)
        except Dense as reason:
            if must_prune:
                raise ValueError(REFUSAL.format(reason)) from None
            how = f"dense: {reason}"
        self._counts[how] += 1
        _running.set((*_running.get(), _Forward(self, past, arguments, prefill)))
        announce(prefill, self.info.config)
        position = None if self._pruning is None else self._pruning.next_position(cache)
        if position is not None and arguments.get("position_ids") is None:
            kwargs = kwargs | {"position_ids": position}
        return args, kwargs

    def _prefill(self, arguments: dict[str, Any], training: bool) -> tuple[str, Prefill]:
        """What to count a forward as, and how it is computed; raises `Dense` where by transformers' own SDPA."""
        if training or any(attention.training for attention in self.info.attentions):
            raise Dense("training mode")
        layouts, q_start = read_layouts(arguments, self.info.family, self.info.special)
        if self._pruning is not None and isinstance(self.mode, SparseMode) and layouts[0].n_images:
            return self._pruning.prefill(layouts[0], self.mode, arguments)
        worth_it(layouts, q_start)
        how, attend = self.mode.prefill(layouts, q_start, arguments)
        self._look_at_devices()
        differentiable = how == "sparse" and self.implementation.differentiable
        return how, Prefill(layouts, q_start, attend, self.info.config, differentiable)

    def _look_at_devices(self) -> None:
        """Says once that the model moved: the implementation was chosen for where it was, and may be slow here."""
        devices = {device.type for device in attention_devices(self.info)}
        if devices not in (self._devices, {"meta"}):  # weights that are offloaded since
            logger.warning(
                "the model was on %s when it was patched, and is on %s now; its prefills are still computed by %r. "
                "Unpatch it and patch it again, to have the implementation for where it is.",
                *(", ".join(sorted(where)) for where in (self._devices, devices)),
                self.implementation.name,
            )
            self._devices = devices

    def _leave(self, ended: bool = False) -> _Forward | None:
        """This model's forward in progress, which ends, and with it whatever it called; None if there is none.

        An interrupted one (Ctrl-C) never comes to its hook, and is found here at the next; later ones may go on.
        """
        running = _running.get()
        mine = next((i for i, forward in enumerate(running) if forward.handle is self), len(running))
        around = running[:mine] if ended else (*running[:mine], *running[mine + 1 :])
        _running.set(around)
        if around:
            announce(around[-1].prefill, around[-1].handle.info.config)
        else:
            announce(None)
        return running[mine] if mine < len(running) else None

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        forward = self._leave(ended=True)
        if output is None:  # the forward raised
            return
        if forward is None:
            raise RuntimeError(
                "a patched model must end one forward before it begins the next in the same thread. "
                "Got one that was called within another. Call a copy of the model, patched by itself."
            )
        prefill, arguments = forward.prefill, forward.arguments
        if kwargs.get("input_ids", args[0] if args else None) is not arguments.get("input_ids"):
            raise RuntimeError(
                "a patched model must compute the tokens that the patch has seen. A hook that was registered after "
                "patch() gave it other input_ids. Register it first, or unpatch and patch again."
            )
        if prefill is not None:
            if prefill.layers != list(range(self.info.n_layers)):
                raise RuntimeError(
                    f"all {self.info.n_layers} layers must call BlindSight's attention, once each. "
                    f"Called: {prefill.layers}. "
                    "Something replaced the model's attention after patch(); unpatch and patch again."
                )
            self.mode = self.mode.after(prefill, arguments)
        cache = _cache_of(output)
        if self._pruning is not None and isinstance(prefill, PrunedPrefill):
            self._pruning.after(prefill, cache)
            self.kept = prefill.kept
        elif cache is not None and arguments.get("input_ids") is not None:
            note_tokens(cache, forward.past, Chunk.of(arguments))

    def _refuse(self, arguments: dict[str, Any]) -> None:
        """Refuses what would be silently wrong under a patch."""
        wanted = arguments.get("output_attentions")
        if wanted or (wanted is None and self.model.config.get_text_config().output_attentions):
            raise ValueError(
                "a patched model has no attention weights to return: no S x S matrix exists. "
                "Got output_attentions=True, as an argument or in the configuration. "
                "Call handle.unpatch() first."
            )
        if any(arguments.get(name) is not None for name in ("cu_seq_lens_q", "cache")):
            raise ValueError(
                "a patched model takes batches as rows with padding. "
                "Got a packed batch (generate_batch, cu_seq_lens_q). "
                "Call handle.unpatch() first, or use generate."
            )


def _cache_of(output: Any) -> Any:
    """The cache that a forward returns, also in a tuple (`return_dict=False`); None where it returns none."""
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    return getattr(output, "past_key_values", None)
