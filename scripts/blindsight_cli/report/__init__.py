"""The report: one self-contained HTML page about a model, its profile, and what the profile costs and saves.

`ReportData` holds everything the page shows and travels as JSON; `render` makes the page, `write_report` stores it.
"""

from __future__ import annotations

from blindsight_cli.report.curve import CurveRow
from blindsight_cli.report.data import (
    DEMO_LIMITS,
    AccuracyRow,
    CategoryStatistics,
    Example,
    FlopsPoint,
    KindAccuracy,
    Machine,
    MaskExample,
    ModelInfo,
    ReportData,
    ReportProvenance,
    Segment,
    TemplateInfo,
    TimingRow,
    Timings,
)
from blindsight_cli.report.from_profile import budget_of, chosen_by, curve_from_profile, statistics_from_summary
from blindsight_cli.report.render import render, write_report

__all__ = [
    "DEMO_LIMITS",
    "AccuracyRow",
    "CategoryStatistics",
    "CurveRow",
    "Example",
    "FlopsPoint",
    "KindAccuracy",
    "Machine",
    "MaskExample",
    "ModelInfo",
    "ReportData",
    "ReportProvenance",
    "Segment",
    "TemplateInfo",
    "TimingRow",
    "Timings",
    "budget_of",
    "chosen_by",
    "curve_from_profile",
    "render",
    "statistics_from_summary",
    "write_report",
]
