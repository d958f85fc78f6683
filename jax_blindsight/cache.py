"""The key/value cache of a batch, with what is needed to go on from it: its tokens, images and positions.

Slots are prompt positions. All rows end together, so padding stands on the left and a row's tokens are
`[start[b], length)`:

    slot      0 1 2 3 4 5 6 7 | 8 9 ...          capacity S, a bucket
    row 0     . . a b c d e f |                  start 2
    row 1     g h i j k l m n |                  start 0, length 8
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np

from jax_blindsight.params import Params
from jax_blindsight.tokens import Tokens
from shared_profiles import SpecialTokens

# What a placeholder becomes that the model wrote: no image stands behind it, so it is text like any other.
WRITTEN_PLACEHOLDER = -1


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of the tokens so far. `sparse_prefill` makes it; it and `decode_step` go on from it.

    Whoever goes on from a cache consumes it: its buffers become those of the returned one. To go on from one twice,
    copy it first, by `copy.deepcopy`. Calls that refuse what they are given consume nothing; a `write` that runs out of
    slots has.

    Attributes:
        keys, values: one array per layer, `[B, K, S, D]`, rotary position applied; slots from `length` on are unset.
        length: slots in use.
        next_position: `[B]` int32, the rotary position of the token that the model writes next.
        next_piece: `[B]` int32, that from which a further prefill counts: after a written token the same, but the rest
            of a prompt with a video may begin earlier, see `positions.py`.
        prefilled: the tokens that prefills brought.
        written: one array `[B]` per decode step since.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: int
    next_position: np.ndarray
    next_piece: np.ndarray
    prefilled: Tokens
    written: tuple[jax.Array | np.ndarray, ...] = ()

    @property
    def capacity(self) -> int:
        """S, slots in all."""
        return self.keys[0].shape[2]

    @property
    def batch(self) -> int:
        """B, rows."""
        return self.keys[0].shape[0]

    @property
    def valid(self) -> np.ndarray:
        """`[B, length]` bool, False for padding."""
        return np.arange(self.length) >= self.prefilled.start[:, None]

    def tokens(self, special: SpecialTokens) -> Tokens:
        """All tokens in the cache, those of decode steps included."""
        if not self.written:
            return self.prefilled
        ids = np.stack([np.asarray(x) for x in self.written], axis=1).astype(np.int64)  # [B, n]
        ids[np.isin(ids, special.placeholders)] = WRITTEN_PLACEHOLDER
        return self.prefilled.followed_by(Tokens.text(ids), special)

    def require_room(self, params: Params, n: int) -> None:
        """Demands that a model can write `n` more tokens.

        Raises:
            ValueError: the cache is full, was consumed, lies on the host, or is of another model.
        """
        arrays = *self.keys, *self.values
        if not all(isinstance(array, jax.Array) for array in arrays):
            raise ValueError(
                "keys and values must be arrays of JAX. Got others, as jax.device_get makes them. Go on from "
                "dataclasses.replace(cache, keys=jax.device_put(cache.keys), values=jax.device_put(cache.values))."
            )
        if any(array.is_deleted() for array in arrays):  # one that NumPy looks at is left
            raise ValueError(
                "a cache can be gone on from once. Got one that was consumed already: use the cache that "
                "sparse_prefill or decode_step returned last."
            )
        text, table = params.config.text, params.weights["decoder"]["embed_tokens"]["embedding"]
        wanted = text.n_layers, text.n_kv_heads, text.head_dim, table.dtype.name
        given = len(self.keys), self.keys[0].shape[1], self.keys[0].shape[3], self.keys[0].dtype.name
        if given != wanted:
            raise ValueError(
                "the cache must be of this model, layers, kv heads, head dimension and dtype being "
                f"{wanted}. Got one of {given}. Go on with the params that it was made with."
            )
        if self.length + n > self.capacity:
            raise ValueError(
                f"length + new tokens must be at most the cache's capacity of {self.capacity} slots. Got {self.length} "
                f"+ {n}. Prefill with capacity={self.length + n} or more."
            )

    def after_step(
        self, keys: tuple[jax.Array, ...], values: tuple[jax.Array, ...], tokens: jax.Array | np.ndarray
    ) -> Cache:
        """The cache with one more token per row."""
        return replace(
            self,
            keys=keys,
            values=values,
            length=self.length + 1,
            next_position=self.next_position + 1,
            next_piece=self.next_position + 1,
            written=(*self.written, tokens),
        )
