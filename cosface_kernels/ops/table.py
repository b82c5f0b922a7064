"""The class table as the slab loop reads it, and the gradient as it writes it: a slab at a time, nothing C x D beside them.

The row of class j is w_j, or with a bias (w_j, b_j): (x, 1)·(w_j, b_j) = x·w_j + b_j, so that no kernel knows of one.
"""

from typing import NamedTuple, Protocol

import torch

from . import page_pool
from .normalize import project, unit_rows


class Table(NamedTuple):
    weight: torch.Tensor  # (R, D) raw rows, any float dtype and strides; `centers` consecutive ones to a class
    bias: torch.Tensor | None = None  # (R,)
    normalize: bool = True  # whether each row is divided by its norm; never with a bias
    centers: int = 1  # a class's logit is the largest of its rows'
    index: torch.Tensor | None = None  # (M,) int64 ascending: the rows of weight that take part, in whole classes; None: all

    @property
    def num_rows(self):
        """How many rows take part; wherever a row has a position, it is counted among them."""
        return (self.weight if self.index is None else self.index).shape[0]

    @property
    def num_classes(self):
        """How many classes there are, taking part or not: labels are below it."""
        return self.weight.shape[0] // self.centers

    def positions(self, classes):
        """The first row of each class (N,); -1 for one that takes no part, and for a number that is no class."""
        inside = (classes >= 0) & (classes < self.num_classes)
        first = torch.where(inside, classes, 0) * self.centers
        if self.index is not None:
            place = torch.searchsorted(self.index, first).clamp(max=self.num_rows - 1)
            inside, first = inside & (self.index[place] == first), place
        return torch.where(inside, first, -1)

    def rows(self, start, stop):
        """The raw rows of a slab: a view, or where they are sampled or have a bias a copy of that slab."""
        if self.index is not None:
            return self._gather(self.index[start:stop])
        rows = self.weight[start:stop]
        return rows if self.bias is None else torch.cat([rows, self.bias[start:stop, None]], 1)

    def gathered(self, positions, dtype):
        """The raw rows at positions (P,), in dtype."""
        return self._gather(positions if self.index is None else self.index[positions]).to(dtype)

    def _gather(self, index):
        rows = self.weight.index_select(0, index)
        return rows if self.bias is None else torch.cat([rows, self.bias.index_select(0, index)[:, None]], 1)

    def unit(self, rows):
        """(what is multiplied with x, 1 / ‖rows‖ (M, 1) or None) for raw rows in the dtype to compute in."""
        return unit_rows(rows) if self.normalize else (rows, None)

    def project(self, rows, unit_grad):
        """The gradient of raw rows from that of their unit rows."""
        return project(*self.unit(rows), unit_grad)


class Sink(Protocol):
    """Where backward hands the rows of dW, slab by slab: kept (TableGradient), added up, or used up by an optimiser."""

    def room(self, start, stop, dtype=None):
        """Where a slab's rows (B, D) may be written in dtype (None: the sink's own) before they are `put`; D + 1 with a bias."""

    def put(self, start, stop, rows):
        """Takes the rows start .. stop of those that take part."""

    def native_update(self):
        """The C struct of an optimiser's step that native code is to apply to each row as soon as it is made, instead of room and
        put; None where there is none."""

    def device_update(self):
        """The same on a GPU: [(a Part of the optimiser, first column of its gradient)] for triton_update.py; or None."""


class TableGradient(NamedTuple):
    """A Sink that keeps dW and db."""

    weight: torch.Tensor  # (R, D), of the rows that take part
    bias: torch.Tensor | None  # (R,)

    @classmethod
    def of(cls, table):
        """Not yet written: every slab must be."""
        shape, bias = (table.num_rows, table.weight.shape[1]), table.bias
        weight = page_pool.empty(shape, table.weight.dtype, table.weight.device)
        return cls(weight, None if bias is None else torch.empty(shape[0], dtype=bias.dtype, device=bias.device))

    def native_update(self):
        return None

    def device_update(self):
        return None

    def room(self, start, stop, dtype=None):
        """The gradient itself where it can hold the rows."""
        rows = self.weight[start:stop]
        dtype = dtype or rows.dtype
        if self.bias is None and rows.dtype == dtype:
            return rows
        return torch.empty(len(rows), rows.shape[1] + (self.bias is not None), dtype=dtype, device=rows.device)

    def put(self, start, stop, rows):
        weight = self.weight[start:stop]
        if rows.data_ptr() != weight.data_ptr():
            weight.copy_(rows[:, : weight.shape[1]])
        if self.bias is not None:
            self.bias[start:stop] = rows[:, -1]
