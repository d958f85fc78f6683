"""The report of a real calibration in a real browser: nothing goes wrong, nothing is fetched, every head is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blindsight_cli.commands import demo
from blindsight_cli.main import app
from blindsight_cli.report import ReportData
from browser import NAMES, Browser, find_chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_chromium() is None:
        assert "BLINDSIGHT_CI" not in os.environ, "CI must install a browser: apt-get install chromium"
        pytest.skip(f"needs a browser: {' or '.join(NAMES)}; on Debian, apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportData]:
    """What `blindsight demo` writes, a short prompt timed."""
    path = tmp_path_factory.mktemp("report") / "demo.html"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "_LONG_PROMPT", (3, 64))
        command = ("demo", "--out", str(path), "--questions", "6", "--calibration-prompts", "16")
        result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return path, ReportData.from_json(json.loads(result.stdout))


def test_the_report_opens_without_errors_and_asks_for_nothing(
    browser: Browser, report: tuple[Path, ReportData]
) -> None:
    page = browser.open(report[0])
    assert page.errors == []
    own, *others = page.requests
    assert own == report[0].as_uri()
    assert others and all(url.startswith("data:image/png") for url in others)  # its pictures, inside itself
    assert browser.evaluate("document.title") == "BlindSight report: blindsight-tiny-qwen2_5_vl"


def test_every_head_has_a_visible_cell_that_tells_its_figures(
    browser: Browser, report: tuple[Path, ReportData]
) -> None:
    browser.open(report[0])
    model = report[1].model
    heads = "[...document.querySelectorAll('svg.map rect.head')]"
    seen = browser.evaluate(
        f"{heads}.filter(cell => cell.getBoundingClientRect().width > 4 && cell.getBoundingClientRect().height > 4)"
        ".map(cell => cell.dataset.at)"
    )
    every = [f"{layer}.{head}" for layer in range(model.n_layers) for head in range(model.n_heads)]
    assert sorted(seen) == sorted(every)
    told = browser.evaluate(
        f"{heads}.map(cell => {{ cell.dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}));"
        " const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.textContent; })"
    )
    assert len(set(told)) == len(every) and all(told)


def test_the_report_opens_with_the_curve(browser: Browser, report: tuple[Path, ReportData]) -> None:
    """Before any other section: one visible point for each measured choice, one of them chosen."""
    browser.open(report[0])
    assert browser.evaluate("document.querySelector('main > section').id") == "curve"
    points = "[...document.querySelectorAll('#curve svg .point')].filter(p => p.getBoundingClientRect().width > 2)"
    assert browser.evaluate(f"{points}.length") == len(report[1].curve) > 1
    assert browser.evaluate(f"{points}.filter(p => p.classList.contains('chosen')).length") == 1


def test_a_bad_page_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<script>console.error("first"); second()</script><img src="https://example.com/third.png">')
    page = browser.open(bad)
    said = "\n".join(page.errors)
    assert "first" in said and "second is not defined" in said and "ERR_NAME_NOT_RESOLVED" in said
    assert page.requests == [bad.as_uri(), "https://example.com/third.png"]
