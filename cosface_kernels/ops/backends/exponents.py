"""Exponents and exponentials of a slab in plain PyTorch: for the torch backend, and for what no kernel computes.

Kernels take the exponential while a product is in registers. For sub-centres, several classes to a row and corrections of
sampled classes they write all of a slab's exponents in float32 instead, and what is here does the rest.
"""

from . import centers
from . import hard as hard_products


def finished(products, table, start, hard, factor, dim):
    """(factor g(c) + the class's correction; g'(c), or None without hard negatives), in place of a slab's products c.

    start: the slab's first position. dim: that of the classes, 1, or 0 for (B, N). Of sub-centres all but the nearest are -inf.
    """
    products, slope = centers.nearest(products, table.centers, dim), None
    if hard is not None:
        products, slope = hard_products.changed(products, hard, dim)
    if factor != 1.0:
        products.mul_(factor)
    if table.correction is not None:
        products += table.correction[start : start + products.shape[dim]].unsqueeze(1 - dim)
    return products, slope


def exponentials(products, shift, *rest):
    """(E, E g'), E = 2^{exponent - shift}, in place of the products; one tensor without hard negatives. rest: as above."""
    exponents, slope = finished(products, *rest)
    e = exponents.sub_(shift.unsqueeze(rest[-1])).exp2_()
    return e, e if slope is None else e * slope
