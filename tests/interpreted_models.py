"""What the tests of `impl="triton"` run where Triton is interpreted: functions of modules that a worker can import."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from interpreted import nan_filled
from shared_profiles import SinkTemplate
from shared_profiles.budget import Budget
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import Profile
from shared_profiles.statistics import Statistics
from tiny_models import (
    END,
    IMAGE,
    IMAGE_TOKENS,
    START,
    in_double,
    make_ids,
    make_inputs,
    make_model,
    mixed_profile,
    patch,
)
from torch_blindsight import calibrate

TEMPLATE = SinkTemplate((0, 1), (1, 2), 16)
SECOND_TURN = [START, *[IMAGE] * IMAGE_TOKENS, END, 40, 41]


@contextmanager
def dense_heads(by_vendor: bool):
    """Sends dense heads to the vendor's kernel, or to ours, whatever the prompt's length."""
    from torch_blindsight import mixed

    before, mixed.VENDOR_ROWS = mixed.VENDOR_ROWS, 0 if by_vendor else 1 << 30
    try:
        yield
    finally:
        mixed.VENDOR_ROWS = before


def attend_mixed(by_vendor: bool, q: np.ndarray, k: np.ndarray, v: np.ndarray, *args, **kwargs) -> tuple:
    """`mixed_attention` of arrays, its outputs filled with NaN first."""
    from torch_blindsight.mixed import mixed_attention

    with dense_heads(by_vendor), nan_filled():
        out, lse = mixed_attention(*map(torch.from_numpy, (q, k, v)), *args, **kwargs)
    return out.numpy(), lse.numpy()


@torch.no_grad()
def conversation(
    family: str, impl: str, *, double: bool = False, by_vendor: bool = False, device: str = "cpu"
) -> tuple[list, dict]:
    """A left-padded batch, then a second turn with a picture on its cache, then a token: logits, and the report."""
    model = make_model(family, n_layers=2)
    inputs = make_inputs(family, [make_ids(2), make_ids(1, seed=1)])
    if double:
        model, inputs = model.double(), in_double(inputs)
    model, inputs = model.to(device), {name: x.to(device) for name, x in inputs.items()}
    mask, cache = inputs["attention_mask"], DynamicCache(config=model.config)
    profile = mixed_profile(model, seed=3, template=TEMPLATE)
    dense_kernel = dense_heads(by_vendor) if impl == "triton" else nullcontext()
    with dense_kernel, patch(model, profile, impl=impl) as handle:
        logits = [model(**inputs, past_key_values=cache).logits[mask.bool()]]
        for ids in (SECOND_TURN, [42]):
            past, more = cache.get_seq_length(), torch.tensor([ids] * 2, device=device)
            mask = torch.cat([mask, torch.ones_like(more)], dim=1)
            positions = past + torch.arange(len(ids), device=device)
            turn = dict(input_ids=more, attention_mask=mask, past_key_values=cache)
            turn["position_ids"] = positions.expand(*(() if family == "gemma3" else (3,)), 2, -1)
            logits.append(model(**turn).logits)
        report = handle.report()
    return [x.double().cpu().numpy() for x in logits], report


def statistics(family: str, impl: str, folder: Any) -> Statistics:
    """What calibration measures of two prompts."""
    model = make_model(family, n_layers=2)
    prompts = [make_inputs(family, [make_ids(2, seed=i)], seed=i) for i in range(2)]
    path = folder / f"{impl}.npz"
    options = dict(template=TEMPLATE, thresholds=Thresholds(), progress=False)
    calibrate(model, prompts, state=path, impl=impl, **options)
    return Statistics.load(path)


def calibrated(family: str, impl: str, device: str = "cpu") -> tuple[Profile, list, dict]:
    """A profile by the gradient with learned sinks, then 8 tokens generated with it, and the report."""
    model = make_model(family, n_layers=2).to(device)
    prompts = [make_inputs(family, [make_ids(2, seed=i)], seed=i) for i in range(6)]
    prompts = [{name: x.to(device) for name, x in prompt.items()} for prompt in prompts]
    profile = calibrate(model, prompts, budget=Budget(1e9, "gradient"), held_out=0.5, progress=False, impl=impl)
    with patch(model, profile, impl=impl) as handle:
        tokens = model.generate(**prompts[0], max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return profile, tokens[0, -8:].tolist(), handle.report()


@torch.no_grad()
def compiled(family: str, impl: str, backend: str, part: str, device: str = "cpu") -> tuple[list, list, dict]:
    """Logits of prompts of several lengths through a model of which a submodule is compiled whole, and uncompiled."""
    model = make_model(family, n_layers=2).to(device)
    prompts = [make_inputs(family, [make_ids(n)]) for n in (2, 3, 1, 2)]
    prompts = [{name: x.to(device) for name, x in prompt.items()} for prompt in prompts]
    with patch(model, mixed_profile(model, template=TEMPLATE), impl=impl) as handle:
        want = [model(**x).logits.cpu().numpy() for x in prompts]
        module = model.get_submodule(part)
        module.forward = torch.compile(module.forward, fullgraph=True, backend=backend)
        got = [model(**x).logits.cpu().numpy() for x in prompts]
        del module.forward
        return got, want, handle.report()
