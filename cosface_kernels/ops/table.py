"""The class table as the slab loop reads it, and the gradient as it writes it: a slab at a time, without another C x D tensor.

The row of class j is w_j, or with a bias (w_j, b_j): (x, 1)·(w_j, b_j) = x·w_j + b_j, so no kernel has code for a bias.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import formats, page_pool
from .normalize import project, unit_rows


class Table(NamedTuple):
    weight: torch.Tensor  # (R, D) raw rows, any float dtype and strides, or float8; `centers` consecutive ones to a class
    bias: torch.Tensor | None = None  # (R,)
    normalize: bool = True  # True: each row is divided by its norm; never with a bias
    centers: int = 1  # a class's logit is the largest of its rows'
    index: torch.Tensor | None = None  # (M,) int64 ascending: the rows of weight that take part, in whole classes; None: all
    correction: torch.Tensor | None = None  # (M,): added to the binary exponents of the rows that take part; None: zeros
    row_scale: torch.Tensor | None = None  # (R,) float32 beside a float8 weight

    @property
    def num_rows(self):
        """The number of rows that take part. A row's position is its place among these."""
        return (self.weight if self.index is None else self.index).shape[0]

    @property
    def num_classes(self):
        """The number of classes, taking part or not. Labels are below it."""
        return self.weight.shape[0] // self.centers

    def positions(self, classes):
        """The position (N,) of each class's first row; -1 for a class that takes no part, and for a number outside [0, C)."""
        inside = (classes >= 0) & (classes < self.num_classes)
        first = torch.where(inside, classes, 0) * self.centers
        if self.index is not None:
            place = torch.searchsorted(self.index, first).clamp(max=self.num_rows - 1)
            inside, first = inside & (self.index[place] == first), place
        return torch.where(inside, first, -1)

    def classes(self, positions):
        """The class (N,) of each position, -1 for -1."""
        rows = positions if self.index is None else self.index[positions.clamp(min=0)]
        return torch.where(positions < 0, -1, rows // self.centers)

    def rows(self, start, stop):
        """The raw rows of a slab: a view, or a copy of that slab if classes are sampled, there is a bias, or they are float8:
        then float32.
        """
        if self.index is not None:
            return self._gather(self.index[start:stop])
        slab = slice(start, stop)
        rows = self.weight[slab] if self.row_scale is None else formats.read(self.weight, self.row_scale, slab)
        return rows if self.bias is None else torch.cat([rows, self.bias[slab, None]], 1)

    def gathered(self, positions, dtype):
        """The raw rows at positions (P,), in dtype."""
        return self._gather(positions if self.index is None else self.index[positions]).to(dtype)

    def _gather(self, index):
        weight, scale = self.weight, self.row_scale
        rows = weight.index_select(0, index) if scale is None else formats.read(weight, scale, index)
        return rows if self.bias is None else torch.cat([rows, self.bias.index_select(0, index)[:, None]], 1)

    def unit(self, rows):
        """(w̃, 1 / ‖rows‖ (M, 1) or None) for raw rows in the dtype to compute in; w̃: the rows to multiply with x̃."""
        return unit_rows(rows) if self.normalize else (rows, None)

    def project(self, rows, unit_grad):
        """The gradient of raw rows from that of their unit rows."""
        return project(*self.unit(rows), unit_grad)


class Sink:
    """Receives the rows of dW, slab by slab, and stores them (TableGradient), adds them up, or applies an optimiser's step. A
    subclass defines `room` and `put`, and the others where they are not None.
    """

    def room(self, start, stop, dtype=None):
        """A tensor (B, D), D + 1 with a bias, to write a slab's rows into before `put`, in dtype or (None) the sink's own."""

    def put(self, start, stop, rows):
        """Take the rows at positions start .. stop."""

    def whole(self):
        """The tensor (R, D) to write all rows to at once (`room` and `put` are then not called), or None."""

    def native_update(self):
        """The C struct of an optimiser's step, if native code can apply it to each row as it is made (`room` and `put` are
        then not called). Else None."""

    def device_update(self):
        """The step for a kernel to apply on a GPU: [(a Part, first column of its gradient)] for triton_update.py, or None."""


@dataclass
class TableGradient(Sink):
    """A Sink that stores dW and db."""

    weight: torch.Tensor  # (R, D), of the rows that take part
    bias: torch.Tensor | None  # (R,)

    @classmethod
    def of(cls, table):
        """Uninitialised gradients of a Table: every slab must be written."""
        shape, bias = (table.num_rows, table.weight.shape[1]), table.bias
        weight = page_pool.empty(shape, table.weight.dtype, table.weight.device)
        return cls(weight, None if bias is None else torch.empty(shape[0], dtype=bias.dtype, device=bias.device))

    def whole(self):
        return self.weight if self.bias is None else None

    def room(self, start, stop, dtype=None):
        """The slab's part of the gradient itself, if it has the dtype and width."""
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
