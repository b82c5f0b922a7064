"""Each class's nearest other classes: people who look alike, and one person under two names."""

import torch

from .. import validation
from ..ops.table import Table
from . import logits

ROWS = 1024  # classes looked up at a time


@torch.no_grad()
def confusions(head, k):
    """`MarginSoftmaxLoss.confusions`. Over ranks each looks its own classes up in the whole table, and gets all answers."""

    def check():
        validation.check_k(k, head.num_classes - 1, "the number of other classes")

    placement, centers = head.placement.here(head.weight), head.centers_per_class
    weight, size = placement.rows((head.weight, None))[0].detach(), ROWS * centers
    first, cosines_of = placement.first_class(head, head.weight), logits.Cosines(centers, head._row_scale())
    found, table = [], Table(weight, row_scale=head._row_scale())
    for number in range(placement.rounds(head, check, k, -(-len(weight) // size))):
        rows = table.rows(number * size, (number + 1) * size)
        cosines, classes = placement.nearest(head, cosines_of, (weight, None), rows, k + 1)
        start = first + number * ROWS
        own = torch.arange(start, start + len(rows) // centers, dtype=torch.int64, device=weight.device)
        cosines = cosines.masked_fill(classes == own.repeat_interleave(centers)[:, None], -torch.inf)
        by_class = (each.reshape(len(own), centers * (k + 1)) for each in (cosines, classes))
        found.append(_merged(*by_class, k))
    return tuple(placement.everyones(head, torch.cat(each)) for each in zip(*found, strict=True))


def _merged(cosines, classes, k):
    """The k largest of each row, of a class that is there several times the largest alone."""
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    classes = classes.gather(1, order)
    again = (classes[:, :, None] == classes[:, None]).tril(-1).any(2)
    cosines, order = cosines.masked_fill(again, -torch.inf).topk(k, 1)
    return cosines, classes.gather(1, order)
