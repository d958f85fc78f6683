"""What our kernel is compared with, all of it inside PyTorch: cuDNN, FlexAttention, and `varlen_attn` in two calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from blindsight_gpu.measure import Place
from blindsight_gpu.prompts import TEMPLATE, RowTables, row_tables
from shared_profiles import Category, Layout
from shared_profiles.plan import packed_positions

_BLOCK = 128  # FlexAttention's default, rows and keys
_MOST_REPEATED = 16 << 30  # bytes of keys and values that the varlen composition may repeat


class DoesNotFit(Exception):
    """A peer cannot run this case; the message says why, for the table."""


def causal_dense(q: Tensor, k: Tensor, v: Tensor, place: Place) -> tuple[Tensor, str]:
    """Causal attention by torch's fastest kernel, and which that was: `[B, H, T, D]`."""
    if place.dry_run:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), "SDPA on the CPU"
    for backend, name in ((SDPBackend.CUDNN_ATTENTION, "cuDNN SDPA"), (SDPBackend.FLASH_ATTENTION, "flash SDPA")):
        try:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), name
        except RuntimeError as error:  # it does not take this head dimension, or takes it and finds no plan
            if not any(words in str(error) for words in ("vailable kernel", "cuDNN Frontend error")):
                raise
    raise DoesNotFit(f"neither cuDNN nor flash takes {tuple(q.shape)} in {q.dtype}")


