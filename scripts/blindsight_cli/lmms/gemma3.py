"""lmms-eval's Gemma 3, patched."""

from __future__ import annotations

from lmms_eval.models.simple.gemma3 import Gemma3

from blindsight_cli.lmms.sparse import Sparse


class SparseGemma3(Sparse, Gemma3):
    """`--model blindsight_gemma3`."""
