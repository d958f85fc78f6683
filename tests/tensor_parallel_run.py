"""One process of two that share tensor-parallel models: `torchrun --nproc-per-node 2 tests/tensor_parallel_run.py DIR`.

Writes what it saw to `DIR/rank-N.json`; `test_torch_tensor_parallel.py` says what that must be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

from shared_profiles.profile import Profile
from tiny_models import FAMILIES, double_model, in_double, make_ids, make_inputs, mixed_profile, patch
from torch_blindsight import DivPrune, calibrate, fingerprint


def answers(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, list]:
    """Logits of a prompt, and of a batch with padding; tokens that follow the prompt."""
    batch = in_double(make_inputs(model.config.model_type, [make_ids(2), make_ids(3, seed=1)], seed=1))
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    parts = {"prompt": model(**inputs).logits, "batch": model(**batch).logits, "tokens": tokens}
    return {name: x.tolist() for name, x in parts.items()}


def error_of(attempt: Callable[[], Any]) -> str:
    """What it raises."""
    try:
        attempt()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@torch.no_grad()
def run(family: str, folder: Path) -> dict[str, Any]:
    """Everything about one family, in this process."""
    whole = double_model(family)
    if dist.get_rank() == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    # transformers 5.17 would also split Gemma's embedding, and not what is tied to it
    plan = {name: how for name, how in whole.tp_plan.items() if "embed_tokens" not in name}
    split = AutoModelForImageTextToText.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan=plan), dtype=torch.float64
    ).eval()
    profile, inputs = mixed_profile(whole), in_double(make_inputs(family, [make_ids(3)]))
    seen: dict[str, Any] = {"processes": split.tp_size, "fingerprints": [fingerprint(split).digest]}
    seen["fingerprints"].append(profile.fingerprint.digest)
    for name, model in (("split", split), ("whole", whole)):
        seen[name] = {"dense": answers(model, inputs)}
        with patch(model, profile) as handle:
            seen[name] |= {"sparse": answers(model, inputs), "report": handle.report()}
    other = mixed_profile(whole, seed=dist.get_rank())
    alone: Profile | None = profile if dist.get_rank() == 0 else None
    seen["errors"] = {
        "profile": error_of(lambda: patch(split, other)),
        "one": error_of(lambda: patch(split, alone)),
        "none": error_of(lambda: patch(split)),
        "pruner": error_of(lambda: patch(split, profile, pruner=DivPrune(0.5))),
        "calibrate": error_of(lambda: calibrate(split, [inputs])),
    }
    return seen


def main(folder: Path) -> None:
    """All families."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = {family: run(family, folder / family) for family in FAMILIES}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
