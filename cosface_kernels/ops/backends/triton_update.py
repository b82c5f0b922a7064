"""A fused optimiser's step on a GPU: one kernel reads a slab's rows and state once, and writes them once.

    gradient    dw = (dw̃ - ŵ (ŵ·dw̃)) / ‖w‖ or dw̃, + the targets' share, as triton_slab.project_rows; or given
    sgd         g = ±dw + λ w    m = μ m + g                                     w -= η m,  nesterov: η (g + μ m)
    adamw       g = ±dw          m = β1 m + (1 - β1) g, v = β2 v + (1 - β2) g²   w -= η λ w + η / c1 · m / (√v / c2 + ε)

With max_row_norm, a row of dw that is longer is first made that long. Rows and state are decoded before and encoded after, with
stochastic rounding, all in registers: neither a slab of dw nor one of decoded rows exists. formats.py and optim/rules.py do the
same in PyTorch, with the same random bits.
"""

import math

import torch
import triton
import triton.language as tl

from ..slabs import ceil_div
from .triton_launch import Launcher
from .triton_slab import project, targets_share, unit_and_inverse

# Elements that one program holds, and how many a warp: of the gradient, the row and each state it holds one at a time.
BLOCK_ELEMENTS, WARP_ELEMENTS, WARPS = 1024, 256, (4, 32)
PART_ARGUMENTS = 24  # of a kernel, from table_ptr to max_row_norm
OF_PAIR, OF_STREAM = tl.constexpr(0x9E3779B9), tl.constexpr(0xAC564B05)


