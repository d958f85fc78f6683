"""`torchrun` with two processes: killed half-way, resumed, and bit for bit what one process gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from scale_out_run import KILLED, run
from shared_profiles.profile import Profile
from shared_profiles.statistics import Statistics


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_give_the_bits_of_one_and_a_killed_run_counts_no_prompt_twice(tmp_path):
    """Learned sinks, gradients and the budget search on held-out prompts included."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("scale_out_run.py")
    folders = os.pathsep.join([str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    told = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert done.returncode == 0, (done.stderr[-2000:], told)
    # The killed process takes the other one with it, which was waiting for it.
    assert told[f"status-0-{KILLED}.txt"] == str(-signal.SIGKILL) and told[f"status-0-{1 - KILLED}.txt"] == "1"
    assert "RuntimeError" in told[f"ended-0-{1 - KILLED}.txt"]

    whole = run(tmp_path / "whole.npz")
    assert (tmp_path / "state.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not list(tmp_path.glob("state.rank*")), "no part is left"
    first, second = (Profile.load(tmp_path / f"profile-{name}.json") for name in ("first", "second"))
    assert first == second
    assert (first.summary, first.curve, first.choice) == (whole.summary, whole.curve, whole.choice)
    assert first.template == whole.template and first.choice["sinks"]["prompts"] == 8
    assert first.provenance.dataset_hash == whole.provenance.dataset_hash
    assert first.choice["held_out_prompts"] >= 2, "both processes have some"

    lists = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("measured-*.json")}
    statistics = Statistics.load(tmp_path / "state.npz")
    once = Counter(statistics[prompt_id].n_tokens for prompt_id in statistics.prompt_ids)
    assert sum((Counter(lengths) for lengths in lists.values()), Counter()) == once
    assert len(lists[f"measured-0-{KILLED}"]) == 2 and len(lists["measured-1-0"]) > 0
