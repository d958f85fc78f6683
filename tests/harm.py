"""What torch measures of one prompt, its gradient included: what its own tests and those of JAX compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from shared_profiles import SinkTemplate
from torch_blindsight.gradient import GradientMode, measure_with_gradient
from torch_blindsight.handle import Handle
from torch_blindsight.implementations import implementation
from torch_blindsight.models import inspect_model
from torch_blindsight.residual import ResidualStream

SMALL = SinkTemplate((0, 1), (1, 2), 8)


def measure_in_torch(model: nn.Module, inputs: Mapping[str, Tensor], *, stream: bool = False) -> Any:
    """One prompt's observer, gradient and all, with `SMALL`; with `stream` the residual stream's harm, too."""
    info = inspect_model(model)
    chosen = implementation("portable", model, info)
    with ResidualStream(model, info) as noted:
        mode = GradientMode(info, SMALL, chosen.attend, noted if stream else None)
        with Handle(model, info, mode, chosen) as handle:
            handle.install()
            return measure_with_gradient(model, mode, inputs)
