"""lmms-eval's Qwen2.5-VL, patched: for tasks with plain questions, and for those with chats."""

from __future__ import annotations

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL as Chat
from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL as Simple

from blindsight_cli.lmms.sparse import Sparse


class SparseQwen2_5_VL(Sparse, Simple):
    """`--model blindsight_qwen2_5_vl --force_simple`."""


class SparseQwen2_5_VLChat(Sparse, Chat):
    """`--model blindsight_qwen2_5_vl`."""