def blocks(size):
    """Launch configuration for rows of `size` numbers."""
    block_d = 1 << (size - 1).bit_length()
    num_warps = min(max(block_d // WARP_ELEMENTS, WARPS[0]), WARPS[1])
    return {"BLOCK_R": max(1, BLOCK_ELEMENTS // block_d), "BLOCK_D": block_d, "num_warps": num_warps}


def launcher(size):
    """A Launcher of the steps of a call, for rows of `size` numbers."""
    # Without fusion: the bits that PyTorch's operators have, wherever rows are encoded.
    return Launcher(update_rows, **blocks(size), enable_fp_fusion=False)


def update(
    part, index, grad, *, column=0, start=0, normalize=False, unscale=None, targets=(None, None), launch=None, whole=False
):
    """One step of a rules.Part, for the rows at index: a slice, or int64 positions (R,).

    grad (R, >= column + D) float32: their gradient, from `column` on. If unscale is given, grad is dw̃, the other arguments are
    those of backends.backward, and `start` is the position of the slab's first row. launch: the call's `launcher`; whole: whether
    this is one of its whole slabs.
    """
    num_rows, size = grad.shape[0], part.rows.shape[1]
    target_rows, target_sums = targets
    num_targets, launch = 0 if target_rows is None else target_rows.shape[0], launch or launcher(size)
    if num_rows:
        launch(
            ceil_div(num_rows, launch.constants["BLOCK_R"]),
            *(grad[:, column:], unscale, target_rows, None if target_sums is None else target_sums[:, column:]),
            *(num_rows, size, num_targets, index.start if isinstance(index, slice) else start),
            *(grad.stride(0), 0 if target_sums is None else target_sums.stride(0)),
            *of_part(part, index),
            whole=whole,
            NORMALIZE=normalize,
            SEARCH_STEPS=num_targets.bit_length(),
        )


def of_part(part, index):
    """A rules.Part and the rows of it at index, as the kernels that step take them; None: what they take for no step."""
    if part is None:
        return (None,) * PART_ARGUMENTS
    first, second, *_ = *part.states, (None, None), (None, None)
    rows = part.rows if part.row_scale is None else part.rows.view(torch.int8)  # a chip below 8.9 takes no pointer to e4m3
    numbers = part.rule.numbers()
    return (
        *(rows, part.row_scale, *first, *second, None if isinstance(index, slice) else index, part.skip, part.rule.step),
        *(part.first_row, _signed(part.key), _signed(part.key >> 32), *numbers),
        *(math.log(decay) if decay else -math.inf for decay in (numbers.first_decay, numbers.second_decay)),
        part.max_row_norm,
    )


def of_slabs(sink, table, factors, plan):
    """A function of start, stop and dw̃ of a slab that steps with it what a sink updates; None for a sink that wants dW.

    table, factors, plan: as for backends.backward.
    """
    parts = sink.device_update()
    if parts is None:
        return None
    projection = {
        "normalize": table.normalize,
        "unscale": factors.unscale,
        "targets": (factors.target_rows, factors.target_sums),
    }
    launchers = [launcher(part.rows.shape[1]) for part, _ in parts]

    def update_slab(start, stop, grad):
        place = slice(start, stop) if table.index is None else table.index[start:stop]
        for (part, column), launch in zip(parts, launchers, strict=True):
            bound = {"launch": launch, "whole": stop - start == plan.slab}
            update(part, place, grad, column=column, start=start, **projection, **bound)

    return update_slab


def _signed(word):
    """32 bits as an int32, because Triton compiles again for integers of another size."""
    return (word + 2**31) % 2**32 - 2**31


@triton.jit(do_not_specialize=("key_low", "key_high"))
def update_rows(
    grad_ptr,  # (R, stride_grad) float32: Eᵀ diag(row_scale) x, or without unscale the gradient itself
    unscale_ptr,  # 0-dim float32
    target_row_ptr,  # (T,) int64 ascending
    target_sum_ptr,  # (T, stride_sum) float32, a row's sum in the first slot that it has
    R,
    D,
    T,
    first_row,  # of the table, and the place of grad's first row among those that target_row counts
    stride_grad,
    stride_sum,
    table_ptr,  # (C, D) float32, bfloat16, or int8 that are the bits of e4m3
    table_scale_ptr,  # (C,) float32 beside e4m3, else None
    first_ptr,  # (C, D) m, float32, bfloat16 or int8; None where the rule has none
    first_scale_ptr,  # (C,) float32 for 8 bits
    second_ptr,  # (C, D) v, float32, bfloat16 or uint8
    second_scale_ptr,
    index_ptr,  # (R,) int64 distinct rows of the table; None: those from first_row on
    skip_ptr,  # bool (0-dim): where true nothing changes; None: it is known that all does
    step_ptr,  # 0-dim float32: t of adamw; None for sgd
    first_of_shard,  # of the table in the whole one, whose others are on other ranks
    key_low,
    key_high,
    lr,
    weight_decay,
    sign,
    nesterov,
    eps,
    first_decay,  # μ, or β1
    second_decay,
    first_rate,  # 1 - β, which β in float32 is too coarse for
    second_rate,
    log_first,  # log β1
    log_second,
    max_row_norm,  # None: any
    NORMALIZE: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    row, live = rows_to_step(slot, first_row, R, index_ptr, skip_ptr)
    inside = live[:, None] & (column < D)[None, :]
    place = row[:, None] * D  # its columns are 32-bit numbers, which take fewer registers

    table = load(table_ptr + place + column[None, :], table_scale_ptr, row, live, inside, 0)
    grad = tl.load(grad_ptr + slot[:, None] * stride_grad + column[None, :], mask=inside, other=0.0)
    if NORMALIZE:
        unit, inverse = unit_and_inverse(table)
        grad = project(unit, inverse, grad)
    if unscale_ptr is not None:
        share = targets_share(target_row_ptr, target_sum_ptr, slot + first_row, inside, column, T, stride_sum, SEARCH_STEPS)
        grad = grad * tl.load(unscale_ptr) + share
    step(
        *(grad, table, row, live, inside, column, D, table_ptr, table_scale_ptr, first_ptr, first_scale_ptr),
        *(second_ptr, second_scale_ptr, step_ptr, first_of_shard, key_low, key_high, lr, weight_decay, sign, nesterov, eps),
        *(first_decay, second_decay, first_rate, second_rate, log_first, log_second, max_row_norm),
    )


@triton.jit
def rows_to_step(slot, first_row, R, index_ptr, skip_ptr):
    """(rows of the table, whether they change) of a slab's slots (R,) int64."""
    live = slot < R
    if skip_ptr is not None:
        live = live & (tl.load(skip_ptr).to(tl.int32) == 0)
    row = first_row + slot
    if index_ptr is not None:
        row = tl.load(index_ptr + slot, mask=live, other=0)
    return row, live


@triton.jit
def step(
    grad,  # (R, D) float32 of the loss
    table,  # (R, D) float32, the rows as they were; the other arguments are update_rows'
    row,
    live,
    inside,
    column,
    D,
    table_ptr,
    table_scale_ptr,
    first_ptr,
    first_scale_ptr,
    second_ptr,
    second_scale_ptr,
    step_ptr,
    first_of_shard,
    key_low,
    key_high,
    lr,
    weight_decay,
    sign,
    nesterov,
    eps,
    first_decay,
    second_decay,
    first_rate,
    second_rate,
    log_first,
    log_second,
    max_row_norm,
):
    """Write the rows and their state."""
    place = row[:, None] * D
    if max_row_norm is not None:
        grad *= shortening(grad, max_row_norm)[:, None]
    grad *= sign
    words = random_words((row + first_of_shard)[:, None], column[None, :], key_low, key_high)
    if step_ptr is not None:
        count = tl.load(step_ptr)
        first = load(first_ptr + place + column[None, :], first_scale_ptr, row, live, inside, 1)
        second = load(second_ptr + place + column[None, :], second_scale_ptr, row, live, inside, 2)
        # As torch.lerp: exact where a β is 0.
        first = tl.where(first_rate < 0.5, first + first_rate * (grad - first), grad - first_decay * (grad - first))
        second = second_decay * second + second_rate * grad * grad
        size = lr / one_minus_power(log_first, count)
        length = tl.sqrt(second) / tl.sqrt(one_minus_power(log_second, count)) + eps
        table = table - lr * weight_decay * table
        table -= size * (first / length)
        store(first_ptr + place + column[None, :], first_scale_ptr, row, live, inside, first, words, column, 1)
        store(second_ptr + place + column[None, :], second_scale_ptr, row, live, inside, second, words, column, 2)
    else:
        grad += weight_decay * table
        if first_ptr is not None:
            first = load(first_ptr + place + column[None, :], first_scale_ptr, row, live, inside, 1)
            first = first_decay * first + grad
            store(first_ptr + place + column[None, :], first_scale_ptr, row, live, inside, first, words, column, 1)
            grad = tl.where(nesterov != 0, grad + first_decay * first, first)
        table -= lr * grad
    store(table_ptr + place + column[None, :], table_scale_ptr, row, live, inside, table, words, column, 0)


@triton.jit
def shortening(grad, max_row_norm):
    """min(1, max_row_norm / ‖row‖) (R,). A row is divided by its largest number: squares of float32 end at 1e19."""
    largest = tl.max(tl.abs(grad), 1)
    shrunk = grad / tl.where(largest > 0.0, largest, 1.0)[:, None]
    norm = largest * tl.sqrt(tl.sum(shrunk * shrunk, 1))
    return tl.where(norm > max_row_norm, max_row_norm / tl.where(norm > 0.0, norm, 1.0), 1.0)


@triton.jit
def one_minus_power(log_base, exponent):
    """1 - base^exponent of numbers, to the last digits for a base near 1 (W. Kahan's expm1)."""
    log = log_base * exponent
    power = tl.exp(log)
    # What `power` has lost of a small `log`, its own logarithm has lost too.
    near = (power > 0.5) & (power < 1.0)
    lost = tl.where(near, log / tl.log(tl.where(near, power, 0.5)), 1.0)
    return tl.where(power < 1.0, (1.0 - power) * lost, -log)


# STREAM: 0 of the table, whose 8 bits are float8, 1 and 2 of the states, whose 8 bits are codes.
@triton.jit
def load(pointer, scale, row, live, inside, STREAM: tl.constexpr):
    """See formats.read."""
    rows = tl.load(pointer, mask=inside, other=0)
    if scale is not None:
        scales = tl.load(scale + row, mask=live, other=0.0)[:, None]
        rows = from_float8(rows, scales) if STREAM == 0 else rows.to(tl.float32) * scales
        if pointer.dtype.element_ty == tl.uint8:
            rows *= rows
    return rows.to(tl.float32)


@triton.jit
def store(pointer, scale, row, live, inside, rows, words, column, STREAM: tl.constexpr):
    """See formats.write."""
    bits = random_bits(words, column[None, :], STREAM)
    if scale is not None:
        if STREAM == 0:
            rows, scales = to_float8(rows, bits)
        else:
            rows, scales = to_codes(rows, bits, pointer.dtype.element_ty == tl.uint8)
        tl.store(scale + row, scales, mask=live)
        tl.store(pointer, rows.to(pointer.dtype.element_ty), mask=inside)
    elif pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, to_bfloat16(rows, bits), mask=inside)
    else:
        tl.store(pointer, rows, mask=inside)


@triton.jit
def to_bfloat16(rows, bits):
    """See formats.round_bfloat16."""
    word = tl.where(rows != rows, 0x7FC00000, rows.to(tl.uint32, bitcast=True) + bits)
    return (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def from_float8(codes, scale):
    """See formats._read_float8."""
    halves = ((codes.to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True)
    return halves.to(tl.float32) * (scale * 2.0**8)


@triton.jit
def to_float8(rows, bits):
    """(e4m3 as int32, scale (R,)) of formats._float8."""
    words = rows.to(tl.int32, bitcast=True)
    largest = tl.max(words & 0x7FFFFFFF, 1)
    finite = largest < 0x7F800000
    exponent = tl.minimum(tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1), 246)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    sizes = tl.minimum(tl.abs(rows) * inverse[:, None], 448.0)
    small = sizes < 2.0**-6
    kept = tl.where(small, sizes + 2.0**-6, sizes).to(tl.int32, bitcast=True)
    kept = (kept + (bits.to(tl.int32) << 4) + 8) >> 20
    codes = (kept - tl.where(small, 121 << 3, 120 << 3)) | ((words >> 24) & 0x80)
    return tl.where(finite[:, None], codes, 0), tl.where(finite, scale, float("nan"))


@triton.jit
def to_codes(rows, bits, SQUARES: tl.constexpr):
    """(codes (R, D) in float32, scale (R,)) of formats._codes."""
    LARGEST_CODE: tl.constexpr = 255 if SQUARES else 127
    if SQUARES:
        rows = tl.sqrt_rn(rows)
    # Magnitudes are ordered as their bits are, and NaN comes last; tl.max would pass over it.
    largest = tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = largest < 0x7F800000
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), LARGEST_CODE * 1.0)
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale)))
    tiny = inverse == float("inf")
    scale = tl.where(tiny, 0.0, scale)
    inverse = tl.where(tiny, 0.0, inverse)
    codes = tl.floor(rows * inverse[:, None] + ((bits >> 1).to(tl.float32) + 0.5) * 2.0**-15)
    if SQUARES:
        codes = tl.where(rows > 0.0, tl.maximum(codes, 1.0), codes)
    codes = tl.minimum(tl.maximum(codes, -LARGEST_CODE), LARGEST_CODE)
    return tl.where(finite[:, None], codes, 0.0), tl.where(finite, scale, float("nan"))


@triton.jit
def random_words(row, column, key_low, key_high):
    """What formats.random_bits takes its bits from, for row numbers (R, 1) int64 in the whole table and columns (1, D)."""
    key = mixed(row.to(tl.uint32) ^ key_low.to(tl.uint32))
    key = mixed(key ^ (row >> 32).to(tl.uint32) ^ key_high.to(tl.uint32))
    return mixed(key + (column >> 1).to(tl.uint32) * OF_PAIR)


@triton.jit
def random_bits(words, column, STREAM: tl.constexpr):
    for _ in tl.static_range(STREAM):
        words = (words ^ (words >> 16)) * OF_STREAM
    return (words >> ((column & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def mixed(word):
    """See formats._mixed."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)
