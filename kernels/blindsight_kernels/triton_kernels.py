"""The Triton kernels: prefill attention of a whole layer in one launch, and the merge of what it computed in parts.

The kernel knows no category. A program reads one tile of the work list (`triton_work.py`) and walks what it says:
packed keys, then one range of ordinary keys, each first without masks and then, where rows differ, with them. Four
loops with no branch inside, so that Triton pipelines each. Keys and values come through tensor descriptors (TMA from
Hopper on), which start at any row and read zeros beyond the prompt. In the
code `p_` marks a pointer, `o_` offsets, `m_` a mask; the rest are named as in the papers.
"""

from __future__ import annotations

MINIMUM_TRITON = (3, 6)
_WITHOUT = "the portable and reference implementations need no Triton"
try:
    import triton
    import triton.language as tl
    import triton.tools.tensor_descriptor
except ImportError as error:
    raise ImportError(
        f"the Triton kernel needs triton {MINIMUM_TRITON[0]}.{MINIMUM_TRITON[1]} or later. It could not be imported: "
        f"{error}. Install it (pip install 'triton>=3.6'; PyTorch for CUDA on Linux brings it), or: {_WITHOUT}."
    ) from error
if tuple(map(int, triton.__version__.split(".")[:2])) < MINIMUM_TRITON:
    raise ImportError(
        f"the Triton kernel needs triton {MINIMUM_TRITON[0]}.{MINIMUM_TRITON[1]} or later. Got {triton.__version__}. "
        f"Upgrade it together with PyTorch, or do without: {_WITHOUT}."
    )


