"""Each row's cosines with its own class's centres, and each class's dominant centre: to find rows under a wrong name."""

import torch

from .. import validation
from ..ops import formats, label_checks
from ..ops.normalize import unit_rows
from ..ops.slabs import wide_dtype
from ..positives import class_indices

ROWS = 4096  # looked up at a time


@torch.no_grad()
def own_cosines(head, features, labels):
    """`MarginSoftmaxLoss.own_cosines`. Over ranks each row is looked up by the rank that holds its class."""
    centers = head.centers_per_class

    def check(weight):
        validation.check_tensors(features, weight, labels, None, centers)
        label_checks.check_labels(class_indices(labels), head.num_classes, int(head.ignore_index))

    def found(features, places):
        scale, (weight, _) = head._row_scale(), head.placement.rows((head.weight, None))
        by_class = (len(weight) // centers, centers)
        return of_rows(features, weight.unflatten(0, by_class), places, None if scale is None else scale.unflatten(0, by_class))

    return head.placement.here(head.weight).looked_up(head, check, features, labels, found)


def of_rows(features, table, labels, scale=None):
    """cos(x_n, w_{y_n,k}) (N, K), table: (C, K, D), in float32 or float64; NaN for labels outside [0, C). scale: (C, K) beside
    float8.
    """
    wide = wide_dtype(features.dtype, table.dtype)
    known = (labels >= 0) & (labels < len(table))
    found = features.new_full((len(features), table.shape[1]), torch.nan, dtype=wide)
    for rows in known.nonzero().squeeze(1).split(ROWS):
        centers = formats.read(table, scale, labels[rows]).to(wide)
        unit, _ = unit_rows(centers.flatten(0, 1))
        found[rows] = (unit_rows(features[rows].to(wide))[0][:, None] * unit.view_as(centers)).sum(2)
    return found


def dominant(cosines, labels, num_classes):
    """`MarginSoftmaxLoss.dominant_centers`."""
    width = cosines.shape[1]
    known = (labels >= 0) & (labels < num_classes)
    nearest = labels[known] * width + cosines[known].argmax(1)
    counts = nearest.bincount(minlength=num_classes * width).view(num_classes, width)
    return torch.where(counts.any(1), counts.argmax(1), -1)
