"""From files to what a model takes: checkpoint folders, pictures, and a question about them.

Only local files are read: a checkpoint is a folder, and nothing is looked up on any hub.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from blindsight_cli.errors import IncompatibleError
from shared_profiles import family_of

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_checkpoint(folder: Path, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Loads a checkpoint folder of a supported family.

    Args:
        folder: what `save_pretrained` wrote, or a downloaded snapshot.
        dtype: one of `DTYPES`; "auto" takes the checkpoint's own.
        device: where the model goes, for example "cpu" or "cuda".

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        IncompatibleError: the family is not supported, or a package that its processor needs is missing.
        ValueError: not a whole checkpoint folder.
        OSError: a file cannot be read.
    """
    return load_model(folder, dtype=dtype, device=device), load_processor(folder)


def load_model(folder: Path, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """The model of a checkpoint folder; see `load_checkpoint`."""
    check_family(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}. Got {dtype!r}.")
    transformers_logging.disable_progress_bar()
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: a weight file is damaged: {error}. Download or save the checkpoint again."
        ) from error
    # transformers makes up missing weights and carries on; answers and profile would be worthless.
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{folder} must hold all weights of its model. Missing: {len(missing)}, the first is {missing[0]}. "
            "Download or save the checkpoint again."
        )
    return model.eval().to(device)


def load_processor(folder: Path) -> Any:
    """The processor of a checkpoint folder; see `load_checkpoint`."""
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise IncompatibleError(
            f"{folder}: its processor cannot be loaded: {str(error).strip()} `blindsight doctor` shows what is missing."
        ) from error


def check_family(folder: Path) -> None:
    """Reads a checkpoint's `config.json` before any weights are.

    Raises:
        IncompatibleError: the family is not supported.
        ValueError: the folder holds no checkpoint.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"CHECKPOINT must be a folder with a config.json, as save_pretrained writes it or a hub snapshot has it. "
            f"Got {folder}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON. Got: {error}. Download or save the checkpoint again.") from error
    try:
        family_of(config if isinstance(config, dict) else {})
    except ValueError as error:
        raise IncompatibleError(f"{folder}: {error}") from error


def pick_device(name: str | None) -> str:
    """The device to run on: the named one, else a GPU if there is one, else the CPU.

    Raises:
        ValueError: torch does not know the device, or this machine has none.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"the device must exist on this machine, such as cpu or cuda. Got {name!r}: {reason}."
        ) from error
    return name


def load_image(path: Path) -> Image.Image:
    """A picture as RGB, turned as its camera says.

    Raises:
        ValueError: the file cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image must be a picture that Pillow can read. Got {path}: {_reason(error)}.") from error


def ask(processor: Any, images: Sequence[Image.Image], question: str, device: str = "cpu") -> dict[str, Tensor]:
    """What the model takes for one question: pictures first, then the text, in the checkpoint's own chat template.

    Args:
        processor: the checkpoint's.
        images: RGB pictures.
        question: the text.
        device: where the tensors go.

    Returns:
        `input_ids` `[1, N]`, `attention_mask` `[1, N]`, `pixel_values` and whatever else the family uses.

    Raises:
        ValueError: the processor has no chat template.
    """
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}


def _reason(error: Exception) -> str:
    """An error in a few words: what the system says of a file, or its own message."""
    return (isinstance(error, OSError) and error.strerror) or str(error).rstrip(".") or type(error).__name__
