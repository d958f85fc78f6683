"""Untrained checkpoint folders of every family with their real processors, pictures and prompt files to feed them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

import tiny_models
from blindsight_cli.smallvlm import build
from blindsight_cli.smallvlm.puzzles import make_puzzle

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<start>", "<end>", "<image>", "<video>")  # ids as in tiny_models
_VOCABULARY = 96
_SIDE = 32  # pixels: 8 x 8 patches


def save_checkpoint(folder: Path, family: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """Saves a random model and its processor; the family's Qwen2.5-VL is the small model before training."""
    if family == "qwen2_5_vl":
        torch.manual_seed(seed)
        model, processor = build.make_model(), build.make_processor()
    else:
        model, processor = tiny_models.make_model(family, seed), make_processor(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_prompts(folder: Path, images: tuple[int, ...] = (2, 3, 1, 4)) -> Path:
    """Saves a prompt file and its pictures, one prompt per number of images."""
    lines = []
    for seed, n_images in enumerate(images):
        puzzle = make_puzzle(max(n_images, 2), seed)
        names = [f"{seed}-{i}.png" for i in range(n_images)]
        for name, picture in zip(names, puzzle.images, strict=False):
            picture.save(folder / name)
        lines.append(json.dumps({"images": names, "question": puzzle.question.text, "answer": puzzle.question.answer}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_processor(family: str) -> Any:
    """A word-level tokenizer and the family's own picture processing."""
    words = (*_SPECIAL, "<unk>", *["what", "color", "shape", "is", "image", "the", "same", "?", "1", "2", "3", "4"])
    words += tuple(f"w{i}" for i in range(_VOCABULARY - len(words)))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin = "<start>" if family == "gemma3" else "<start><image><end>"
    template = (
        "<bos> {% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
        + begin
        + "{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    names = dict(boi_token="<start>", eoi_token="<end>", image_token="<image>", video_token="<video>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=names | {"vision_bos_token": "<start>", "vision_eos_token": "<end>"},
    )
    if family == "gemma3":
        pictures = Gemma3ImageProcessor(size={"height": _SIDE, "width": _SIDE})
        return Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=tiny_models.IMAGE_TOKENS)
    patches = dict(patch_size=4, merge_size=2)
    size = {"shortest_edge": _SIDE**2, "longest_edge": _SIDE**2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches),
        chat_template=template,
    )
