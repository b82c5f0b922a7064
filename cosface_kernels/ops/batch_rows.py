"""The N x D work before and after the slab loop, in plain PyTorch: any device, any float dtype.

    enter             x̃,  w̃_{y_n},  x̃_n·w̃_{y_n},  the target of each row: x̃ = x / ‖x‖ or x, w̃ = w / ‖w‖ or w; (x, 1) and (w, b)
                      with a bias
    losses            softplus(lse - s logit), reduced
    x_gradient        dx = (dx̃ - x̂ (x̂·dx̃)) / ‖x‖ or dx̃,  dx̃ = s g pull + p w̃_{y_n} + q Σ_j w̃_j + ∂‖x̃‖ x̂
    slab_factors      the factors of every slab of dW: row_scale = g / total, for each row p x̃_n + ∂‖w̃_y‖ ŵ_{y_n}, Σ_n q_n x̃_n

g, p, q, ∂‖x̃‖ and ∂‖w̃_y‖ are the gradients of a row's lse, of x̃_n·w̃_{y_n}, of Σ_j x̃_n·w̃_j and of the two lengths.

These functions are a backend's `row_functions`. A backend for which a hundred small operators cost too much has its own, for
cosines with one row to a class; its `losses` must cover everything.
"""

from typing import NamedTuple

import torch

from .normalize import direction, project, unit_rows


class Entered(NamedTuple):
    """A batch as the slab loop reads it. All but the targets have the dtype of sums, and D + 1 columns with a bias."""

    targets: torch.Tensor  # (N,) the position of the first of the class's K rows, or (N, K) those of K classes; -1 for none
    unit: torch.Tensor  # x̃ (N, D)
    inverse_norm: torch.Tensor  # 1 / ‖x‖ (N,), or (0,) where features are not normalised
    target_unit: torch.Tensor  # w̃_{y_n} (N, K, D)
    product: torch.Tensor  # x̃_n·w̃_{y_n} (N, K)


class SlabFactors(NamedTuple):
    """The factors of every slab of dW, beside E."""

    targets: torch.Tensor  # (N,) or (N, K)
    row_scale: torch.Tensor  # (N,)
    unscale: torch.Tensor  # (0-dim)
    target_rows: torch.Tensor  # (N K,) ascending, R for none; of equal ones the first one's sum counts, the others' are zero
    target_sums: torch.Tensor  # (N K, D)
    common: torch.Tensor | None = None  # (D,) added to each row of dw̃ before `unscale`; None: nothing


def enter(x, table, labels, options, wide):
    """Entered of raw features x (N, D) and a Table.

    A row labelled ignore_index has no target and is set to zero, whatever x holds there. A row labelled foreign_index has no
    target and counts: another rank holds its class. The target row of either is zero. A row with any other label outside [0, C),
    or whose class takes no part, is set to NaN, which shows in all that depends on it.
    """
    targets = _targets(labels, table, options.ignore_index)
    rows = torch.where(ignored(labels, options.ignore_index)[:, None], 0.0, x).to(wide).contiguous()
    unit, inverse_norm = unit_rows(rows) if options.normalize_features else (rows, rows.new_empty(0, 1))
    if table.bias is not None:
        unit = torch.cat([unit, unit.new_ones(len(unit), 1)], 1)
    lost = (targets < 0) & needs_target(labels, options.ignore_index, options.foreign_index)
    unit = torch.where(_of_rows(lost).any(1, keepdim=True), torch.nan, unit)
    target_rows = _rows_of(targets.clamp(min=0), table.centers)
    target_unit, _ = table.unit(table.gathered(target_rows.flatten(), wide))
    target_unit = torch.where((_of_rows(targets) < 0)[:, :, None], 0.0, target_unit.view(*target_rows.shape, unit.shape[1]))
    return Entered(targets, unit, inverse_norm[:, 0], target_unit, (unit[:, None] * target_unit).sum(2))


def ignored(labels, ignore_index):
    """Bool (N,): True for rows without any class."""
    return (_of_rows(labels) == ignore_index).all(1)


def _of_rows(values):
    """(N,) as (N, 1), (N, K) as it is."""
    return values.unsqueeze(1) if values.dim() == 1 else values


def needs_target(labels, ignore_index, foreign_index):
    """Bool, as labels: True where there must be a target here, neither no class nor one that another rank holds."""
    needed = labels != ignore_index
    return needed if foreign_index is None else needed & (labels != foreign_index)


def x_gradient(grads, saved, options, shape, dtype):
    """dx (N, D), its shape, in dtype from the gradients of operands.Vectors."""
    unit, inverse_norm = saved.unit, saved.inverse_norm
    grad = (options.scale * grads.lse)[:, None] * saved.pull + (grads.product[:, :, None] * saved.target_unit).sum(1)
    if options.sums_products and grads.product_sum is not None:
        grad = grad + grads.product_sum[:, None] * saved.row_sum
    if not options.normalize_features and grads.feature_length is not None:
        grad = grad + grads.feature_length[:, None] * direction(unit)
    grad = grad[:, : shape[1]]
    unit = unit[:, : shape[1]]
    grad = project(unit, inverse_norm[:, None] if len(inverse_norm) == len(grad) else None, grad)
    return grad.to(dtype).contiguous()  # with a bias a slice


