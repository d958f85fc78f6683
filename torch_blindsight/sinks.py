"""Measuring which tokens of other images draw attention, from queries, keys and log-sum-exps alone.

The weight of one query-key pair is `exp(score - lse)`. So the mass on the first and last few tokens of every image and
on text is the sum of a small packed part of the scores, a few rows at a time. `INTRA_IMAGE` keeps own image and text:
its log-sum-exp gives what they get together, and what is left over is the middle of the other images. Nothing of size
T * S ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_profiles import Category, Layout, SinkTemplate
from shared_profiles.sink_statistics import REACH, SinkMass, SinkRows
from torch_blindsight.attention import AttendLayer, Prefill
from torch_blindsight.handle import Handle
from torch_blindsight.implementations import Attend, Name, implementation
from torch_blindsight.models import ModelInfo, evaluating, inspect_model
from torch_blindsight.modes import Mode
from torch_blindsight.prompts import next_token_logits

# Scores of all heads that exist at once; on a GPU more, in fewer launches (estimates: 0.5 GiB in float32).
_SCORES, _SCORES_CUDA = 1 << 22, 1 << 27


class SinkMeter:
    """Collects the `SinkMass` of one prompt.

    Args:
        layout: of the whole prompt, of at least two images.
        info: the model.
        reach: offsets told apart at either end of an image.
    """

    def __init__(self, layout: Layout, info: ModelInfo, reach: int) -> None:
        self._layout, self._rows, self._reach = layout, SinkRows.of(layout, reach), reach
        self._windows: list[int | None] = [None] * info.n_layers
        shape = info.n_layers, info.n_heads
        self._told, self._kept = np.zeros((*shape, 2 * reach + 2)), np.zeros(shape)  # as in `SinkMass.of`

    @torch.no_grad()
    def add(
        self, layer: int, q: Tensor, k: Tensor, scale: float, window: int | None, dense: Tensor, intra: Tensor
    ) -> None:
        """Measures one layer.

        Args:
            layer: its number.
            q: `[1, H, T, D]`.
            k: `[1, K, T, D]`.
            scale: factor on the scores.
            window: the layer's sliding window.
            dense: log-sum-exp of all heads run `DENSE`, `[1, H, T]` float32 or float64.
            intra: the same of `INTRA_IMAGE`.
        """
        self._windows[layer] = window
        told, kept = self._look(q[0], k[0], scale, window, dense[0], intra[0])
        self._told[layer], self._kept[layer] = told.cpu().numpy(), kept.cpu().numpy()

    def _look(
        self, q: Tensor, k: Tensor, scale: float, window: int | None, dense: Tensor, intra: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the rows give in one layer to every bin and text, and to own image and text, means over them."""
        found, n_bins = self._rows, 2 * self._reach + 1
        where, group = torch.from_numpy(found.keys).to(k.device), q.shape[0] // k.shape[0]
        keys = k[:, where].float()  # [K, P, D]
        bins = torch.from_numpy(found.bins).to(k.device)
        which = torch.nn.functional.one_hot(bins, n_bins + 1).double()  # [P, bins]
        sums = torch.zeros(q.shape[0], n_bins + 1, dtype=torch.float64, device=q.device)
        kept = torch.zeros(q.shape[0], dtype=torch.float64, device=q.device)
        step = max(1, (_SCORES_CUDA if q.is_cuda else _SCORES) // (q.shape[0] * len(found.keys)))
        all_rows, all_stops = (torch.from_numpy(x).to(q.device) for x in (found.rows, found.stops))
        for some in range(0, len(found.rows), step):
            at, stops = all_rows[some : some + step], all_stops[some : some + step]
            seen = int(np.searchsorted(found.keys, found.stops[some : some + step][-1]))  # before the last of them
            queries = q[:, at].float().unflatten(0, (-1, group)).flatten(1, 2)  # [K, G * R, D]
            scores = (queries @ keys[:, :seen].mT).unflatten(1, (group, -1)).flatten(0, 1) * scale  # [H, R, P]
            hidden = where[:seen] >= stops[:, None]
            if window is not None:
                hidden |= where[:seen] <= at[:, None] - window
            scores = torch.exp(scores - dense[:, at, None]).masked_fill_(hidden, 0.0)
            sums += scores.sum(1).double() @ which[:seen]
            kept += torch.exp(intra[:, at] - dense[:, at]).double().sum(1)
        return sums / len(found.rows), kept / len(found.rows)

    def mass(self) -> SinkMass:
        """What was measured, once all layers were added."""
        return SinkMass.of(self._layout, self._windows, self._told, self._kept)


class SinkMode:
    """Runs prefills dense and measures where their image rows look; a `Mode`."""

    def __init__(self, info: ModelInfo, attend: Attend, reach: int) -> None:
        self.info, self._attend, self.reach = info, attend, reach
        self.meter: SinkMeter | None = None

    def prefill(self, layouts: list[Layout], q_start: int, arguments: dict[str, Any]) -> tuple[str, AttendLayer]:
        """Measures this prompt."""
        if q_start or len(layouts) != 1:
            got = f"{len(layouts)} from position {q_start} on"
            raise ValueError(f"prompts must be measured one at a time, and whole. Got {got}.")
        self.meter = SinkMeter(layouts[0], self.info, self.reach)
        return "measured", self.attend

    def after(self, prefill: Prefill, arguments: dict[str, Any]) -> Mode:
        """Goes on measuring."""
        return self

    def attend(
        self, prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Dense attention of one layer, `[B, T, H, D]`, measured on the way; an `AttendLayer`."""
        assert self.meter is not None

        def run(category: Category) -> tuple[Tensor, Tensor]:
            heads = [category] * q.shape[1]  # neither category knows sinks, so any template will do
            return self._attend(q, k, v, prefill.layouts, heads, SinkTemplate(), scale=scale, window=window)

        out, dense = run(Category.DENSE)
        self.meter.add(layer, q, k, scale, window, dense, run(Category.INTRA_IMAGE)[1])
        return out


class WithoutDelimiters:
    """The ablation: in this context every image delimiter is embedded as the nearest text token before it.

    (The nearest after it where there is none before.) Ids, positions and everything else stay: what is gone is the
    delimiter's own embedding. A context manager.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._info = inspect_model(model)

    def __enter__(self) -> None:
        self._hook = self._model.get_input_embeddings().register_forward_pre_hook(self._replace)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _replace(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        special = self._info.special
        ids = args[0].cpu().numpy().copy()  # [B, N]
        places = np.arange(ids.shape[1])
        marks = [special.start, special.end, *special.placeholders]
        for row in ids:
            text, delimiters = ~np.isin(row, marks), np.isin(row, (special.start, special.end))
            if not text.any():
                raise ValueError("the ablation puts text in the place of delimiters. Got a prompt without text.")
            before = np.maximum.accumulate(np.where(text, places, -1))
            nearest = np.where(before < 0, np.flatnonzero(text)[0], before)
            row[delimiters] = row[nearest[delimiters]]
        return (torch.from_numpy(ids).to(args[0].device),)


@dataclass(frozen=True)
class SinkReading:
    """What one prompt showed.

    Attributes:
        mass: where its image rows look.
        log_probs: of the token after the prompt, `[V]` float64.
    """

    mass: SinkMass
    log_probs: np.ndarray


def measure_sinks(
    model: nn.Module,
    prompts: Iterable[Mapping[str, Any]],
    *,
    reach: int = REACH,
    delimiters: bool = True,
    impl: Name | None = None,
) -> list[SinkReading]:
    """Where the image rows of some prompts look; prompts with fewer than two images are skipped.

    Args:
        model: a supported Hugging Face model, not patched.
        prompts: what the model's processor returns, one prompt each.
        reach: offsets told apart at either end of an image.
        delimiters: False measures the ablation `WithoutDelimiters`.
        impl: what computes the attention; as in `patch`.

    Raises:
        ValueError: a prompt is malformed, or the model is patched.
        ValueError, NotImplementedError, ImportError: the implementation cannot serve this model; it is tensor-parallel.
    """
    context: AbstractContextManager[None] = nullcontext() if delimiters else WithoutDelimiters(model)
    readings: list[SinkReading] = []
    with observing(model, lambda info, attend: SinkMode(info, attend, reach), impl) as mode, context:
        readings += filter(None, (read_sinks(model, mode, prompt) for prompt in prompts))
    return readings


def read_sinks(model: nn.Module, mode: SinkMode, prompt: Mapping[str, Any]) -> SinkReading | None:
    """Where the image rows of one prompt look, `observing` with this mode; None if it has fewer than two images."""
    mode.meter = None
    (logits,) = next_token_logits(model, prompt)
    if mode.meter is None:
        return None
    return SinkReading(mode.meter.mass(), logits.double().log_softmax(-1).cpu().numpy())


@contextmanager
def observing[M: Mode](
    model: nn.Module, make_mode: Callable[[ModelInfo, Attend], M], impl: Name | None = None
) -> Iterator[M]:
    """In this context the model's prefills run through a mode that watches them, in evaluation mode, no gradients.

    Raises:
        ValueError: the model is not supported, or is patched.
        ValueError, NotImplementedError, ImportError: the implementation cannot serve this model; it is tensor-parallel.
    """
    info = inspect_model(model)
    info.require_all_heads("watching attention")
    chosen = implementation(impl, model, info)
    mode = make_mode(info, chosen.attend)
    with evaluating(model), torch.no_grad(), Handle(model, info, mode, chosen) as handle:
        handle.install()
        yield mode
