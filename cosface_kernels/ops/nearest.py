"""The largest products of each row with its negatives, slab by slab in plain PyTorch: what a threshold by rank needs first.

Operands are rounded as in the slab loop of a backend, so that both see the same products but for the order of a sum.
"""

import torch

from .backends.products import cosines
from .backends.torch_backend import without_targets
from .slabs import slab_rows


def largest_products(entered, table, x, dtype, count):
    """(N, count), descending, -inf where a row has fewer negatives; of sub-centres each class's largest.

    entered: batch_rows.Entered of x.
    """
    low, slab = entered.unit.to(dtype), slab_rows(x, table, dtype)
    best = entered.unit.new_full((len(x), count), -torch.inf)
    for start in range(0, table.num_rows, slab):
        rows = table.rows(start, min(start + slab, table.num_rows)).to(best.dtype)
        products = cosines(low, table.unit(rows)[0].to(dtype))
        products = without_targets(products, entered.targets - start, table.centers)
        products = products.unflatten(1, (-1, table.centers)).amax(2) if table.centers > 1 else products
        found = products.topk(min(count, products.shape[1])).values
        best = torch.cat([best, found], 1).topk(count).values
    return best
