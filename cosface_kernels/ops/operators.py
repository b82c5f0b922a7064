"""The package's torch operators: the only place that registers any. Schema, fake (shapes), autograd.

    negative_lse(x, W, b, labels) -> A_n = log Σ_{j≠y_n} e^{s (x̃_n·w̃_j + b_j)},  t_n = x̃_n·w̃_{y_n},  ‖w̃_{y_n}‖  and ‖x̃_n‖
    margin_losses(A, t')          -> the losses softplus(A_n - s t'_n), reduced

x̃ = x / ‖x‖ or x, w̃ = w / ‖w‖ or w; with K rows to a class the largest of its K counts; with a bias x̃ is (x, 1) and w̃ is (w, b).
The first, differentiable in x, W and b, knows no margin: what is done with its N-vectors to come from t to t' is autograd's. What
comes back for t_n and the lengths is projected, for w̃_{y_n} with the rows of dW while the slabs are made, for x̃_n with dx̃_n.

    ∂A_n/∂x̃_n = s Σ_j p_nj w̃_j = s pull_n          ∂A_n/∂w̃_j = s p_nj x̃_n,       p_nj = E_nj / total_n
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor, library

from . import backends, batch_rows, sampled_classes
from .slabs import kept_size, make_plan, wide_dtype
from .table import Table, TableGradient

LIBRARY = library.Library("cosface_kernels", "FRAGMENT")


class Options(NamedTuple):
    """What the operators are told beside their tensors, in this order."""

    scale: float
    ignore_index: int
    normalize_features: bool
    normalize_weight: bool
    centers: int
    dtype: torch.dtype
    memory_budget: int | None  # bytes of exponentials that may be kept from forward for backward; None: as plan.kept_size says
    backend: str


class Factors(NamedTuple):
    """What dW is made of, beside the table."""

    unit: torch.Tensor  # x̃ (N, D), D + 1 with a bias
    labels: torch.Tensor  # (N,)
    shift: torch.Tensor  # (N,)
    total: torch.Tensor  # (N,)
    lse_grad: torch.Tensor  # (N,)
    product_grad: torch.Tensor  # (N, K)
    length_grad: torch.Tensor  # (N, K), or (0, K) where the table is normalised
    kept: torch.Tensor  # exponentials from forward, as the operator keeps them; empty where they are computed again


def _registered(function):
    """torch.ops.cosface_kernels.<name of the function>. As library.custom_op, whose register_autograd looks up each argument's
    default in each call, and these have many. What it runs is the operator's `implementation`.
    As there, where torch.compile gives up on what calls it, it does not go on in here.
    """
    name = function.__name__
    LIBRARY.define(name + library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    operator = getattr(torch.ops.cosface_kernels, name).default
    operator.implementation = function
    return operator


@_registered
def negative_lse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor | None,
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
    foreign_index: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(lse (N,), x̃_n·w̃_{y_n} (N, K), ‖w̃_{y_n}‖ (N, K), ‖x̃‖ (N,)), and what else backward reuses: x̃ (N, D), w̃_{y_n} (N, K, D),
    1 / ‖x‖ (N,), pull (N, D), shift (N,), total (N,), kept (1-D). D + 1 columns with a bias. Lengths that are 1 are not there,
    (0, K) and (0,); nor is 1 / ‖x‖ where features are not normalised.

    x (N, D) any float dtype and norms; weight (C K, D); bias (C K,) or None; labels (N,) int64; index (M,) int64, the rows of the
    table that take part, ascending and all of a class, or None for all. A row labelled ignore_index counts as zero, whatever it
    holds, and has no target: every class is a negative and w̃_{y_n} is zero. dtype: what the products read. memory_budget:
    bytes of kept exponentials. foreign_index: the label of rows whose class another shard of the table holds: as they are, and
    without a target.
    """
    table = Table(weight, bias, normalize_weight, centers, index)
    _check_index(table)
    check_labels(labels, table.num_classes, ignore_index, foreign_index)
    _check_sampled(labels, table, ignore_index, foreign_index)
    cosines = normalize_features and normalize_weight
    plan = make_plan(x, table, scale=scale, dtype=dtype, memory_budget=memory_budget, keep=need_table_grad, cosines=cosines)
    chosen = backends.choose(backend, x.device, dtype)
    functions = _row_functions(chosen, table, normalize_features)
    with torch._C._DisableAutocast(), torch.cuda.device_of(x):
        targets, unit, inverse_norm, target_unit, product = functions.enter(
            x, table, labels, ignore_index, plan.wide, normalize_features, foreign_index
        )
        sums = chosen.forward(unit, table, targets, plan, need_pull=need_x_grad)
        target_length = product.new_empty(0, centers) if normalize_weight else target_unit.norm(dim=2)
        feature_length = product.new_empty(0) if normalize_features else unit.norm(dim=1)
    vectors = sums.lse, product, target_length, feature_length
    return *vectors, unit, target_unit, inverse_norm, sums.pull, sums.shift, sums.total, sums.kept


