"""The parts, how long each is estimated to take, and the three commands that run them all."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

# Estimates for an H200, in seconds: the start of each process, compiling, and the rows that the targets speak of, which
# come first in every part. The rows behind those use what the parts before leave, or are left out.
SECONDS = {
    "correctness": 190,  # pytest with 8 workers, nearly all of it compiling
    "attention": 190,  # 105 s at 300K, 55 s at 100K, half of it compiling FlexAttention; 15 s at 36K and to start
    "bounds": 75,  # 6 launches: 5 s each to compile for Triton, 15 s for Pallas
    "sanitizer": 85,  # four checks side by side, each starting torch under the tool
    "model": 220,  # 7B: 75 s at 300K, 45 s below, 20 s to start; Gemma 80 s
    "pallas": 170,  # 55 s a length with 35 s of compiling: two lengths of Qwen, one of Gemma
    "attention_more": 90,  # two lengths of Gemma
    "profile": 60,  # three kernels under ncu, each starting torch under it
    "jax_model": 390,  # 7B: 140 s at 36K, 240 s at 300K; every row starts and compiles anew, calibrations 80 s each
    "calibration": 80,  # 36K 20 s, by the gradient 25 s, 144K 35 s
    "tune": 70,  # 14 tile sizes, 4 s each to compile; then the short lengths, 1 s each
}
# Everything, in three commands of at most ten minutes each: 30 minutes of a GPU with its start.
COMMANDS = (
    ("correctness", "attention", "bounds", "sanitizer"),
    ("model", "pallas", "attention_more", "profile"),
    ("jax_model", "calibration", "tune"),
)
BUDGET = 540


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """What reads an option's value, names separated by commas, and refuses any that is not known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(
                f"parts must be among {', '.join(known)}. Got {', '.join(sorted(unknown))}."
            )
        return names

    return read
