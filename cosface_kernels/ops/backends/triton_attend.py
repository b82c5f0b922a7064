"""Attention-shaped kernels: two products and the exponential between them in one launch, E in registers alone.

    attend(Q, KV) = (2^{k Q KVᵀ - h}, targets left out) KV

    attend_features     Q = x̂, KV = ŵ of a slab: row sums of E, and E ŵ. Classes are split over programs, each of which writes its
                        part; finish_sums and add_pull of triton_slab.py add the parts in their order
    attend_table        Q = ŵ, KV = x̂ with E's columns times row_scale: a program makes whole rows of dŵ, and after them of
                        dw = (dŵ - ŵ (ŵ·dŵ)) / ‖w‖ + the targets' share, from the raw rows and back to the gradient's, or a
                        fused optimiser's step with them, as triton_update.py

No N x B matrix is stored, and no tile is transposed in registers: the second kernel computes ŵ x̂ᵀ. No atomics.

They serve cosines with a constant shift and one row to a class, if nothing is kept, and only if triton_forms.py asks for
them. Rows are padded to a power of two up to 512, the longest row of dŵ that registers hold beside 63 others.
"""

import importlib

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..slabs import ceil_div
from . import triton_exponentials, triton_forms, triton_slab, triton_update
from .triton_exponentials import add_sums, in_slab, operand, own_tile
from .triton_launch import Launcher
from .triton_slab import FUSE, project, targets_share, unit_and_inverse

SIZE_MIN, SIZE_MAX = 64, 512
# Programs that fill a GPU; the most parts that the classes are cut into.
PROGRAMS, PARTS_MAX = 128, 16
# Numbers of the table's rows that a thread holds at a time, before and after the products.
ROW_NUMBERS = 16
# By padded size: rows of Q, rows of KV, warps, stages. Compiled for that chip, none spills and no wgmma waits for the one before;
# with more rows of x̂ attend_table does one or the other.
HOPPER = {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2), 512: (64, 64, 8, 2)}
HOPPER_TABLE = {**HOPPER, 256: (64, 32, 4, 2), 512: (64, 32, 8, 2)}
BLACKWELL = {size: HOPPER[size] for size in (64, 128, 256)}  # 64 rows of 512 spill there, and 128 rows of 256 of the table's
BLACKWELL_TABLE = {size: HOPPER[size] for size in (64, 128)}
OLDER = {64: (64, 64, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)}  # 99 KB of shared memory
FLOAT32 = {64: (32, 16, 8, 1), 128: (32, 16, 8, 1), 256: (32, 16, 8, 1), 512: (16, 16, 8, 1)}
FLOAT32_TABLE = {**FLOAT32, 64: (16, 16, 8, 1), 128: (16, 16, 8, 1)}
BLOCKS = {"attend_features": ("BLOCK_N", "BLOCK_C"), "attend_table": ("BLOCK_R", "BLOCK_N")}  # of Q, of KV


def width(size):
    """The size to which rows of `size` numbers are padded."""
    return max(SIZE_MIN, 1 << (size - 1).bit_length())


def serves(x, table, targets, plan, *, need_pull=True, need_largest=False, hard=None):
    """True if the kernels compute what a call asks for; the slab loop computes every call."""
    cosines = plan.shift is not None and table.centers == 1 and table.correction is None and hard is None and targets.dim() == 1
    return cosines and need_pull and not need_largest and x.shape[0] > 0 and x.shape[1] <= SIZE_MAX


def constants(kernel, x, table, targets, plan, *, common=None, **needs):
    """A kernel's launch options and constants if it serves the call and is asked for; None if the slab loop does.

    common: what backward adds to each row of dŵ (SlabFactors); needs: as in `serves`.
    """
    if not serves(x, table, targets, plan, **needs) or plan.kept_slabs:
        return None
    num_rows, size = x.shape
    capability = triton_slab.capability(x.device)
    asked = triton_forms.options(kernel, num_rows, size, plan.dtype, capability)
    if asked is None:
        return None
    if asked.get("GLUON"):
        fits = capability == (9, 0) and width(size) == SIZE_MAX and plan.dtype != torch.float32 and hopper()
        return {"GLUON": True, "SIZE": SIZE_MAX, "BLOCK_N": 64, "BLOCK_C": 128} if fits else None
    if common is not None:
        return None  # no slab of dŵ to add to
    shapes = _shapes(kernel, plan.dtype, capability)
    # At other D so wide a tile spills, or ptxas has each wgmma wait for the one before.
    odd = capability[0] == 9 and width(size) >= 256 and size % 16 and plan.dtype != torch.float32
    if width(size) not in shapes or odd:
        return None
    if plan.dtype == torch.float32:
        asked = {**asked, "DESCRIPTORS": False}  # spills
    names = *BLOCKS[kernel], "num_warps", "num_stages"
    return {
        **dict(zip(names, shapes[width(size)], strict=True)),
        **{
            "SIZE": width(size),
            "DESCRIPTORS": False,
            "PRECISION": triton_slab.precision(),
            "UPCAST": triton_slab.INTERPRETED,
        },
        **FUSE,
        **asked,
    }


