"""`blindsight bench jax-convert`: how fast checkpoints become weights of the JAX backend."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import torch
from transformers.utils import logging as transformers_logging

from blindsight_cli.random_model import make_random_model
from jax_blindsight.params import load, save


def bench_convert(repeats: int) -> list[dict[str, Any]]:
    """Loading a random bfloat16 checkpoint from a warm file cache: in one file, in shards, and as `save` wrote it."""
    rows = []
    model: Any = make_random_model(hidden=1024, layers=16)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / part for part in ("one file", "shards of 50 MB", "saved by orbax")]
        model.to(torch.bfloat16).save_pretrained(folders[0])
        model.save_pretrained(folders[1], max_shard_size="50MB")
        save(load(folders[0]), folders[2])
        for folder in folders:
            seconds = []
            for _ in range(repeats + 1):
                begun = time.perf_counter()
                params = load(folder)
                seconds.append(time.perf_counter() - begun)
            megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
            rows.append(
                {
                    "case": f"load a Qwen2.5-VL of {megabytes:.0f} MB, bfloat16, {folder.name}",
                    "seconds": median(seconds[1:]),
                    "mb_per_s": megabytes / median(seconds[1:]),
                }
            )
    return rows
