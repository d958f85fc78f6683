"""Exit codes of the command line, and the one place where expected errors become a message instead of a traceback."""

from __future__ import annotations

import enum
import functools
import os
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from blindsight_cli.output import note

TRACEBACK = "BLINDSIGHT_TRACEBACK"
"""Environment variable that shows expected errors with their traceback, too."""

# Packages that an install without extras leaves out, and the extra that brings them.
_EXTRAS = {
    **dict.fromkeys(("torch", "torchvision", "transformers", "safetensors", "PIL", "tqdm"), "torch"),
    **dict.fromkeys(("jax", "flax", "orbax", "ml_dtypes"), "jax"),
    **dict.fromkeys(("jinja2", "av"), "cli"),
}


def install_advice(extra: str) -> str:
    """How to install an extra: from the source, as nothing is published yet."""
    return f"In BlindSight's source folder: pip install '.[{extra}]'"


def reason_of(error: BaseException) -> str:
    """What an error of a file's reader says, without the file's name and without a full stop."""
    return getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__


class ExitCode(enum.IntEnum):
    """What the `blindsight` command returns to the shell."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    INCOMPATIBLE = 3


class IncompatibleError(ValueError):
    """Versions, model and profile do not go together, although each may be fine alone."""


def guarded(command: Callable[..., int]) -> Callable[..., NoReturn]:
    """Makes a typer command of a function that returns an exit code: expected errors are told in one paragraph.

    Wrong input (`ValueError`, `OSError`) exits with 2; damaged or foreign profiles, unsupported models and missing
    packages with 3. Anything else is a bug and keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> NoReturn:
        try:
            code = command(*args, **kwargs)
        except Exception as error:
            expected = _expected(error)
            if expected is None or os.environ.get(TRACEBACK):
                raise
            code, message = expected
            note(f"error: {message}", style="red")
        raise typer.Exit(code)

    return run


def _expected(error: Exception) -> tuple[ExitCode, str] | None:
    """Exit code and message of an error that users can cause; None for any other."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            return None
        advice = install_advice(_EXTRAS[package])
        return ExitCode.INCOMPATIBLE, f"this command needs {package}, which is not installed. {advice}"
    if isinstance(error, BrokenPipeError) or not isinstance(error, ValueError | OSError):
        return None
    from shared_profiles.profile_parts import ProfileError

    incompatible = isinstance(error, IncompatibleError | ProfileError)
    return ExitCode.INCOMPATIBLE if incompatible else ExitCode.USAGE, str(error)
