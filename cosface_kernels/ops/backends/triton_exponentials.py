"""One product, k x w̃ᵀ of a slab, and what is made of its tiles while they are in registers: a kernel for each.

    exponential_sums    row sums of E = 2^{k x w̃ᵀ - shift}, E[n, y_n] = 0
    exponentials        the same, and E itself
    maxima              row maxima of the exponents k x w̃ᵀ, for the shift of logits without a bound
    exponents           the exponents themselves, in float32, for classes of several rows

Sums and maxima of a tile are added to those of the slabs before, one float64 for each row and tile; exponents of a row's target
and past the slab's end count as -inf. Cosines are never stored. No atomics.
"""

import triton
import triton.language as tl


@triton.jit
def own_tile(N, BLOCK_N: tl.constexpr):
    """(rows of x, tile of classes) of a program."""
    # Row tiles run fastest: neighbouring programs read the same class rows while those are in L2.
    row_tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, tl.program_id(0) // row_tiles


@triton.jit
def operand(block, UPCAST: tl.constexpr):
    """A block as tl.dot takes it. UPCAST: for the interpreter, whose bfloat16 products are not numbers."""
    return block.to(tl.float32) if UPCAST else block


@triton.jit
def in_slab(target, first_class, B):
    """Targets as the slab of B classes from first_class on counts them, -1 for those elsewhere."""
    target -= first_class
    # 64-bit comparisons for each row, 32-bit ones for each element.
    return tl.where((target >= 0) & (target < B), target, -1).to(tl.int32)


@triton.jit
def add_sums(partial, part, row, N, first_class, sums):
    """sums of this slab + those of the slabs before: in float64, because a float32 sum of 10^5 slabs would lose digits."""
    place = partial + part.to(tl.int64) * N + row
    before = tl.load(place, mask=(row < N) & (first_class > 0), other=0.0)
    tl.store(place, before + sums.to(tl.float64), mask=row < N)


