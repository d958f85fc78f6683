"""`blindsight report`: the HTML page of results that were saved as JSON."""

from __future__ import annotations

from pathlib import Path

from blindsight_cli.errors import ExitCode
from blindsight_cli.folders import read_json, require_writable
from blindsight_cli.output import print_json, results
from blindsight_cli.report import ReportData, write_report


def run_report(path: Path, out: Path, *, as_json: bool) -> int:
    """Renders a saved report.

    Raises:
        ValueError: the file holds no report, or one of another version; or `out` cannot be written.
        OSError: a file cannot be read or written.
    """
    require_writable("--out", out, {"RESULTS": path}, kind="page")
    try:
        document = read_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, as `blindsight demo --json` prints it. Got: {error}.") from error
    try:
        write_report(ReportData.from_json(document), out)
    except OverflowError as error:
        raise ValueError(f"{path} must hold numbers that can be drawn. Got one too large: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if as_json:
        print_json({"report": str(out)})
    else:
        results().print(f"report: {out}", markup=False, soft_wrap=True)
    return ExitCode.OK
