"""The Triton kernels of the slab loop: three, each reading the class table or its slab once.

    normalize_rows      ŵ = w / ‖w‖ of a slab, in 16 bits or float32, its columns padded with zeros to D_padded
    exponentials        E = 2^{k x ŵᵀ - shift} with E[n, y_n] = 0, as the epilogue of the matmul: cosines live in registers only.
                        Row sums (or row maxima of k cos) of each tile leave as one float32 per row; E is stored only if asked for
    project_rows        dw = (dŵ - ŵ (ŵ·dŵ)) / ‖w‖ + the targets' share, in float32 from the raw rows, rounded once on the way out

No atomics: a tile writes its own partial sums, and their reduction is a plain sum. Row offsets are int64: C x D passes 2^31.
"""

import triton
import triton.language as tl

from ..unit import TINY_NORM as _TINY_NORM

TINY_NORM = tl.constexpr(_TINY_NORM)


@triton.jit
def _unit_and_inverse(rows):
    """(unit rows, 1 / norm) of a float32 tile (R, D); see unit.unit_rows."""
    magnitude = tl.abs(rows)
    largest = tl.max(magnitude, 1)
    # tl.max passes over NaN; an infinity divides to NaN by itself.
    scaled = rows / tl.where(largest == 0.0, 1.0, largest)[:, None]
    length = tl.sqrt_rn(tl.sum(scaled * scaled, 1))
    tiny = length * largest < TINY_NORM
    length = tl.where(tiny, 1.0, length)
    unit = tl.where(tiny[:, None], 0.0, scaled / length[:, None])
    return unit, tl.where(tiny, 0.0, 1.0 / (length * largest))


@triton.jit
def normalize_rows(
    rows_ptr,  # (R, D) raw class rows, any float dtype
    unit_ptr,  # (R_padded, D_padded) unit rows; rows past R and columns past D become zero
    R,
    R_padded,
    D,
    stride_row,
    stride_column,
    D_padded,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D_padded, a power of two
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (row < R)[:, None] & (column < D)[None, :]
    rows = tl.load(rows_ptr + row[:, None] * stride_row + column[None, :] * stride_column, mask=inside, other=0.0)
    unit, _ = _unit_and_inverse(rows.to(tl.float32))
    tl.store(
        unit_ptr + row[:, None] * D_padded + column[None, :],
        unit.to(unit_ptr.dtype.element_ty),
        mask=(row < R_padded)[:, None] & (column < D_padded)[None, :],
    )


@triton.jit
def exponentials(
    x_ptr,  # (N, D_padded) rows to multiply
    unit_ptr,  # (>= B, D_padded) unit class rows of the slab
    target_ptr,  # (N,) int64 target class, -1 for none
    shift_ptr,  # (N,) float32
    e_ptr,  # (N, stride_e) exponentials, columns B .. stride_e become zero; not touched unless STORE
    partial_ptr,  # (tiles, N) float32 row sums of E, or with MAXIMUM row maxima of k cos
    N,
    B,
    D_padded,
    first_class,
    log2_scale,
    stride_e,
    STORE: tl.constexpr,
    MAXIMUM: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    UPCAST: tl.constexpr,  # interpreter only, whose bfloat16 products are not numbers
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Row tiles run fastest: neighbouring programs read the same class rows while those are in L2.
    row_tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) // row_tiles
    column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    step = tl.arange(0, BLOCK_K)
    # Ragged rows and columns read the last valid one, and are dropped after the exponential.
    x_row = x_ptr + tl.minimum(row, N - 1).to(tl.int64)[:, None] * D_padded + step[None, :]
    unit_row = unit_ptr + tl.minimum(column, B - 1).to(tl.int64)[:, None] * D_padded + step[None, :]
    cosine = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for k in tl.range(0, D_padded, BLOCK_K):
        x = tl.load(x_row + k)
        unit = tl.load(unit_row + k)
        if UPCAST:
            x = x.to(tl.float32)
            unit = unit.to(tl.float32)
        cosine = tl.dot(x, unit.T, cosine, input_precision=PRECISION)

    live = row < N
    target = tl.load(target_ptr + row, mask=live, other=-1) - first_class
    # 64-bit comparisons for each row, 32-bit ones for each element.
    target = tl.where((target >= 0) & (target < B), target, -1).to(tl.int32)
    dropped = (target[:, None] == column[None, :]) | (column >= B)[None, :]
    partial = partial_ptr + tile.to(tl.int64) * N + row
    if MAXIMUM:
        tl.store(partial, tl.max(tl.where(dropped, float("-inf"), cosine * log2_scale), 1), mask=live)
    else:
        shift = tl.load(shift_ptr + row, mask=live, other=0.0)
        e = tl.where(dropped, 0.0, tl.exp2(cosine * log2_scale - shift[:, None]))
        tl.store(partial, tl.sum(e, 1), mask=live)
        if STORE:
            tl.store(
                e_ptr + row.to(tl.int64)[:, None] * stride_e + column[None, :],
                e.to(e_ptr.dtype.element_ty),
                mask=live[:, None] & (column < stride_e)[None, :],
            )


@triton.jit
def project_rows(
    rows_ptr,  # (R, D) raw class rows, any float dtype
    grad_ptr,  # (R, D_padded) float32: Eᵀ diag(row_scale) x
    unscale_ptr,  # 0-dim float32
    slot_ptr,  # (R,) int64: where target_classes might hold the row's class
    target_class_ptr,  # (N,) int64 ascending
    target_sum_ptr,  # (N, D) float32
    out_ptr,  # (R, D) contiguous rows of the weight's gradient
    R,
    D,
    N,
    first_class,
    stride_row,
    stride_column,
    D_padded,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (row < R)[:, None] & (column < D)[None, :]
    rows = tl.load(rows_ptr + row[:, None] * stride_row + column[None, :] * stride_column, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row[:, None] * D_padded + column[None, :], mask=inside, other=0.0)
    unit, inverse = _unit_and_inverse(rows.to(tl.float32))
    out = (grad - unit * tl.sum(unit * grad, 1)[:, None]) * inverse[:, None] * tl.load(unscale_ptr)
    out = tl.where((inverse == 0.0)[:, None], 0.0, out)
    slot = tl.load(slot_ptr + row, mask=row < R, other=0)
    held = slot < N
    held = held & (tl.load(target_class_ptr + slot, mask=held, other=-1) == row + first_class) & (row < R)
    share = tl.load(target_sum_ptr + slot[:, None] * D + column[None, :], mask=inside & held[:, None], other=0.0)
    tl.store(out_ptr + row[:, None] * D + column[None, :], (out + share).to(out_ptr.dtype.element_ty), mask=inside)
