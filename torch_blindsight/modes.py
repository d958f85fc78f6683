"""What a patched model does with a prefill: compute it sparsely, or measure it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shared_profiles import Category, Layout
from shared_profiles.profile import Profile
from torch_blindsight.attention import AttendLayer, Prefill
from torch_blindsight.break_even import gains
from torch_blindsight.heads import as_index
from torch_blindsight.implementations import Implementation
from torch_blindsight.models import ModelInfo
from torch_blindsight.prompts import Dense


class Mode(Protocol):
    """How a handle's prefills are computed."""

    def prefill(self, layouts: list[Layout], q_start: int, arguments: dict[str, Any]) -> tuple[str, AttendLayer]:
        """What to count this prefill as, and how its layers are computed; raises `Dense` to decline."""
        ...

    def after(self, prefill: Prefill, arguments: dict[str, Any]) -> Mode:
        """Called when that prefill has ended well, in its own thread; returns the mode of the next one."""
        ...


class SparseMode:
    """Every head by its category in a profile.

    Args:
        profile: the categories.
        implementation: what computes them.
        info: the model.
        break_even: run prompts dense that are too short to gain.
        source: where the profile lies, for the report.
    """

    def __init__(
        self,
        profile: Profile,
        implementation: Implementation,
        info: ModelInfo,
        break_even: bool,
        source: str = "in memory",
    ) -> None:
        self.profile, self.implementation, self.info, self.source = profile, implementation, info, source
        self._costs = implementation.costs if break_even else None
        self._all_dense = not profile.categories.any()
        self._categories = profile.categories[:, info.heads.start : info.heads.stop]

    def prefill(self, layouts: list[Layout], q_start: int, arguments: dict[str, Any]) -> tuple[str, AttendLayer]:
        """Computes this prompt sparsely, if that pays."""
        if self._all_dense:
            raise Dense("all heads are Dense")
        if self._costs is not None and not gains(self._costs, self.profile, self.info, layouts, q_start):
            raise Dense("too short to gain")
        return "sparse", self._attend

    def after(self, prefill: Prefill, arguments: dict[str, Any]) -> Mode:
        """Stays sparse."""
        return self

    def _attend(
        self, prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Sparse rows sparsely; rows with fewer than two images densely, as if they had come alone."""

        def run(layouts: list[Layout], q: Tensor, k: Tensor, v: Tensor, categories: np.ndarray) -> Tensor:
            return self._run(layouts, q, k, v, categories, scale, window, prefill.q_start)

        categories, layouts = self._categories[layer], prefill.layouts
        lone = np.array([layout.n_images < 2 for layout in layouts])
        if not lone.any():
            return run(layouts, q, k, v, categories)
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        for mine, heads in ((~lone, categories), (lone, np.full_like(categories, Category.DENSE))):
            if not mine.any():  # a pruner has left fewer than two images of its one prompt
                continue
            numbers = np.flatnonzero(mine)
            rows = as_index(numbers, q.device)
            out[rows] = run([layouts[b] for b in numbers], q[rows], k[rows], v[rows], heads)
        return out

    def attend_dense(
        self, prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Every head densely, by the same implementation."""
        heads = np.full_like(self._categories[layer], Category.DENSE)
        return self._run(prefill.layouts, q, k, v, heads, scale, window, prefill.q_start)

    def _run(
        self,
        layouts: list[Layout],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        categories: np.ndarray,
        scale: float,
        window: int | None,
        q_start: int,
    ) -> Tensor:
        """One layer's attention of some rows: `[B, T, H, D]`."""
        attend, template = self.implementation.attend, self.profile.template
        return attend(q, k, v, layouts, categories, template, scale=scale, window=window, q_start=q_start)[0]