@triton.jit
def exponent_tile(
    x,
    unit,
    row,
    column,
    N,
    B,
    D_padded,
    log2_scale,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """k x w̃ᵀ (BLOCK_N, BLOCK_C). Ragged rows and columns are those of the last valid one."""
    step = tl.arange(0, BLOCK_K)
    unit_row = tl.minimum(column, B - 1) if RAGGED else column
    x_row = x + tl.minimum(row, N - 1).to(tl.int64)[:, None] * D_padded + step[None, :]
    unit_row = unit + unit_row.to(tl.int64)[:, None] * D_padded + step[None, :]
    cosine = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for k in tl.range(0, D_padded, BLOCK_K):
        left, right = operand(tl.load(x_row + k), UPCAST), operand(tl.load(unit_row + k), UPCAST)
        cosine = tl.dot(left, right.T, cosine, input_precision=PRECISION)
    return cosine * log2_scale


@triton.jit
def negatives(tile, fill, targets, row, column, N, B, first_class, RAGGED: tl.constexpr, CENTERS: tl.constexpr):
    """The tile, `fill` in place of each row's target, which has CENTERS columns, and past the slab's end."""
    target = in_slab(tl.load(targets + row, mask=row < N, other=-1), first_class, B)
    dropped = target[:, None] == column[None, :]
    if CENTERS > 1:
        dropped = (target >= 0)[:, None] & (column[None, :] >= target[:, None]) & (column[None, :] < target[:, None] + CENTERS)
    if RAGGED:
        dropped = dropped | (column >= B)[None, :]
    return tl.where(dropped, fill, tile)


@triton.jit
def exponential_tile(exponent, targets, shifts, row, column, N, B, first_class, RAGGED: tl.constexpr):
    shift = tl.load(shifts + row, mask=row < N, other=0.0)
    return negatives(tl.exp2(exponent - shift[:, None]), 0.0, targets, row, column, N, B, first_class, RAGGED, 1)


@triton.jit
def store_tile(tile, out, row, column, N, stride, RAGGED: tl.constexpr):
    """Into out (N, stride); what is past a slab's end is stored as well, as far as the row goes."""
    inside = (row < N)[:, None]
    if RAGGED:
        inside = inside & (column < stride)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * stride + column[None, :], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def exponential_sums(
    x_ptr,  # (N, D_padded) rows to multiply
    unit_ptr,  # (>= B, D_padded) unit class rows of the slab
    target_ptr,  # (N,) int64 class, -1 for none
    N,
    B,
    D_padded,
    first_class,
    log2_scale,
    shift_ptr,  # (N,) float32
    partial_ptr,  # (tiles, N) float64
    RAGGED: tl.constexpr,  # whether BLOCK_C does not divide B
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, tile = own_tile(N, BLOCK_N)
    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    exponent = exponent_tile(
        x_ptr, unit_ptr, row, column, N, B, D_padded, log2_scale, RAGGED, PRECISION, UPCAST, BLOCK_N, BLOCK_C, BLOCK_K
    )
    e = exponential_tile(exponent, target_ptr, shift_ptr, row, column, N, B, first_class, RAGGED)
    add_sums(partial_ptr, tile, row, N, first_class, tl.sum(e, 1))


@triton.jit
def exponentials(
    x_ptr,
    unit_ptr,
    target_ptr,
    N,
    B,
    D_padded,
    first_class,
    log2_scale,
    shift_ptr,
    partial_ptr,
    e_ptr,  # (N, stride_e), columns B .. stride_e become 0
    stride_e,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, tile = own_tile(N, BLOCK_N)
    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    exponent = exponent_tile(
        x_ptr, unit_ptr, row, column, N, B, D_padded, log2_scale, RAGGED, PRECISION, UPCAST, BLOCK_N, BLOCK_C, BLOCK_K
    )
    e = exponential_tile(exponent, target_ptr, shift_ptr, row, column, N, B, first_class, RAGGED)
    add_sums(partial_ptr, tile, row, N, first_class, tl.sum(e, 1))
    store_tile(e, e_ptr, row, column, N, stride_e, RAGGED)


@triton.jit
def maxima(
    x_ptr,
    unit_ptr,
    target_ptr,  # (N,) int64 first of the target class's CENTERS rows, -1 for none
    N,
    B,
    D_padded,
    first_class,
    log2_scale,
    partial_ptr,
    CENTERS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, tile = own_tile(N, BLOCK_N)
    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    exponent = exponent_tile(
        x_ptr, unit_ptr, row, column, N, B, D_padded, log2_scale, RAGGED, PRECISION, UPCAST, BLOCK_N, BLOCK_C, BLOCK_K
    )
    exponent = negatives(exponent, float("-inf"), target_ptr, row, column, N, B, first_class, RAGGED, CENTERS)
    place = partial_ptr + tile.to(tl.int64) * N + row
    before = tl.load(place, mask=(row < N) & (first_class > 0), other=float("-inf"))
    tl.store(place, tl.maximum(before, tl.max(exponent, 1).to(tl.float64)), mask=row < N)


@triton.jit
def exponents(
    x_ptr,
    unit_ptr,
    target_ptr,  # (N,) int64 first of the target class's CENTERS rows, -1 for none
    N,
    B,
    D_padded,
    first_class,
    log2_scale,
    out_ptr,  # (N, stride_out) float32
    stride_out,
    CENTERS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, tile = own_tile(N, BLOCK_N)
    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    exponent = exponent_tile(
        x_ptr, unit_ptr, row, column, N, B, D_padded, log2_scale, RAGGED, PRECISION, UPCAST, BLOCK_N, BLOCK_C, BLOCK_K
    )
    exponent = negatives(exponent, float("-inf"), target_ptr, row, column, N, B, first_class, RAGGED, CENTERS)
    store_tile(exponent, out_ptr, row, column, N, stride_out, RAGGED)
