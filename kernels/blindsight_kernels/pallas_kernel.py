"""The Pallas kernel (Mosaic GPU, Hopper): prefill attention of a whole layer in one launch.

Like the Triton kernel it knows no category: a block reads one tile of the work list (`pallas_work.py`), 128 query rows
of one head, and walks what it says: packed keys, then one range of ordinary keys. A block is three warpgroups:

    memory warpgroup      TMA:  K0 V0 K1 V1 ...   into a ring of `stages` slots
    compute warpgroup 0   rows  0.. 63:  QK softmax PV QK softmax PV ...
    compute warpgroup 1   rows 64..127:     QK softmax PV QK softmax PV ...      half a step behind

The two compute warpgroups take turns at the tensor cores (the schedule barrier of FlashAttention-3): one multiplies
while the other exponentiates. Tiles of which no row is denied a key come first, from both sources in one loop without
masks; then the masked packed tiles, then the masked tiles of the range.

TMA under the layout that wgmma reads starts at multiples of 8 rows, and images start anywhere. Keys are loaded from
the multiple of 8 before, and masked. Queries and outputs are in a buffer of the kernel's own, every tile at a multiple
of 128 rows (`pallas_prefill.py` gathers it): text rows and images are alike then, and no store needs a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from blindsight_kernels.pallas_configurations import Configuration
from blindsight_kernels.pallas_requirements import jax, jnp, lax, pl, plgpu
from blindsight_kernels.pallas_work import ALIGNMENT, BLOCK_Q, FIELDS

ROWS = BLOCK_Q // 2  # of one compute warpgroup
# Stands for minus infinity: a row that is denied a whole tile stays finite, and its weights there vanish later.
NEVER = -1e30
_NOWHERE = -(2**31)  # before any window: the position of a key that the tile may not see
_LAYOUT = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class _Span:
    """Keys of one source: `n_tiles` tiles of `block_k` keys from row `first` on, those `[low, high)` unmasked."""

    first: Any
    n_tiles: Any
    low: Any
    high: Any
    start: Any
    stop: Any

    @property
    def n_full(self) -> Any:
        return self.high - self.low

    @property
    def n_masked(self) -> Any:
        return self.n_tiles - self.n_full

    def masked(self, j: Any) -> Any:
        """The number of the j-th masked tile."""
        return jnp.where(j < self.low, j, j + self.n_full)


@dataclass(frozen=True)
class _Item:
    """What a block is told: one tile of query rows of one head, and the two spans of keys it reads."""

    head: Any
    kv: Any
    batch: Any
    q_tile: Any
    slot: Any
    packed: _Span
    own: _Span

    @classmethod
    def read(cls, tile_ref: Any, head_ref: Any) -> _Item:
        batch, q_tile, slot, *spans = (tile_ref[i] for i in range(len(FIELDS)))
        return cls(head_ref[0], head_ref[1], batch, q_tile, slot, _Span(*spans[:6]), _Span(*spans[6:]))

    @property
    def n_full(self) -> Any:
        return self.packed.n_full + self.own.n_full

    @property
    def n_steps(self) -> Any:
        return self.packed.n_tiles + self.own.n_tiles


@dataclass(frozen=True)
class _Shared:
    """Shared memory and barriers of a block. `here`: a copy has arrived; `free`: both readers are done with it."""

    q: Any  # [2, 64, D], by compute warpgroup; at the end the output
    keys: tuple[Any, Any]  # K and V, [stages, block_k, D] each
    lse: Any  # [2, 64]
    q_here: Any
    here: tuple[Any, Any]
    free: tuple[Any, Any]
    turn: Any  # of the two compute warpgroups at the tensor cores


def prefill_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    packed_k: jax.Array,
    packed_v: jax.Array,
    tiles: jax.Array,
    heads: jax.Array,
    oldest: jax.Array,
    newest: jax.Array,
    positions: jax.Array,
    *,
    n_slots: int,
    scale: float,
    configuration: Configuration,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Attention of every tile of a work list.

    Args:
        q: queries `[H, R, D]`, row r of tile r // 128. bfloat16 or float16.
        k, v: keys and values `[B, K, S, D]`, all values finite: zero times NaN is NaN.
        packed_k, packed_v: packed keys and values `[K, P, D]`.
        tiles: `[5, n_tiles, len(FIELDS)]` int32: under each category, and of a head that is left out.
        heads: `[H, 3]` int32: head, kv head, category, in the order of the launch.
        oldest, newest: `[R]` int32, the positions that each row may look at, where its tile's range does not say less.
        positions: `[P]` int32 positions of the packed keys.
        n_slots: parts a head.
        scale: factor on the scores.
        configuration: tile sizes.
        interpret: simulate on a CPU.

    Returns:
        Outputs `[R, H, D]` in q's dtype and log-sum-exps `[H, R]` float32 of whole tiles; the same of parts, float32,
        `[n_slots, 128, H, D]` and `[H, n_slots, 128]`. Rows of tiles that are not in the work list are not written.
    """
    n_heads, n_rows, dim = q.shape
    stages = configuration.stages
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]  # they are not
    ring = plgpu.SMEM((stages, configuration.block_k, dim), q.dtype, transforms=swizzled)
    f32 = jnp.float32
    return plgpu.kernel(
        partial(_block, scale=scale, configuration=configuration, simulated=interpret is not None),
        out_type=(
            jax.ShapeDtypeStruct((n_rows, n_heads, dim), q.dtype),
            jax.ShapeDtypeStruct((n_heads, n_rows), f32),
            jax.ShapeDtypeStruct((n_slots, BLOCK_Q, n_heads, dim), f32),
            jax.ShapeDtypeStruct((n_heads, n_slots, BLOCK_Q), f32),
        ),
        scratch_types=dict(
            q=plgpu.SMEM((2, ROWS, dim), q.dtype, transforms=swizzled),
            keys=(ring, ring),
            lse=plgpu.SMEM((2, ROWS), f32),
            q_here=plgpu.Barrier(num_barriers=2),
            here=(plgpu.Barrier(num_barriers=stages),) * 2,
            free=(plgpu.Barrier(num_barriers=stages, num_arrivals=2),) * 2,
            turn=plgpu.Barrier(num_arrivals=2),
        ),
        interpret=interpret,
        grid=(tiles.shape[1], n_heads),
        grid_names=("tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="blindsight_prefill",
        # Sums over a row stay within a warp; the default of 2 KB for those across warps would cost a stage at D=128.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    )(q, k, v, packed_k, packed_v, tiles, heads, oldest, newest, positions)


def _block(
    q_ref,
    k_ref,
    v_ref,
    packed_k_ref,
    packed_v_ref,
    tiles_ref,
    heads_ref,
    oldest_ref,
    newest_ref,
    positions_ref,
    out_ref,
    lse_ref,
    part_out_ref,
    part_lse_ref,
    *,
    scale: float,
    configuration: Configuration,
    simulated: bool,
    **scratch: Any,
) -> None:
    """One block: three warpgroups, unless its tile has no keys."""
    shared = _Shared(**scratch)
    warpgroup = lax.axis_index("warpgroup")
    head_ref = heads_ref.at[lax.axis_index("head")]
    tile_ref = tiles_ref.at[head_ref[2], lax.axis_index("tile")]
    n_packed, n_own = (tile_ref[FIELDS.index(f"{source}_n_tiles")] for source in ("packed", "range"))
    used = n_packed + n_own > 0

    @pl.when(used & (warpgroup == 2))
    def _memory() -> None:
        plgpu.set_max_registers(40, action="decrease")
        item = _Item.read(tile_ref, head_ref)
        _load_keys(item, (packed_k_ref, packed_v_ref), (k_ref, v_ref), shared, configuration, simulated)

    @pl.when(used & (warpgroup < 2))
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        item = _Item.read(tile_ref, head_ref)
        q_s, lse_s = shared.q.at[warpgroup], shared.lse.at[warpgroup]
        rows = pl.ds(pl.multiple_of(item.q_tile * BLOCK_Q + warpgroup * ROWS, ROWS), ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[item.head, rows], q_s, shared.q_here.at[warpgroup])
        oldest, newest = (_load(ref.at[rows], _LAYOUT.reduce(1)) for ref in (oldest_ref, newest_ref))
        step = partial(
            _step,
            n_steps=item.n_steps,
            q_s=q_s,
            shared=shared,
            scale=scale * math.log2(math.e),
            configuration=configuration,
            simulated=simulated,
        )
        plgpu.barrier_wait(shared.q_here.at[warpgroup])
        acc, m_i, l_i = _walk(item, step, oldest, newest, positions_ref, warpgroup, shared, configuration)
        acc = acc * _along_rows(1.0 / l_i, acc.shape)
        lse_s[...] = (m_i + jnp.log2(l_i)) * math.log(2)

        @pl.when(item.slot < 0)
        def _whole() -> None:
            q_s[...] = acc.astype(q_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, out_ref.at[rows, item.head])
            plgpu.copy_smem_to_gmem(lse_s, lse_ref.at[item.head, rows])

        @pl.when(item.slot >= 0)
        def _part() -> None:
            rows = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
            part_out_ref[item.slot, rows, item.head] = acc
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_s, part_lse_ref.at[item.head, item.slot, rows])

        plgpu.wait_smem_to_gmem(0)


def _load_keys(item, packed_refs, own_refs, shared, configuration, simulated) -> None:
    """The memory warpgroup: tiles of keys and values in the order in which they are used.

    That is: full packed tiles, full tiles of the range, masked packed tiles, masked tiles of the range.
    """
    block_k, stages = configuration.block_k, configuration.stages
    packed, own = item.packed, item.own

    @pl.loop(0, item.n_steps)
    def _tile(i) -> None:
        slot = lax.rem(i, jnp.int32(stages))
        masked = i - item.n_full
        from_packed = (i < packed.n_full) | ((masked >= 0) & (masked < packed.n_masked))
        j_packed = jnp.where(masked < 0, packed.low + i, packed.masked(masked))
        j_own = jnp.where(masked < 0, own.low + i - packed.n_full, own.masked(masked - packed.n_masked))
        packed_rows = pl.ds(pl.multiple_of(packed.first + j_packed * block_k, ALIGNMENT), block_k)
        own_rows = pl.ds(pl.multiple_of(own.first + j_own * block_k, ALIGNMENT), block_k)
        for packed_ref, own_ref, ring, here, free in zip(
            packed_refs, own_refs, shared.keys, shared.here, shared.free, strict=True
        ):
            packed_tile, own_tile = packed_ref.at[item.kv, packed_rows], own_ref.at[item.batch, item.kv, own_rows]
            pl.when(i >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
            copies = (
                partial(plgpu.copy_gmem_to_smem, x, ring.at[slot], here.at[slot]) for x in (packed_tile, own_tile)
            )
            lax.cond(from_packed, *copies)

    if simulated:  # the simulator insists that somebody observes every completed phase

        @pl.loop(jnp.maximum(item.n_steps - stages, 0), item.n_steps)
        def _drain(i) -> None:
            for barrier in shared.free:
                plgpu.barrier_wait(barrier.at[lax.rem(i, jnp.int32(stages))])


def _walk(item, step, oldest, newest, positions_ref, warpgroup, shared, configuration):
    """A compute warpgroup: all steps of the online softmax. Returns output not normalised, maxima and sums of rows."""
    block_k = configuration.block_k
    packed, own = item.packed, item.own
    first_own = item.n_full + packed.n_masked  # step
    offsets = plgpu.broadcasted_iota(jnp.int32, (block_k,), 0, layout=_LAYOUT.reduce(0))
    low, high = jnp.maximum(oldest, own.start), jnp.minimum(newest, own.stop - 1)

    def deny_packed(i, qk):
        row = pl.multiple_of(packed.first + packed.masked(i - item.n_full) * block_k, ALIGNMENT)
        position = _load(positions_ref.at[pl.ds(row, block_k)], _LAYOUT.reduce(0))
        inside = (offsets >= packed.start - row) & (offsets < packed.stop - row)
        position = _along_columns(jnp.where(inside, position, _NOWHERE), qk.shape)
        return jnp.where(position >= _along_rows(oldest, qk.shape), qk, NEVER)

    def deny_own(i, qk):
        row = own.first + own.masked(i - first_own) * block_k
        position = _along_columns(offsets + row, qk.shape)
        seen = (position >= _along_rows(low, qk.shape)) & (position <= _along_rows(high, qk.shape))
        return jnp.where(seen, qk, NEVER)

    carry = (
        plgpu.layout_cast(jnp.zeros(shared.q.shape[1:], jnp.float32), _LAYOUT),
        plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), _LAYOUT.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _LAYOUT.reduce(1)),
    )
    plgpu.barrier_wait(shared.here[0].at[0])
    pl.when(warpgroup == 1)(partial(_pass, shared.turn))
    carry = lax.fori_loop(0, item.n_full, partial(step, deny=None), carry)
    carry = lax.fori_loop(item.n_full, first_own, partial(step, deny=deny_packed), carry)
    carry = lax.fori_loop(first_own, item.n_steps, partial(step, deny=deny_own), carry)
    pl.when(warpgroup == 0)(partial(_pass, shared.turn))
    return carry


