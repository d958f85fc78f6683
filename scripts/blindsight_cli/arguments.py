"""What the command lines of the studies and of the small models' training have in common."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """An argument that counts prompts, questions or steps: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Got {value}.")
    return value
