"""The slab loop in plain PyTorch operators: any device, any float dtype, float64 for gradcheck.

Per slab of B classes, nothing larger than N x B or B x D:

    ŵ = unit rows of the slab          E = 2^{k x ŵᵀ - shift}, E[n, y_n] = 0          total += Σ_j E          U += E ŵ
    backward: E again (or kept)        dŵ = Eᵀ diag(row_scale) x        dw = (dŵ - ŵ (ŵ·dŵ)) / ‖w‖ + the targets' share
"""

import torch

from .. import rows
from ..plan import aligned
from ..unit import project, unit_rows
from . import Sums
from .products import accumulated, cosines

row_functions = rows


def forward(x, weight, targets, plan, *, need_pull):
    num_rows, size = x.shape
    low = x.to(plan.dtype)
    shift = _shift(low, weight, targets, plan)
    # Sums over up to 10^5 slabs: in float32 they would lose three digits.
    total = torch.zeros(num_rows, dtype=_sum_dtype(x), device=x.device)
    pull = torch.zeros(num_rows if need_pull else 0, size, dtype=_sum_dtype(x), device=x.device)
    kept = torch.empty(plan.kept_elements, dtype=plan.dtype, device=x.device)
    for index, start, stop in plan.slabs(weight.shape[0]):
        unit = unit_rows(weight[start:stop].to(plan.wide))[0].to(plan.dtype)
        e = _exponentials(low, unit, shift, targets - start, plan)
        total += e.sum(1)
        place = plan.kept_view(kept, index, num_rows, aligned(stop - start))
        if place is not None:
            place[:, stop - start :] = 0
            e = place[:, : stop - start].copy_(e)
        if need_pull:
            pull += accumulated(e.to(plan.dtype), unit)
    if need_pull:
        pull /= torch.where(total == 0, 1.0, total)[:, None]
    return Sums(shift, total.to(plan.wide), pull.to(plan.wide), kept)


def backward(x, weight, targets, row_scale, unscale, shift, target_classes, target_sums, kept, plan, weight_grad):
    low = x.to(plan.dtype)
    scaled = (x * row_scale[:, None]).to(plan.dtype)
    for index, start, stop in plan.slabs(weight.shape[0]):
        unit, inverse_norm = unit_rows(weight[start:stop].to(plan.wide))
        e = plan.kept_view(kept, index, len(x), aligned(stop - start))
        if e is None:
            e = _exponentials(low, unit.to(plan.dtype), shift, targets - start, plan).to(plan.dtype)
        grad = project(unit, inverse_norm, accumulated(e[:, : stop - start].T, scaled)) * unscale
        weight_grad[start:stop] = _add_rows(grad, target_classes - start, target_sums)


def _exponentials(low, unit, shift, columns, plan):
    """E (N, B) in plan.wide; columns: each row's target counted from the slab's first class."""
    e = cosines(low, unit).mul_(plan.log2_scale).sub_(shift[:, None]).exp2_()
    return _replace_targets(e, columns, 0.0)


def _shift(low, weight, targets, plan):
    """(N,): the plan's constant, or each row's largest k cos_nj (0 for a row without negatives)."""
    if plan.shift is not None:
        return torch.full((low.shape[0],), plan.shift, dtype=plan.wide, device=low.device)
    largest = torch.full((low.shape[0],), -torch.inf, dtype=plan.wide, device=low.device)
    for _, start, stop in plan.slabs(weight.shape[0]):
        unit = unit_rows(weight[start:stop].to(plan.wide))[0].to(plan.dtype)
        exponents = cosines(low, unit).mul_(plan.log2_scale)
        largest = torch.maximum(largest, _replace_targets(exponents, targets - start, -torch.inf).amax(1))
    return torch.where(largest == -torch.inf, 0.0, largest)


def _replace_targets(slab, columns, value):
    """slab[n, columns[n]] = value where that column lies in the slab, in place and without asking the device where it does."""
    inside = (columns >= 0) & (columns < slab.shape[1])
    columns = torch.where(inside, columns, 0)[:, None]
    return slab.scatter_(1, columns, torch.where(inside[:, None], value, slab.gather(1, columns)))


def _add_rows(grad, rows, sums):
    """grad[rows[i]] += sums[i] for the rows inside grad, which are distinct; the others add zero to the first, in any order."""
    inside = (rows >= 0) & (rows < len(grad))
    return grad.index_add_(0, torch.where(inside, rows, 0), torch.where(inside[:, None], sums, 0.0))


def _sum_dtype(x):
    return torch.float32 if x.device.type == "mps" else torch.float64