def slab_factors(factors, table, options):
    """SlabFactors of operands.TableFactors. The targets' shares of a row of the table are summed, then projected once."""
    unit, total = factors.unit, factors.total
    targets = _targets(factors.labels, table, options.ignore_index)
    power, common = _power_of_two(factors.lse_grad), None
    if factors.sum_grad is not None:
        power = _power_of_two(torch.cat([factors.lse_grad, factors.sum_grad]))
        common = ((factors.sum_grad * (power / options.scale))[:, None] * unit).sum(0)
    # An ignored row's 0 over a total that a class of NaN made NaN would reach every row of the table.
    left_out = (total == 0) | ignored(factors.labels, options.ignore_index)
    row_scale = torch.where(left_out, 0.0, factors.lse_grad * power / total)
    rows = torch.where(_of_rows(targets) < 0, -1, _rows_of(targets, table.centers)).flatten()
    unit_grad = factors.product_grad[:, :, None] * unit[:, None]
    if factors.length_grad is not None:
        target_rows = table.gathered(rows.clamp(min=0), unit.dtype).view(unit_grad.shape)
        unit_grad = unit_grad + factors.length_grad[:, :, None] * direction(target_rows)
    rows, sums = _sum_by_row(rows, unit_grad.flatten(0, 1), table.num_rows)
    sums = table.project(table.gathered(rows.clamp(max=table.num_rows - 1), sums.dtype), sums)
    return SlabFactors(targets, row_scale, options.scale / power, rows, sums, common)


def losses(lse, logit, counted, scale, reduction):
    """(loss, its derivative by each row's lse (N,)) of ops.margin_losses."""
    exponent = lse - scale * logit
    small = exponent.abs().neg().exp()
    # -log σ(-z) = softplus(z): 1 - p_y is never formed by subtraction, so a converged row keeps its relative accuracy.
    loss = torch.where(counted, exponent.clamp(min=0) + small.log1p(), 0.0)
    slope = torch.where(counted, torch.where(exponent < 0, small, 1.0) / (1 + small), 0.0)
    return reduced(loss, counted, reduction), slope / counted.sum().clamp(min=1) if reduction == "mean" else slope


def reduced(values, counted, reduction):
    """The mean over counted rows, the sum, or the vector itself, of numbers (N,) that are 0 where a row is not counted."""
    if reduction == "none":
        return values
    return values.sum() / counted.sum().clamp(min=1) if reduction == "mean" else values.sum()


def _targets(labels, table, ignore_index):
    """The position of each label's class in the table, its first row; -1 for a label outside [0, C) or of a class not sampled."""
    return torch.where(labels == ignore_index, -1, table.positions(labels))


def _rows_of(targets, centers):
    """The positions (N, K) of the rows that make up each target's class (N,); of K targets to a row they are those."""
    if targets.dim() == 2:
        return targets
    return targets[:, None] + torch.arange(centers, dtype=torch.int64, device=targets.device)


def _power_of_two(lse_grad):
    """A power of two (0-dim) that brings the largest finite |lse_grad| to [0.5, 1).

    total may reach 2^112, so that an upstream gradient of 2^-16 over it would leave float32, and bfloat16 with it.
    """
    finite = torch.where(lse_grad.isfinite(), lse_grad.abs(), 0.0)
    largest = torch.cat([finite, finite.new_zeros(1)]).amax()
    # Built from its bits: on a GPU torch.exp2 is compiled at its first call.
    bits, bias, places = (torch.int64, 1023, 52) if lse_grad.dtype == torch.float64 else (torch.int32, 127, 23)
    exponent = torch.frexp(largest).exponent.clamp(-126, 126).to(bits)
    return ((bias - exponent) << places).view(lse_grad.dtype)


def _sum_by_row(targets, rows, num_rows):
    """Sums of vectors by row of the table, added in order: (rows (N,) ascending, padded with num_rows; sums (N, D))."""
    keys, order = torch.where(targets < 0, num_rows, targets).sort(stable=True)
    slot = (keys.diff(prepend=keys.new_full((1,), -1)) != 0).cumsum(0) - 1
    targets = torch.full_like(keys, num_rows).scatter_(0, slot, keys)
    sums = rows.new_zeros(rows.shape)  # contiguous, whatever rows is
    if rows.is_cuda:
        # Sorts, then adds each slot's rows one after another; index_add_ would use atomics there.
        sums.index_put_((slot,), rows[order], accumulate=True)
    else:
        sums.index_add_(0, slot, rows[order])
    return targets, sums
