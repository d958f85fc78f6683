"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes a file so that its name only ever stands for a complete one.

    The bytes go to a temporary file in the same directory, are flushed to the disk, and take the name in one step. On
    any failure, an interruption included, the old file is untouched and the temporary file is removed.

    Args:
        path: where the file goes; a symbolic link is followed.
        data: all of its bytes.

    Raises:
        OSError: the directory is missing or not writable, the disk is full, or the name is that of a directory, device
            or pipe. The message names the file.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():  # the new file would take its place
        raise OSError(f"only a file may be written over. Got {target}, a folder, device or pipe. Name another file.")
    temporary = target.with_name(f".blindsight-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first failure is the one to report
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        raise
