"""attend(Q, KV) of triton_attend.py in Gluon, for Hopper and rows padded to 512: a candidate that `auto` never picks (GLUON in
triton_forms.py).

    out = E KV,   E = 2^{k Q KVᵀ - h} (times column_scale), targets left out

    features    Q = x̂, KV = ŵ of a slab: the row sums of E too; KV is split over programs, each of which writes its part
    table       Q = ŵ, KV = x̂, with column_scale: out is dŵ

A program holds 64 rows of Q in shared memory, and their 64 x 512 sums in the registers of two warp groups, half of the columns
each. A third group loads KV, in pairs of blocks of 64 rows. Each of the two makes E of one block and leaves it in shared memory,
where both multiply it with their columns of KV: so one's exponentials run under the other's products. Barriers:

    full[block, half]     written by the loads, read by the group that makes the block's E and by the half's
    empty[block, half]    from the half's group: the E that it has multiplied was made after the other's reading
    e_full[block]         from the group that makes the block's E, over one that both have multiplied, as `empty` told the loads

Nothing N x B is stored in memory. No atomics: each group has its row of partial sums. tests/gluon_emulator.py runs this file on a
CPU, with loads that land late and products that read late.
"""

import torch
import torch.nn.functional as F
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..slabs import ceil_div
from .triton_launch import Launcher

SIZE = 512
# Rows of Q and of a block of KV; columns of a half of either.
ROWS, HALF = gl.constexpr(64), gl.constexpr(SIZE // 2)
PAIR = 2 * ROWS.value
# The two groups' warps, and registers of each of their threads; the loads' group has what is left.
WARPS, REGISTERS = gl.constexpr([4, 4]), gl.constexpr([240, 240])
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def launcher(TABLE):
    """A Launcher of the kernel of `features` or of `table` for the slabs of a call."""
    return Launcher(attend, TABLE=TABLE, num_warps=4)


def features(launch, low, unit, targets, partial, parts, first, log2_scale, shift, whole):
    """Write E ŵ of a slab's unit rows (B, 512) into parts (P, N, D), and add E's row sums to partial (2 P, N)."""
    count, num_rows, size = parts.shape
    pairs = ceil_div(ceil_div(unit.shape[0], PAIR), count)
    launch(
        ceil_div(num_rows, ROWS.value) * count,
        *(_source(low), _source(unit), targets, None, partial, parts),
        *(num_rows, unit.shape[0], size, first, pairs, log2_scale, shift),
        whole=whole,
    )


def table(launch, unit, low, targets, column_scale, out, first, log2_scale, shift, whole):
    """Write dŵ of a slab's unit rows (B, 512) into out (B, D). targets (N,): classes; column_scale (N,)."""
    (classes, size), num_rows = out.shape, low.shape[0]
    targets = targets - first
    targets = torch.where((targets >= 0) & (targets < classes), targets, -1).int()
    padding = 0, -num_rows % PAIR  # no mask in the loop
    launch(
        ceil_div(classes, ROWS.value),
        *(_source(unit), _source(low), F.pad(targets, padding, value=-1), F.pad(column_scale, padding), None, out),
        *(classes, num_rows, size, 0, ceil_div(num_rows, PAIR), log2_scale, shift),
        whole=whole,
    )


def _source(rows):
    """The descriptor of a matrix (n, 512) of 16-bit numbers, of which half blocks are loaded."""
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [ROWS.value, HALF.value], LAYOUT)


