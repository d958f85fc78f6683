"""A model that transformers splits over two processes: patched, it gives what the whole one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tiny_models import family_names, make_model
from torch_blindsight import patch
from torch_blindsight.models import inspect_model

KINDS = ("prompt", "batch")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes saw, by family."""
    folder = tmp_path_factory.mktemp("split")
    script = Path(__file__).with_name("tensor_parallel_run.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@family_names
def test_it_gives_what_the_whole_model_gives(processes, family):
    for seen in (process[family] for process in processes):
        assert seen["processes"] == 2 and len(set(seen["fingerprints"])) == 1
        for how in ("dense", "sparse"):
            for kind in KINDS:
                got, want = (np.array(seen[name][how][kind]) for name in ("split", "whole"))
                np.testing.assert_allclose(got, want, atol=1e-9)
            assert seen["split"][how]["tokens"] == seen["whole"][how]["tokens"]
        for kind in KINDS:
            dense, sparse = (np.array(seen["split"][how][kind]) for how in ("dense", "sparse"))
            assert abs(dense - sparse).max() > 1e-2, "sparsity changes something"
        assert seen["split"]["report"] == seen["whole"]["report"]
        assert seen["split"]["report"]["forwards"]["sparse"] == 3


@family_names
def test_what_needs_all_heads_or_one_profile_is_refused(processes, family):
    for process in processes:
        errors = process[family]["errors"]
        assert errors["profile"].startswith("ValueError: all processes of a tensor-parallel model must have the same")
        assert errors["one"] == errors["profile"] and "those of rank 1 than in that of rank 0" in errors["one"]
        refusal = "needs all heads of a layer in one process. Got a tensor-parallel model (tp_plan), of which this one"
        assert errors["none"].startswith(
            f"NotImplementedError: measuring the first prompts, for want of a profile, {refusal}"
        )
        assert errors["pruner"].startswith(f"NotImplementedError: a pruner {refusal} has 2 of 4")
        assert errors["calibrate"].startswith(f"NotImplementedError: calibration {refusal}")


def test_a_model_whose_split_cannot_be_told_is_refused():
    model = make_model("qwen2_vl", n_layers=1)
    model._tp_size = 2  # as transformers notes it; projections as of a quantized model
    with pytest.raises(NotImplementedError, match=r"by heads \(tp_plan, not quantized\). Got 4 heads over 2 pro"):
        patch(model)


@pytest.fixture
def middle():
    """The second of three processes, which stands for all of them; and a function that gives it its part of a model."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    mesh = init_device_mesh("cpu", (3,))

    def split(placement, layers):
        model = make_model("qwen2_vl", n_layers=2)
        model._tp_size = 3
        model.config.text_config.num_attention_heads = 6
        for layer in layers:
            projection = model.get_decoder().layers[layer].self_attn.q_proj
            part = DTensor.from_local(projection.weight.detach(), mesh, [placement], run_check=False)
            projection.weight = torch.nn.Parameter(part)
        return model

    yield split
    dist.destroy_process_group()


def test_a_process_has_the_heads_that_it_projects(middle):
    """Or none can be told: split by what goes in, not at all, not in every layer, or not by whole heads."""
    assert inspect_model(middle(Shard(0), [0, 1])).heads == range(2, 4)
    uneven = middle(Shard(0), [0, 1])
    uneven.config.text_config.num_attention_heads = 4
    for model in (middle(Shard(1), [0, 1]), middle(Replicate(), [0, 1]), middle(Shard(0), [1]), uneven):
        with pytest.raises(NotImplementedError, match=r"split evenly by heads .* over 3 processes, split otherwise"):
            inspect_model(model)
