"""lmms-eval's Qwen2-VL, patched."""

from __future__ import annotations

from lmms_eval.models.simple.qwen2_vl import Qwen2_VL

from blindsight_cli.lmms.sparse import Sparse


class SparseQwen2VL(Sparse, Qwen2_VL):
    """`--model blindsight_qwen2_vl`."""
