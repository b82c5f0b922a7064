"""The package's torch operators: schema, fake (shapes), autograd. registration.py has the means.

    negative_lse(x, W, b, labels) -> A_n = log Σ_{j≠y_n} e^{s (x̃_n·w̃_j + b_j)},  t_n = x̃_n·w̃_{y_n},  ‖w̃_{y_n}‖  and ‖x̃_n‖
    margin_losses(A, t')          -> the losses softplus(A_n - s t'_n), reduced

x̃ = x / ‖x‖ or x, w̃ = w / ‖w‖ or w; with K rows to a class the largest of its K counts; with a bias x̃ is (x, 1) and w̃ is (w, b).
The first, differentiable in x, W and b, knows no margin: a margin turns its t into t' in plain autograd. The gradients of t_n and
of the lengths are projected together with others: for w̃_{y_n} with the rows of dW, slab by slab, for x̃_n with dx̃_n.

    ∂A_n/∂x̃_n = s Σ_j p_nj w̃_j = s pull_n          ∂A_n/∂w̃_j = s p_nj x̃_n,       p_nj = E_nj / total_n
"""

import contextlib

import torch
from torch import Tensor, library

from .. import validation
from . import backends, batch_rows, label_checks, nearest, sampled_classes
from .operands import (
    Gradients,
    Largest,
    Losses,
    Needs,
    Options,
    Problem,
    Ranked,
    Reduction,
    RowLogits,
    Saved,
    Slopes,
    TableFactors,
    Targets,
    Vectors,
    split,
)
from .registration import Operator
from .slabs import kept_size, make_plan, slab_rows, wide_dtype
from .table import Table, TableGradient


def _negative_lse(problem, options, needs):
    """(Vectors, Saved, Largest) of a Problem; Vectors are differentiable. needs: also gradients wanted though no tensor here
    requires any.
    """
    options = with_scale(problem, options)
    table = _table(problem, options)
    label_checks.check_index(table)
    x = problem.x
    with _no_autocast(), _device_of(x):
        entered, sums = _entered_and_summed(problem, table, options, needs)
        product = entered.product
        row_sum = None if sums.row_sum is None else sums.row_sum.to(product.dtype)
        product_sum = None if row_sum is None else (entered.unit * row_sum).sum(1)
        target_length = None if options.normalize_weight else entered.target_unit.norm(dim=2)
        feature_length = None if options.normalize_features else entered.unit.norm(dim=1)
    saved = Saved(
        unit=entered.unit,
        target_unit=entered.target_unit,
        inverse_norm=entered.inverse_norm,
        pull=sums.pull,
        shift=sums.shift,
        total=sums.total,
        row_sum=row_sum,
        kept=sums.kept,
    )
    largest = sums.largest or Largest(None, None)
    if needs.need_largest:
        largest = largest._replace(place=table.classes(largest.place))
    return Vectors(sums.lse, product, target_length, product_sum, feature_length), saved, largest


def _entered_and_summed(problem, table, options, needs):
    """(Entered, Sums) of a backend."""
    x, labels = problem.x, problem.labels
    backend = backends.choose(options.backend, x.device, options.dtype)
    plan = make_plan(x, table, options, keep=needs.need_table_grad)
    rows, one_call = _row_functions(backend, table, options, labels)
    if one_call and not needs.need_largest and problem.hard is None and one_call.takes(x, table, plan):
        return one_call.forward(x, table, labels, options, plan, needs.need_x_grad)
    label_checks.check_labels(labels, table.num_classes, options.ignore_index, options.foreign_index)
    label_checks.check_sampled(labels, table, options)
    label_checks.check_correction(table)
    entered = rows.enter(x, table, labels, options, plan.wide)
    wanted = {"need_pull": needs.need_x_grad, "need_largest": needs.need_largest, "need_row_sum": options.sums_products}
    return entered, backend.forward(entered.unit, table, entered.targets, plan, **wanted, hard=problem.hard)


def _no_autocast():
    """Context manager without autocast."""
    return torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else _HERE


