"""Locking a file, so that it has one writer at a time."""

from __future__ import annotations

from typing import IO


def try_lock(file: IO[bytes]) -> bool:
    """Whether an open file is now locked: until it is closed or the process ends, nobody else can lock it."""
    import fcntl  # not on Windows, where all else works

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
