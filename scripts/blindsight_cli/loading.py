"""From files to what a model takes: checkpoint folders, pictures, and a question about them and about videos.

Only local files are read: a checkpoint is a folder, and nothing is looked up on any hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from blindsight_cli.errors import IncompatibleError, install_advice, reason_of
from blindsight_cli.folders import AGAIN, check_family
from blindsight_cli.videos import Video

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
    except (RuntimeError, SafetensorError, StrictDataclassError) as error:  # sizes, files, config.json
        reason = " ".join(str(error).split()).rstrip(".!")
        raise ValueError(f"{folder} must hold a whole checkpoint. Got: {reason}. {AGAIN}") from error
    # transformers makes up missing weights and carries on; answers and profile would be worthless.
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{folder} must hold all weights of its model. Missing: {len(missing)}, the first is {missing[0]}. {AGAIN}"
        )
    return model.eval().to(device)


def load_processor(folder: Path) -> Any:
    """The processor of a checkpoint folder; see `load_checkpoint`."""
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer, image = processor.tokenizer, processor.image_token
        if tokenizer.convert_tokens_to_ids(image) == tokenizer.unk_token_id:  # transformers makes an empty one up
            raise ValueError(f"a tokenizer that does not know {image}")
        return processor
    except ImportError as error:  # the message goes on about how to install it
        reason = " ".join(str(error).split()).partition(" Check out")[0].rstrip(".")
        raise IncompatibleError(
            f"{folder}: its processor needs more packages: {reason}. {install_advice('torch')}"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} must hold the files of its processor (preprocessor_config.json or processor_config.json, the "
            f"tokenizer, the chat template) beside the weights. Got: {str(error).splitlines()[0]}"
        ) from error


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
        reason = str(error).splitlines()[0].rstrip(".!")
        raise ValueError(
            f"the device must exist on this machine, such as cpu or cuda. Got {name!r}: {reason}."
        ) from error
    return name


def load_image(path: Path) -> Image.Image:
    """A picture as RGB, turned as its camera says.

    Raises:
        ValueError: the file cannot be read as a picture.
    """
    with _open_image(path) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith("I;16"):  # Pillow's convert cuts off at 255: nearly all would be white
            turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
        return turned.convert("RGB")


def check_image(path: Path) -> None:
    """Looks at the beginning of a picture's file only.

    Raises:
        ValueError: it does not begin like a picture, or like one whose pixels are no colours.
    """
    with _open_image(path):
        pass


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """An open picture; whatever goes wrong with it is a ValueError that names it."""
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):  # Pillow's convert would make them all black or white
                raise ValueError("its pixels are 32-bit numbers, none of which is known to be white. Save 8 or 16 bits")
            yield image
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image must be a picture that Pillow can read. Got {path}: {reason_of(error)}.") from error


def ask(
    processor: Any, images: Sequence[Image.Image], question: str, device: str = "cpu", videos: Sequence[Video] = ()
) -> dict[str, Tensor]:
    """What the model takes for one question: pictures, videos, then the text, in the checkpoint's own chat template.

    Args:
        processor: the checkpoint's.
        images: RGB pictures.
        question: the text.
        device: where the tensors go.
        videos: their frames, as `load_video` reads them for this processor.

    Returns:
        `input_ids` `[1, N]`, `attention_mask` `[1, N]`, `pixel_values` and whatever else the family uses.

    Raises:
        ValueError: the question has tokens that stand for pictures, the processor takes no such question, picture
            or video, or its chat template is missing or leaves videos out.
    """
    names = ("image_token", "video_token", "boi_token")
    if held := [token for name in names if (token := getattr(processor, name, None)) and token in question]:
        raise ValueError(
            f"a question must be without the tokens that stand for pictures and videos. Got {', '.join(held)} in it. "
            "Take them out."
        )
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": video.frames} for video in videos]
    chosen = {"video_metadata": [video.metadata for video in videos], "do_sample_frames": False} if videos else {}
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    try:
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=chosen,
        )
    except (LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:  # not all of them say why
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(
            f"the checkpoint's processor must take the question and what it is about. Got: {reason}. "
            "Change the prompt, or leave it out."
        ) from error
    if videos and not (inputs["input_ids"] == processor.video_token_id).any():
        raise ValueError("the checkpoint's chat template must put videos into the prompt. It leaves them out.")
    return {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
