"""Each class's nearest other classes: people who look alike, and one person under two names."""

import torch

from .. import validation
from ..distributed import dtensors
from ..ops.table import Table
from . import logits

ROWS = 1024  # classes looked up at a time


@torch.no_grad()
def confusions(head, k):
    """`MarginSoftmaxLoss.confusions`."""
    if dtensors.is_sharded(head.weight) or head.placement.ranks(head.weight).size > 1:
        raise NotImplementedError("confusions needs the whole table in one process: load_checkpoint into an unsharded head")
    validation.check_k(k, head.num_classes - 1, "the number of other classes")
    weight, centers = head.weight, head.centers_per_class
    cosines_of = logits.Cosines(centers, head._row_scale())
    found, table = [], Table(weight.detach(), row_scale=head._row_scale())
    for start in range(0, len(weight), ROWS * centers):
        rows = table.rows(start, start + ROWS * centers)
        cosines, classes = logits.largest(cosines_of, (weight, None), rows, k + 1)
        first = ROWS * len(found)
        own = torch.arange(first, first + len(rows) // centers, dtype=torch.int64, device=weight.device)
        cosines = cosines.masked_fill(classes == own.repeat_interleave(centers)[:, None], -torch.inf)
        found.append(_merged(cosines.unflatten(0, (-1, centers)).flatten(1), classes.unflatten(0, (-1, centers)).flatten(1), k))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _merged(cosines, classes, k):
    """The k largest of each row, of a class that is there several times the largest alone."""
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    classes = classes.gather(1, order)
    again = (classes[:, :, None] == classes[:, None]).tril(-1).any(2)
    cosines, order = cosines.masked_fill(again, -torch.inf).topk(k, 1)
    return cosines, classes.gather(1, order)
