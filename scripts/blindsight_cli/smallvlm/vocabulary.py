"""What the small models read and write: one vocabulary of words, and how a chat becomes tokens.

A prompt of two pictures, in every family::

    <|im_start|> 1 <|vision_start|> <|image_pad|> x 16 <|vision_end|> 2 <|vision_start|> ... <|vision_end|> color 2

The number before each picture is what lets so small a model tell the pictures apart.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blindsight_cli.smallvlm.puzzles import COLORS, SHAPES

MAX_IMAGES = 12

END, START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (END, START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
WORDS = (
    *SPECIAL,
    "<unk>",
    *("color", "shape", "first", "many", "same", "yes", "no", "none"),
    *(str(i) for i in range(MAX_IMAGES + 1)),
    *COLORS,
    *SHAPES,
)
VOCAB = {word: i for i, word in enumerate(WORDS)}

# Words that carry nothing here; punctuation goes with them.
_STOP_WORDS = r"\b(what|which|how|is|are|do|have|has|the|a|an|of|and|in|image|images|picture|pictures)\b|[?.,!]"

_CHAT_TEMPLATE = (
    "{{ '<|im_start|>' }}{% set ns = namespace(i=0) %}{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set ns.i = ns.i + 1 %}"
    "{{ ns.i }}PICTURE"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def chat_template(picture: str, video: str | None = None) -> str:
    """The chat template of a family whose processor looks for these texts where a picture and a video go."""
    more = "" if video is None else f"{{% elif part.type == 'video' %}}{video}"
    return _CHAT_TEMPLATE.replace("PICTURE", picture + more)


def make_tokenizer(template: str, **names: Any) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS` that lowercases and drops stop words and punctuation.

    Args:
        template: the chat template.
        names: the special tokens beyond padding, end of turn and unknown, as this family's processor asks for them.
    """
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(_STOP_WORDS), "")])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=END,
        eos_token=TURN_END,
        unk_token="<unk>",
        chat_template=template,
        **names,
    )
