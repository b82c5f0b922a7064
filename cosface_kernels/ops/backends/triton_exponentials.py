"""The product k x w̃ᵀ of a slab with an epilogue on its tiles while they are in registers: one kernel for each epilogue.

    exponentials    row sums of E = 2^{k x w̃ᵀ - shift}, E[n, y_n] = 0, and where it is given memory for it E itself
    maxima          row maxima of the exponents k x w̃ᵀ, for the shift of logits without a bound
    exponents       the exponents themselves, in float32, for classes of several rows

Sums and maxima of a tile are added to those of the slabs before, one float64 for each row and tile; exponents of a row's target
and past the slab's end count as -inf. Cosines are never stored. No atomics. All but maxima also find each row's largest product
and its position in the table, where they are given memory for it. Of hard negatives, where given, exponentials are those of
p0 + p1 c + p2 c² where a product c passes τ, and what is stored is E times its slope.

Forms (triton_forms.py): DESCRIPTORS, blocks are moved by tensor descriptors, which compute capability 9.0 has hardware for.
HALVES, E is made and stored in two halves of a tile, the first on its way out under the second's exponentials.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


def source(matrix, block, descriptors):
    """The matrix, or its descriptor, of which a kernel loads or stores blocks."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block) if descriptors else matrix


@triton.jit
def own_tile(N, BLOCK_N: tl.constexpr):
    """(first row of x, tile of classes) of a program."""
    # Row tiles run fastest: neighbouring programs read the same class rows while those are in L2.
    row_tiles = tl.cdiv(N, BLOCK_N)
    return (tl.program_id(0) % row_tiles) * BLOCK_N, tl.program_id(0) // row_tiles


@triton.jit
def operand(block, UPCAST: tl.constexpr):
    """A block as tl.dot takes it. UPCAST: for the interpreter, whose bfloat16 products are not numbers."""
    return block.to(tl.float32) if UPCAST else block