# A launch option: products are added in one instruction, which Triton 3.9 warns of and 3.10 does only if asked.
FP_FUSION = True
# Stands for minus infinity: a row that is denied a whole tile stays finite, and its weights there vanish later.
_NEVER = tl.constexpr(-1e30)
# Before any window: the position of a packed key beyond the end of its slice.
_NOWHERE = tl.constexpr(-(2**31) + 1)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _tile(source, batch, head, row, end, BLOCK_K: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Rows `row ..` of one head of keys or values: `[BLOCK_K, D]`. `end`: do not read from there on; None: read all."""
    if TMA:
        tile = source.load([batch, head, row, 0]).reshape(BLOCK_K, D)
    else:
        o_k = tl.arange(0, BLOCK_K)
        o_d = tl.arange(0, D)
        o_row = batch.to(tl.int64) * source[1] + head.to(tl.int64) * source[2] + row.to(tl.int64) * source[3]
        p_tile = source[0] + o_row + o_k[:, None] * source[3] + o_d[None, :]
        if end is None:  # noqa: SIM108 (Triton decides it at compile time)
            tile = tl.load(p_tile)
        else:
            tile = tl.load(p_tile, mask=(row + o_k < end)[:, None], other=0.0)
    return tile


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """`a @ b + c` in float32."""
    if _INTERPRETED:  # Triton 3.6's interpreter would multiply the bit patterns of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Float32 in the dtype of the values, rounded to nearest."""
    if _INTERPRETED and dtype == tl.bfloat16:  # Triton 3.6's interpreter would truncate
        x = x.to(dtype, fp_downcast_rounding="rtne")
    return x.to(dtype)


@triton.jit
def _scores(q, k, PRECISION: tl.constexpr):
    """Scores of queries and keys, not scaled: `[BLOCK_Q, BLOCK_K]` float32."""
    return _dot(q, k.T, tl.zeros([q.shape[0], k.shape[0]], tl.float32), PRECISION)


@triton.jit
def _update(acc, l_i, m_i, s, scale, v, PRECISION: tl.constexpr):
    """One step of the online softmax, in powers of two: scores `s * scale` `[BLOCK_Q, BLOCK_K]`, values `v`."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    p = tl.math.exp2(s * scale - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = _dot(_narrow(p, v.dtype), v, acc * alpha[:, None], PRECISION)
    return acc, l_i, m_new


@triton.jit
def _rows(p_tile, rows_ptr, q_start, BLOCK_Q: tl.constexpr):
    """Positions of a tile's rows, their indices among the queries in int64, and which of them exist.

    Loads are volatile so that the compiler computes all this again for the store, after the loops, rather than keep
    it in registers that a wide head has not.
    """
    o_q = tl.arange(0, BLOCK_Q)
    gathered = (tl.load(p_tile + 1, volatile=True) & 1) != 0
    row_start = tl.load(p_tile + 2, volatile=True)
    m_q = o_q < tl.load(p_tile + 3, volatile=True)
    m_listed = tl.where(gathered, m_q, False)  # Triton 3.9's interpreter makes integers of m_q & gathered
    pos = tl.load(rows_ptr + row_start + o_q, mask=m_listed, other=0, volatile=True)
    pos = tl.where(gathered, pos, row_start + o_q)
    return pos, (pos - q_start).to(tl.int64), m_q


@triton.jit
def _masked_tile(j, start, full, n_full, stop, BLOCK_K: tl.constexpr):
    """First key of the j-th masked tile of a span, and where its piece of the span ends."""
    n_before = tl.cdiv(full - start, BLOCK_K)
    before = n_before > j
    key = tl.where(before, start + j * BLOCK_K, full + (n_full + j - n_before) * BLOCK_K)
    return key, tl.where(before, full, stop)


@triton.jit
def _n_masked(start, full, n_full, stop, BLOCK_K: tl.constexpr):
    """Masked tiles of a span: those before its full tiles and those after."""
    return tl.cdiv(full - start, BLOCK_K) + tl.cdiv(stop - full - n_full * BLOCK_K, BLOCK_K)


@triton.jit(do_not_specialize=["n_tiles", "n_slots", "n_queries", "n_heads", "q_start", "window"])
def prefill_kernel(
    q_ptr,  # [B, H, T, D]
    k,  # [B, K, S, D]: a tensor descriptor, or without TMA a tuple of a pointer and the strides of B, K and S
    v,
    packed_k,  # [1, K, P, D], likewise
    packed_v,
    out_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] float32
    part_out_ptr,  # [H, n_slots, BLOCK_Q, D] float32
    part_lse_ptr,  # [H, n_slots, BLOCK_Q] float32, base 2
    tiles_ptr,  # [4, n_tiles, 13] int32
    heads_ptr,  # [H, 3] int32
    rows_ptr,  # gathered rows, int32
    positions_ptr,  # [P] int32
    n_tiles,
    n_slots,
    n_queries,
    n_heads,
    q_start,
    window,
    scale,  # log2(e) included
    stride_qb,
    stride_qh,
    stride_qt,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N_FIELDS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of query rows of one head."""
    program = tl.program_id(0)
    p_head = heads_ptr + program // n_tiles * 3
    head = tl.load(p_head)
    kv = tl.load(p_head + 1)
    category = tl.load(p_head + 2)
    p_tile = tiles_ptr + (category * n_tiles + program % n_tiles) * N_FIELDS
    batch = tl.load(p_tile)

    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, D)
    pos, row, m_q = _rows(p_tile, rows_ptr, q_start, BLOCK_Q)
    p_q = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(p_q + row[:, None] * stride_qt + o_d[None, :], mask=m_q[:, None], other=0.0)
    m_i = tl.full([BLOCK_Q], _NEVER, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    oldest = pos - window + 1
    nothing = batch * 0  # the packed keys of a batch follow one another

    start = tl.load(p_tile + 5)
    full = tl.load(p_tile + 6)
    n_full = tl.load(p_tile + 7)
    stop = tl.load(p_tile + 8)
    for j in range(0, n_full):
        key = full + j * BLOCK_K
        s = _scores(q, _tile(packed_k, nothing, kv, key, None, BLOCK_K, D, TMA), PRECISION)
        values = _tile(packed_v, nothing, kv, key, None, BLOCK_K, D, TMA)
        acc, l_i, m_i = _update(acc, l_i, m_i, s, scale, values, PRECISION)
    for j in range(0, _n_masked(start, full, n_full, stop, BLOCK_K)):
        key, end = _masked_tile(j, start, full, n_full, stop, BLOCK_K)
        s = _scores(q, _tile(packed_k, nothing, kv, key, end, BLOCK_K, D, TMA), PRECISION)
        position = tl.load(positions_ptr + key + o_k, mask=key + o_k < end, other=_NOWHERE)
        s = tl.where(position[None, :] >= oldest[:, None], s * scale, _NEVER)
        values = _tile(packed_v, nothing, kv, key, end, BLOCK_K, D, TMA)
        acc, l_i, m_i = _update(acc, l_i, m_i, s, 1.0, values, PRECISION)

    start = tl.load(p_tile + 9)
    full = tl.load(p_tile + 10)
    n_full = tl.load(p_tile + 11)
    stop = tl.load(p_tile + 12)
    newest = tl.where((tl.load(p_tile + 1) & 2) != 0, stop, pos)
    for j in range(0, n_full):
        key = full + j * BLOCK_K
        s = _scores(q, _tile(k, batch, kv, key, None, BLOCK_K, D, TMA), PRECISION)
        values = _tile(v, batch, kv, key, None, BLOCK_K, D, TMA)
        acc, l_i, m_i = _update(acc, l_i, m_i, s, scale, values, PRECISION)
    for j in range(0, _n_masked(start, full, n_full, stop, BLOCK_K)):
        key, end = _masked_tile(j, start, full, n_full, stop, BLOCK_K)
        s = _scores(q, _tile(k, batch, kv, key, end, BLOCK_K, D, TMA), PRECISION)
        position = (key + o_k)[None, :]
        m_s = (position <= tl.minimum(newest, end - 1)[:, None]) & (position >= oldest[:, None])
        s = tl.where(m_s, s * scale, _NEVER)
        values = _tile(v, batch, kv, key, end, BLOCK_K, D, TMA)
        acc, l_i, m_i = _update(acc, l_i, m_i, s, 1.0, values, PRECISION)

    acc = acc / l_i[:, None]
    lse = m_i + tl.math.log2(l_i)
    slot = tl.load(p_tile + 4, volatile=True)
    if slot >= 0:
        o_part = (head.to(tl.int64) * n_slots + slot) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        tl.store(part_out_ptr + o_part[:, None] * D + o_d[None, :], acc)
        tl.store(part_lse_ptr + o_part, lse)
    else:
        _, row, m_q = _rows(p_tile, rows_ptr, q_start, BLOCK_Q)
        _store(out_ptr, lse_ptr, acc, lse, batch, head, row, m_q, n_queries, n_heads, o_d, D)


@triton.jit
def _store(out_ptr, lse_ptr, acc, lse, batch, head, row, m_q, n_queries, n_heads, o_d, D: tl.constexpr):
    """Writes rows of the output and of the log-sum-exp, here turned from base 2 to base e."""
    p_out = out_ptr + ((batch * n_queries + row) * n_heads + head)[:, None] * D + o_d[None, :]  # `row` is int64
    tl.store(p_out, _narrow(acc, out_ptr.dtype.element_ty), mask=m_q[:, None])
    p_lse = lse_ptr + (batch.to(tl.int64) * n_heads + head) * n_queries + row
    tl.store(p_lse, lse * 0.6931471805599453, mask=m_q)


@triton.jit(do_not_specialize=["n_merges", "n_slots", "n_queries", "n_heads", "q_start"])
def merge_kernel(
    part_out_ptr,  # [H, n_slots, BLOCK_Q, D] float32
    part_lse_ptr,  # [H, n_slots, BLOCK_Q] float32, base 2
    out_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] float32
    heads_ptr,  # [n_heads_launched, 3] int32: head, kv head, category
    merges_ptr,  # [n_merges, 5] int32
    rows_ptr,  # gathered rows, int32
    n_merges,
    n_slots,
    n_queries,
    n_heads,
    q_start,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Joins the parts of one gathered tile of one head by their log-sum-exps, in the order of their keys."""
    program = tl.program_id(0)
    head = tl.load(heads_ptr + program // n_merges * 3)
    p_merge = merges_ptr + program % n_merges * 5
    batch = tl.load(p_merge)
    row_start = tl.load(p_merge + 1)
    n_rows = tl.load(p_merge + 2)
    slot = tl.load(p_merge + 3)
    n_parts = tl.load(p_merge + 4)
    o_q = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, D)
    m_q = o_q < n_rows
    m_i = tl.full([BLOCK_Q], _NEVER, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    for part in range(0, n_parts):
        o_part = (head.to(tl.int64) * n_slots + slot + part) * BLOCK_Q + o_q
        lse = tl.load(part_lse_ptr + o_part)
        m_new = tl.maximum(m_i, lse)
        alpha = tl.math.exp2(m_i - m_new)
        weight = tl.math.exp2(lse - m_new)
        acc = acc * alpha[:, None] + tl.load(part_out_ptr + o_part[:, None] * D + o_d[None, :]) * weight[:, None]
        l_i = l_i * alpha + weight
        m_i = m_new
    row = (tl.load(rows_ptr + row_start + o_q, mask=m_q, other=0) - q_start).to(tl.int64)
    acc = acc / l_i[:, None]
    _store(out_ptr, lse_ptr, acc, m_i + tl.math.log2(l_i), batch, head, row, m_q, n_queries, n_heads, o_d, D)
