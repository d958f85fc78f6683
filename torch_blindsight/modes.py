"""What a patched model does with a prefill: compute it sparsely, or measure it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from blindsight_kernels.reference import reference_attention
from shared_profiles import Category, Layout
from shared_profiles.profile import Profile
from torch_blindsight.attention import AttendLayer, Prefill
from torch_blindsight.portable import portable_attention
from torch_blindsight.prompts import Dense

Implementation = Literal["portable", "reference"]


class Mode(Protocol):
    """How a handle's prefills are computed."""

    def prefill(self, layouts: list[Layout], q_start: int, arguments: dict[str, Any]) -> tuple[str, AttendLayer]:
        """What to count this prefill as, and how its layers are computed; raises `Dense` to decline."""
        ...

    def after(self) -> Mode:
        """Called when that prefill has ended well; returns the mode of the next one."""
        ...


class SparseMode:
    """Every head by its category in a profile."""

    def __init__(self, profile: Profile, impl: Implementation) -> None:
        self.profile = profile
        self._sparse = IMPLEMENTATIONS[impl](profile)
        self._dense = IMPLEMENTATIONS[impl](Profile.uniform(Category.DENSE, profile.fingerprint))
        self._all_dense = not profile.categories.any()

    def prefill(self, layouts: list[Layout], q_start: int, arguments: dict[str, Any]) -> tuple[str, AttendLayer]:
        """Computes this prompt sparsely."""
        if self._all_dense:
            raise Dense("all heads are Dense")
        return "sparse", self._attend

    def after(self) -> Mode:
        """Stays sparse."""
        return self

    def _attend(
        self, prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Sparse rows sparsely; rows with fewer than two images densely, as if they had come alone."""
        lone = [layout.n_images < 2 for layout in prefill.layouts]
        if not any(lone):
            return self._sparse(prefill, layer, q, k, v, scale, window)
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        for attend, kind in ((self._sparse, False), (self._dense, True)):
            rows = [b for b, is_lone in enumerate(lone) if is_lone is kind]
            part = replace(prefill, layouts=[prefill.layouts[b] for b in rows])
            out[rows] = attend(part, layer, q[rows], k[rows], v[rows], scale, window)
        return out


def _portable(profile: Profile) -> AttendLayer:
    def attend(
        prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        heads, layouts = profile.categories[layer], prefill.layouts
        out, _ = portable_attention(
            q, k, v, layouts, heads, profile.template, scale=scale, window=window, q_start=prefill.q_start
        )
        return out

    return attend


def _reference(profile: Profile) -> AttendLayer:
    def attend(
        prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        heads, layouts = profile.categories[layer], prefill.layouts
        q64, k64, v64 = (x.detach().double().cpu().numpy() for x in (q, k, v))
        out, _ = reference_attention(
            q64, k64, v64, layouts, heads, profile.template, scale=scale, window=window, q_start=prefill.q_start
        )
        return q.new_tensor(np.ascontiguousarray(out.transpose(0, 2, 1, 3)))

    return attend


IMPLEMENTATIONS: dict[str, Callable[[Profile], AttendLayer]] = {"portable": _portable, "reference": _reference}
