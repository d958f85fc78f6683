"""The optimizers of the small models: AdamW, and Muon for matrices with AdamW for the rest.

Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) steps along the nearest orthogonal matrix to
the momentum. `torch.optim.Muon` finds it in bfloat16, which on a processor without bfloat16 instructions takes twice as
long as all the rest of a step of these models (1.5 s a step instead of 0.48 s); here it is found in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration, from the source above
_ITERATIONS = 5
_REST_PEAK = 1.5e-3  # learning rate of what is no matrix


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    A step has the root mean square of AdamW's, 0.2 (J. Liu et al., 2025, arXiv 2502.16982), so rates are comparable.

    Args:
        matrices: parameters of two dimensions.
        lr: learning rate.
        momentum: share of the past in the momentum.
        weight_decay: what a step takes off the weights, in units of the learning rate.
    """

    def __init__(
        self, matrices: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure that returns a loss
        """Takes one step."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(state["momentum"], group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(_orthogonal(ahead), alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Roughly the nearest (semi-)orthogonal matrix `[m, n]`: singular values, unless tiny, become 0.7 to 1.2."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _adamw(model: Any, peak: float) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    decayed, plain = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=0.05), dict(params=plain, weight_decay=0.0)]
    return [torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)]


def _muon(model: Any, peak: float) -> list[torch.optim.Optimizer]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=_REST_PEAK, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, peak), adamw]


# Each takes the model and the highest learning rate.
OPTIMIZERS: dict[str, Callable[[Any, float], list[torch.optim.Optimizer]]] = {"adamw": _adamw, "muon": _muon}