def hopper():
    """The module of the kernels for Hopper, or None: Triton's interpreter cannot run them, and an older Triton has no Gluon."""
    if triton_slab.INTERPRETED:
        return None
    try:
        return importlib.import_module(".triton_hopper", __package__)
    except ImportError:
        return None


def _shapes(kernel, dtype, capability):
    if dtype == torch.float32:
        return FLOAT32_TABLE if kernel == "attend_table" else FLOAT32
    if kernel == "attend_table":
        return {9: HOPPER_TABLE, 10: BLACKWELL_TABLE}.get(capability[0], OLDER)
    return {9: HOPPER, 10: BLACKWELL}.get(capability[0], OLDER)


class Features:
    """E ŵ and the row sums of E, slab by slab."""

    def __init__(self, low, size, targets, plan, constants):
        """low (N, width(size)): x̂ in plan.dtype."""
        self.low, self.size, self.targets, self.plan, self.constants = low, size, targets, plan, constants
        self.partial = self._parts = None
        gluon = constants.get("GLUON", False)
        self._attend = hopper().launcher(TABLE=False) if gluon else Launcher(attend_features, **constants)

    def parts(self, unit, start, stop):
        """(parts, N, D) float32 whose sum is E ŵ of the slab; its row sums are added to `partial` (a row or two a part, N)."""
        num_rows, classes, constants = self.low.shape[0], stop - start, self.constants
        row_tiles, class_tiles = ceil_div(num_rows, constants["BLOCK_N"]), ceil_div(classes, constants["BLOCK_C"])
        parts = max(1, min(PARTS_MAX, PROGRAMS // row_tiles, class_tiles))
        gluon = constants.get("GLUON", False)
        if self._parts is None:  # no other slab has more
            self._parts = torch.empty(parts, num_rows, self.size, dtype=torch.float32, device=self.low.device)
            self.partial = torch.empty(parts * (1 + gluon), num_rows, dtype=torch.float64, device=self.low.device)
        if gluon:
            slab = self.low, unit[:classes], self.targets, self.partial, self._parts[:parts], start
            hopper().features(self._attend, *slab, self.plan.log2_scale, self.plan.shift, classes == self.plan.slab)
            return self._parts[:parts]
        self._attend(
            row_tiles * parts,
            *(self.low, _rows(unit[:classes], constants, "BLOCK_C"), self.targets, self.partial, self._parts),
            *(num_rows, classes, self.size, start, ceil_div(class_tiles, parts), self.plan.log2_scale, self.plan.shift),
            whole=classes == self.plan.slab,
            RAGGED=classes % constants["BLOCK_C"] != 0,
        )
        return self._parts[:parts]


def backward(low, size, table, factors, plan, sink, constants):
    """See backends.backward; low (N, width(size)): x̂ in plan.dtype."""
    num_rows, slab, num_targets = low.shape[0], min(plan.slab, table.num_rows), factors.target_rows.shape[0]
    unit, room = low.new_empty(slab, low.shape[1]), None
    source = _rows(low, constants, "BLOCK_N")
    few = min(constants["BLOCK_R"], ROW_NUMBERS * 32 * constants["num_warps"] // low.shape[1])
    # No mask in the kernel's loop: it would cost the registers that the product needs.
    padding = 0, -num_rows % constants["BLOCK_N"]
    targets, row_scale = F.pad(factors.targets, padding, value=-1), F.pad(factors.row_scale, padding)
    part = next((part for part, _ in sink.device_update() or ()), None)  # a table of cosines has no bias
    attend = Launcher(attend_table, **constants, SEARCH_STEPS=num_targets.bit_length(), FEW=few)
    for _, start, stop in plan.slabs(table):
        rows, out = table.rows(start, stop), sink.room(start, stop)
        if out.dtype != torch.float32 and room is None:
            room = torch.empty(slab, size, dtype=torch.float32, device=low.device)
        attend(
            ceil_div(stop - start, constants["BLOCK_R"]),
            *(rows, source, targets, row_scale, factors.unscale, factors.target_rows, factors.target_sums, unit),
            *(out if room is None else room, out, stop - start, num_rows, size, num_targets, start),
            *(plan.log2_scale, plan.shift, *rows.stride()),
            *triton_update.of_part(part, slice(start, stop) if table.index is None else table.index[start:stop]),
            whole=stop - start == plan.slab,
        )
        if part is None:
            sink.put(start, stop, out)


def _rows(matrix, constants, block):
    """The source from which a kernel loads blocks of whole rows."""
    return triton_exponentials.source(matrix, [constants[block], matrix.shape[1]], constants["DESCRIPTORS"])


@triton.jit
def load_rows(source, first, count, SIZE: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr):
    """BLOCK rows from `first` on; in place of those past `count` the last one, or of a descriptor zeros."""
    if DESCRIPTORS:
        rows = source.load([first, 0])
    else:
        row = tl.minimum(first + tl.arange(0, BLOCK), count - 1).to(tl.int64)
        rows = tl.load(source + row[:, None] * SIZE + tl.arange(0, SIZE)[None, :])
    return operand(rows, UPCAST)


@triton.jit
def attend_features(
    x_ptr,  # (N, SIZE) x̂
    unit,  # (B, SIZE) ŵ of the slab, or its descriptor
    target_ptr,  # (N,) int64 class, -1 for none
    partial_ptr,  # (PARTS, N) float64 row sums of E over all slabs so far
    part_ptr,  # (PARTS, N, D) float32 E ŵ of this slab
    N,
    B,
    D,
    first_class,
    blocks_each,  # blocks of classes to a part
    log2_scale,
    shift,
    RAGGED: tl.constexpr,  # whether BLOCK_C does not divide B
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    UPCAST: tl.constexpr,  # interpreter only, whose bfloat16 products are not numbers
    DESCRIPTORS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_row, part = own_tile(N, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_N)
    column = tl.arange(0, SIZE)
    live = row < N
    target = in_slab(tl.load(target_ptr + row, mask=live, other=-1), first_class, B)
    x = operand(tl.load(x_ptr + tl.minimum(row, N - 1).to(tl.int64)[:, None] * SIZE + column[None, :]), UPCAST)
    start = part * blocks_each * BLOCK_C
    total = tl.zeros((BLOCK_N,), tl.float64)  # in float32 a sum over 10^5 blocks would lose digits
    pull = tl.zeros((BLOCK_N, SIZE), tl.float32)
    for first in tl.range(start, tl.minimum(start + blocks_each * BLOCK_C, B), BLOCK_C):
        rows = load_rows(unit, first, B, SIZE, BLOCK_C, DESCRIPTORS, UPCAST)
        classes = first + tl.arange(0, BLOCK_C)
        exponent = tl.dot(x, rows.T, input_precision=PRECISION) * log2_scale
        # 2^-inf past the last class: an operand of the subtraction, where a mask would be one more instruction for each element.
        exponent -= tl.where(classes < B, shift, float("inf"))[None, :] if RAGGED else shift
        e = tl.where(target[:, None] == classes[None, :], 0.0, tl.exp2(exponent))
        total += tl.sum(e, 1)
        pull = tl.dot(operand(e.to(x_ptr.dtype.element_ty), UPCAST), rows, pull, input_precision=PRECISION)
    add_sums(partial_ptr, part, row, N, first_class, total)
    place = part.to(tl.int64) * N + row
    tl.store(part_ptr + place[:, None] * D + column[None, :], pull, mask=live[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=("key_low", "key_high"))
def attend_table(
    rows_ptr,  # (R, D) raw rows of the table, any float dtype
    x,  # (N, SIZE) x̂, or its descriptor
    target_ptr,  # (N rounded up to BLOCK_N,) int64 class, -1 for none
    row_scale_ptr,  # (the same,) float32, 0 past N, where x̂ is the last row or zero
    unscale_ptr,  # 0-dim float32
    target_row_ptr,  # (T,) int64 ascending
    target_sum_ptr,  # (T, D) float32, a row's sum in the first slot that it has
    unit_ptr,  # (R, SIZE) room for ŵ, in x̂'s dtype
    grad_ptr,  # (R, D) float32 room for dŵ; may be out_ptr
    out_ptr,  # (R, D) contiguous rows of the weight's gradient, where nothing is stepped
    R,
    N,
    D,
    T,
    first_row,
    log2_scale,
    shift,
    stride_row,
    stride_column,
    table_ptr,  # None where nothing is stepped; it and what follows are triton_update.update_rows'
    table_scale_ptr,
    first_ptr,
    first_scale_ptr,
    second_ptr,
    second_scale_ptr,
    index_ptr,
    skip_ptr,
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
    SEARCH_STEPS: tl.constexpr,  # 2^SEARCH_STEPS > T
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FEW: tl.constexpr,  # rows held beside others, a divisor of BLOCK_R
):
    # A tile of raw rows beside one of the gradient would spill: those rows come a few at a time, and what is made of them goes
    # through memory, where it stays in L2. A barrier makes it visible to the program's other threads.
    first_of_tile = tl.program_id(0).to(tl.int64) * BLOCK_R
    for few in tl.range(0, BLOCK_R, FEW):
        some = first_of_tile + few + tl.arange(0, FEW)
        exact, _ = unit_and_inverse(load_raw(rows_ptr, some, R, D, stride_row, stride_column, SIZE))
        place = unit_ptr + some[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        tl.store(place, exact.to(unit_ptr.dtype.element_ty), mask=(some < R)[:, None])
    tl.debug_barrier()
    row = first_of_tile + tl.arange(0, BLOCK_R)
    column = tl.arange(0, SIZE)
    unit = operand(tl.load(unit_ptr + tl.minimum(row, R - 1)[:, None] * SIZE + column[None, :]), UPCAST)
    grad = tl.zeros((BLOCK_R, SIZE), tl.float32)
    tl.assume(N > 0)  # as cosine_tile of triton_exponentials.py has it
    for first in tl.range(0, N, BLOCK_N):
        rows = load_rows(x, first, N, SIZE, BLOCK_N, DESCRIPTORS, UPCAST)
        sample = first + tl.arange(0, BLOCK_N)
        scale = tl.load(row_scale_ptr + sample, cache_modifier=".ca")
        target = in_slab(tl.load(target_ptr + sample, cache_modifier=".ca"), first_row, R)
        e = tl.exp2(tl.dot(unit, rows.T, input_precision=PRECISION) * log2_scale - shift) * scale[None, :]
        e = tl.where(target[None, :] == row.to(tl.int32)[:, None], 0.0, e).to(unit_ptr.dtype.element_ty)
        grad = tl.dot(operand(e, UPCAST), rows, grad, input_precision=PRECISION)
    tl.store(grad_ptr + row[:, None] * D + column[None, :], grad, mask=(row < R)[:, None] & (column < D)[None, :])
    tl.debug_barrier()
    for few in tl.range(0, BLOCK_R, FEW):
        some = first_of_tile + few + tl.arange(0, FEW)
        inside = (some < R)[:, None] & (column < D)[None, :]
        place = some[:, None] * D + column[None, :]
        raw = load_raw(rows_ptr, some, R, D, stride_row, stride_column, SIZE)
        exact, inverse = unit_and_inverse(raw)
        out = project(exact, inverse, tl.load(grad_ptr + place, mask=inside, other=0.0)) * tl.load(unscale_ptr)
        out += targets_share(target_row_ptr, target_sum_ptr, some + first_row, inside, column, T, D, SEARCH_STEPS)
        if table_ptr is None:
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            changed, live = triton_update.rows_to_step(some, first_row, R, index_ptr, skip_ptr)
            triton_update.step(
                *(out, raw, changed, live, live[:, None] & (column < D)[None, :], column, D, table_ptr, table_scale_ptr),
                *(first_ptr, first_scale_ptr, second_ptr, second_scale_ptr, step_ptr, first_of_shard, key_low, key_high),
                *(lr, weight_decay, sign, nesterov, eps, first_decay, second_decay, first_rate, second_rate),
                *(log_first, log_second, max_row_norm),
            )


@triton.jit
def load_raw(table, row, R, D, stride_row, stride_column, SIZE: tl.constexpr):
    """(rows, SIZE) float32, zeros outside the table."""
    column = tl.arange(0, SIZE).to(tl.int64)
    place = row[:, None] * stride_row + column[None, :] * stride_column
    return tl.load(table + place, mask=(row < R)[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
