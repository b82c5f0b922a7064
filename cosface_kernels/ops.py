"""The package's torch operators: the only place that registers any. Schema, fake (shapes), autograd.

    negative_lse(x, W, b, labels) -> A_n = log Σ_{j≠y_n} e^{s (x̃_n·w̃_j + b_j)},  w̃_{y_n}  and  x̃_n,  differentiable in x, W and b

x̃ = x / ‖x‖ or x, w̃ = w / ‖w‖ or w; with K rows to a class the largest of its K counts; with a bias x̃ is (x, 1) and w̃ is (w, b).
The op knows no margin: whatever is done with A_n, w̃_{y_n} and x̃_n afterwards is N x D work for autograd. What comes back for
w̃_{y_n} is projected and added to the rows of dW while the slabs are made, what comes back for x̃_n to dx̃_n before its projection.

    ∂A_n/∂x̃_n = s Σ_j p_nj w̃_j = s pull_n          ∂A_n/∂w̃_j = s p_nj x̃_n,       p_nj = E_nj / total_n
"""

import math
import os

import torch
from torch import Tensor, library

from . import backends, rows
from .plan import kept_size, make_plan, wide_dtype
from .table import Table, TableGradient


@library.custom_op("cosface_kernels::negative_lse", mutates_args=())
def negative_lse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    ignore_index: int,
    normalize_features: bool,
    normalize_weight: bool,
    centers: int,
    dtype: torch.dtype,
    memory_budget: int | None,
    backend: str,
    need_x_grad: bool,
    need_table_grad: bool,
    foreign_index: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lse (N,), target rows w̃_{y_n} (N, K, D), x̃ (N, D)), and what else backward reuses: 1 / ‖x‖ (N,), pull (N, D), shift (N,),
    total (N,), kept (1-D). D + 1 columns with a bias; no 1 / ‖x‖ where features are not normalised.

    x (N, D) any float dtype and norms; weight (C K, D); bias (C K,) or None; labels (N,) int64. A row labelled ignore_index
    counts as zero, whatever it holds, and has no target: every class is a negative and its target row is zero. dtype: what the
    products read. memory_budget: bytes of kept exponentials. foreign_index: the label of rows whose class another shard of the
    table holds: as they are, and without a target.
    """
    table = Table(weight, bias, normalize_weight, centers)
    _check_labels(labels, table.num_classes, ignore_index, foreign_index)
    cosines = normalize_features and normalize_weight
    plan = make_plan(x, table, scale=scale, dtype=dtype, memory_budget=memory_budget, keep=need_table_grad, cosines=cosines)
    chosen = backends.choose(backend, x.device, dtype)
    functions = _row_functions(chosen, table, normalize_features)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        targets, unit, inverse_norm, target_unit = functions.enter(
            x, table, labels, ignore_index, plan.wide, normalize_features, foreign_index
        )
        sums = chosen.forward(unit, table, targets, plan, need_pull=need_x_grad)
        lse = torch.add(sums.total.log(), sums.shift, alpha=math.log(2))
    return lse, target_unit, unit, inverse_norm, sums.pull, sums.shift, sums.total, sums.kept


def _row_functions(backend, table, normalize_features):
    """A backend's own are for cosines with one row to a class."""
    return backend.row_functions if normalize_features and table.normalize and table.centers == 1 else rows


