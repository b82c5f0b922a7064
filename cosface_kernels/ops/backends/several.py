"""Several classes to a row: targets (N, K), the rows of the table that a row leaves out, anywhere, -1 for none.

Kernels leave out one class a row. So where there are several, they write all exponents of a slab in float32, as for sub-centres,
and what is left out becomes -inf in it before the exponential: nothing is subtracted from a sum.
"""

import torch


def leave_out(slab, targets, start, dim):
    """Set slab[n, targets[n, k] - start] = -inf in place for those inside; dim: that of the classes, 1, or 0 for (B, N)."""
    columns = targets - start
    inside = (columns >= 0) & (columns < slab.shape[dim])
    # The smaller of two numbers, so that a target outside, which changes nothing, may share a place with one inside.
    bound = torch.where(inside, -torch.inf, torch.inf).to(slab.dtype)
    columns = torch.where(inside, columns, 0)
    if dim == 0:
        columns, bound = columns.T, bound.T
    return slab.scatter_reduce_(dim, columns, bound, "amin")
