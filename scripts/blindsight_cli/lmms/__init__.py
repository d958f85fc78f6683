"""Plug-in for lmms-eval: its own models, patched. Found by the entry-point group `lmms_eval.models`.

    lmms-eval --model blindsight_qwen2_5_vl --model_args pretrained=FOLDER,profile=PROFILE --tasks ...

Arguments are those of lmms-eval's own class, and `profile`. The dense arm is that class itself, `--model qwen2_5_vl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """What lmms-eval asks the plug-in for: the names of its models and where their classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = __name__
    return [
        ModelManifest("blindsight_qwen2_vl", simple_class_path=f"{here}.qwen2_vl.SparseQwen2VL"),
        ModelManifest(
            "blindsight_qwen2_5_vl",
            simple_class_path=f"{here}.qwen2_5_vl.SparseQwen2_5_VL",
            chat_class_path=f"{here}.qwen2_5_vl.SparseQwen2_5_VLChat",
        ),
        ModelManifest("blindsight_gemma3", simple_class_path=f"{here}.gemma3.SparseGemma3"),
    ]
