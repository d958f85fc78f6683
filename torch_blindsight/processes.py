"""The processes of a torch process group, sharing one calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from shared_profiles.processes import ALONE, Processes

# A process waits so long for one that was given longer prompts, before it takes it for dead. One that ends is noticed
# at once: its connections close.
PATIENCE = timedelta(days=1)


class GroupProcesses(Processes):
    """Those of a group.

    Args:
        group: of gloo, which sends what lies in main memory.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.n = dist.get_rank(group), dist.get_world_size(group)

    def gather[T](self, value: T) -> list[T]:
        """See `Processes`.

        Raises:
            RuntimeError: another process has ended.
        """
        values: list[Any] = [None] * self.n
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"all {self.n} processes must stay to the end. Another one has ended, and says why: {error}. Start all "
                "of them again: with a state they go on from what each has measured."
            ) from error
        return values


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Those of the default process group, whatever its backend; this one alone where there is none."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield ALONE
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield GroupProcesses(group)
    finally:
        dist.destroy_process_group(group)