@negative_lse.register_fake
def _(x, weight, bias, labels, scale, ignore_index, *options):
    normalize_features, normalize_weight, centers, dtype, memory_budget, _, need_x_grad, need_table_grad, *_ = options
    num_rows, size = x.shape[0], x.shape[1] + (bias is not None)
    wide = wide_dtype(dtype)
    table = Table(weight, bias, normalize_weight, centers)
    _, elements = kept_size(x, table, dtype, memory_budget) if need_table_grad else (0, 0)
    row = x.new_empty(num_rows, dtype=wide)
    return (
        row,
        x.new_empty(num_rows, centers, size, dtype=wide),
        x.new_empty(num_rows, size, dtype=wide),
        x.new_empty(num_rows if normalize_features else 0, dtype=wide),
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
    bias: Tensor | None,
    labels: Tensor,
    unit: Tensor,
    inverse_norm: Tensor,
    pull: Tensor,
    shift: Tensor,
    total: Tensor,
    kept: Tensor,
    scale: float,
    ignore_index: int,
    normalize_features: bool,
    normalize_weight: bool,
    centers: int,
    dtype: torch.dtype,
    memory_budget: int | None,
    backend: str,
    need_x_grad: bool,
    need_table_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX (N, D), dW (C K, D), db (C K,), each in its tensor's dtype) from the gradients of lse (N,), target rows and x̃.

    What is not needed comes back empty. All are one op, of x, weight and bias, so that no second derivative can miss one of them.
    """
    table = Table(weight, bias, normalize_weight, centers)
    chosen = backends.choose(backend, x.device, dtype)
    functions = _row_functions(chosen, table, normalize_features)
    x_grad, weight_grad, bias_grad = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        if need_x_grad:
            x_grad = functions.x_gradient(lse_grad, unit_grad, unit, inverse_norm, pull, scale, x.shape, x.dtype)
            if not normalize_features:  # else 1 / ‖x‖ is 0; a table's NaN is in every pull
                x_grad = torch.where((labels == ignore_index)[:, None], 0.0, x_grad)
        if need_table_grad:
            cosines = normalize_features and normalize_weight
            plan = make_plan(x, table, scale=scale, dtype=dtype, memory_budget=memory_budget, keep=True, cosines=cosines)
            targets, row_scale, unscale, target_rows, target_sums = functions.weight_factors(
                lse_grad, target_grad, total, table, labels, ignore_index, scale
            )
            gradient = TableGradient.of(table)
            chosen.backward(unit, table, targets, row_scale, unscale, shift, target_rows, target_sums, kept, plan, gradient)
            weight_grad, bias_grad = gradient.weight, bias_grad if gradient.bias is None else gradient.bias
    return x_grad, weight_grad, bias_grad


@negative_lse_backward.register_fake
def _(lse_grad, target_grad, unit_grad, x, weight, bias, *rest):
    *_, need_x_grad, need_table_grad = rest
    x_grad = x.new_empty(x.shape if need_x_grad else 0)
    if not need_table_grad:
        return x_grad, weight.new_empty(0), weight.new_empty(0)
    weight_grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return x_grad, weight_grad, weight.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, labels, *constants = inputs
    ctx.mark_non_differentiable(*output[3:])
    # Else autograd would hand backward a zero tensor as large as `kept`.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, labels, *output[2:])
    ctx.constants = constants[:-3]
    ctx.no_grads = [None] * (len(inputs) - 3)


def _backward(ctx, lse_grad, target_grad, unit_grad, *_):
    saved = ctx.saved_tensors  # once: each access unpacks them all, and activation checkpointing allows one
    unit, *_, total, _ = saved[4:]
    centers = ctx.constants[4]
    lse_grad = torch.zeros_like(total) if lse_grad is None else lse_grad
    target_grad = unit.new_zeros(len(unit), centers, unit.shape[1]) if target_grad is None else target_grad
    unit_grad = torch.zeros_like(unit) if unit_grad is None else unit_grad
    need = ctx.needs_input_grad[:3]
    grads = negative_lse_backward(lse_grad, target_grad, unit_grad, *saved, *ctx.constants, need[0], need[1] or need[2])
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *ctx.no_grads


negative_lse.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "cosface_kernels computes first derivatives only; for a second one write the loss in plain PyTorch, as "
        "cosface_kernels.reference does"
    )


negative_lse_backward.register_autograd(_no_second_derivative)


@library.custom_op("cosface_kernels::snapshot", mutates_args=())
def snapshot(value: Tensor) -> Tensor:
    """A copy of a running statistic, without gradient, that backward sees as it is now.

    torch.compile computes again in backward what is cheaper to compute than to keep, even from a buffer that has moved since
    (pytorch/pytorch#197039): λ of SphereFace's annealing was one step late in the gradient. An operator's result it keeps.
    """
    return value.clone()


@snapshot.register_fake
def _(value):
    return torch.empty_like(value)


def _check_labels(labels, num_classes, ignore_index, foreign_index=None):
    """On a CPU, or with COSFACE_CHECK_LABELS=1 at the price of a device synchronisation, a label that is no class raises."""
    if labels.device.type != "cpu" and os.environ.get("COSFACE_CHECK_LABELS") != "1":
        return
    outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if foreign_index is not None:
        outside &= labels != foreign_index
    if outside.any():
        row = int(outside.nonzero()[0])
        raise IndexError(
            f"labels[{row}] is {int(labels[row])}, but a label must be in [0, {num_classes}) or be ignore_index = {ignore_index}"
        )
