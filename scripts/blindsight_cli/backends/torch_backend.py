"""Checkpoints run by PyTorch: a transformers model, patched for as long as it is to run sparsely."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from blindsight_cli.backends import Answer, Facts, Prompt
from blindsight_cli.errors import IncompatibleError
from blindsight_cli.loading import load_model, pick_device
from blindsight_cli.timing import describe_cpu
from shared_profiles import Layout, SinkTemplate
from shared_profiles.budget import Budget
from shared_profiles.classifier import Thresholds
from shared_profiles.profile import Profile
from shared_profiles.split import HELD_OUT
from torch_blindsight import Handle, calibrate, fingerprint, patch
from torch_blindsight.attention import check_masked
from torch_blindsight.implementations import implementation
from torch_blindsight.models import inspect_model


class TorchBackend:
    """A `Backend`. Between calls the model is unpatched."""

    def __init__(self, folder: Path, dtype: str, device: str | None) -> None:
        self.model = load_model(folder, dtype=dtype, device=pick_device(device))
        self.version = f"torch {torch.__version__}"
        self.device = str(self.model.device)
        on_cuda = self.model.device.type == "cuda"
        self.hardware = torch.cuda.get_device_name(self.model.device) if on_cuda else describe_cpu()[0]
        info = inspect_model(self.model)
        n_parameters = sum(p.numel() for p in self.model.parameters())
        self.facts = Facts(info.family, info.special, fingerprint(self.model, info), info.windows, n_parameters)
        self._last: tuple[Profile | None, Handle] | None = None

    def calibrate(
        self,
        prompts: Iterable[Prompt],
        *,
        dataset: str,
        template: SinkTemplate | None,
        budget: Budget | None = None,
        thresholds: Thresholds | None = None,
        held_out: float | Sequence[Prompt] = HELD_OUT,
        local_block: int | None = None,
        state: Path | None = None,
        merge: Sequence[Path] = (),
    ) -> Profile:
        """See `Backend`."""
        return calibrate(
            self.model,
            prompts,
            dataset=dataset,
            template=template,
            budget=budget,
            thresholds=thresholds,
            held_out=held_out,
            local_block=local_block,
            state=state,
            merge=merge,
        )

    def answer(self, prompt: Prompt, profile: Profile | None, max_new_tokens: int) -> Answer:
        """See `Backend`."""
        if profile is None:
            self._check_dense(prompt)
            return self._generate(prompt, max_new_tokens, None)
        with self._patched(profile) as handle:
            return self._generate(prompt, max_new_tokens, handle)

    def answer_unprofiled(self, prompt: Prompt, max_new_tokens: int) -> Answer:
        """Runs dense and is measured, as under `patch`."""
        with self._patched(None) as handle:
            return self._generate(prompt, max_new_tokens, handle)

    def next_token(self, prompt: Prompt, profile: Profile | None) -> tuple[np.ndarray, str]:
        """See `Backend`."""
        if profile is None:
            self._check_dense(prompt)
            return self._next_token(prompt), "dense"
        with self._patched(profile) as handle:
            before = Counter(handle.report()["forwards"])
            return self._next_token(prompt), _ran(handle, before)

    def prefill_seconds(self, prompt: Prompt, profile: Profile | None) -> float:
        """See `Backend`; the time of patching is left out."""
        if profile is None:
            return self._seconds(prompt)
        with self._patched(profile):
            return self._seconds(prompt)

    def attention_seconds(self, layout: Layout, profile: Profile | None) -> float:
        """See `Backend`; without a profile torch's own causal attention, else what `patch` would choose."""
        shape, device, dtype = self.facts.fingerprint, self.model.device, self.model.dtype
        heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
        q, k, v = (torch.randn(1, h, layout.n_tokens, shape.head_dim, device=device, dtype=dtype) for h in heads)
        scale = shape.head_dim**-0.5
        attend = implementation(None, self.model, inspect_model(self.model)).attend
        q.sum().item()  # waits for the device
        begun = time.perf_counter()
        if profile is None:
            for _ in range(shape.n_layers):
                k_all, v_all = (x.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=1) for x in (k, v))
                out = scaled_dot_product_attention(q, k_all, v_all, is_causal=True, scale=scale)
        else:
            for categories in profile.categories:
                out, _ = attend(q, k, v, [layout], categories, profile.template, scale=scale)
        out[0, 0, 0, 0].item()
        return time.perf_counter() - begun

    def _check_dense(self, prompt: Prompt) -> None:
        """Refuses a comparison with a dense model that torch computes wrongly: Gemma's attention has masks."""
        if self.facts.family.bidirectional:
            try:
                check_masked(prompt["input_ids"].shape[1] ** 2, self.model.device)
            except NotImplementedError as error:
                raise IncompatibleError(str(error)) from error

    @contextmanager
    def _patched(self, profile: Profile | None) -> Iterator[Handle]:
        """The model patched; a patch is made once, which hashes the weights, and put on again."""
        try:
            if self._last is not None and self._last[0] is profile:
                handle = self._last[1]
                handle.install()
            else:
                # Whoever asks for a comparison gets one, however short the prompt.
                handle = patch(self.model, profile, break_even=False)
                self._last = profile, handle
        except RuntimeError as error:  # transformers did not take it
            raise IncompatibleError(str(error)) from error
        with handle:
            yield handle

    @torch.no_grad()
    def _generate(self, prompt: Prompt, max_new_tokens: int, handle: Handle | None) -> Answer:
        before = Counter() if handle is None else Counter(handle.report()["forwards"])
        generated = self.model.generate(
            **prompt,
            max_new_tokens=max_new_tokens,
            # Greedy; what the checkpoint says about sampling would only be warned about.
            **dict(do_sample=False, temperature=None, top_p=None, top_k=None),
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = generated.sequences[0, prompt["input_ids"].shape[1] :].tolist()
        log_probs = generated.logits[0][0].double().cpu().log_softmax(-1).numpy()
        return Answer(ids, log_probs, "dense" if handle is None else _ran(handle, before))

    @torch.no_grad()
    def _next_token(self, prompt: Prompt) -> np.ndarray:
        logits = self.model(**prompt, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.float().cpu().log_softmax(-1).numpy()

    @torch.no_grad()
    def _seconds(self, prompt: Prompt) -> float:
        begun = time.perf_counter()
        logits = self.model(**prompt, use_cache=True, logits_to_keep=1).logits
        logits[0, -1].argmax().item()  # waits for the device
        return time.perf_counter() - begun


def _ran(handle: Handle, before: Counter[str]) -> str:
    """What the one prefill since `before` was."""
    since = Counter(handle.report()["forwards"]) - before
    return next((kind for kind in since if kind != "dense: decode step"), "dense: decode step")
