"""The slab loop in plain PyTorch operators: any device, any float dtype, float64 for gradcheck.

Per slab of B rows of the table, nothing larger than N x B or B x D:

    w̃ = rows of the slab, unit or as they are    E = 2^{k x w̃ᵀ - shift}, E[n, y_n] = 0    total += Σ_j E    U += E w̃
    backward: E again (or kept)        dw̃ = Eᵀ diag(row_scale) x        dw = (dw̃ - ŵ (ŵ·dw̃)) / ‖w‖ or dw̃, + the targets' share
"""

import math

import torch

from .. import batch_rows, page_pool
from ..normalize import project
from ..operands import Largest
from ..slabs import aligned
from . import Sums, exponents
from .products import accumulated, cosines

row_functions = batch_rows


def forward(x, table, targets, plan, *, need_pull, need_largest=False, need_row_sum=False, hard=None):
    num_rows, size = x.shape
    low = x.to(plan.dtype)
    shift = exponents.shift(plan, num_rows, x.device, lambda: _largest_exponents(low, table, targets, plan, hard))
    # Sums over up to 10^5 slabs: in float32 they would lose three digits.
    total = torch.zeros(num_rows, dtype=_sum_dtype(x), device=x.device)
    pull = torch.zeros(num_rows if need_pull else 0, size, dtype=_sum_dtype(x), device=x.device)
    kept = page_pool.empty((plan.kept_elements,), plan.dtype, x.device)
    largest, row_sum = None, torch.zeros(size, dtype=_sum_dtype(x), device=x.device) if need_row_sum else None
    for index, start, stop in plan.slabs(table):
        unit = _unit(table, start, stop, plan)[0].to(plan.dtype)
        if need_row_sum:
            row_sum += unit.sum(0, dtype=row_sum.dtype)
        products = _products(low, unit, targets - start, table)
        if need_largest:
            value, place = products.max(1)  # the first of equal ones
            parts = [*([] if largest is None else [largest]), Largest(value, place + start)]
            largest = Largest.of_parts(*map(torch.stack, zip(*parts, strict=True)))
        summed, e = exponents.exponentials(products, shift, table=table, start=start, hard=hard, factor=plan.log2_scale, dim=1)
        total += summed.sum(1)
        place = plan.kept_view(kept, index, num_rows, aligned(stop - start))
        if place is not None:
            place[:, stop - start :] = 0
            e = place[:, : stop - start].copy_(e)
        if need_pull:
            pull += accumulated(e.to(plan.dtype), unit)
    if need_pull:
        pull /= torch.where(total == 0, 1.0, total)[:, None]
    total = total.to(plan.wide)
    lse = total.log().add_(shift, alpha=math.log(2))
    return Sums(lse, shift, total, pull.to(plan.wide), kept, largest=largest, row_sum=row_sum)


def backward(x, table, factors, shift, kept, plan, sink, *, hard=None):
    low = x.to(plan.dtype)
    scaled = (x * factors.row_scale[:, None]).to(plan.dtype)
    for index, start, stop in plan.slabs(table):
        unit, inverse_norm = _unit(table, start, stop, plan)
        e = plan.kept_view(kept, index, len(x), aligned(stop - start))
        if e is None:
            products = _products(low, unit.to(plan.dtype), factors.targets - start, table)
            rest = {"table": table, "start": start, "hard": hard, "factor": plan.log2_scale, "dim": 1}
            e = exponents.exponentials(products, shift, **rest)[1].to(plan.dtype)
        unit_grad = accumulated(e[:, : stop - start].T, scaled)
        if factors.common is not None:
            unit_grad += factors.common
        grad = project(unit, inverse_norm, unit_grad) * factors.unscale
        sink.put(start, stop, _add_rows(grad, factors.target_rows - start, factors.target_sums))


def _unit(table, start, stop, plan):
    return table.unit(table.rows(start, stop).to(plan.wide))


def _products(low, unit, columns, table):
    """x w̃ᵀ (N, B) in plan.wide, -inf at targets; columns: each row's target counted from the slab's first row."""
    if columns.dim() == 2:
        return exponents.leave_out(cosines(low, unit), columns, 0, 1)
    return without_targets(cosines(low, unit), columns, table.centers)


def _largest_exponents(low, table, targets, plan, hard):
    """The largest exponent of each row (N,)."""
    largest = torch.full((low.shape[0],), -torch.inf, dtype=plan.wide, device=low.device)
    for _, start, stop in plan.slabs(table):
        products = _products(low, _unit(table, start, stop, plan)[0].to(plan.dtype), targets - start, table)
        found, _ = exponents.finished(products, table=table, start=start, hard=hard, factor=plan.log2_scale, dim=1)
        largest = torch.maximum(largest, found.amax(1))
    return largest


def without_targets(slab, columns, count):
    """Set slab[n, columns[n] + k] = -inf in place, for k < count and columns inside the slab, without waiting for the device."""
    inside = ((columns >= 0) & (columns < slab.shape[1]))[:, None]
    columns = torch.where(inside, columns[:, None] + torch.arange(count, dtype=torch.int64, device=slab.device), 0)
    return slab.scatter_(1, columns, torch.where(inside, -torch.inf, slab.gather(1, columns)))


def _add_rows(grad, rows, sums):
    """Add sums[i] to grad[rows[i]] for rows inside grad, which are distinct; others add zero to row 0, in any order."""
    inside = (rows >= 0) & (rows < len(grad))
    return grad.index_add_(0, torch.where(inside, rows, 0), torch.where(inside[:, None], sums, 0.0))


def _sum_dtype(x):
    return torch.float32 if x.device.type == "mps" else torch.float64
