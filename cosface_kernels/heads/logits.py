"""The logits of a head without its margin, s x̃_n·w̃_j: all of them for small C, and the largest of each row for any C.

Autocast is off here: many of a million cosines are equal after rounding to 16 bits. table: (weight, bias), this process's rows.
"""

from typing import NamedTuple

import torch

from ..ops import class_tables
from ..ops.normalize import unit_rows
from ..ops.slabs import slab_rows, wide_dtype
from ..ops.table import Table

TRACED_CLASSES = 2**16  # classes of a slab where a graph is traced, for any number of rows


class Cosines(NamedTuple):
    """Stand-in for a head whose logits are cosines."""

    centers_per_class: int = 1
    row_scale: torch.Tensor | None = None  # (R,) beside float8 rows
    are_unit: bool = False  # True: features and rows have norm 1 already
    scale: float = 1.0

    @property
    def normalize_features(self):
        return not self.are_unit

    normalize_weight = normalize_features

    def _row_scale(self):
        return self.row_scale


def of_all(head, table, features):
    """All logits (N, C), differentiable."""
    return _logits(head, table, _rows(head, table, features), 0, len(table[0]))


def largest(head, table, features, k):
    """(values, indices) of the k largest logits, each (N, k), descending, slab by slab; fewer columns if this process holds fewer
    classes.
    """
    rows, weight, centers = _rows(head, table, features), table[0], head.centers_per_class
    values = rows.new_empty(rows.shape[0], 0)
    indices = torch.empty(rows.shape[0], 0, dtype=torch.int64, device=rows.device)
    if torch.compiler.is_compiling():  # also in torch.export
        slab = min(len(weight), TRACED_CLASSES // centers * centers)
    else:
        slab = slab_rows(features, Table(weight, centers=centers), rows.dtype)
    for start in range(0, len(weight), slab or 1):  # 0: an empty shard
        found = _logits(head, table, rows, start, start + slab)
        best = found.topk(min(k, found.shape[1]))
        candidates = torch.cat([values, best.values], 1)
        values, order = candidates.topk(min(k, candidates.shape[1]))
        indices = torch.cat([indices, best.indices + start // centers], 1).gather(1, order)
    return values, indices


def _rows(head, table, features):
    """x̃ (N, D), in float32 or float64."""
    rows = features.to(wide_dtype(features.dtype, table[0].dtype))
    return unit_rows(rows)[0] if head.normalize_features else rows


def _logits(head, table, rows, start, stop):
    """The logits (N, B) of the table's rows from `start` to `stop`."""
    with torch.autocast(rows.device.type, enabled=False):
        weight, bias = table
        row_scale = head._row_scale()
        slab = Table(weight, row_scale=row_scale).rows(start, stop).to(rows.dtype)
        if row_scale is not None:
            slab = class_tables.refused(weight, slab)
        products = rows @ (unit_rows(slab)[0] if head.normalize_weight else slab).T
        if bias is not None:
            products = products + bias[start:stop].to(rows.dtype)
        if head.centers_per_class > 1:
            products = products.unflatten(1, (-1, head.centers_per_class)).max(2).values
        return head.scale * products