def _row_functions(backend, table, normalize_features):
    """A backend's own are for cosines over all of a table with one row to a class."""
    plain = normalize_features and table.normalize and table.centers == 1 and table.index is None
    return backend.row_functions if plain else batch_rows


@library.register_fake("cosface_kernels::negative_lse", lib=LIBRARY)
def _(x, weight, bias, labels, index, scale, ignore_index, *options):
    normalize_features, normalize_weight, centers, dtype, memory_budget, _, need_x_grad, need_table_grad, *_ = options
    num_rows, size = x.shape[0], x.shape[1] + int(bias is not None)  # sympy adds no bool
    wide = wide_dtype(dtype)
    table = Table(weight, bias, normalize_weight, centers, index)
    _, elements = kept_size(x, table, dtype, memory_budget) if need_table_grad else (0, 0)
    row = x.new_empty(num_rows, dtype=wide)
    return (
        row,
        x.new_empty(num_rows, centers, dtype=wide),
        x.new_empty(0 if normalize_weight else num_rows, centers, dtype=wide),
        x.new_empty(0 if normalize_features else num_rows, dtype=wide),
        x.new_empty(num_rows, size, dtype=wide),
        x.new_empty(num_rows, centers, size, dtype=wide),
        x.new_empty(num_rows if normalize_features else 0, dtype=wide),
        x.new_empty(num_rows if need_x_grad else 0, size, dtype=wide),
        torch.empty_like(row),
        torch.empty_like(row),
        x.new_empty(elements, dtype=dtype),
    )