@gluon.jit
def attend(
    q,  # descriptor of (Q, 512)
    kv,  # descriptor of (K, 512)
    target_ptr,  # class, -1 for none: (Q,) int64; of a table (K,) int32, counted from its first row
    column_scale_ptr,  # (K,) float32 of a table; it and the targets of a table go on to a multiple of 128
    partial_ptr,  # (2 PARTS, Q) float64 of features: row sums of E over all slabs so far
    out_ptr,  # (PARTS, Q, D) float32
    Q,
    K,
    D,
    first,  # class of the first row of KV; of a table nothing
    pairs_each,  # pairs of blocks to a part
    log2_scale,
    shift,
    TABLE: gl.constexpr,
):
    q_tile = gl.allocate_shared_memory(q.dtype, [2, ROWS, HALF], q.layout)
    blocks = gl.allocate_shared_memory(q.dtype, [4, ROWS, HALF], kv.layout)  # [2 block + half]
    e_tiles = gl.allocate_shared_memory(q.dtype, [2, ROWS, ROWS], q.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    e_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(e_full.index(i), count=1)
    # Row tiles run fastest: neighbouring programs read the same rows of KV while those are in L2.
    row_tiles = (Q + ROWS - 1) // ROWS
    first_row, part = (gl.program_id(0) % row_tiles) * ROWS, gl.program_id(0) // row_tiles
    start = part * pairs_each * 2 * ROWS
    stop = gl.minimum(start + pairs_each * 2 * ROWS, K)
    queries, keys, exponentials = (q_tile, q_full), (blocks, full, empty), (e_tiles, e_full)
    tensors, sizes = (target_ptr, column_scale_ptr, partial_ptr, out_ptr), (Q, K, D)
    firsts, bounds, affine = (first, first_row, part), (start, stop), (log2_scale, shift)
    gl.warp_specialize(
        [
            (_load, (q, kv, queries, keys, first_row, bounds)),
            (_group, (queries, keys, exponentials, tensors, sizes, firsts, bounds, affine, 0, TABLE)),
            (_group, (queries, keys, exponentials, tensors, sizes, firsts, bounds, affine, 1, TABLE)),
        ],
        WARPS,
        REGISTERS,
    )


@gluon.jit
def _load(q, kv, queries, keys, first_row, bounds):
    q_tile, q_full = queries
    blocks, full, empty = keys
    start, stop = bounds
    mbarrier.expect(q_full, 2 * ROWS * HALF * 2)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [first_row, half * HALF], q_full, q_tile.index(half))
    phase = 1  # what nobody has filled is empty
    for pair in range(start, stop, 2 * ROWS):
        for i in gl.static_range(4):
            mbarrier.wait(empty.index(i), phase)
            mbarrier.expect(full.index(i), ROWS * HALF * 2)
            # Rows past the end are zeros, of a block that is wholly past it too.
            tma.async_copy_global_to_shared(kv, [pair + (i // 2) * ROWS, (i % 2) * HALF], full.index(i), blocks.index(i))
        phase ^= 1


@gluon.jit
def _group(queries, keys, exponentials, tensors, sizes, firsts, bounds, affine, OWN: gl.constexpr, TABLE: gl.constexpr):
    """The warp group of block OWN of each pair, and of half OWN of the columns."""
    q_tile, q_full = queries
    blocks, full, empty = keys
    e_tiles, e_full = exponentials
    target_ptr, column_scale_ptr, partial_ptr, out_ptr = tensors
    Q, K, D = sizes
    first, first_row, part = firsts
    start, stop = bounds
    log2_scale, shift = affine
    e_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, e_layout))
    column = gl.arange(0, ROWS, layout=gl.SliceLayout(0, e_layout))
    if not TABLE:
        target = _inside(gl.load(target_ptr + row, mask=row < Q, other=-1), first, K)
    total = gl.full([ROWS], 0.0, gl.float64, layout=gl.SliceLayout(1, e_layout))  # in float32 10^5 blocks would lose digits
    out = gl.full([ROWS, HALF], 0.0, gl.float32, layout=out_layout)
    mbarrier.wait(q_full, 0)
    phase = 0
    for pair in range(start, stop, 2 * ROWS):
        own = OWN ^ phase
        exponent = warpgroup_mma_init(gl.full([ROWS, ROWS], 0.0, gl.float32, layout=e_layout))
        for half in gl.static_range(2):
            mbarrier.wait(full.index(2 * own + half), phase)
            block = blocks.index(2 * own + half).permute((1, 0))
            exponent = warpgroup_mma(q_tile.index(half), block, exponent, use_acc=half > 0, is_async=True)
        exponent = warpgroup_mma_wait(0, deps=[exponent])
        sample = pair + own * ROWS + column
        if TABLE:
            e = gl.exp2(exponent * log2_scale - shift) * gl.load(column_scale_ptr + sample)[None, :]
            target_row = gl.load(target_ptr + sample)
            e = gl.where(target_row[None, :] == row[:, None], 0.0, e)
        else:  # 2^-inf past the last row of KV
            e = gl.exp2(exponent * log2_scale - gl.where(sample < K, shift, float("inf"))[None, :])
            e = gl.where(target[:, None] == sample[None, :], 0.0, e)
            total += gl.sum(e, 1).to(gl.float64)
        e_tiles.index(own).store(e.to(e_tiles.dtype))
        fence_async_shared()
        mbarrier.arrive(e_full.index(own), count=1)
        for other in gl.static_range(2):
            block = own ^ other
            mbarrier.wait(e_full.index(block), phase)
            mbarrier.wait(full.index(2 * block + OWN), phase)
            product = warpgroup_mma(e_tiles.index(block), blocks.index(2 * block + OWN), warpgroup_mma_init(out), is_async=True)
            out = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(2 * block + OWN), count=1)
        phase ^= 1
    if not TABLE:
        place = partial_ptr + (2 * part + OWN).to(gl.int64) * Q + row
        before = gl.load(place, mask=(row < Q) & (first > 0), other=0.0)
        gl.store(place, before + total, mask=row < Q)
    out_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
    out_column = OWN * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, out_layout))
    tile = out_ptr + (part.to(gl.int64) * Q + first_row) * D
    inside = (first_row + out_row < Q)[:, None] & (out_column < D)[None, :]
    gl.store(tile + out_row[:, None] * D + out_column[None, :], out, mask=inside)


@gluon.jit
def _inside(target, first, count):
    """Targets as positions in `count` rows from class `first` on; -1 for those outside."""
    target -= first
    return gl.where((target >= 0) & (target < count), target, -1).to(gl.int32)
