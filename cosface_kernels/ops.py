"""The package's torch operators: the only place that registers any. Schema, fake (shapes), autograd.

    negative_lse(x, W, labels) -> A_n = log Σ_{j≠y_n} e^{s x̂_n·ŵ_j},  w_{y_n}  and  x̂_n,  differentiable in x and W

The op knows no margin: whatever is done with A_n, w_{y_n} and x̂_n afterwards is N x D work for autograd. What comes back for
w_{y_n} is added to the rows of dW while the slabs are made, and what comes back for x̂_n to dx̂_n before it is projected to dx_n.

    ∂A_n/∂x̂_n = s Σ_j p_nj ŵ_j = s pull_n          ∂A_n/∂ŵ_j = s p_nj x̂_n,       p_nj = E_nj / total_n
"""

import math
import os

import torch
from torch import Tensor, library

from . import backends
from .plan import kept_size, make_plan, wide_dtype
from .unit import project, unit_rows


@library.custom_op("cosface_kernels::negative_lse", mutates_args=())
def negative_lse(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    memory_budget: int | None,
    backend: str,
    need_x_grad: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lse (N,), target rows (N, D), unit x (N, D)), and what backward reuses: pull (N, D), shift (N,), total (N,), kept (1-D).

    x (N, D) in the wide dtype, any norms; weight (C, D); labels (N,) int64. A row labelled ignore_index has no target: every
    class counts as a negative and its target row is zero. dtype: what the products read. memory_budget: bytes of kept
    exponentials.
    """
    plan = make_plan(x, weight, scale=scale, dtype=dtype, memory_budget=memory_budget, keep=need_weight_grad)
    targets, outside = _resolve(labels, weight.shape[0], ignore_index, check=True)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        unit, _ = unit_rows(x.contiguous())
        sums = backends.choose(backend, x.device, dtype).forward(unit, weight, targets, plan, need_pull=need_x_grad)
        lse = torch.where(outside, torch.nan, (sums.total.log2() + sums.shift) * math.log(2))
        rows = weight.index_select(0, targets.clamp(min=0)).to(plan.wide)
        rows = torch.where(outside[:, None], torch.nan, torch.where((targets < 0)[:, None], 0.0, rows))
        pull = torch.where(outside[:, None], torch.nan, sums.pull) if need_x_grad else sums.pull
    return lse, rows, unit, pull, sums.shift, sums.total, sums.kept


@negative_lse.register_fake
def _(x, weight, labels, scale, ignore_index, dtype, memory_budget, backend, need_x_grad, need_weight_grad):
    num_rows, size = x.shape
    wide = wide_dtype(dtype)
    _, elements = kept_size(x, weight, dtype, memory_budget) if need_weight_grad else (0, 0)
    row = x.new_empty(num_rows, dtype=wide)
    return (
        row,
        x.new_empty(num_rows, size, dtype=wide),
        x.new_empty(num_rows, size, dtype=wide),
        x.new_empty(num_rows if need_x_grad else 0, size, dtype=wide),
        torch.empty_like(row),
        torch.empty_like(row),
        x.new_empty(elements, dtype=dtype),
    )


@library.custom_op("cosface_kernels::negative_lse_backward", mutates_args=())
def negative_lse_backward(
    lse_grad: Tensor,
    target_grad: Tensor,
    unit_grad: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    pull: Tensor,
    shift: Tensor,
    total: Tensor,
    kept: Tensor,
    scale: float,
    ignore_index: int,
    dtype: torch.dtype,
    memory_budget: int | None,
    backend: str,
    need_x_grad: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(dX (N, D), dW (C, D) in the weight's dtype) from the gradients of lse (N,), target rows (N, D) and unit x (N, D).

    What is not needed comes back empty. Both are one op, of x and weight, so that no second derivative can miss one of them.
    """
    unit, inverse_norm = unit_rows(x.contiguous())
    x_grad = project(unit, inverse_norm, (scale * lse_grad)[:, None] * pull + unit_grad) if need_x_grad else x.new_empty(0)
    if not need_weight_grad:
        return x_grad, weight.new_empty(0)
    plan = make_plan(x, weight, scale=scale, dtype=dtype, memory_budget=memory_budget, keep=True)
    targets, _ = _resolve(labels, weight.shape[0], ignore_index, check=False)
    weight_grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        power = _power_of_two(lse_grad)
        row_scale = torch.where(total == 0, 0.0, lse_grad * power / total)
        classes, sums = _sum_by_class(targets, target_grad, weight.shape[0])
        backends.choose(backend, x.device, dtype).backward(
            unit, weight, targets, row_scale, scale / power, shift, classes, sums, kept, plan, weight_grad
        )
    return x_grad, weight_grad


