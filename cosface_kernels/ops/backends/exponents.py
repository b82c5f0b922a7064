"""Exponents and exponentials of a slab in plain PyTorch: for the torch backend, and for what no kernel computes.

    sub-centres       a class has K consecutive rows, and only the one nearest to x counts: the others' exponents are -inf
    hard negatives    where a product c of row n passes τ_n, g(c) = p0_n + p1_n c + p2_n c² takes its place. E of g(c) is summed;
                      E g'(c) is kept and multiplied, so that both gradients are what they would be without g

Kernels take the exponential while a product is in registers, and leave out one class a row. For sub-centres, several classes to
a row and corrections of sampled classes they write all of a slab's exponents in float32 instead, and what is here does the rest:
what is left out becomes -inf before the exponential, so that nothing is subtracted from a sum.
"""

from typing import NamedTuple

import torch


class Epilogue(NamedTuple):
    """The work on a slab's products c, divided between a kernel and PyTorch:

    the problem                                       the kernel                        PyTorch
    one row and one class to a class and row          E of factor c, its maxima
    the same with hard negatives                      E of factor g(c), its maxima
    sub-centres, several classes, a correction        factor c                          `finished`, E
    the same with hard negatives                      c                                 `finished` with late_factor, E
    """

    targets: torch.Tensor  # (N,), those that the kernel leaves out: -1 where a row has several
    several: torch.Tensor | None  # (N, K), the targets of rows that have several
    hard: torch.Tensor | None  # (N, 4), see finished
    columns: torch.Tensor | None  # (4, N), `hard` as a kernel reads it, or None if PyTorch does it
    in_pytorch: bool  # True: PyTorch makes E
    finds_maxima: bool  # True: the kernel can find the largest exponents itself
    factor: float  # of the kernel
    late_factor: float

    @classmethod
    def of(cls, table, targets, hard, plan):
        several = targets if targets.dim() == 2 else None
        special = several is not None or table.correction is not None
        in_pytorch = special or table.centers > 1
        late = in_pytorch and hard is not None  # g is of a product, before the factor
        return cls(
            targets=targets if several is None else targets.new_full(targets.shape[:1], -1),
            several=several,
            hard=hard,
            columns=None if hard is None or late else hard.T.contiguous(),
            in_pytorch=in_pytorch,
            finds_maxima=not special and (hard is None or table.centers == 1),
            factor=1.0 if late else plan.log2_scale,
            late_factor=plan.log2_scale if late else 1.0,
        )

    def rest(self, table, start, dim):
        """The arguments of `finished` beside a slab's products."""
        return {"table": table, "start": start, "hard": self.hard, "factor": self.late_factor, "dim": dim}


def shift(plan, num_rows, device, largest):
    """(N,): the plan's constant, or each row's largest exponent of a negative, which largest() finds; 0 for a row without any."""
    if plan.shift is not None:
        return torch.full((num_rows,), plan.shift, dtype=plan.wide, device=device)
    found = largest()
    return torch.where(found == -torch.inf, 0.0, found)


def finished(products, *, table, start, hard, factor, dim):
    """(factor g(c) + the class's correction; g'(c), or None without hard negatives), in place of a slab's products c.

    start: the slab's first position. dim: that of the classes, 1, or 0 for (B, N). Of sub-centres all but the nearest are -inf.
    """
    products, slope = _nearest(products, table.centers, dim), None
    if hard is not None:
        products, slope = _changed(products, hard, dim)
    if factor != 1.0:
        products.mul_(factor)
    if table.correction is not None:
        products += table.correction[start : start + products.shape[dim]].unsqueeze(1 - dim)
    return products, slope


def exponentials(products, shift, *, dim, **rest):
    """(E, E g'), E = 2^{exponent - shift}, in place of the products; one tensor without hard negatives. dim, rest: as above."""
    exponents, slope = finished(products, dim=dim, **rest)
    e = exponents.sub_(shift.unsqueeze(dim)).exp2_()
    return e, e if slope is None else e * slope


def leave_out(slab, targets, start, dim):
    """Set slab[n, targets[n, k] - start] = -inf in place for those inside; targets (N, K): rows of the table, anywhere, -1 for
    none; dim: that of the classes, 1, or 0 for (B, N).
    """
    columns = targets - start
    inside = (columns >= 0) & (columns < slab.shape[dim])
    # The smaller of two numbers, so that a target outside, which changes nothing, may share a place with one inside.
    bound = torch.where(inside, -torch.inf, torch.inf).to(slab.dtype)
    columns = torch.where(inside, columns, 0)
    if dim == 0:
        columns, bound = columns.T, bound.T
    return slab.scatter_reduce_(dim, columns, bound, "amin")


def _nearest(exponents, centers, dim):
    """The exponents, all but the largest of each class set to -inf; the first of equal ones stays.

    Exponents are compared, because far more exponentials are equal after rounding.

    A loop over the K centres: an argmax along so short a dimension takes ten times as long on a CPU.
    """
    if centers == 1:
        return exponents
    parts = exponents.unflatten(dim, (-1, centers)).unbind(dim + 1)
    largest = parts[0]
    for part in parts[1:]:
        largest = torch.maximum(largest, part)
    wanted = torch.ones_like(largest, dtype=torch.bool)
    for part in parts:
        kept = wanted & ((part == largest) | part.isnan())
        part.masked_fill_(~kept, -torch.inf)
        wanted &= ~kept
    return exponents


def _changed(products, hard, dim):
    """(g(c), g'(c)) of products with rows along the other dimension than dim; hard: (N, 4), (τ, p0, p1, p2) of each row."""
    threshold, p0, p1, p2 = (column.unsqueeze(dim) for column in hard.unbind(1))
    is_hard = products > threshold
    return (
        torch.where(is_hard, p0 + products * (p1 + products * p2), products),
        torch.where(is_hard, p1 + 2 * p2 * products, 1.0),
    )