def _step(i, carry, *, deny, n_steps, q_s, shared, scale, configuration, simulated):
    """One step of the online softmax, in powers of two: `scale` has log2(e) in it. `deny` masks scores, None: none."""
    acc, m_i, l_i = carry
    stages = jnp.int32(configuration.stages)
    slot, next_slot = lax.rem(i, stages), lax.rem(i + 1, stages)
    (k_here, v_here), (k_free, v_free) = shared.here, shared.free
    k_s, v_s = (ring.at[slot] for ring in shared.keys)

    def scores(accumulator):
        plgpu.wgmma(accumulator, q_s, k_s.transpose((1, 0)))
        _pass(shared.turn)
        return accumulator[...]

    qk = pl.run_scoped(scores, plgpu.ACC((ROWS, configuration.block_k), jnp.float32))
    plgpu.barrier_arrive(k_free.at[slot])
    if deny is not None:  # scaled first: NEVER - NEVER must be zero, and would not be after a fused multiply-add
        qk, scale = deny(i, qk * scale), 1.0
    m_new = jnp.maximum(m_i, qk.max(axis=1) * scale)
    alpha = jnp.exp2(m_i - m_new)
    p = jnp.exp2(qk * scale - _along_rows(m_new, qk.shape))
    acc = acc * _along_rows(alpha, acc.shape)
    l_i = l_i * alpha
    narrow = p.astype(q_s.dtype)

    def end_softmax():
        plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(v_here.at[slot])
        plgpu.barrier_wait(shared.turn)  # the tensor cores are free

    # The order that measured better in the attention of jax itself (ops/gpu/attention_mgpu.py).
    if q_s.shape[1] <= 128:
        l_i = l_i + p.sum(axis=1)
        acc, l_i, m_new, narrow = lax.optimization_barrier((acc, l_i, m_new, narrow))
        end_softmax()
    else:
        end_softmax()
        l_i = l_i + p.sum(axis=1)

    def await_next_keys():
        pl.when(i + 1 < n_steps)(partial(plgpu.barrier_wait, k_here.at[next_slot]))

    if simulated:  # which knows neither accumulators with a value nor wgmma from registers
        acc = acc + jnp.dot(narrow, v_s[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # orders this read before the next TMA write, as the end of a wgmma does
        await_next_keys()
    else:

        def values(accumulator):
            plgpu.wgmma(accumulator, narrow, v_s)
            await_next_keys()

        acc = pl.run_state(values)(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(v_free.at[slot])
    return acc, m_new, l_i


def _pass(turn) -> None:
    """Hands the tensor cores to the other compute warpgroup, and waits for them."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _load(ref, layout) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _along_rows(x, shape) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def _along_columns(x, shape) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [1])
