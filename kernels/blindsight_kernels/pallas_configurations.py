"""The tile sizes that the Pallas kernel runs with on Hopper, by head dimension; the same for bfloat16 and float16."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """How one kernel is compiled. A tile of queries always has 128 rows, 64 for each of two compute warpgroups.

    Attributes:
        block_k: keys of a tile.
        stages: tiles of K and of V in flight.
    """

    block_k: int
    stages: int

    def shared_memory(self, head_dim: int) -> int:
        """Bytes of shared memory of the tiles of 16-bit Q, K and V; barriers and sums take about 3 KB more."""
        return (128 + 2 * self.stages * self.block_k) * head_dim * 2


# As many keys as registers and the 227 KB of shared memory allow; what each uses: pallas_resources.json.
_TILES = {64: Configuration(128, 4), 128: Configuration(128, 3), 256: Configuration(64, 2)}
HEAD_DIMS = tuple(_TILES)
SHARED_MEMORY = 227 * 1024  # bytes that a block may use on Hopper


def configuration(head_dim: int) -> Configuration:
    """The tiles for a head dimension.

    Raises:
        NotImplementedError: the kernel has no tiles for this head dimension.
    """
    if head_dim not in _TILES:
        raise NotImplementedError(
            f"the Pallas kernel's head dimension must be one of {HEAD_DIMS}. Got {head_dim}. Pad q, k and v with zeros "
            "to the next of them, keeping the scale, or use the portable implementation."
        )
    return _TILES[head_dim]
