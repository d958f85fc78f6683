"""Sparse prefill for Hugging Face vision-language models in PyTorch: `patch` a model, `calibrate` a profile for it."""

from torch_blindsight.calibration import calibrate
from torch_blindsight.handle import Handle
from torch_blindsight.models import fingerprint
from torch_blindsight.patching import patch
from torch_blindsight.portable import portable_attention
from torch_blindsight.pruners import DivPrune, FastV
from torch_blindsight.pruning import Pruner, Seen

__all__ = [
    "DivPrune",
    "FastV",
    "Handle",
    "Pruner",
    "Seen",
    "calibrate",
    "fingerprint",
    "patch",
    "portable_attention",
]