@_registered
def negative_lse_backward(
    lse_grad: Tensor,
    product_grad: Tensor,
    length_grad: Tensor,
    feature_length_grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor | None,
    unit: Tensor,
    target_unit: Tensor,
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
    """(dX (N, D), dW (C K, D), db (C K,), each in its tensor's dtype) from the gradients of negative_lse's vectors.

    With an index dW (M, D) and db (M,) are those of its rows. What is not needed comes back empty. All are one op, of x, weight
    and bias, so that no second derivative can miss one of them.
    """
    table = Table(weight, bias, normalize_weight, centers, index)
    x_grad, weight_grad, bias_grad = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    with torch._C._DisableAutocast(), torch.cuda.device_of(x):
        if need_x_grad:
            functions = _row_functions(backends.choose(backend, x.device, dtype), table, normalize_features)
            x_grad = functions.x_gradient(
                *(lse_grad, product_grad, feature_length_grad, unit, target_unit, inverse_norm, pull, scale, x.shape, x.dtype)
            )
            if not normalize_features:  # else 1 / ‖x‖ is 0; a table's NaN is in every pull
                x_grad = torch.where((labels == ignore_index)[:, None], 0.0, x_grad)
        if need_table_grad:
            gradient = TableGradient.of(table)
            factors = Factors(unit, labels, shift, total, lse_grad, product_grad, length_grad, kept)
            options = Options(scale, ignore_index, normalize_features, normalize_weight, centers, dtype, memory_budget, backend)
            write_table_gradient(gradient, table, factors, options)
            weight_grad, bias_grad = gradient.weight, bias_grad if gradient.bias is None else gradient.bias
    return x_grad, weight_grad, bias_grad


def write_table_gradient(gradient, table, factors, options):
    """dW and db slab by slab into a TableGradient, or what has its methods."""
    unit, labels, shift, total, lse_grad, product_grad, length_grad, kept = factors
    scale, ignore_index, normalize_features, normalize_weight, _, dtype, memory_budget, backend = options
    chosen = backends.choose(backend, unit.device, dtype)
    cosines = normalize_features and normalize_weight
    plan = make_plan(unit, table, scale=scale, dtype=dtype, memory_budget=memory_budget, keep=True, cosines=cosines)
    functions = _row_functions(chosen, table, normalize_features)
    targets, row_scale, unscale, target_rows, target_sums = functions.weight_factors(
        lse_grad, product_grad, length_grad, unit, total, table, labels, ignore_index, scale
    )
    with torch._C._DisableAutocast():  # a fused optimiser's step comes here without an operator
        chosen.backward(unit, table, targets, row_scale, unscale, shift, target_rows, target_sums, kept, plan, gradient)


@library.register_fake("cosface_kernels::negative_lse_backward", lib=LIBRARY)
def _(lse_grad, product_grad, length_grad, feature_length_grad, x, weight, bias, labels, index, *rest):
    *_, need_x_grad, need_table_grad = rest
    x_grad = x.new_empty(x.shape if need_x_grad else 0)
    if not need_table_grad:
        return x_grad, weight.new_empty(0), weight.new_empty(0)
    rows = Table(weight, bias, index=index).num_rows
    weight_grad = weight.new_empty(
        rows, weight.shape[1]
    )  # no TableGradient.of: page_pool.py lends memory, which a shape has none of
    return x_grad, weight_grad, weight.new_empty(0) if bias is None else bias.new_empty(rows)


def zeros_for_none(gradients, shapes, like):
    return [like.new_zeros(shape) if grad is None else grad for grad, shape in zip(gradients, shapes, strict=True)]


def _differentiable(operator, function):
    """The operator is the autograd Function where a gradient may be wanted, as one made by custom_op would be."""

    def call(*inputs):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    LIBRARY.impl(operator, call, "Autograd")


class _NegativeLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *inputs, need_x_grad, need_table_grad, foreign_index = inputs
        # Here it is known what vmap and torch.export hide from the caller.
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        needs = need_x_grad or for_x, need_table_grad or for_weight or for_bias
        with torch._C._AutoDispatchBelowAutograd():
            output = negative_lse(*inputs, *needs, foreign_index)
        x, weight, bias, labels, index, *constants = inputs
        ctx.mark_non_differentiable(*output[4:])
        # Else autograd would hand backward a zero tensor as large as `kept`.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, labels, index, *output[4:])
        ctx.constants, ctx.shapes = constants, [vector.shape for vector in output[:4]]
        ctx.no_grads = [None] * len(inputs)
        return output

    @staticmethod
    def backward(ctx, *came_back):
        saved = ctx.saved_tensors  # once: each access unpacks them all, and activation checkpointing allows one
        _, weight, bias, _, index, *_, total, _ = saved
        vector_grads = zeros_for_none(came_back[:4], ctx.shapes, total)
        need = ctx.needs_input_grad[:3]
        grads = negative_lse_backward(*vector_grads, *saved, *ctx.constants, need[0], need[1] or need[2])
        if index is not None:
            grads = grads[0], *(_in_rows(index, grad, of) for grad, of in zip(grads[1:], (weight, bias), strict=True))
        return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *ctx.no_grads


_differentiable(negative_lse, _NegativeLse)


def _in_rows(index, grad, of):
    """The gradient of `of` as a sparse tensor whose rows at index are those of grad, the others never being touched."""
    if of is None or grad.shape[0] == 0:  # not needed
        return grad
    # A copy: the index may be the caller's tensor, which the next step's classes are written to.
    return torch.sparse_coo_tensor(index[None].clone(), grad, of.shape, is_coalesced=True, check_invariants=False)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "cosface_kernels computes first derivatives only; for a second one write the loss in plain PyTorch, as "
        "cosface_kernels.reference does"
    )


library.register_autograd("cosface_kernels::negative_lse_backward", _no_second_derivative, lib=LIBRARY)


@_registered
def margin_losses(
    lse: Tensor, logit: Tensor, counted: Tensor, scale: float, reduction: str, backend: str
) -> tuple[Tensor, Tensor]:
    """(softplus(lse_n - s logit_n) of the counted rows and 0 of others, reduced; its derivative by each row's lse (N,)).

    lse, logit (N,) of one dtype; counted (N,) bool. "mean": over the counted rows, 0 where there are none.
    """
    with torch.cuda.device_of(lse):
        return backends.choose(backend, lse.device, lse.dtype).row_functions.losses(lse, logit, counted, scale, reduction)


