"""The tile sizes that the Triton kernel runs with, by GPU generation, head dimension and element size."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Configuration:
    """How one kernel is compiled.

    Attributes:
        block_q: query rows of a tile at most.
        block_k: keys of a tile.
        num_warps: warps of a program.
        num_stages: tiles of K and V in flight.
        tma: whether keys and values come through tensor descriptors; through pointers if not.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool


# (generation, bytes of an element) -> head dimension -> tiles. Generation 80 fits the 99 KB of shared memory of every
# GPU since Ampere; 90 is Hopper, 100 data-centre Blackwell, both with 227 KB. What each uses: triton_resources.json;
# why these for Hopper: docs/triton-hopper.md.
_HOPPER = {
    16: Configuration(128, 128, 8, 3, True),
    32: Configuration(128, 128, 8, 3, True),
    64: Configuration(128, 128, 8, 3, True),
    128: Configuration(128, 128, 8, 2, True),
    256: Configuration(128, 64, 8, 2, True),
}
_BLACKWELL = {
    **_HOPPER,
    64: Configuration(128, 64, 8, 3, True),
    128: Configuration(128, 64, 8, 3, True),
    256: Configuration(128, 32, 8, 2, True),
}
_AMPERE = {
    16: Configuration(128, 64, 4, 3, False),
    32: Configuration(128, 64, 4, 3, False),
    64: Configuration(128, 64, 8, 2, False),
    128: Configuration(128, 64, 8, 2, False),
    256: Configuration(64, 32, 8, 2, False),
}
# Exact float32 products run without tensor cores: small tiles, for comparisons rather than for speed.
_EXACT = {
    16: Configuration(64, 32, 4, 2, False),
    32: Configuration(32, 32, 8, 2, False),
    64: Configuration(32, 32, 8, 1, False),
    128: Configuration(32, 16, 8, 2, False),
    256: Configuration(16, 16, 8, 1, False),
}
_TILES = {(80, 2): _AMPERE, (90, 2): _HOPPER, (100, 2): _BLACKWELL}
GENERATIONS = (80, 90, 100)
_TILES |= {(gpu, 4): _EXACT for gpu in GENERATIONS}


def generation(major: int) -> int:
    """The generation whose tiles suit a GPU of compute capability `major`.x; 80 if no other does."""
    return {9: 90, 10: 100}.get(major, 80)


def configuration(gpu: int, head_dim: int, element_size: int) -> Configuration:
    """The tiles for a GPU generation, a head dimension and an element size in bytes.

    Raises:
        NotImplementedError: the kernel has no tiles for this head dimension.
    """
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"the Triton kernel's head dimension must be one of {HEAD_DIMS}. Got {head_dim}. Pad q, k and v with zeros "
            "to the next of them, keeping the scale, or use the portable or reference implementation."
        )
    return _TILES[gpu, element_size][head_dim]
