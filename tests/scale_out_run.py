"""One process of two: begins a calibration of a tiny model, is killed, and finishes it in a second attempt.

`torchrun --nproc-per-node 2 tests/scale_out_run.py FOLDER`. Every attempt is a fork of its own, as when torchrun
restarts its processes, but torch and transformers are imported only once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import torch_blindsight
from blindsight_cli.launched import launched
from shared_profiles.profile import Profile
from shared_profiles.statistics import PromptStatistics
from tiny_models import make_ids, make_inputs, make_model
from torch_blindsight import calibration

KILLED = 1  # rank that is killed in the first attempt, when it begins its third prompt
measured: list[int] = []  # lengths of the prompts that this process has measured, which tell them apart


def run(state: Path) -> Profile:
    """Calibrates on prompts of different lengths: one has one image, one comes twice."""
    torch.set_num_threads(1)
    prompts = [make_inputs("qwen2_5_vl", [make_ids(2 + i % 2, seed=i, text=3 + i)], seed=i) for i in range(12)]
    prompts += [make_inputs("qwen2_5_vl", [make_ids(1, seed=1)]), prompts[0]]
    model = make_model("qwen2_5_vl", n_layers=2)
    return torch_blindsight.calibrate(
        model, iter(prompts), budget=0.05, held_out=0.3, local_block=8, state=state, save_every=1, progress=False
    )


def attempt(folder: Path, number: int) -> None:
    """One attempt of one process."""
    measure = calibration._measure

    def counted(model: Any, mode: Any, prompt: Any) -> PromptStatistics | None:
        if number == 0 and int(os.environ["RANK"]) == KILLED and len(measured) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        record = measure(model, mode, prompt)
        if record is not None:
            measured.append(prompt["input_ids"].shape[1])
        (folder / f"measured-{number}-{os.environ['RANK']}.json").write_text(json.dumps(measured))
        return record

    calibration._measure = counted
    if number == 0:  # torchrun's own meeting place serves one attempt
        rank, store = int(os.environ["RANK"]), f"file://{folder / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        run(folder / "state.npz")
    with launched("torch") as place:
        profile = run(folder / "state.npz")
        profile.save(folder / f"profile-{'first' if place.is_first else 'second'}.json")


def main(folder: Path) -> None:
    """Both attempts; the second must succeed."""
    for number in range(2):
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            try:
                attempt(folder, number)
            except Exception as error:
                (folder / f"ended-{number}-{os.environ['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        (folder / f"status-{number}-{os.environ['RANK']}.txt").write_text(str(os.waitstatus_to_exitcode(status)))
    raise SystemExit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
