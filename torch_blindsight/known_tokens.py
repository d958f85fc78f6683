"""What is behind a cache: the tokens of all forwards that filled it, so that a later turn's layout is known.

They are noted in an attribute of the cache. What becomes of the note, and how that is told:

    a forward of the patched model     goes on                       its hooks see it
    crop, or reset and filled anew     keeps what is left            the cache's length
    copy.deepcopy                      the copy has one, too         copied along with the keys
    written to by somebody else        forgotten                     the keys' version
    rows reordered                     forgotten                     the keys' storage
    rows repeated or selected          forgotten                     other keys, another number of rows
    pickled                            not in the pickle             nobody could tell whose keys come with it
    static, in inference mode          there is none                 writes are not counted there
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class Chunk:
    """What one forward added to a cache.

    Attributes:
        ids: `[B, T]` token ids.
        grids: `[n, 3]`, one row per video of all rows: its frame groups, height and width in patches.
        positions: mRoPE `[3 or 4, B, T]`; all that tells of frames where there are no grids.
    """

    ids: Tensor
    grids: Tensor | None = None
    positions: Tensor | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Chunk:
        """The new tokens of a forward. A decode step holds no video."""
        ids = arguments["input_ids"]
        if ids.shape[1] == 1:
            return cls(ids)
        return cls(ids, arguments.get("video_grid_thw"), arguments.get("position_ids"))

    def clone(self) -> Chunk:
        """A copy that nobody else can write into."""
        grids, positions = (None if x is None else x.clone() for x in (self.grids, self.positions))
        return Chunk(self.ids.clone(), grids, positions)

    def cut(self, n: int) -> Chunk:
        """Its first `n` tokens. Grids are listed for all rows together: whose are left is not known."""
        if n >= self.ids.shape[1]:
            return self
        return Chunk(self.ids[:, :n], None, None if self.positions is None else self.positions[..., :n])


# The attribute of a cache that holds its `_Known`; deep copies of the cache have their own.
_KNOWN = "_blindsight_tokens"


@dataclass
class _Known:
    """What is behind a cache: its tokens, how many, and the state of its first layer's keys when they were noted.

    Tokens stay on their device, so decode steps cost an append and no synchronization.
    """

    cache: ReferenceType[Any]
    chunks: list[Chunk]
    length: int
    keys: tuple[object, ...]

    def crop(self, length: int) -> None:
        """Drops what follows the first `length` tokens."""
        while self.length > length:
            last = self.chunks.pop()
            self.length -= last.ids.shape[1]
            if self.length < length:
                self.chunks.append(last.cut(length - self.length))
                self.length = length

    def __deepcopy__(self, memo: dict[int, Any]) -> _Known | None:
        """The copied cache's own, of the keys that were copied with it; None where those are not the ones noted."""
        cache = self.cache()
        copied = memo.get(id(cache))
        if copied is None or self.keys != _state_of(_keys_of(cache)):
            return None
        return _Known(ref(copied), list(self.chunks), self.length, _state_of(memo.get(id(_keys_of(cache)))))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None in a pickle: it cannot be told whose keys it came with."""
        return type(None), ()


def length_of(cache: Any) -> int:
    """Tokens in a cache; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def forget_changed(cache: Any) -> None:
    """Before a forward: forgets a cache that somebody wrote to, or whose rows they reordered; cropping does neither."""
    known: _Known | None = getattr(cache, _KNOWN, None)
    if known is not None and known.keys != _state_of(_keys_of(cache)):
        setattr(cache, _KNOWN, None)


def tokens_before(cache: Any, length: int) -> list[Chunk] | None:
    """The first `length` tokens of the cache, all that it holds; None where they did not all come through a patch."""
    known = _known(cache, length)
    return None if known is None else known.chunks


def note_tokens(cache: Any, length: int, chunk: Chunk) -> None:
    """After a forward: notes that a chunk now follows the first `length` tokens of the cache."""
    known = _known(cache, length) if length else _Known(ref(cache), [], 0, ())
    # With other rows than before, some were repeated or selected.
    if known is None or (length and len(known.chunks[0].ids) != len(chunk.ids)) or _untraceable(cache):
        setattr(cache, _KNOWN, None)
        return
    known.chunks.append(chunk.clone())  # a server may write its next prompt into the same tensors
    known.length, known.keys = length + chunk.ids.shape[1], _state_of(_keys_of(cache))
    setattr(cache, _KNOWN, known)


def _known(cache: Any, length: int) -> _Known | None:
    """What is behind a cache that has this length now; None where something of it is unknown."""
    known: _Known | None = getattr(cache, _KNOWN, None)
    if known is None or known.length < length:
        return None
    known.crop(length)
    return known


def _keys_of(cache: Any) -> Tensor | None:
    """The first layer's keys; None of a cache that does not show them."""
    return getattr(cache.layers[0], "keys", None) if getattr(cache, "layers", None) else None


def _untraceable(cache: Any) -> bool:
    """Whether nobody counts the writes to a cache: its keys are hidden, or static in inference mode."""
    keys = _keys_of(cache)
    return keys is None or (keys.is_inference() and getattr(cache, "is_compileable", False))


def _state_of(keys: Tensor | None) -> tuple[object, ...]:
    """The storage of keys, and how often it was written to."""
    if keys is None:
        return ()
    return StorageWeakRef(keys.untyped_storage()), None if keys.is_inference() else keys._version
