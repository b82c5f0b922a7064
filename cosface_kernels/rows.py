"""What the operators do before and after the slab loop, N x D work, in plain PyTorch: any device, any float dtype.

    enter             x̂ = x / ‖x‖,  ŵ_{y_n} = w_{y_n} / ‖w_{y_n}‖,  the target class of each row
    x_gradient        dx = (dx̂ - x̂ (x̂·dx̂)) / ‖x‖,  dx̂ = s g pull + what came back for x̂
    weight_factors    what the slabs of dW are made of: row_scale = g / total, and what came back for ŵ_{y_n}, class by class

They are a backend's `row_functions`; one for which some hundred small operators would cost too much brings its own.
"""

import torch

from .unit import project, unit_rows


def enter(x, weight, labels, ignore_index, wide):
    """(targets (N,), unit x (N, D), 1 / ‖x‖ (N,), unit target rows (N, D)), all but the targets in the wide dtype.

    A row labelled ignore_index has target -1 and is zero, whatever x holds there; so is the target row of a row without a target.
    A row with any other label outside [0, C) is NaN, and makes NaN of all that it reaches.
    """
    targets = _targets(labels, len(weight), ignore_index)
    ignored = labels == ignore_index
    unit, inverse_norm = unit_rows(torch.where(ignored[:, None], 0.0, x).to(wide).contiguous())
    unit = torch.where(((targets < 0) & ~ignored)[:, None], torch.nan, unit)
    target_unit, _ = unit_rows(weight.index_select(0, targets.clamp(min=0)).to(wide))
    return targets, unit, inverse_norm[:, 0], torch.where((targets < 0)[:, None], 0.0, target_unit)


def x_gradient(lse_grad, unit_grad, unit, inverse_norm, pull, scale, dtype):
    """dx (N, D) in dtype from the gradients of lse (N,) and of unit x (N, D)."""
    return project(unit, inverse_norm[:, None], (scale * lse_grad)[:, None] * pull + unit_grad).to(dtype)


def weight_factors(lse_grad, target_grad, total, weight, labels, ignore_index, scale):
    """(targets (N,), row_scale (N,), unscale (0-dim), target_classes (N,), target_sums (N, D)) of backends.backward.

    target_grad (N, D) is the gradient of the unit target rows; its sum over a class is projected once.
    """
    targets = _targets(labels, len(weight), ignore_index)
    power = _power_of_two(lse_grad)
    row_scale = torch.where(total == 0, 0.0, lse_grad * power / total)
    classes, sums = _sum_by_class(targets, target_grad, len(weight))
    rows = weight.index_select(0, classes.clamp(max=len(weight) - 1)).to(sums.dtype)
    return targets, row_scale, scale / power, classes, project(*unit_rows(rows), sums)


def _targets(labels, num_classes, ignore_index):
    """The class, or -1 for a label that is none."""
    return torch.where((labels >= 0) & (labels < num_classes) & (labels != ignore_index), labels, -1)


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
