"""The package's torch operators: the only place that registers any. Schema, fake (shapes), autograd.

    negative_lse(x, W, labels) -> A_n = log Σ_{j≠y_n} e^{s x̂_n·ŵ_j},  ŵ_{y_n}  and  x̂_n,  differentiable in x and W

The op knows no margin: whatever is done with A_n, ŵ_{y_n} and x̂_n afterwards is N x D work for autograd. What comes back for
ŵ_{y_n} is projected and added to the rows of dW while the slabs are made, what comes back for x̂_n to dx̂_n before its projection.

    ∂A_n/∂x̂_n = s Σ_j p_nj ŵ_j = s pull_n          ∂A_n/∂ŵ_j = s p_nj x̂_n,       p_nj = E_nj / total_n
"""

import math
import os

import torch
from torch import Tensor, library

from . import backends
from .plan import kept_size, make_plan, wide_dtype


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lse (N,), unit target rows (N, D), unit x (N, D)), and what else backward reuses: 1 / ‖x‖ (N,), pull (N, D), shift (N,),
    total (N,), kept (1-D).

    x (N, D) any float dtype and norms; weight (C, D); labels (N,) int64. A row labelled ignore_index counts as zero, whatever it
    holds, and has no target: every class is a negative and its target row is zero. dtype: what the products read.
    memory_budget: bytes of kept exponentials.
    """
    _check_labels(labels, weight.shape[0], ignore_index)
    plan = make_plan(x, weight, scale=scale, dtype=dtype, memory_budget=memory_budget, keep=need_weight_grad)
    chosen = backends.choose(backend, x.device, dtype)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        targets, unit, inverse_norm, target_unit = chosen.row_functions.enter(x, weight, labels, ignore_index, plan.wide)
        sums = chosen.forward(unit, weight, targets, plan, need_pull=need_x_grad)
        lse = torch.add(sums.total.log(), sums.shift, alpha=math.log(2))
    return lse, target_unit, unit, inverse_norm, sums.pull, sums.shift, sums.total, sums.kept


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
        torch.empty_like(row),
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
    unit: Tensor,
    inverse_norm: Tensor,
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
    """(dX (N, D), dW (C, D), in the dtypes of x and weight) from the gradients of lse (N,), unit target rows and unit x (N, D).

    What is not needed comes back empty. Both are one op, of x and weight, so that no second derivative can miss one of them.
    """
    chosen = backends.choose(backend, x.device, dtype)
    x_grad, weight_grad = x.new_empty(0), weight.new_empty(0)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        if need_x_grad:
            x_grad = chosen.row_functions.x_gradient(lse_grad, unit_grad, unit, inverse_norm, pull, scale, x.dtype)
        if need_weight_grad:
            plan = make_plan(x, weight, scale=scale, dtype=dtype, memory_budget=memory_budget, keep=True)
            targets, row_scale, unscale, classes, sums = chosen.row_functions.weight_factors(
                lse_grad, target_grad, total, weight, labels, ignore_index, scale
            )
            weight_grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            chosen.backward(unit, weight, targets, row_scale, unscale, shift, classes, sums, kept, plan, weight_grad)
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
    ctx.save_for_backward(x, weight, labels, *output[2:])
    ctx.constants = constants[:-2]
    ctx.no_grads = [None] * (len(inputs) - 2)


def _backward(ctx, lse_grad, target_grad, unit_grad, *_):
    saved = ctx.saved_tensors  # once: each access unpacks them all, and activation checkpointing allows one
    unit, *_, total, _ = saved[3:]
    grads = zip((lse_grad, target_grad, unit_grad), (total, unit, unit), strict=True)
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


def _check_labels(labels, num_classes, ignore_index):
    """On a CPU, or with COSFACE_CHECK_LABELS=1 at the price of a device synchronisation, a label that is no class raises."""
    if labels.device.type != "cpu" and os.environ.get("COSFACE_CHECK_LABELS") != "1":
        return
    outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise IndexError(
            f"labels[{row}] is {int(labels[row])}, but a label must be in [0, {num_classes}) or be ignore_index = {ignore_index}"
        )
