"""The Triton kernels of the slab loop around its product, which is triton_exponentials.py's. Each reads the table, or a slab of
it, once.

    normalize_rows      w̃ = w / ‖w‖ or w of a slab, in 16 bits or float32, its columns padded with zeros to D_padded
    finish_sums         total, the sum of a row's tiles, and lse = log total + shift log 2
    add_pull            U += E w̃ from the parts that the product comes in, divided by the row's total after the last slab
    project_rows        dw = (dw̃ - ŵ (ŵ·dw̃)) / ‖w‖ or dw̃, + the targets' share, in float32 from the raw rows, rounded once on the
                        way out

No atomics: every sum has a fixed order. Row offsets are int64: C x D passes 2^31.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ..normalize import TINY_NORM as _TINY_NORM

# TRITON_INTERPRET=1 runs the kernels on CPU tensors; a GPU build of them refuses such tensors.
INTERPRETED = triton.knobs.runtime.interpret

TINY_NORM = tl.constexpr(_TINY_NORM)
LOG_2 = tl.constexpr(math.log(2))
# Elements that one program of a row kernel holds.
ROW_BLOCK_ELEMENTS = 4096
# Whether a product and a sum may become one operation with one rounding: in each launch, for Triton's default moves.
FUSE = {"enable_fp_fusion": True}


@functools.cache
def row_blocks(size, elements=ROW_BLOCK_ELEMENTS):
    """Launch configuration of the row kernels for (padded) embedding size `size`."""
    block_d = 1 << (size - 1).bit_length()  # triton.next_power_of_2 takes the host longer
    return {"BLOCK_R": max(1, elements // block_d), "BLOCK_D": block_d, "num_warps": 4 if block_d <= 4096 else 8, **FUSE}


def capability(device):
    """A GPU's compute capability; off a GPU, in the interpreter, Hopper's."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def precision():
    """PyTorch's own switch for float32 matrix products on a GPU, as Triton spells it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def unit_and_inverse(rows):
    """(unit rows, 1 / norm) of a float32 tile (R, D); see normalize.unit_rows."""
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
def project(unit, inverse, grad):
    """The gradient of rows from that of their unit rows (R, D); see normalize.project."""
    out = (grad - unit * tl.sum(unit * grad, 1)[:, None]) * inverse[:, None]
    return tl.where((inverse == 0.0)[:, None], 0.0, out)


@triton.jit
def normalize_rows(
    rows_ptr,  # (R, D) raw class rows, any float dtype
    unit_ptr,  # (R_padded, D_padded) unit rows, or the rows as they are; rows past R and columns past D become zero
    R,
    R_padded,
    D,
    stride_row,
    stride_column,
    D_padded,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D_padded, a power of two
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (row < R)[:, None] & (column < D)[None, :]
    rows = tl.load(rows_ptr + row[:, None] * stride_row + column[None, :] * stride_column, mask=inside, other=0.0)
    unit = rows.to(tl.float32)
    if NORMALIZE:
        unit, _ = unit_and_inverse(unit)
    tl.store(
        unit_ptr + row[:, None] * D_padded + column[None, :],
        unit.to(unit_ptr.dtype.element_ty),
        mask=(row < R_padded)[:, None] & (column < D_padded)[None, :],
    )


@triton.jit
def finish_sums(
    partial_ptr,  # (T, N) float64 row sums of E in each tile of a slab, over all slabs
    shift_ptr,  # (N,) float32
    lse_ptr,  # (N,) float32
    total_ptr,  # (N,) float32
    N,
    T,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < N
    total = tl.zeros((BLOCK_N,), tl.float64)
    for start in tl.range(0, T, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        place = tile.to(tl.int64)[:, None] * N + row[None, :]
        total += tl.sum(tl.load(partial_ptr + place, mask=(tile < T)[:, None] & live[None, :], other=0.0), 0)
    rounded = tl.where(live, total, 1.0).to(tl.float32)
    shift = tl.load(shift_ptr + row, mask=live, other=0.0)
    tl.store(total_ptr + row, rounded, mask=live)
    tl.store(lse_ptr + row, tl.log(rounded) + shift * LOG_2, mask=live)


@triton.jit
def add_pull(
    part_ptr,  # (PARTS, N * D) float32 whose sum is E ŵ of the slab
    sum_ptr,  # (N * D,) float64 over the slabs so far
    total_ptr,  # (N,) float32 row sums of E, read after the last slab
    pull_ptr,  # (N * D,) float32, written after the last slab
    size,  # N * D
    D,
    PARTS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    pull = tl.zeros((BLOCK,), tl.float64)
    if not FIRST:
        pull = tl.load(sum_ptr + index, mask=inside, other=0.0)
    for _ in tl.static_range(PARTS):
        pull += tl.load(part_ptr + index, mask=inside, other=0.0)
        part_ptr += size
    if LAST:
        total = tl.load(total_ptr + index // D, mask=inside, other=1.0)
        tl.store(pull_ptr + index, pull.to(tl.float32) / tl.where(total == 0.0, 1.0, total), mask=inside)
    else:
        tl.store(sum_ptr + index, pull, mask=inside)


@triton.jit
def targets_share(
    target_rows,  # (T,) int64 ascending
    target_sums,  # (T, stride) float32, a row's sum in the first slot that it has
    row,  # (R,) as target_rows counts them
    inside,  # (R, D) what is wanted
    column,
    T,
    stride,
    SEARCH_STEPS: tl.constexpr,  # 2^SEARCH_STEPS > T
):
    """(R, D) of a slab's rows what the targets add, 0 for a row that is none."""
    # Bisection: the first slot whose row is not below this one.
    slot = tl.zeros_like(row).to(tl.int32)
    end = slot + T
    for _ in tl.range(SEARCH_STEPS):
        middle = (slot + end) // 2
        below = tl.load(target_rows + middle, mask=middle < T, other=2**62) < row
        slot = tl.where(below, middle + 1, slot)
        end = tl.where(below, end, middle)
    held = tl.load(target_rows + slot, mask=slot < T, other=-1) == row
    return tl.load(target_sums + slot[:, None].to(tl.int64) * stride + column[None, :], mask=inside & held[:, None], other=0.0)


@triton.jit
def project_rows(
    rows_ptr,  # (R, D) raw rows of the table, any float dtype
    grad_ptr,  # (R, D_padded) float32: Eᵀ diag(row_scale) x
    unscale_ptr,  # 0-dim float32
    target_row_ptr,  # (T,) int64 ascending
    target_sum_ptr,  # (T, D) float32, a row's sum in the first slot that it has
    out_ptr,  # (R, D) contiguous rows of the weight's gradient
    R,
    D,
    T,
    first_row,
    stride_row,
    stride_column,
    D_padded,
    NORMALIZE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,  # 2^SEARCH_STEPS > T
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (row < R)[:, None] & (column < D)[None, :]
    out = tl.load(grad_ptr + row[:, None] * D_padded + column[None, :], mask=inside, other=0.0)
    if NORMALIZE:
        rows = tl.load(rows_ptr + row[:, None] * stride_row + column[None, :] * stride_column, mask=inside, other=0.0)
        unit, inverse = unit_and_inverse(rows.to(tl.float32))
        out = project(unit, inverse, out)
    out = out * tl.load(unscale_ptr) + targets_share(
        target_row_ptr, target_sum_ptr, row + first_row, inside, column, T, D, SEARCH_STEPS
    )
    tl.store(out_ptr + row[:, None] * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
