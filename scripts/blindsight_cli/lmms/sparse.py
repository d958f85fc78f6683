"""What makes a model class of lmms-eval prefill sparsely.

lmms-eval knows the attention implementations by name and refuses any other, so its class loads the model as always, and
the loaded model is patched.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from loguru import logger

from torch_blindsight import Handle, patch


class Sparse:
    """To be inherited before a model class of lmms-eval.

    Args:
        profile: path of the profile; default: the one that `patch` finds for this very model.
        arguments: of lmms-eval's class.

    Raises:
        ValueError: there is no profile; without one the first prompts would be measured, not answered sparsely.
        ProfileError: the profile is damaged or of another model.
    """

    model: Any

    def __init__(self, profile: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Sparse however short the prompt: it is the sparse answer that is to be judged.
        self.handle: Handle = patch(self.model, profile, break_even=False)
        if self.handle.profile is None:
            self.handle.unpatch()
            raise ValueError(
                "a sparse model needs a profile. Found none. Run `blindsight calibrate` on the checkpoint, or add "
                "profile=FILE to --model_args."
            )

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The answers of lmms-eval's class; says how many prefills were sparse."""
        before = Counter(self.handle.report()["forwards"])
        answers = super().generate_until(requests)  # type: ignore[misc]  # of the class inherited after this one
        ran = Counter(self.handle.report()["forwards"]) - before
        del ran["dense: decode step"]
        told = ", ".join(f"{count} {how}" for how, count in ran.most_common())
        logger.log("INFO" if ran["sparse"] else "WARNING", f"prefills of {len(requests)} requests: {told}")
        return answers
