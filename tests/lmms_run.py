"""Runs models of lmms-eval's registry on a few requests; prints what they did as JSON.

    python lmms_run.py JOBS.json      [{"model": ..., "simple": true, "arguments": "pretrained=...", "images": [[...]]}]

A process of its own: lmms-eval and what it needs lie outside the environment that everything else is tested in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lmms_eval import models
from lmms_eval.api.instance import Instance
from PIL import Image

QUESTION = "Is the color of images 1 and 2 the same?"


def request(i: int, chat: bool, images: list[Image.Image]) -> Instance:
    """A request as lmms-eval's tasks make them."""
    settings = {"max_new_tokens": 4}

    def visuals(doc: Any) -> list[Image.Image]:
        return images

    def messages(doc: Any) -> list[dict[str, Any]]:
        pictures = [{"type": "image", "url": image} for image in images]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": QUESTION}]}]

    arguments = (QUESTION, messages, settings) if chat else (QUESTION, settings, visuals)
    return Instance(
        request_type="generate_until",
        arguments=(*arguments, i, "task", "test"),
        idx=0,
        metadata={"task": "task", "doc_id": i, "repeats": 1},
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One model: its class, its answers, and what its handle counted, if it has one."""
    cls = models.get_model(job["model"], job["simple"])
    try:
        model = cls.create_from_arg_string(job["arguments"])
    except ValueError as error:
        return {"error": str(error)}
    model.task_dict = {"task": {"test": list(range(len(job["images"])))}}
    pictures = [[Image.open(path).convert("RGB") for path in paths] for paths in job["images"]]
    answers = model.generate_until([request(i, not model.is_simple, images) for i, images in enumerate(pictures)])
    handle = getattr(model, "handle", None)
    return {
        "bases": [base.__module__ for base in cls.__mro__],
        "answers": [getattr(answer, "text", answer) for answer in answers],
        "forwards": None if handle is None else handle.report()["forwards"],
    }


if __name__ == "__main__":
    results = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print("\n" + json.dumps({"models": models.list_available_models(), "results": results}))
