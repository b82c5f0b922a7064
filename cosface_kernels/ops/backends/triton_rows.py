"""The functions of batch_rows.py in five launches: a kernel for each, two for slab_factors. All but `losses` are for cosines and
one row to a class. At a table of 10^4 classes the launches of plain PyTorch's hundred-odd operators would take ten times as long
as the slabs.

    enter_rows          x̂, 1 / ‖x‖, ŵ_{y_n}, x̂_n·ŵ_{y_n} and the target from raw features, table and labels
    reduce_losses       softplus(lse - s logit) and its derivative, reduced
    x_gradient_rows     dx = (dx̂ - x̂ (x̂·dx̂)) / ‖x‖,  dx̂ = s g pull + p ŵ_{y_n}
    order_targets       row_scale = g / total, and the targets sorted: a row's place is how many rows come before it
    sum_targets         p x̂_n added up class by class in row order, projected

g and p are the gradients of a row's lse and of x̂_n·ŵ_{y_n}.

No atomics. Sorting by counting makes N^2 comparisons, as many as a table of N classes has logits.
"""

import torch
import triton
import triton.language as tl

from ..batch_rows import Entered, SlabFactors
from ..slabs import ceil_div
from .triton_slab import FUSE, project, row_blocks, unit_and_inverse

# Fewer than a slab's kernels hold: a batch has few rows, and each is held two or three times.
ROW_BLOCK_ELEMENTS = 1024
ORDER_BLOCKS = {"BLOCK_R": 8, "BLOCK_M": 512, **FUSE}
LOSS_BLOCK = {"BLOCK": 1024, **FUSE}


def enter(x, table, labels, options, wide):
    """See batch_rows.enter."""
    assert options.cosines and table.centers == 1
    (num_rows, size), weight = x.shape, table.weight
    targets = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    inverse_norm = torch.empty(num_rows, dtype=wide, device=x.device)
    product = torch.empty(num_rows, 1, dtype=wide, device=x.device)
    unit = torch.empty(num_rows, size, dtype=wide, device=x.device)
    target_unit = torch.empty(num_rows, 1, size, dtype=wide, device=x.device)
    foreign_index = options.ignore_index if options.foreign_index is None else options.foreign_index
    _launch(
        enter_rows,
        num_rows,
        size,
        (x, weight, labels, targets, inverse_norm, product, unit, target_unit),
        (weight.shape[0], options.ignore_index, foreign_index, *x.stride(), *weight.stride(), labels.stride(0)),
    )
    return Entered(targets, unit, inverse_norm, target_unit, product)


def losses(lse, logit, counted, scale, reduction):
    """See batch_rows.losses. One program reads all rows: it reduces N numbers to one."""
    num_rows, is_reduced = lse.shape[0], reduction != "none"
    loss, slope = lse.new_empty(() if is_reduced else num_rows), torch.empty_like(lse)
    reduce_losses[(1,)](
        *(lse.contiguous(), logit.contiguous(), counted.contiguous().view(torch.uint8), loss, slope, num_rows, scale),
        REDUCED=is_reduced,
        MEAN=reduction == "mean",
        **LOSS_BLOCK,
    )
    return loss, slope


def x_gradient(grads, saved, options, shape, dtype):
    """See batch_rows.x_gradient."""
    x_grad = torch.empty(shape, dtype=dtype, device=saved.unit.device)
    vectors = grads.lse.contiguous(), grads.product.contiguous()
    _launch(
        x_gradient_rows,
        *saved.unit.shape,
        (*vectors, saved.unit, saved.target_unit, saved.inverse_norm, saved.pull, x_grad),
        (options.scale,),
    )
    return x_grad


def slab_factors(factors, table, options):
    """See batch_rows.slab_factors."""
    labels, unit, total, weight = factors.labels, factors.unit, factors.total, table.weight
    num_rows, size = unit.shape
    targets, classes, order, repeats = torch.empty(4, num_rows, dtype=torch.int64, device=labels.device)
    row_scale, sums = torch.empty_like(total), torch.empty_like(unit)
    unscale = total.new_empty(()) if num_rows else total.new_ones(())
    if num_rows:
        order_targets[(ceil_div(num_rows, ORDER_BLOCKS["BLOCK_R"]),)](
            labels,
            factors.lse_grad.contiguous(),
            total,
            targets,
            classes,
            order,
            repeats,
            row_scale,
            unscale,
            num_rows,
            weight.shape[0],
            options.ignore_index,
            labels.stride(0),
            options.scale,
            **ORDER_BLOCKS,
        )
        sum_targets[(num_rows,)](
            classes,
            order,
            repeats,
            factors.product_grad.contiguous(),
            unit,
            weight,
            sums,
            size,
            *weight.stride(),
            BLOCK_D=row_blocks(size)["BLOCK_D"],
            **FUSE,
        )
    return SlabFactors(targets, row_scale, unscale, classes, sums)