class Flex:
    """FlexAttention with exactly our masks, its block mask built once per prompt and profile.

    The block mask is built here from the masks' rows, a block of rows at a time: torch's own `create_block_mask` asks
    for an N x N boolean tensor, 90 GB at 300K tokens.

    Args:
        layout, categories: the masks, one a head.
        place: where.
        rows: positions of the queries, a multiple of 128 of them; default all.

    Attributes:
        mask_seconds: what building the block mask took.
        mask_bytes: of its index tensors.
    """

    def __init__(
        self, layout: Layout, categories: Sequence[Category], place: Place, rows: Tensor | None = None
    ) -> None:
        begun = time.perf_counter()
        if rows is None:
            rows = torch.arange(layout.n_tokens, device=place.device)
        distinct = sorted(set(categories))
        tables = [row_tables(layout, category, place.device) for category in distinct]
        of_head = [distinct.index(category) for category in categories]
        if len(distinct) == 1:
            of_head = [0]  # one mask, broadcast over the heads
        index = torch.tensor(of_head, device=place.device)
        columns = zip(*((t.oldest[rows], t.newest[rows], t.packed) for t in tables), strict=True)
        oldest, newest, packed = (torch.stack(x)[index] for x in columns)  # [H, T], [H, T], [H, N]
        last = len(of_head) - 1

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            h = torch.clamp(h, max=last)
            return (k <= newest[h, q]) & ((k >= oldest[h, q]) | packed[h, k])

        blocks = [_blocks(table, rows) for table in tables]
        partial, full = (torch.stack(x)[index][None] for x in zip(*blocks, strict=True))  # [1, H, n_q, n_k] bool
        self._mask = BlockMask.from_kv_blocks(
            *_listed(partial), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=mask_mod,
            seq_lengths=(len(rows), layout.n_tokens), compute_q_blocks=False,
        )  # fmt: skip
        self._attend = _compiled() if not place.dry_run else flex_attention
        if not place.dry_run:
            torch.cuda.synchronize()
        self.mask_seconds = time.perf_counter() - begun
        mask = self._mask
        tensors = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
        self.mask_bytes = sum(x.nbytes for x in tensors if x is not None)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, H, T, D]`."""
        out: Any = self._attend(q, k, v, block_mask=self._mask, enable_gqa=True)
        return out


@cache
def _compiled() -> Any:
    torch._dynamo.config.recompile_limit = 64  # one compilation per length and profile: dynamic shapes run slower
    return torch.compile(flex_attention, dynamic=False)


def _blocks(tables: RowTables, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of rows sees in part, and which whole: `[n_q, n_k]` bool each."""
    some, every = [], []
    for block in rows.split(_BLOCK):
        seen = tables.visible(block).view(_BLOCK, -1, _BLOCK)
        some.append(seen.any(2).any(0))
        every.append(seen.all(2).all(0))
    full = torch.stack(every)
    return torch.stack(some) & ~full, full


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`[1, H, n_q, n_k]` bool -> how many `[1, H, n_q]` and which, those first `[1, H, n_q, n_k]`, both int32."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


class VarlenComposition:
    """`varlen_attn` per image and on the packed keys, a merge by log-sum-exp, and FlexAttention for the text.

    All rows, as our kernel: `varlen_attn` cannot serve rows of text, which see the whole past. The packed keys of each
    image are a longer prefix than the last one's, so they must be repeated; that is done once a call, as packing is for
    our kernel.
    """

    def __init__(
        self, layout: Layout, category: Category, place: Place, *, kv_heads: int, dim: int, bytes_each: int
    ) -> None:
        if category not in (Category.INTRA_IMAGE, Category.INTRA_IMAGE_SINK):
            raise DoesNotFit("composed for Intra-Image and Intra-Image+Sink only")
        packed = packed_positions(layout, category, TEMPLATE)
        begin, last = layout.images[:, 0], layout.images[:, 2]
        n_seen = np.searchsorted(packed, begin)
        size = 2 * int(n_seen.sum()) * kv_heads * dim * bytes_each
        if size > _MOST_REPEATED:
            raise DoesNotFit(f"its repeated prefixes of packed keys take {size / 2**30:.0f} GiB")
        # Segments: every image with its start delimiter, and what stands between two: that looks at itself and, for no
        # segment may be empty, at one packed key.
        edges = np.unique(np.concatenate([[0], begin, last, [layout.n_tokens]]))
        is_image = np.isin(edges[:-1], begin)
        n_keys = np.ones(len(edges) - 1, dtype=np.int64)
        n_keys[is_image] = n_seen
        index = np.concatenate([packed[:n] for n in n_keys])
        self._causal = not layout.bidirectional
        self._edges, self._longest = _on(edges, place), int(np.diff(edges).max())
        self._packed_edges = _on(np.concatenate([[0], np.cumsum(n_keys)]), place)
        self._most_packed, self._index = int(n_keys.max()), torch.from_numpy(index).to(place.device)
        self._merge = torch.compile(_merge, dynamic=False)
        text = layout.textual_rows
        n_rows = -(-len(text) // _BLOCK) * _BLOCK
        self._text = torch.from_numpy(np.pad(text, (0, n_rows - len(text)), mode="edge")).to(place.device)
        self._of_text = Flex(layout, [category], place, self._text)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[1, H, N, D]` -> `[N, H, D]`."""
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        of_text = self._of_text(q[:, :, self._text], k, v)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [N, H, D]
        window = (-1, 0) if self._causal else (-1, -1)
        one, one_lse = varlen_attn(
            q, k, v, self._edges, self._edges, self._longest, self._longest,
            return_aux=AuxRequest(lse=True), window_size=window,
        )  # fmt: skip
        two, two_lse = varlen_attn(
            q, k[self._index], v[self._index], self._edges, self._packed_edges, self._longest, self._most_packed,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        out = self._merge(one, one_lse, two, two_lse)
        out[self._text] = of_text[0].transpose(0, 1)
        return out


def _on(array: np.ndarray, place: Place) -> Tensor:
    return torch.from_numpy(array).to(place.device, torch.int32)


def _merge(one: Tensor, one_lse: Tensor, two: Tensor, two_lse: Tensor) -> Tensor:
    """`[N, H, D]` twice, with log-sum-exps `[H, N]` -> `[N, H, D]`."""
    weight = torch.sigmoid(one_lse - two_lse).T[..., None]
    return (one.float() * weight + two.float() * (1 - weight)).to(one.dtype)
