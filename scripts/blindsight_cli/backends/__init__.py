"""The frameworks that can run a checkpoint, and all that the commands ask of one.

the commands ──► Backend ──┬─► torch_backend ──► torch_blindsight
                           └─► jax_backend ────► jax_blindsight
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from blindsight_cli.folders import require_for_torch
from shared_profiles import Category, Family, Layout, PairCounts, SinkTemplate, SpecialTokens, count_model_pairs
from shared_profiles.budget import Budget
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import Fingerprint, Profile
from shared_profiles.split import HELD_OUT

BackendName = Literal["torch", "jax"]
NO_PROFILE = "there is no profile of this model"
Prompt = Mapping[str, Tensor]  # what the checkpoint's processor returns, whatever runs it


@dataclass(frozen=True)
class Facts:
    """What the commands need to know of a loaded checkpoint.

    Attributes:
        special: its token ids of delimiters and placeholders.
        windows: the sliding window of each layer, None where it has none.
        n_parameters: numbers in its weights.
    """

    family: Family
    special: SpecialTokens
    fingerprint: Fingerprint
    windows: tuple[int | None, ...]
    n_parameters: int

    def layouts(self, prompt: Prompt) -> list[Layout]:
        """The layout of every row of a batch."""
        rows = zip(prompt["input_ids"].cpu().numpy(), prompt["attention_mask"].cpu().numpy(), strict=True)
        grids = prompt["video_grid_thw"][:, 0].tolist() if "video_grid_thw" in prompt else []
        groups, layouts = iter(grids), []
        for ids, mask in rows:
            n_videos = int(np.diff(ids == self.special.video, prepend=False).sum() + 1) // 2
            layout = Layout.from_ids(
                ids,
                self.special,
                valid=mask,
                frames=list(islice(groups, n_videos)),
                bidirectional=self.family.bidirectional,
            )
            layouts.append(layout)
        return layouts

    def pairs(self, layout: Layout, profile: Profile | None) -> PairCounts:
        """Query-key pairs of a prompt's attention, all layers and heads; without a profile all heads dense."""
        shape = self.fingerprint.n_layers, self.fingerprint.n_heads
        categories = np.full(shape, Category.DENSE) if profile is None else profile.categories
        template = SinkTemplate() if profile is None else profile.template
        return count_model_pairs(layout, categories, template, windows=self.windows)


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        ids: the new tokens.
        log_probs: of its first token, `[V]` float64.
        ran: what the prefill really was: "sparse", "measured", or "dense" and why.
    """

    ids: list[int]
    log_probs: np.ndarray
    ran: str


class Backend(Protocol):
    """A checkpoint loaded in one framework. Where a profile is asked for, None runs dense.

    Attributes:
        version: the framework's name and version.
        device: where the tensors of prompts must be.
        hardware: name of the processor that computes.
        facts: what was loaded.
    """

    version: str
    device: str
    hardware: str
    facts: Facts

    def calibrate(
        self,
        prompts: Iterable[Prompt],
        *,
        dataset: str,
        template: SinkTemplate | None,
        budget: Budget | None = None,
        thresholds: Thresholds | None = None,
        held_out: float | Sequence[Prompt] = HELD_OUT,
        local_block: int | None = None,
        state: Path | None = None,
        merge: Sequence[Path] = (),
    ) -> Profile:
        """The checkpoint's profile, as the framework's `calibrate` makes it, by a budget or by thresholds.

        Without a template it is that of the state, or learned; `local_block` is then the width of its local blocks.
        """
        ...

    def answer(self, prompt: Prompt, profile: Profile | None, max_new_tokens: int) -> Answer:
        """The greedy answer to one prompt."""
        ...

    def answer_unprofiled(self, prompt: Prompt, max_new_tokens: int) -> Answer:
        """What the framework does for a user who has no profile and does not say dense."""
        ...

    def next_token(self, prompt: Prompt, profile: Profile | None) -> tuple[np.ndarray, str]:
        """Log-probabilities `[B, V]` float32 of each row's next token, and what the prefill really was."""
        ...

    def prefill_seconds(self, prompt: Prompt, profile: Profile | None) -> float:
        """Seconds of one warm prefill."""
        ...

    def attention_seconds(self, layout: Layout, profile: Profile | None) -> float:
        """Seconds of the attention of all layers, on random queries and keys."""
        ...


def next_tokens(model: Backend, prompts: Iterable[Prompt], profile: Profile | None) -> np.ndarray:
    """Log-probabilities `[N, V]` float32 of the next token of every row of some batches; without a profile dense.

    Raises:
        RuntimeError: a prefill that should have run sparse did not.
    """
    found, ran = zip(*(model.next_token(prompt, profile) for prompt in prompts), strict=True)
    if profile is not None and profile.categories.any() and set(ran) != {"sparse"}:
        raise RuntimeError(f"all {len(ran)} prefills must have run sparse. Got {sorted(set(ran))}.")
    return np.concatenate(found)


def load_backend(name: BackendName, folder: Path, *, dtype: str = "auto", device: str | None = None) -> Backend:
    """Loads a checkpoint folder.

    Args:
        name: the framework.
        folder: what `save_pretrained` wrote, or a downloaded snapshot.
        dtype: of the weights; "auto" takes the checkpoint's own.
        device: where they go. Default: a GPU if there is one.

    Raises:
        IncompatibleError: the family is not supported.
        ValueError: not a whole checkpoint folder, or one converted for the other framework, or there is no such device.
        OSError: a file cannot be read.
    """
    if name == "torch":
        require_for_torch(folder)
        from blindsight_cli.backends.torch_backend import TorchBackend

        return TorchBackend(folder, dtype, device)
    from blindsight_cli.backends.jax_backend import JaxBackend

    return JaxBackend(folder, dtype, device)