def _launch(kernel, num_rows, size, tensors, numbers):
    if num_rows:
        blocks = row_blocks(size, ROW_BLOCK_ELEMENTS)
        kernel[(ceil_div(num_rows, blocks["BLOCK_R"]),)](*tensors, num_rows, size, *numbers, **blocks)


@triton.jit
def enter_rows(
    x_ptr,  # (N, D) raw features, any float dtype
    weight_ptr,  # (C, D) raw class rows, any float dtype
    label_ptr,  # (N,) int64
    target_ptr,  # (N,) int64: the class, -1 for none
    inverse_ptr,  # (N,) float32
    product_ptr,  # (N,) float32
    unit_ptr,  # (N, D) float32
    target_unit_ptr,  # (N, D) float32
    N,
    D,
    C,
    ignore_index,
    foreign_index,  # of rows that count and have no target here; ignore_index for none
    x_stride_row,
    x_stride_column,
    stride_row,
    stride_column,
    label_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    live = row < N
    label = tl.load(label_ptr + row * label_stride, mask=live, other=0)
    counted = live & (label != ignore_index)
    found = counted & (label >= 0) & (label < C)
    inside = live[:, None] & (column < D)[None, :]
    x = tl.load(
        x_ptr + row[:, None] * x_stride_row + column[None, :] * x_stride_column, mask=inside & counted[:, None], other=0.0
    )
    target = tl.load(
        weight_ptr + label[:, None] * stride_row + column[None, :] * stride_column, mask=inside & found[:, None], other=0.0
    )
    unit, inverse = unit_and_inverse(x.to(tl.float32))
    # A label that is no class: NaN, which reaches all that it should not leave untouched.
    unit = tl.where((counted & ~found & (label != foreign_index))[:, None], float("nan"), unit)
    target_unit, _ = unit_and_inverse(target.to(tl.float32))
    tl.store(target_ptr + row, tl.where(found, label, -1), mask=live)
    tl.store(inverse_ptr + row, inverse, mask=live)
    tl.store(product_ptr + row, tl.sum(unit * target_unit, 1), mask=live)
    place = row[:, None] * D + column[None, :]
    tl.store(unit_ptr + place, unit, mask=inside)
    tl.store(target_unit_ptr + place, target_unit, mask=inside)


@triton.jit
def reduce_losses(
    lse_ptr,  # (N,) float32
    logit_ptr,  # (N,) float32
    counted_ptr,  # (N,) uint8: whether a row is not ignored
    loss_ptr,  # (N,) float32, or 0-dim where REDUCED
    slope_ptr,  # (N,) float32: the derivative of what is at loss_ptr by the row's lse
    N,
    scale,
    REDUCED: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = 1.0
    if MEAN:
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, N, BLOCK):
            row = start + tl.arange(0, BLOCK)
            counts += tl.load(counted_ptr + row, mask=row < N, other=0).to(tl.int32)
        count = tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        counted = tl.load(counted_ptr + row, mask=row < N, other=0) != 0
        exponent = tl.load(lse_ptr + row, mask=counted, other=0.0) - scale * tl.load(logit_ptr + row, mask=counted, other=0.0)
        small = tl.exp(-tl.abs(exponent))
        # log(1 + small) to the last digits: what 1 + small loses of a small `small`, this quotient puts back.
        more = 1.0 + small
        log = tl.where(more == 1.0, small, tl.log(more) * (small / tl.where(more == 1.0, 1.0, more - 1.0)))
        loss = tl.where(counted, tl.where(exponent < 0.0, log, exponent + log), 0.0)
        slope = tl.where(counted, tl.where(exponent < 0.0, small, 1.0) / more, 0.0)
        tl.store(slope_ptr + row, slope / count, mask=row < N)
        if REDUCED:
            total += loss
        else:
            tl.store(loss_ptr + row, loss, mask=row < N)
    if REDUCED:
        tl.store(loss_ptr, tl.sum(total, 0) / count)


@triton.jit
def x_gradient_rows(
    lse_grad_ptr,  # (N,) float32
    product_grad_ptr,  # (N,) float32
    unit_ptr,  # (N, D) float32
    target_unit_ptr,  # (N, D) float32
    inverse_ptr,  # (N,) float32
    pull_ptr,  # (N, D) float32
    out_ptr,  # (N, D) gradient of the features, in their dtype
    N,
    D,
    scale,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    live = row < N
    inside = live[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]
    lse_grad = scale * tl.load(lse_grad_ptr + row, mask=live, other=0.0)
    product_grad = tl.load(product_grad_ptr + row, mask=live, other=0.0)
    grad = lse_grad[:, None] * tl.load(pull_ptr + place, mask=inside, other=0.0)
    grad += product_grad[:, None] * tl.load(target_unit_ptr + place, mask=inside, other=0.0)
    unit = tl.load(unit_ptr + place, mask=inside, other=0.0)
    out = project(unit, tl.load(inverse_ptr + row, mask=live, other=0.0), grad)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def order_targets(
    label_ptr,  # (N,) int64
    lse_grad_ptr,  # (N,) float32
    total_ptr,  # (N,) float32
    target_ptr,  # (N,) int64: the class, -1 for none
    class_ptr,  # (N,) int64: the targets ascending, C for none
    order_ptr,  # (N,) int64: the rows that they are of
    repeat_ptr,  # (N,) int64: how many rows a class has, in the first slot that it has; 0 in others and for none
    row_scale_ptr,  # (N,) float32
    unscale_ptr,  # 0-dim float32
    N,
    C,
    ignore_index,
    label_stride,
    scale,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < N
    label = tl.load(label_ptr + row.to(tl.int64) * label_stride, mask=live, other=-1)
    key = tl.where((label >= 0) & (label < C) & (label != ignore_index), label, C)
    below = tl.zeros((BLOCK_R,), tl.int32)
    same = below
    same_before = below
    largest = tl.zeros((BLOCK_M,), tl.float32)
    # Every program goes over all rows: N numbers from L2 are cheaper than a launch of their own.
    for start in tl.range(0, N, BLOCK_M):
        other_row = start + tl.arange(0, BLOCK_M)
        other = tl.load(label_ptr + other_row.to(tl.int64) * label_stride, mask=other_row < N, other=-1)
        # Past the last row: C, which is below no key.
        other = tl.where((other >= 0) & (other < C) & (other != ignore_index), other, C)
        equal = (other[None, :] == key[:, None]) & (other_row < N)[None, :]
        below += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
        same += tl.sum(equal.to(tl.int32), 1)
        same_before += tl.sum((equal & (other_row[None, :] < row[:, None])).to(tl.int32), 1)
        size = tl.abs(tl.load(lse_grad_ptr + other_row, mask=other_row < N, other=0.0))
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
    tl.store(target_ptr + row, tl.where(key < C, key, -1), mask=live)
    place = below + same_before
    tl.store(class_ptr + place, key, mask=live)
    tl.store(repeat_ptr + place, tl.where((same_before == 0) & (key < C), same, 0).to(tl.int64), mask=live)
    tl.store(order_ptr + place, row.to(tl.int64), mask=live)
    # See rows._power_of_two: 2^-e with the largest in [2^{e-1}, 2^e), made of the exponent's bits.
    exponent = (tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    power = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    total = tl.load(total_ptr + row, mask=live, other=1.0)
    row_scale = tl.load(lse_grad_ptr + row, mask=live, other=0.0) * power / tl.where(total == 0.0, 1.0, total)
    # An ignored row's 0 over a total that a class of NaN made NaN would reach every row of the table.
    tl.store(row_scale_ptr + row, tl.where((total == 0.0) | (label == ignore_index), 0.0, row_scale), mask=live)
    tl.store(unscale_ptr, scale / power, mask=tl.program_id(0) == 0)


@triton.jit
def sum_targets(
    class_ptr,  # (N,) int64 ascending, C for none
    order_ptr,  # (N,) int64
    repeat_ptr,  # (N,) int64
    product_grad_ptr,  # (N,) float32
    unit_ptr,  # (N, D) float32 x̂
    weight_ptr,  # (C, D) raw class rows, any float dtype
    sum_ptr,  # (N, D) float32: a class's sum in the first slot that it has, zero in others
    D,
    stride_row,
    stride_column,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    inside = column < D
    repeats = tl.load(repeat_ptr + slot)
    total = tl.zeros((1, BLOCK_D), tl.float32)
    for i in tl.range(repeats):
        row = tl.load(order_ptr + slot + i)
        total += tl.load(product_grad_ptr + row) * tl.load(unit_ptr + row * D + column, mask=inside, other=0.0)
    target = tl.load(class_ptr + slot)
    target_row = tl.load(weight_ptr + target * stride_row + column * stride_column, mask=inside & (repeats > 0), other=0.0)
    unit, inverse = unit_and_inverse(target_row.to(tl.float32))
    tl.store(sum_ptr + slot * D + column, project(unit, inverse, total), mask=inside)
