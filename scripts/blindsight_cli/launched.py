"""A command that `torchrun` started in several processes: they find each other, and each takes its own GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blindsight_cli.backends import BackendName


@dataclass(frozen=True)
class Place:
    """One process of a command.

    Attributes:
        is_first: whether it is the one that says and writes things.
        device: where its model goes unless a device was named; None for the usual choice.
    """

    is_first: bool = True
    device: str | None = None


@contextmanager
def launched(backend: BackendName) -> Iterator[Place]:
    """Joins the processes that `torchrun` started, by gloo; does nothing in a process of its own.

    Raises:
        ValueError: `torchrun` has started a backend that does not share its work.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield Place()
        return
    if backend != "torch":
        raise ValueError(f"torchrun deals out the work of --backend torch only. Got {backend}. Start it without.")
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        n_gpus = torch.cuda.device_count()
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % n_gpus}" if n_gpus else None
        yield Place(dist.get_rank() == 0, device)
    finally:
        dist.destroy_process_group()
