"""`patch(model)`: a Hugging Face vision-language model prefills sparsely, until it is unpatched."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from shared_profiles import SinkTemplate
from shared_profiles.lookup import find_profile, searched
from shared_profiles.profile import Profile
from torch_blindsight.freeze import Freezer
from torch_blindsight.handle import HANDLE, Handle
from torch_blindsight.implementations import Name, implementation
from torch_blindsight.models import checkpoint_folder, fingerprint, inspect_model
from torch_blindsight.modes import Mode, SparseMode
from torch_blindsight.pruning import Pruner
from torch_blindsight.tensor_parallel import require_agreement

logger = logging.getLogger("torch_blindsight")


def patch(
    model: nn.Module,
    profile: Profile | str | Path | None = None,
    *,
    impl: Name | None = None,
    allow_mismatch: bool = False,
    template: SinkTemplate | None = None,
    measure_prompts: int = 4,
    break_even: bool = True,
    pruner: Pruner | None = None,
) -> Handle:
    """Makes a Hugging Face Qwen2-VL, Qwen2.5-VL or Gemma 3 model prefill sparsely.

    With no profile, one made for this very model is looked for (beside the checkpoint, in the user's cache folder,
    bundled). If there is none, the first multi-image prompts run dense while they are measured; then a profile is
    frozen from them, saved in the cache folder, and prefills are sparse from there on.

    Args:
        model: the multimodal model, e.g. `Qwen2_5_VLForConditionalGeneration`, not compiled and not wrapped. If it is
            split over several processes (`tp_plan`), all of them must patch it, with the same profile.
        profile: a profile, or the path of one.
        impl: "triton", the GPU kernel; "portable", plain torch on any device; "reference", the float64 oracle, for
            tests. Default: "triton" for a model on a CUDA device, "portable" elsewhere; `Handle.report` says which.
        allow_mismatch: accept a profile of another model with as many layers and heads.
        template: sinks and local blocks for a profile that is still to be measured; one that is there has its own.
        measure_prompts: how many prompts to measure before freezing.
        break_even: run prompts dense that are too short to gain (`break_even.py` has the rule). False: all multi-image
            prompts run sparse, for comparisons.
        pruner: drops tokens of every prompt with images, before the language model or between two layers; for decode
            steps positions go on from the whole prompt's length. Then prompts with images come one at a time, whole,
            unpadded, on a dynamic cache, logits have a row per kept token, and a cache is of use under this patch only.
            Whether sparsity pays is judged by the whole prompt; one that does not run sparse is pruned all the same.

    Returns:
        The handle of the patch. Patching again with the same arguments, profile and weights returns the same handle.
        Weights that change under a patch, as when an adapter is loaded, are noticed only then.

    Raises:
        ValueError: not a supported model; the model is patched already, and not like this; a template other than the
            profile's; processes with different profiles; what is no pruner, one without a profile, or of a layer that
            the model does not have; no profile and `measure_prompts` below 1.
        ProfileError: the profile is damaged or belongs to another model.
        OSError: the profile cannot be read.
        ValueError, NotImplementedError, ImportError: the implementation cannot serve this model: its device, dtype or
            head dimension, Triton itself, or a tensor-parallel model with a pruner or no profile; or the model's text
            looks both ways.
        RuntimeError: transformers did not take the patch; the model is unchanged.
    """
    current: Handle | None = getattr(model, HANDLE, None)
    info = inspect_model(model) if current is None else current.info
    print_ = fingerprint(model, info)
    given, source = profile is not None, "in memory"
    if profile is None:
        folder = checkpoint_folder(model)
        found = find_profile(print_, folder)
        if found is not None:
            profile, source = found[0], str(found[1])
    else:
        if not isinstance(profile, Profile):
            profile, source = Profile.load(profile), str(profile)
        profile.require(print_, allow_mismatch=allow_mismatch)
    asked = (given, print_, impl, allow_mismatch, template, measure_prompts, break_even, pruner)
    if current is not None:
        if current.asked == asked and profile in (None, current.profile):
            return current
        raise ValueError(
            "the model must not be patched already with other arguments, by another profile or with other weights. "
            "Call unpatch() on the handle that patch() returned."
        )
    chosen = implementation(impl, model, info)
    if profile is not None and template not in (None, profile.template):
        raise ValueError(
            f"a template is for a profile that is still to be measured. Got {template}, and a profile that has "
            f"{profile.template}. Leave the template out, or calibrate with it and pass that profile."
        )
    if len(info.heads) < info.n_heads:
        require_agreement(info.attentions, profile and (profile.template, profile.categories.tolist()))
    if pruner is not None:
        info.require_all_heads("a pruner")
        if profile is None:
            raise ValueError(
                "a pruner needs a profile: prompts are measured whole. Got none, and none was found for this model. "
                "Make one with calibrate, or pass Profile.uniform(Category.DENSE, fingerprint(model)) to prune only."
            )
    if profile is None:
        info.require_all_heads("measuring the first prompts, for want of a profile,")
        mode: Mode = Freezer(info, print_, template or SinkTemplate(), measure_prompts, chosen, break_even)
        logger.warning(
            "found no profile of this model: looked %s; the first %d multi-image prompts run dense while they are "
            "measured",
            searched(print_, folder),
            measure_prompts,
        )
    else:
        mode = SparseMode(profile, chosen, info, break_even, source)
        if not given:
            logger.info("using the profile %s", source)
    handle = Handle(model, info, mode, chosen, pruner)
    handle.asked = asked
    handle.install()
    return handle
