"""Measuring a prefill: what each category would keep and change, from the attention's own outputs and `lse`.

The observed forward runs dense. For every layer the three sparse categories are computed beside it, and per head
two means over the image rows that have an earlier image are kept (`PromptStatistics`):

* retained mass `exp(lse_category - lse_dense)`, the share of softmax weight that the category keeps;
* relative output error `||o_category - o_dense|| / ||o_dense||`;

and, where asked, one or two estimates of what the category's change does to the answer (`Summary.harm`).

All come from the outputs and log-sum-exps of the implementation in use, a few rows at a time: nothing of size T * S
ever exists, and no second copy of the outputs, so a prompt that prefills can also be measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_profiles import SPARSE, Category, Layout, SinkTemplate, count_layer_pairs
from shared_profiles.layout import concatenated_ranges
from shared_profiles.statistics import PromptStatistics
from torch_blindsight.attention import AttendLayer, Prefill
from torch_blindsight.implementations import Attend
from torch_blindsight.models import ModelInfo
from torch_blindsight.modes import Mode
from torch_blindsight.prompts import Dense
from torch_blindsight.residual import ResidualStream

# Rows measured at once: their outputs are compared in float32.
_ROWS = 4096


class ObserveMode:
    """Measures every prefill and keeps the records of the last one; a `Mode`.

    Args:
        info: the model.
        template: sinks and local blocks.
        attend: what computes the attention, and its log-sum-exps.
        stream: the model's residual stream, for the ranking `"residual"`; None measures no harm.
    """

    def __init__(
        self, info: ModelInfo, template: SinkTemplate, attend: Attend, stream: ResidualStream | None = None
    ) -> None:
        self.info, self.template, self._attend, self._stream = info, template, attend, stream
        self.observer: Observer | None = None

    def prefill(self, layouts: list[Layout], q_start: int, arguments: dict[str, Any]) -> tuple[str, AttendLayer]:
        """Measures this prompt."""
        if q_start or any(layout.unfinished for layout in layouts):
            raise Dense("only whole prompts are measured")
        self.observer = self._observer(layouts)
        return "measured", self.observer

    def after(self, prefill: Prefill, arguments: dict[str, Any]) -> Mode:
        """Goes on measuring."""
        return self

    def _observer(self, layouts: list[Layout]) -> Observer:
        return Observer(layouts, self.info, self.template, self._attend, self._stream)


class Observer:
    """Collects the statistics of one forward, one record per batch row; an `AttendLayer`.

    Args:
        layouts: B layouts of the whole prompts; rows with fewer than two images are skipped.
        info: the model.
        template: sinks and local blocks.
        attend: what computes the attention.
        stream: see `ObserveMode`.
    """

    def __init__(
        self,
        layouts: list[Layout],
        info: ModelInfo,
        template: SinkTemplate,
        attend: Attend,
        stream: ResidualStream | None = None,
    ) -> None:
        self.layouts, self.template, self._attend, self._stream = layouts, template, attend, stream
        self.config = info.config
        self.mass = np.zeros((len(layouts), len(SPARSE), info.n_layers, info.n_heads), dtype=np.float32)
        self.error = np.zeros_like(self.mass)
        self.harm: dict[str, np.ndarray] = {}
        self.windows: list[int | None] = [None] * info.n_layers
        # Image rows that have an earlier image: all that a category can change.
        self.rows = [concatenated_ranges(x.images[1:, 1], x.images[1:, 2]) for x in layouts]

    def __call__(
        self, prefill: Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Dense attention of one layer, `[B, T, H, D]`, measured on the way."""
        return self.measure(layer, q, k, v, scale, window)

    @torch.no_grad()
    def measure(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        gradient: Tensor | None = None,
    ) -> Tensor:
        """Measures one layer; `gradient`, like the outputs `[B, T, H, D]`, adds the ranking `"gradient"`."""
        self.windows[layer] = window
        n_heads = q.shape[1]

        def run(category: Category) -> tuple[Tensor, Tensor]:
            return self._attend(q, k, v, self.layouts, [category] * n_heads, self.template, scale=scale, window=window)

        dense = run(Category.DENSE)
        chunks = [
            (b, [torch.from_numpy(x).to(q.device) for x in np.array_split(rows, -(-len(rows) // _ROWS))])
            for b, rows in enumerate(self.rows)
            if len(rows)
        ]
        norms = {b: [_rows(dense[0], b, index).norm(dim=-1) for index in indices] for b, indices in chunks}
        for c, category in enumerate(SPARSE):
            sparse = run(category)
            for b, indices in chunks:
                mass = torch.zeros(n_heads, dtype=torch.float64, device=q.device)
                error, moved, steered = (torch.zeros_like(mass) for _ in range(3))
                for index, norm in zip(indices, norms[b], strict=True):  # norm: [n, H]
                    change = _rows(sparse[0], b, index) - _rows(dense[0], b, index)  # [n, H, D]
                    size = change.norm(dim=-1)
                    error += torch.where(size == 0, 0.0, size / norm).double().sum(0)  # a pruned head is all zeros
                    if self._stream is not None:
                        moved += self._stream.moved(layer, b, index, dense[0], change).double().sum(0)
                    if gradient is not None:
                        steered += (change * _rows(gradient, b, index)).sum(-1).double().sum(0)
                    mass += torch.exp(sparse[1][b][:, index] - dense[1][b][:, index]).double().sum(1)
                self.mass[b, c, layer] = (mass / len(self.rows[b])).cpu().numpy()
                self.error[b, c, layer] = (error / len(self.rows[b])).cpu().numpy()
                if self._stream is not None:
                    self._harm("residual")[b, c, layer] = (moved / len(self.rows[b])).cpu().numpy()
                if gradient is not None:
                    self._harm("gradient")[b, c, layer] = (steered**2 / 2).cpu().numpy()
            del sparse
        return dense[0]

    def _harm(self, ranking: str) -> np.ndarray:
        return self.harm.setdefault(ranking, np.zeros_like(self.mass))

    def records(self) -> list[PromptStatistics | None]:
        """One record per batch row, None for rows with fewer than two images."""
        return [self._record(b) if len(rows) else None for b, rows in enumerate(self.rows)]

    def _record(self, b: int) -> PromptStatistics:
        layout = self.layouts[b]
        return PromptStatistics(
            n_tokens=layout.stop - layout.start,
            n_images=layout.n_images,
            n_rows=len(self.rows[b]),
            mass=self.mass[b],
            error=self.error[b],
            pairs=count_layer_pairs(layout, self.template, self.windows),
            harm={ranking: harm[b] for ranking, harm in self.harm.items()},
        )


def _rows(out: Tensor, b: int, index: Tensor) -> Tensor:
    """Some rows of outputs `[B, T, H, D]`: `[n, H, D]` float32."""
    return out[b, index].float()