def _device_of(tensor):
    """Context manager in which a GPU's tensor is on the current device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else _HERE


_HERE = contextlib.nullcontext()


def with_scale(problem, options):
    """The options, with the scale of the problem if that has one."""
    if problem.own_scale is None:
        return options
    scale = float(problem.own_scale)
    validation.check_scale(scale)
    return options._replace(scale=scale)


def _table(problem, options):
    rows, correction = (problem.weight, problem.bias), problem.correction
    return Table(*rows, options.normalize_weight, options.centers, problem.index, correction, problem.row_scale)


def _row_functions(backend, table, options, labels):
    """(The backend's own row functions, its in_one_call or None), for cosines over a whole table of floats that it reads in place
    with one row to a class, one class to a row and no sum of products; else (the module batch_rows, None).
    """
    plain = options.cosines and table.centers == 1 and table.index is None and labels.dim() == 1 and not options.sums_products
    plain = plain and table.row_scale is None
    return (backend.row_functions, getattr(backend, "in_one_call", None)) if plain else (batch_rows, None)


negative_lse = Operator("negative_lse", (Problem, Options, Needs), (Vectors, Saved, Largest), _negative_lse)


@negative_lse.register_fake
def _(problem, options, needs):
    x, wide = problem.x, wide_dtype(options.dtype)
    targets = options.centers if problem.labels.dim() == 1 else problem.labels.shape[1]
    num_rows, size = x.shape[0], x.shape[1] + int(problem.bias is not None)  # sympy adds no bool
    elements = 0
    if needs.need_table_grad:
        table = _table(problem, options)
        _, elements = kept_size(x, table, options.dtype, options.memory_budget, slab_rows(x, table, options.dtype))
    vectors = Vectors(
        lse=x.new_empty(num_rows, dtype=wide),
        product=x.new_empty(num_rows, targets, dtype=wide),
        target_length=None if options.normalize_weight else x.new_empty(num_rows, targets, dtype=wide),
        product_sum=x.new_empty(num_rows, dtype=wide) if options.sums_products else None,
        feature_length=None if options.normalize_features else x.new_empty(num_rows, dtype=wide),
    )
    saved = Saved(
        unit=x.new_empty(num_rows, size, dtype=wide),
        target_unit=x.new_empty(num_rows, targets, size, dtype=wide),
        inverse_norm=x.new_empty(num_rows if options.normalize_features else 0, dtype=wide),
        pull=x.new_empty(num_rows if needs.need_x_grad else 0, size, dtype=wide),
        shift=x.new_empty(num_rows, dtype=wide),
        total=x.new_empty(num_rows, dtype=wide),
        row_sum=x.new_empty(size, dtype=wide) if options.sums_products else None,
        kept=x.new_empty(elements, dtype=options.dtype),
    )
    largest = x.new_empty(num_rows, dtype=wide), problem.labels.new_empty(num_rows)
    return vectors, saved, Largest(*largest) if needs.need_largest else Largest(None, None)


def _target_products(problem, options, ranked):
    """(Targets,) of a Problem, without gradient, for what must know them before the slabs."""
    x, table = problem.x, _table(problem, options)
    with _no_autocast(), _device_of(x):
        entered = batch_rows.enter(x, table, problem.labels, options, wide_dtype(options.dtype))
        largest = entered.unit.new_empty(len(x), 0)
        if ranked.count:
            largest = nearest.largest_products(entered, table, x, options.dtype, ranked.count)
    return (Targets(entered.product, entered.unit, largest),)


target_products = Operator("target_products", (Problem, Options, Ranked), (Targets,), _target_products)


@target_products.register_fake
def _(problem, options, ranked):
    x, (num_rows, size), wide = problem.x, problem.x.shape, wide_dtype(options.dtype)
    shapes = options.centers, size + int(problem.bias is not None), ranked.count
    return (Targets(*(x.new_empty(num_rows, columns, dtype=wide) for columns in shapes)),)


def _negative_lse_backward(grads, problem, saved, options, needs):
    """Gradients of x, weight and bias from those of negative_lse's vectors: one operator, so no second derivative misses one."""
    options = with_scale(problem, options)
    x, table = problem.x, _table(problem, options)
    backend = backends.choose(options.backend, x.device, options.dtype)
    x_grad = weight_grad = bias_grad = None
    with _no_autocast(), _device_of(x):
        if needs.need_x_grad:
            rows, _ = _row_functions(backend, table, options, problem.labels)
            x_grad = rows.x_gradient(grads, saved, options, x.shape, x.dtype)
            if not options.normalize_features:  # else 1 / ‖x‖ is 0; a table's NaN is in every pull
                x_grad = torch.where(batch_rows.ignored(problem.labels, options.ignore_index)[:, None], 0.0, x_grad)
        if needs.need_table_grad:
            gradient = TableGradient.of(table)
            _write_slabs(backend, gradient, table, TableFactors.of(problem.labels, saved, grads, problem.hard, options), options)
            weight_grad, bias_grad = gradient.weight, gradient.bias
    return (Gradients(x_grad, weight_grad, bias_grad),)


def write_table_gradient(sink, table, factors, options):
    """Write dW and db slab by slab into a table.Sink, without an operator: a step of a fused optimiser."""
    with _no_autocast():
        _write_slabs(backends.choose(options.backend, factors.unit.device, options.dtype), sink, table, factors, options)


def _write_slabs(backend, sink, table, factors, options):
    unit, hard = factors.unit, factors.hard
    plan = make_plan(unit, table, options, keep=True)
    rows, one_call = _row_functions(backend, table, options, factors.labels)
    whole = one_call and hard is None and one_call.takes(unit, table, plan)
    if whole and one_call.backward(factors, table, options, plan, sink):
        return
    slab_factors = rows.slab_factors(factors, table, options)
    backend.backward(unit, table, slab_factors, factors.shift, factors.kept, plan=plan, sink=sink, hard=hard)


negative_lse_backward = Operator(
    "negative_lse_backward", (Vectors, Problem, Saved, Options, Needs), (Gradients,), _negative_lse_backward, inputs=2
)


@negative_lse_backward.register_fake
def _(grads, problem, saved, options, needs):
    x_grad = problem.x.new_empty(problem.x.shape) if needs.need_x_grad else None
    weight, bias = problem.weight, problem.bias
    if not needs.need_table_grad:
        return (Gradients(x_grad, None, None),)
    rows = _table(problem, options).num_rows
    # Not TableGradient.of, which takes memory from page_pool.py: fake tensors have none.
    weight_grad = weight.new_empty(rows, weight.shape[1])
    return (Gradients(x_grad, weight_grad, None if bias is None else bias.new_empty(rows)),)


class _NegativeLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, objects, *_):
        problem, options, needs = objects
        # needs_input_grad is right here, and not in the caller, under vmap and torch.export.
        wanted = _wanted(ctx)
        needs = Needs(needs.need_x_grad or wanted.x, needs.need_table_grad or wanted.weight or wanted.bias, needs.need_largest)
        vectors, saved, largest = compute(problem, options, needs)
        ctx.set_materialize_grads(False)  # autograd's own zeros are no fake tensors where the others are
        ctx.save_for_backward(*problem, *saved)
        ctx.options = options
        return *vectors, saved, largest

    @staticmethod
    def backward(ctx, *came_back):
        # saved_tensors once: each access unpacks them all, and activation checkpointing allows one.
        problem, saved = split(ctx.saved_tensors, (Problem, Saved))
        wanted = _wanted(ctx)
        needs = Needs(wanted.x, wanted.weight or wanted.bias)
        lse_grad, product_grad, *others = came_back[:-2]
        if lse_grad is None:
            lse_grad = torch.zeros_like(saved.total)
        if product_grad is None:
            product_grad = saved.total.new_zeros(saved.target_unit.shape[:2])
        grads = Vectors(lse_grad, product_grad, *others)
        (grads,) = negative_lse_backward(grads, problem, saved, ctx.options, needs)
        if problem.index is not None:
            grads = grads._replace(
                weight=in_rows(problem.index, grads.weight, problem.weight), bias=in_rows(problem.index, grads.bias, problem.bias)
            )
        grads = [grad if needed else None for grad, needed in zip(grads, wanted, strict=True)]
        return None, None, *grads, *[None] * (len(problem) - len(grads))