@triton.jit
def in_slab(target, first_class, B):
    """Targets as positions in the slab of B classes from first_class on; -1 for those outside it."""
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
def cosine_tile(
    x,
    unit,
    first_row,
    first_column,
    N,
    B,
    D_padded,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x w̃ᵀ (BLOCK_N, BLOCK_C). Past the edges rows and columns repeat the last valid one, or are zeros from a descriptor."""
    if not DESCRIPTORS:
        row, column, step = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
        unit_row = tl.minimum(column, B - 1) if RAGGED else column
        x_row = x + tl.minimum(row, N - 1).to(tl.int64)[:, None] * D_padded + step[None, :]
        unit_row = unit + unit_row.to(tl.int64)[:, None] * D_padded + step[None, :]
    cosine = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dtype: tl.constexpr = x.dtype if DESCRIPTORS else x.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        # A path around the loop would set the sums before the last wait for a wgmma, and ptxas would make each wgmma wait. In
        # float32, compiled for 10.0, it spills without that path.
        tl.assume(D_padded > 0)
    for k in tl.range(0, D_padded, BLOCK_K):
        left = x.load([first_row, k]) if DESCRIPTORS else tl.load(x_row + k)
        right = unit.load([first_column, k]) if DESCRIPTORS else tl.load(unit_row + k)
        cosine = tl.dot(operand(left, UPCAST), operand(right, UPCAST).T, cosine, input_precision=PRECISION)
    return cosine


@triton.jit
def halves(tile):
    """(left, right) columns of a tile."""
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def left_out(targets, row, column, N, B, first_class, RAGGED: tl.constexpr, CENTERS: tl.constexpr):
    """Bool: True at a row's target (CENTERS columns of a tile), and past the slab's end."""
    target = in_slab(tl.load(targets + row, mask=row < N, other=-1), first_class, B)
    dropped = target[:, None] == column[None, :]
    if CENTERS > 1:
        dropped = (target >= 0)[:, None] & (column[None, :] >= target[:, None]) & (column[None, :] < target[:, None] + CENTERS)
    if RAGGED:
        dropped = dropped | (column >= B)[None, :]
    return dropped


@triton.jit
def see_largest(
    cosine, targets, largest, positions, tile, row, column, N, B, first_class, RAGGED: tl.constexpr, CENTERS: tl.constexpr
):
    """The larger of a row's largest product in this tile and those of the slabs before, and its position; (tiles, N)."""
    dropped = left_out(targets, row, column, N, B, first_class, RAGGED, CENTERS)
    value, at = tl.max(tl.where(dropped, float("-inf"), cosine), 1, return_indices=True)
    place = tile.to(tl.int64) * N + row
    before = tl.load(largest + place, mask=(row < N) & (first_class > 0), other=float("-inf"))
    tl.store(largest + place, tl.maximum(before, value), mask=row < N)
    position = first_class + (tile * cosine.shape[1] + at).to(tl.int64)
    tl.store(positions + place, position, mask=(row < N) & (value > before))


@triton.jit
def hard_tile(cosine, hard, row, N):
    """(g(c), g'(c)) of a tile; hard: (4, N), each row's τ, p0, p1, p2."""
    live = row < N
    threshold = tl.load(hard + row, mask=live, other=float("inf"))[:, None]
    p0 = tl.load(hard + N + row, mask=live, other=0.0)[:, None]
    p1 = tl.load(hard + 2 * N + row, mask=live, other=0.0)[:, None]
    p2 = tl.load(hard + 3 * N + row, mask=live, other=0.0)[:, None]
    is_hard = cosine > threshold
    value = tl.where(is_hard, p0 + cosine * (p1 + cosine * p2), cosine)
    return value, tl.where(is_hard, p1 + 2.0 * cosine * p2, 1.0)


@triton.jit
def exponential_tile(cosine, log2_scale, targets, shifts, hard, row, column, N, B, first_class, RAGGED: tl.constexpr):
    """(E, what is stored of it) of a tile."""
    dropped = left_out(targets, row, column, N, B, first_class, RAGGED, 1)
    shift = tl.load(shifts + row, mask=row < N, other=0.0)
    if hard is None:
        e = tl.where(dropped, 0.0, tl.exp2(cosine * log2_scale - shift[:, None]))
        stored = e
    else:
        value, slope = hard_tile(cosine, hard, row, N)
        e = tl.where(dropped, 0.0, tl.exp2(value * log2_scale - shift[:, None]))
        stored = e * slope
    return e, stored


@triton.jit
def store_tile(tile, out, first_row, first_column, N, stride, RAGGED: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Store a tile into out (N, stride), with its columns past the slab's end, up to the end of the row."""
    if DESCRIPTORS:
        out.store([first_row, first_column], tile.to(out.dtype))
    else:
        row, column = first_row + tl.arange(0, tile.shape[0]), first_column + tl.arange(0, tile.shape[1])
        inside = (row < N)[:, None]
        if RAGGED:
            inside = inside & (column < stride)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * stride + column[None, :], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def exponentials(
    x,  # (N, D_padded) rows to multiply, or their descriptor
    unit,  # (>= B, D_padded) unit class rows of the slab, or their descriptor
    target_ptr,  # (N,) int64 class, -1 for none
    N,
    B,
    D_padded,
    first_class,
    log2_scale,
    shift_ptr,  # (N,) float32
    partial_ptr,  # (tiles, N) float64
    largest_ptr,  # (tiles, N) float32, and
    position_ptr,  # (tiles, N) int64, as see_largest has them; or None
    hard_ptr,  # (4, N) float32, or None
    out,  # (N, stride_out) E, or its descriptor, or None; columns B .. stride_out become 0
    stride_out,
    HALVES: tl.constexpr,
    RAGGED: tl.constexpr,  # whether BLOCK_C does not divide B
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row, tile = own_tile(N, BLOCK_N)
    first = tile * BLOCK_C
    row, column = first_row + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_C)
    cosine = cosine_tile(
        x, unit, first_row, first, N, B, D_padded, RAGGED, PRECISION, UPCAST, DESCRIPTORS, BLOCK_N, BLOCK_C, BLOCK_K
    )
    if largest_ptr is not None:
        see_largest(cosine, target_ptr, largest_ptr, position_ptr, tile, row, column, N, B, first_class, RAGGED, 1)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    parts = halves(cosine) if HALVES else (cosine,)
    for i in tl.static_range(len(parts)):
        column = first + tl.arange(0, parts[i].shape[1])
        e, stored = exponential_tile(
            parts[i], log2_scale, target_ptr, shift_ptr, hard_ptr, row, column, N, B, first_class, RAGGED
        )
        sums += tl.sum(e, 1)
        if out is not None:
            store_tile(stored, out, first_row, first, N, stride_out, RAGGED, DESCRIPTORS)
        first += parts[i].shape[1]
    add_sums(partial_ptr, tile, row, N, first_class, sums)


@triton.jit
def maxima(
    x,
    unit,
    target_ptr,  # (N,) int64 first of the target class's CENTERS rows, -1 for none
    N,
    B,
    D_padded,
    first_class,
    log2_scale,
    partial_ptr,
    hard_ptr,
    CENTERS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row, tile = own_tile(N, BLOCK_N)
    first = tile * BLOCK_C
    row, column = first_row + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_C)
    cosine = cosine_tile(
        x, unit, first_row, first, N, B, D_padded, RAGGED, PRECISION, UPCAST, DESCRIPTORS, BLOCK_N, BLOCK_C, BLOCK_K
    )
    dropped = left_out(target_ptr, row, column, N, B, first_class, RAGGED, CENTERS)
    if hard_ptr is not None:
        cosine, _ = hard_tile(cosine, hard_ptr, row, N)
    exponent = tl.where(dropped, float("-inf"), cosine * log2_scale)
    place = partial_ptr + tile.to(tl.int64) * N + row
    before = tl.load(place, mask=(row < N) & (first_class > 0), other=float("-inf"))
    tl.store(place, tl.maximum(before, tl.max(exponent, 1).to(tl.float64)), mask=row < N)


@triton.jit
def exponents(
    x,
    unit,
    target_ptr,  # (N,) int64 first of the target class's CENTERS rows, -1 for none
    N,
    B,
    D_padded,
    first_class,
    log2_scale,
    largest_ptr,
    position_ptr,
    out_ptr,  # (N, stride_out) float32
    stride_out,
    CENTERS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row, tile = own_tile(N, BLOCK_N)
    first = tile * BLOCK_C
    row, column = first_row + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_C)
    cosine = cosine_tile(
        x, unit, first_row, first, N, B, D_padded, RAGGED, PRECISION, UPCAST, DESCRIPTORS, BLOCK_N, BLOCK_C, BLOCK_K
    )
    if largest_ptr is not None:
        see_largest(cosine, target_ptr, largest_ptr, position_ptr, tile, row, column, N, B, first_class, RAGGED, CENTERS)
    dropped = left_out(target_ptr, row, column, N, B, first_class, RAGGED, CENTERS)
    exponent = tl.where(dropped, float("-inf"), cosine * log2_scale)
    store_tile(exponent, out_ptr, first_row, first, N, stride_out, RAGGED, False)
