"""Backward of a class table that a fused optimiser trains: O(N D) numbers are recorded, and its `step` makes dW, slab by slab.

dW is fully described by what the operator's backward would be given, (x̃, labels, shift, total) of forward and the gradients of
A_n and w̃_{y_n}. They are additive over batches: those of several backward calls, one below the other, describe the sum.
"""

import weakref
from typing import NamedTuple

import torch

from .ops import write_table_gradient
from .plan import SLAB_CLASSES_MAX
from .table import Table

_heads = weakref.WeakSet()  # an optimiser is given parameters, and has to know what they are


class Options(NamedTuple):
    """What two records must have in common to be one."""

    scale: float
    ignore_index: int
    normalize_features: bool
    normalize_weight: bool
    centers: int
    dtype: torch.dtype
    memory_budget: int  # bytes of exponentials that may be kept from forward until step
    backend: str


class Factors(NamedTuple):
    """One backward call's share of dW."""

    unit: torch.Tensor  # x̃ (N, D), D + 1 with a bias
    labels: torch.Tensor  # (N,)
    shift: torch.Tensor  # (N,)
    total: torch.Tensor  # (N,)
    lse_grad: torch.Tensor  # (N,)
    target_grad: torch.Tensor  # (N, K, D)
    kept: torch.Tensor  # exponentials from forward, as the operator keeps them; empty where they are computed again


class Pending:
    """What has been recorded for a table since the last step."""

    def __init__(self, optimizer):
        self.optimizer = weakref.ref(optimizer)
        self.records = []  # (Options, Factors, the table's version), in the order of backward

    def __reduce__(self):
        return type(None), ()  # a pickled parameter has no optimiser

    def add(self, options, factors, version):
        """Kept exponentials serve a single record: of several, one below the other, they would be another matrix."""
        if self.records:
            (first, single, at), *others = self.records
            self.records = [(first, _without_kept(single), at), *others]
            factors = _without_kept(factors)
        self.records.append((options, factors, version))

    def take(self, weight):
        """[(Options, Factors)], forgotten from now on."""
        if weight.grad is not None:
            raise RuntimeError(
                "the class table has an ordinary gradient, which a fused optimiser does not use: nothing but the loss of its "
                "head may depend on the table. Set weight.grad = None"
            )
        records, self.records = self.records, []
        if any(version != weight._version for *_, version in records):
            raise RuntimeError(
                "the class table was changed between backward and step, so the gradient can no longer be made: change it after "
                "step, or call zero_grad first"
            )
        return [record[:2] for record in records]


def _without_kept(factors):
    return factors._replace(kept=factors.kept.new_empty(0))


def register(head):
    """Makes the head's parameters known as a class table and its bias."""
    _heads.add(head)


def head_of(parameter):
    """The head whose weight or bias a parameter is, or None."""
    return next((head for head in _heads if parameter is head.weight or parameter is head.bias), None)


def attach(weight, optimizer):
    """From now on, for as long as the optimiser lives, backward records for this table."""
    if pending(weight) is not None and pending(weight).optimizer() is optimizer:
        return
    weight._pending = Pending(optimizer)
    weakref.finalize(optimizer, _detach, weakref.ref(weight), weight._pending)


def _detach(reference, pending):
    weight = reference()
    if weight is not None and weight._pending is pending:
        weight._pending = None


def pending(weight):
    """The table's Pending, or None where an ordinary gradient is wanted."""
    return getattr(weight, "_pending", None)


@torch._disable_dynamo
def record(weight, bias, lse, target_rows, factors, options):
    """lse (N,) and target_rows (N, K, D) as they are; their gradients are recorded when backward asks for the table's.

    They come from an operator that saw no gradient of the table. Two zeros are added to them, because the path to the features
    must not lead through here: torch.autograd.grad(loss, features) records nothing.
    """
    lse_part, rows_part = _Record.apply(weight, bias, lse.detach(), target_rows.detach(), *factors, options)
    return lse + lse_part, target_rows + rows_part


class _Record(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, lse, target_rows, unit, labels, shift, total, kept, options):
        ctx.save_for_backward(weight, unit, labels, shift, total, kept)  # weight: a change of it is then noticed
        ctx.options, ctx.target_shape = options, target_rows.shape
        ctx.set_materialize_grads(False)
        return torch.zeros_like(lse), torch.zeros_like(target_rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, lse_grad, target_grad):
        weight, unit, labels, shift, total, kept = ctx.saved_tensors
        lse_grad = torch.zeros_like(total) if lse_grad is None else lse_grad
        target_grad = unit.new_zeros(ctx.target_shape) if target_grad is None else target_grad
        factors = Factors(unit, labels, shift, total, lse_grad, target_grad, kept)
        found = pending(weight)
        if found is None:
            raise RuntimeError("the fused optimiser that this loss was computed for no longer exists")
        found.add(ctx.options, factors, weight._version)
        return (None,) * 10


def refused(weight):
    """weight, for a loss whose backward must not reach it."""
    return _Refuse.apply(weight)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "a table_format of 16 bits trains with FusedSGD or FusedAdamW alone, made before the forward pass: rounded to "
            "nearest, most of another optimiser's updates would be lost. dtype=torch.bfloat16 makes a table that takes any"
        )


def write_gradient(weight, bias, records, gradient):
    """The sum of what all records describe, slab by slab into a TableGradient, or what has its methods."""
    by_options = {}
    for options, factors in records:
        by_options.setdefault(options, []).append(factors)
    if len(by_options) == 1:
        ((options, factors),) = by_options.items()
        _write(weight, bias, options, factors, gradient)
        return
    # Batches with another scale, say, have exponentials of their own: only gradients can be added, so this once they exist.
    total = _Sum(Table(weight, bias), gradient.place(0, 1).dtype)
    for options, factors in by_options.items():
        _write(weight, bias, options, factors, total)
    for start in range(0, len(weight), SLAB_CLASSES_MAX):
        stop = min(start + SLAB_CLASSES_MAX, len(weight))
        gradient.put(start, stop, total.rows[start:stop])


class _Sum:
    """What stands where a TableGradient is expected, and adds to what is there."""

    def __init__(self, table, dtype):
        size = table.weight.shape[1] + (table.bias is not None)
        self.rows = torch.zeros(table.num_rows, size, dtype=dtype, device=table.weight.device)

    def place(self, start, stop, dtype=None):
        return torch.empty_like(self.rows[start:stop], dtype=dtype)

    def put(self, start, stop, rows):
        self.rows[start:stop] += rows


def _write(weight, bias, options, factors, gradient):
    unit, labels, shift, total, lse_grad, target_grad, kept = (torch.cat(parts) for parts in zip(*factors, strict=True))
    write_table_gradient(
        *(gradient, Table(weight, bias, options.normalize_weight, options.centers), unit, labels, shift, total),
        *(kept, lse_grad, target_grad, options.scale, options.ignore_index, options.normalize_features, options.dtype),
        *(options.memory_budget if len(kept) else 0, options.backend),
    )