def _wanted(ctx):
    """Gradients of flags: whether autograd wants them. The first two inputs of _NegativeLse are no tensors."""
    return Gradients._make(ctx.needs_input_grad[2 : 2 + len(Gradients._fields)])


negative_lse.differentiable(_NegativeLse)


def in_rows(index, grad, of):
    """The gradient of `of` as a sparse tensor with the rows of grad at index."""
    if of is None or grad is None or grad.shape[0] == 0:  # not needed
        return grad
    # A copy: the index may be the caller's tensor, which the next step's classes are written to.
    return torch.sparse_coo_tensor(index[None].clone(), grad, of.shape, is_coalesced=True, check_invariants=False)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "cosface_kernels computes first derivatives only; for a second one write the loss in plain PyTorch, as "
        "cosface_kernels.reference does"
    )


class _NegativeLseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, objects, *_):
        (grads,) = compute(*objects)
        return grads

    backward = staticmethod(_no_second_derivative)


negative_lse_backward.differentiable(_NegativeLseBackward)


def _margin_losses(rows, reduction):
    """(Losses, Slopes): softplus(lse_n - s logit_n) of the counted rows and 0 of others, reduced.

    "mean": over the counted rows, 0 where there are none.
    """
    lse, logit, counted = rows
    with _device_of(lse):
        functions = backends.choose(reduction.backend, lse.device, lse.dtype).row_functions
        losses, slopes = functions.losses(lse, logit, counted, reduction.scale, reduction.reduction)
    return Losses(losses), Slopes(slopes)


