"""The gradient of a class table from the records of `recording`, slab by slab."""

import torch
import torch.nn.functional as F

from .operands import TableFactors
from .operators import write_table_gradient
from .table import Sink

PUT_ROWS = 2**16  # rows of a sum that are handed on at once


def rows_of(records):
    """The rows of the table (M,) ascending that any record has a gradient for; None: all."""
    samples = {id(record.index): record.index for record in records}
    if None in samples.values():
        return None
    samples = list(samples.values())
    return samples[0] if len(samples) == 1 else torch.cat(samples).unique()


def write_gradient(table, records, sink):
    """Write the sum of all records' gradients slab by slab into a Sink.

    table: its index must be `rows_of(records)`.
    """
    with torch.cuda.device_of(table.weight):  # kernels go to the current device
        _write_groups(table, records, sink)


def _write_groups(table, records, sink):
    alike = {}
    for record in records:
        key = record.options, id(record.index), id(record.correction), record.factors.hard is None
        alike.setdefault(key, []).append(record)
    if len(alike) == 1:
        _write(table, records, sink)
        return
    # Batches with other classes, another scale or hard negatives have other exponentials, so only their gradients can be added:
    # here these exist, for the rows that any of the batches has.
    total = _Sum(table, sink.room(0, 1).dtype)
    for group in alike.values():
        total.into(group[0].index)
        _write(table, group, total)
    for start in range(0, len(total.rows), PUT_ROWS):
        stop = min(start + PUT_ROWS, len(total.rows))
        sink.put(start, stop, total.rows[start:stop])


class _Sum(Sink):
    """A Sink that accumulates: it adds each slab's rows to `self.rows`."""

    def __init__(self, table, dtype):
        size = table.weight.shape[1] + (table.bias is not None)
        self.index = table.index
        self.rows = torch.zeros(table.num_rows, size, dtype=dtype, device=table.weight.device)

    def into(self, index):
        """Set which rows of the table the next slabs belong to: index (M,), or None for all."""
        self.positions = index if self.index is None or index is None else torch.searchsorted(self.index, index)

    def room(self, start, stop, dtype=None):
        return torch.empty(stop - start, self.rows.shape[1], dtype=dtype or self.rows.dtype, device=self.rows.device)

    def put(self, start, stop, rows):
        self.rows[slice(start, stop) if self.positions is None else self.positions[start:stop]] += rows


def _write(table, records, sink):
    """Write the gradient of records with equal options and rows into a Sink."""
    first = records[0]
    options = first.options
    table = table._replace(normalize=options.normalize_weight, centers=options.centers)
    table = table._replace(index=first.index, correction=first.correction)
    columns = zip(*_of_one_width([record.factors for record in records], options.ignore_index), strict=True)
    factors = TableFactors(*map(_concatenated, columns))
    if not len(factors.kept):
        options = options._replace(memory_budget=0)
    write_table_gradient(sink, table, factors, options)


def _concatenated(parts):
    """None where all are, as of equal options; of a single one no copy: `kept` may be large."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def _of_one_width(batches, ignore_index):
    """TableFactors whose labels are all (N,), or else all (N, K) of one K."""
    if all(factors.labels.dim() == 1 for factors in batches):
        return batches
    width = max(factors.product_grad.shape[1] for factors in batches)

    def widened(factors):
        labels = factors.labels if factors.labels.dim() == 2 else factors.labels[:, None]
        missing = (0, width - labels.shape[1])
        length_grad = None if factors.length_grad is None else F.pad(factors.length_grad, missing)
        product_grad = F.pad(factors.product_grad, missing)
        return factors._replace(
            labels=F.pad(labels, missing, value=ignore_index), product_grad=product_grad, length_grad=length_grad
        )

    return [widened(factors) for factors in batches]