@library.register_fake("cosface_kernels::margin_losses", lib=LIBRARY)
def _(lse, logit, counted, scale, reduction, backend):
    return lse.new_empty(lse.shape if reduction == "none" else ()), torch.empty_like(lse)


class _MarginLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            losses, slope = margin_losses(*inputs)
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)
        lse, logit, counted, ctx.scale, *_ = inputs
        ctx.save_for_backward(slope, counted, lse, logit)
        return losses, slope

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        slope, counted, lse, logit = ctx.saved_tensors
        lse_grad = torch.where(counted, grad * slope, slope)  # where grad may be infinite and slope is 0
        if torch.is_grad_enabled():
            lse_grad = _FirstDerivative.apply(lse_grad, lse, logit)
        return lse_grad, -ctx.scale * lse_grad, None, None, None, None


class _FirstDerivative(torch.autograd.Function):
    """A gradient, which depends on what else is given in a way that is not known."""

    @staticmethod
    def forward(ctx, grad, *_):
        return grad.view_as(grad)

    backward = staticmethod(_no_second_derivative)


_differentiable(margin_losses, _MarginLosses)


@library.custom_op("cosface_kernels::sample_classes", mutates_args=())
def sample_classes(labels: Tensor, step: Tensor, num_classes: int, rate: float, seed: int, step_moves: bool) -> Tensor:
    """sampled_classes.draw for labels (N,) int64 and a 0-dim step, which may move after it was read."""
    if step_moves and torch._C._current_graph_task_id() != -1:  # torch.utils.checkpoint asks the same way where it is
        raise RuntimeError(
            "a head with sample_rate < 1 was computed again in backward, as activation checkpointing does, and would draw other "
            "classes than in forward: leave the head out of the checkpointed part (it holds no logits beyond memory_budget), or "
            "draw outside with sample_classes and call margin_softmax_loss(..., classes=...)"
        )
    return sampled_classes.draw(labels, num_classes, rate, seed, step)


@sample_classes.register_fake
def _(labels, step, num_classes, rate, seed, step_moves):
    most = sampled_classes.wanted(num_classes, rate)
    size = most if labels.shape[0] <= most else library.get_ctx().new_dynamic_size()
    return torch.empty(size, dtype=torch.int64, device=labels.device)


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


def _checks_values(tensor):
    """On a CPU, or with COSFACE_CHECK_LABELS=1 at the price of a device synchronisation."""
    return tensor.device.type == "cpu" or os.environ.get("COSFACE_CHECK_LABELS") == "1"


def check_labels(labels, num_classes, ignore_index, foreign_index=None):
    """Where values are checked, a label that is no class raises."""
    if not _checks_values(labels):
        return
    outside = ((labels < 0) | (labels >= num_classes)) & batch_rows.needs_target(labels, ignore_index, foreign_index)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise IndexError(
            f"labels[{row}] is {int(labels[row])}, but a label must be in [0, {num_classes}) or be ignore_index = {ignore_index}"
        )


def _check_sampled(labels, table, ignore_index, foreign_index):
    """Where values are checked, a label whose class takes no part raises."""
    if table.index is None or not _checks_values(labels):
        return
    missing = (table.positions(labels) < 0) & batch_rows.needs_target(labels, ignore_index, foreign_index)
    if missing.any():
        row = int(missing.nonzero()[0])
        label = int(labels[row])
        raise IndexError(f"labels[{row}] is {label}, but classes must hold the class of every row, and {label} is not in it")


def _check_index(table):
    """Where values are checked, classes that are none, or do not ascend, raise."""
    if table.index is None or not _checks_values(table.index):
        return
    classes = table.index[:: table.centers] // table.centers
    first, last = int(classes[0]), int(classes[-1])
    descents = (classes.diff() <= 0).nonzero()
    if len(descents):
        place = int(descents[0])
        raise ValueError(
            f"classes must ascend, each number once, got {int(classes[place])} before {int(classes[place + 1])} at {place}"
        )
    if first < 0 or last >= table.num_classes:
        raise IndexError(f"classes must be in [0, {table.num_classes}), got {first if first < 0 else last}")