margin_losses = Operator("margin_losses", (RowLogits, Reduction), (Losses, Slopes), _margin_losses)


@margin_losses.register_fake
def _(rows, reduction):
    lse = rows.lse
    return Losses(lse.new_empty(lse.shape if reduction.reduction == "none" else ())), Slopes(torch.empty_like(lse))


class _MarginLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, objects, lse, logit, counted):
        losses, slopes = compute(*objects)
        ctx.scale = objects[1].scale
        ctx.save_for_backward(slopes.slope, counted, lse, logit)
        return losses.loss, slopes

    @staticmethod
    def backward(ctx, grad, _):
        slope, counted, lse, logit = ctx.saved_tensors
        lse_grad = torch.where(counted, grad * slope, slope)  # where grad may be infinite and slope is 0
        if torch.is_grad_enabled():
            lse_grad = FirstDerivative.apply(lse_grad, lse, logit)
        return None, None, lse_grad, -ctx.scale * lse_grad, None


margin_losses.differentiable(_MarginLosses)


class FirstDerivative(torch.autograd.Function):
    """Identity that marks a first-order gradient as a function of the other tensors, so that differentiating it again raises
    instead of returning zeros.
    """

    @staticmethod
    def forward(ctx, grad, *_):
        return grad.view_as(grad)

    backward = staticmethod(_no_second_derivative)


@library.custom_op("cosface_kernels::sample_classes", mutates_args=())
def sample_classes(labels: Tensor, step: Tensor, num_classes: int, rate: float, seed: int, step_moves: bool) -> Tensor:
    """sampled_classes.draw for labels (N,) int64 and a 0-dim step, which the caller may change in place afterwards."""
    if step_moves and torch._C._current_graph_task_id() != -1:  # torch.utils.checkpoint asks the same way where it is
        raise RuntimeError(
            "a head with sample_rate < 1 was computed again in backward, as activation checkpointing does, and would draw other "
            "classes than in forward: leave the head out of the checkpointed part (it holds no logits beyond memory_budget), or "
            "draw outside with sample_classes and call margin_softmax_loss(..., classes=...)"
        )
    return sampled_classes.draw(labels, num_classes, rate, seed, step)


@sample_classes.register_fake
def _(labels, step, num_classes, rate, seed, step_moves):
    size = sampled_classes.wanted(labels.shape[0], num_classes, rate)
    return torch.empty(size, dtype=torch.int64, device=labels.device)


@library.custom_op("cosface_kernels::snapshot", mutates_args=())
def snapshot(value: Tensor) -> Tensor:
    """A copy of a running statistic, without gradient, so that backward sees its present value.

    torch.compile recomputes cheap values in backward, even from a buffer that has changed since (pytorch/pytorch#197039): λ of
    SphereFace's annealing was one step late in the gradient. It keeps an operator's result.
    """
    return value.clone()


@snapshot.register_fake
def _(value):
    return torch.empty_like(value)