@negative_lse_backward.register_fake
def _(lse_grad, target_grad, unit_grad, x, weight, *rest):
    *_, need_x_grad, need_weight_grad = rest
    weight_grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return x.new_empty(x.shape if need_x_grad else 0), weight_grad if need_weight_grad else weight.new_empty(0)


def _setup_context(ctx, inputs, output):
    x, weight, labels, *constants = inputs
    ctx.mark_non_differentiable(*output[3:])
    # Else autograd would hand backward a zero tensor as large as `kept`.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, labels, *output[3:])
    ctx.constants = constants[:-2]
    ctx.no_grads = [None] * (len(inputs) - 2)


def _backward(ctx, lse_grad, target_grad, unit_grad, *_):
    saved = ctx.saved_tensors  # once: each access unpacks them all, and activation checkpointing allows one
    x, *_, total, _ = saved
    grads = zip((lse_grad, target_grad, unit_grad), (total, x, x), strict=True)
    grads = (torch.zeros_like(like) if grad is None else grad for grad, like in grads)
    need = ctx.needs_input_grad[:2]
    grads = negative_lse_backward(*grads, *saved, *ctx.constants, *need)
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *ctx.no_grads


negative_lse.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "cosface_kernels computes first derivatives only; for a second one use cosface_kernels.reference, which is plain PyTorch"
    )


negative_lse_backward.register_autograd(_no_second_derivative)


def _resolve(labels, num_classes, ignore_index, *, check):
    """(targets (N,): the class, or -1 for none; outside (N,): which labels are no class and not ignored).

    On a CPU, or with COSFACE_CHECK_LABELS=1 at the price of a device synchronisation, a label outside raises.
    """
    valid = (labels >= 0) & (labels < num_classes)
    ignored = labels == ignore_index
    outside = ~(valid | ignored)
    if check and (labels.device.type == "cpu" or os.environ.get("COSFACE_CHECK_LABELS") == "1") and outside.any():
        row = int(outside.nonzero()[0])
        raise IndexError(
            f"labels[{row}] is {int(labels[row])}, but a label must be in [0, {num_classes}) or be ignore_index = {ignore_index}"
        )
    return torch.where(valid & ~ignored, labels, -1), outside


def _power_of_two(lse_grad):
    """A power of two (0-dim) that brings the largest finite |lse_grad| to [0.5, 1).

    total may reach 2^112, so that an upstream gradient of 2^-16 over it would leave float32, and bfloat16 with it.
    """
    finite = torch.where(lse_grad.isfinite(), lse_grad.abs(), 0.0)
    largest = torch.cat([finite, finite.new_zeros(1)]).amax()
    return torch.exp2(-torch.frexp(largest).exponent.clamp(-126, 126).to(lse_grad.dtype))


def _sum_by_class(targets, rows, num_classes):
    """The rows of each class added up in row order: (classes (N,) ascending, padded with num_classes; sums (N, D))."""
    keys, order = torch.where(targets < 0, num_classes, targets).sort(stable=True)
    slot = (keys.diff(prepend=keys.new_full((1,), -1)) != 0).cumsum(0) - 1
    classes = torch.full_like(keys, num_classes).scatter_(0, slot, keys)
    sums = rows.new_zeros(rows.shape)  # contiguous, whatever rows is
    if rows.is_cuda:
        # Sorts, then adds each slot's rows one after another; index_add_ would use atomics there.
        sums.index_put_((slot,), rows[order], accumulate=True)
    else:
        sums.index_add_(0, slot, rows[order])
    return classes, sums
