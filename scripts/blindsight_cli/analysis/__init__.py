"""Where a model's heads look, as one page: attention maps, sinks by offset, and the ablation without delimiters."""

from __future__ import annotations

from blindsight_cli.analysis.measure import Analysis, HeadMap, analyze
from blindsight_cli.analysis.page import render, write_page

__all__ = ["Analysis", "HeadMap", "analyze", "render", "write_page"]
