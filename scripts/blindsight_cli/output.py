"""What the commands print: results on standard output, everything said on the way on standard error."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from rich.console import Console

# Pipes and files have no size of their own: wide enough that no row of a table is cut. Without a height, rich would
# not look at the width where FORCE_COLOR is set and TERM is dumb.
_PIPE_SIZE = 160, 100
# What stands for a sign that a terminal's encoding lacks: a minus or an exponent must not be lost.
_PLAIN = {"✓": "+", "✗": "x", "×": "x", "·": ".", "•": "*", "µ": "u", "⁻": "^-", "→": ">", "←": "<"}
_PLAIN |= dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}", "-") | dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True))


def never_fail_on_signs() -> None:
    """Lets standard output and error take any sign, whatever their encoding; those that neither has become `?`."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end

    codecs.register_error("blindsight", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="blindsight")


def results(*, stderr: bool = False) -> Console:
    """The console of results: standard output, or standard error where that is kept for a JSON document."""
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream is not None and stream.isatty()  # it is None where the shell has closed it
    width, height = (None, None) if terminal else _PIPE_SIZE
    return Console(stderr=stderr, highlight=False, width=width, height=height)


def note(text: str, *, style: str | None = None) -> None:
    """Says something on the way, on standard error; lines are not broken, brackets mean nothing."""
    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)


def span(ends: Sequence[int] | None) -> str:
    """A range of whole numbers: `6`, `5-6`; nothing where it is not known."""
    return "-".join(f"{end:,}" for end in sorted(set(ends or ())))


def print_json(document: Any) -> None:
    """Prints the one JSON document of a command with `--json`.

    Raises:
        ValueError: it holds NaN or an infinity, which JSON has not.
    """
    print(json.dumps(document, indent=1, allow_nan=False))
