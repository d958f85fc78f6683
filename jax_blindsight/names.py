"""Names of weights: which tensor of a checkpoint each leaf of the model's tree is, as one table per family.

A row maps a module of `jax_blindsight.model` to the module on disk; its parameters follow from their kind:

    decoder.layers.7.attention.q_proj . kernel   <->   model.layers.7.self_attn.q_proj . weight, transposed

Names on disk are those of the checkpoints on the hub. Whatever else was or is written for the same tensor (names in
memory since transformers 4.52, the SigLIP tower of 5.x without its wrapper) is respelled to them first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jax_blindsight.config import ModelConfig, QwenVisionConfig

# Last part of a leaf's path -> last part of the name on disk, and whether the matrix there is [out, in].
_KINDS = {
    "kernel": ("weight", True),
    "bias": ("bias", False),
    "scale": ("weight", False),
    "embedding": ("weight", False),
}

_PATCHES = "vision.patch_embed.kernel"


@dataclass(frozen=True)
class Source:
    """The tensor on disk that fills a leaf.

    Attributes:
        name: as the hub's checkpoints have it.
        shape: on disk.
        transposed: the leaf is `x.reshape(len(x), -1).T`, `[out, ...]` to `[in, out]`; else the tensor itself.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class Names:
    """The names of one family.

    Attributes:
        modules: module of the tree -> module on disk; `{}` stands for the number of a layer or block.
        parameters: leaf of the tree -> its whole name on disk, where the rule of kinds does not hold. As it is.
        spellings: (pattern, replacement), the first that matches at the start of a name is applied: other spellings to
            those of the table.
        unused: patterns of tensors that the model never reads.
        head: the name of the logits' projection, which a checkpoint with tied embeddings may hold as a copy.
    """

    modules: Mapping[str, str]
    parameters: Mapping[str, str]
    spellings: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    head: str

    def respell(self, name: str) -> str:
        """A name on disk as the table spells it."""
        for pattern, replacement in self.spellings:
            respelled, found = re.subn(rf"\A(?:{pattern})", replacement, name)
            if found:
                return respelled
        return name

    def is_unused(self, name: str) -> bool:
        """Whether the model never reads this (respelled) tensor."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)

    def source(self, path: str, shape: tuple[int, ...], config: ModelConfig) -> Source:
        """The tensor that fills a leaf.

        Args:
            path: the leaf's, joined by dots.
            shape: the leaf's.
            config: the model's configuration.

        Raises:
            KeyError: the table has no row for this leaf.
        """
        pattern, number = re.sub(r"\.(\d+)\.", ".{}.", path), re.findall(r"\.(\d+)\.", path)
        if pattern in self.parameters:
            return Source(self.parameters[pattern], shape, False)
        module, _, kind = pattern.rpartition(".")
        suffix, transposed = _KINDS[kind]
        name = f"{self.modules[module]}.{suffix}".format(*number)
        if path == _PATCHES:
            return Source(name, _patch_shape(config), True)
        return Source(name, shape[::-1] if transposed else shape, transposed)


def _patch_shape(config: ModelConfig) -> tuple[int, ...]:
    """The convolution on disk that embeds patches: `[out, channels, (frames,) rows, columns]`."""
    vision = config.vision
    frames = (vision.temporal_patch_size,) if isinstance(vision, QwenVisionConfig) else ()
    return (vision.hidden_size, vision.in_channels, *frames, vision.patch_size, vision.patch_size)


def _decoder(root: str, norms: Mapping[str, str]) -> dict[str, str]:
    """Rows of a decoder under `root`; `norms` of a layer: ours -> on disk."""
    layer = {f"attention.{x}": f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    layer |= {f"mlp.{x}": f"mlp.{x}" for x in ("gate_proj", "up_proj", "down_proj")} | dict(norms)
    rows = {f"decoder.layers.{{}}.{ours}": f"{root}.layers.{{}}.{disk}" for ours, disk in layer.items()}
    return rows | {"decoder.embed_tokens": f"{root}.embed_tokens", "decoder.norm": f"{root}.norm"}


def _blocks(root: str, rows: Mapping[str, str]) -> dict[str, str]:
    """Rows of a vision tower's blocks under `root`."""
    return {f"vision.blocks.{{}}.{ours}": f"{root}.{{}}.{disk}" for ours, disk in rows.items()}


def _qwen(mlp: tuple[str, ...]) -> Names:
    block = {"norm1": "norm1", "norm2": "norm2", "attention.qkv": "attn.qkv", "attention.proj": "attn.proj"}
    return Names(
        modules={
            **_decoder("model", {"pre_attention_norm": "input_layernorm", "pre_mlp_norm": "post_attention_layernorm"}),
            "decoder.lm_head": "lm_head",
            "vision.patch_embed": "visual.patch_embed.proj",
            **_blocks("visual.blocks", block | {f"mlp.{x}": f"mlp.{x}" for x in mlp}),
            "vision.merger.norm": "visual.merger.ln_q",
            "vision.merger.mlp.fc1": "visual.merger.mlp.0",
            "vision.merger.mlp.fc2": "visual.merger.mlp.2",
        },
        parameters={},
        spellings=((r"model\.language_model\.", "model."), (r"model\.visual\.", "visual.")),
        unused=(),
        head="lm_head.weight",
    )


def _gemma3() -> Names:
    tower = "vision_tower.vision_model"
    block = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attention.proj": "self_attn.out_proj"}
    block |= {f"attention.{x}": f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj")}
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }
    return Names(
        modules={
            **_decoder("language_model.model", norms),
            "decoder.lm_head": "language_model.lm_head",
            "vision.patch_embed": f"{tower}.embeddings.patch_embedding",
            "vision.position_embed": f"{tower}.embeddings.position_embedding",
            **_blocks(f"{tower}.encoder.layers", block | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}),
            "vision.norm": f"{tower}.post_layernorm",
            "vision.projector.norm": "multi_modal_projector.mm_soft_emb_norm",
        },
        parameters={"vision.projector.linear.kernel": "multi_modal_projector.mm_input_projection_weight"},
        spellings=(
            (r"model\.language_model\.", "language_model.model."),
            (r"lm_head\.", "language_model.lm_head."),
            (r"(model\.)?vision_tower\.(vision_model\.)?", f"{tower}."),
            (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        ),
        # The pooling head of SigLIP, which image features do not pass through.
        unused=(rf"{tower}\.head\..*",),
        head="language_model.lm_head.weight",
    )


NAMES = {
    "qwen2_vl": _qwen(("fc1", "fc2")),
    "qwen2_5_vl": _qwen(("gate_proj", "up_proj", "down_proj")),
    "gemma3": _gemma3(),
}
"""The names of every family, by `ModelConfig.family`."""
