"""The small model before training: a real Qwen2.5-VL configuration, a word-level tokenizer and the real processor."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from blindsight_cli.smallvlm.puzzles import COLORS, IMAGE_SIZE, SHAPES

PATCH_SIZE = 8
MERGE_SIZE = 2
MAX_IMAGES = 12
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // MERGE_SIZE) ** 2

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

# The index before each picture is what lets so small a model tell the pictures apart.
_CHAT_TEMPLATE = (
    "{{ '<|im_start|>' }}{% set ns = namespace(i=0) %}{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set ns.i = ns.i + 1 %}"
    "{{ ns.i }}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS` that lowercases and drops stop words and punctuation."""
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(_STOP_WORDS), "")])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=END,
        eos_token=TURN_END,
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[1:2] + SPECIAL[3:]),
        chat_template=_CHAT_TEMPLATE,
    )


def make_processor() -> Qwen2_5_VLProcessor:
    """The real Qwen2.5-VL processor; every picture is resized to about `IMAGE_TOKENS` tokens."""
    tokenizer = make_tokenizer()
    pixels = IMAGE_SIZE**2
    image_processor = Qwen2VLImageProcessor(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    video_processor = Qwen2VLVideoProcessor(patch_size=PATCH_SIZE, merge_size=MERGE_SIZE)
    return Qwen2_5_VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=_CHAT_TEMPLATE,
    )


def make_config() -> Qwen2_5_VLConfig:
    """About 1.4 M parameters: 6 layers of 8 query and 4 key/value heads, hidden size 128."""
    hidden = 128
    text = dict(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 3, 3]),
        bos_token_id=VOCAB[START],
        eos_token_id=VOCAB[TURN_END],
        pad_token_id=VOCAB[END],
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=2,
        hidden_size=96,
        intermediate_size=192,
        num_heads=4,
        patch_size=PATCH_SIZE,
        spatial_merge_size=MERGE_SIZE,
        temporal_patch_size=2,
        out_hidden_size=hidden,
        window_size=IMAGE_SIZE,
        fullatt_block_indexes=[0, 1],
        in_channels=3,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=VOCAB[IMAGE_PAD],
        video_token_id=VOCAB[VIDEO_PAD],
        vision_start_token_id=VOCAB[VISION_START],
        vision_end_token_id=VOCAB[VISION_END],
        tie_word_embeddings=True,
    )


def make_model() -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model; seed torch first for repeatable weights."""
    return Qwen2_5_VLForConditionalGeneration(make_config())
