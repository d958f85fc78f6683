"""A prompt of videos and a picture for the tiny Qwen models, made by the family's real processor."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor

from tiny_checkpoints import make_processor

_PROCESSORS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}
_TEXT = "<bos> w1 <start><video><end> w2 <start><image><end> w3 w4 <start><video><end> w5"
FRAMES = [[3, 24, 24], [2, 32, 40]]  # groups of two frames, height and width in pixels
ROWS = [  # begin, first, last, end of every picture: 3 frame groups of 9 tokens, a still one of 16, 2 groups of 20
    *[[2, 3, 12, 12], [12, 12, 21, 21], [21, 21, 30, 31]],
    [32, 33, 49, 50],
    *[[52, 53, 73, 73], [73, 73, 93, 94]],
]


def make_film_inputs(family: str) -> dict[str, torch.Tensor]:
    """The whole prompt, 95 tokens; the first video has an odd number of frames, so its last is doubled."""
    parts, rng = make_processor("qwen2_vl"), np.random.default_rng(0)
    processor = _PROCESSORS[family](parts.image_processor, parts.tokenizer, parts.video_processor)
    films = [rng.integers(0, 256, (2 * t - (t == 3), h, w, 3), np.uint8) for t, h, w in FRAMES]
    return dict(
        processor(
            text=[_TEXT],
            images=[rng.integers(0, 256, (32, 32, 3), np.uint8)],
            videos=films,
            videos_kwargs=dict(
                size={"shortest_edge": 24 * 24, "longest_edge": 32 * 40},
                video_metadata=[dict(total_num_frames=len(x), fps=1, frames_indices=range(len(x))) for x in films],
                cap_pixels_per_frame=False,
            ),
            return_tensors="pt",
        )
    )
