"""The native CPU kernels as functions of tensors, whose sizes are checked."""

import functools
from typing import NamedTuple

import torch

from ..slabs import ceil_div
from . import cpu_library
from .cpu_library import floats, integers, padded, pointer, rows_of_table

# To wake a thread takes as long as so many products, and to read and write a number as long as some tens.
PRODUCTS_OF_THREAD, PRODUCTS_OF_NUMBER = 2**21, 32


class Product(NamedTuple):
    """x̃ ŵᵀ of a slab and its factor: what the exponents are made of."""

    x_panels: torch.Tensor  # (N, D), in panels
    num_rows: int
    unit: torch.Tensor  # (B, D)
    classes: int  # B
    size: int  # D
    targets: torch.Tensor  # (N,), classes of the whole table
    first_class: int
    log2_scale: float

    @property
    def multiplications(self):
        return self.num_rows * self.classes * self.size


class Pieces(NamedTuple):
    """The results of a slab for each row, (pieces, N). A piece: `sum_classes` classes, whose E one partial sum adds."""

    partial: torch.Tensor  # its sum or maximum
    values: torch.Tensor | None  # its largest product, where wanted
    places: torch.Tensor | None  # and the place of that


class Kernels:
    """The kernels of csrc/cpu for one number type and instruction set. Tensors are (rows, columns) or panels of them, checked
    against the sizes; None is null; the number of threads is PyTorch's.
    """

    def __init__(self, dtype, instruction_set):
        self.dtype = dtype
        self.operand, self.sum_classes, self.scratch_numbers = cpu_library.sizes(dtype, instruction_set)
        self._room = {each: cpu_library.room(each, dtype, instruction_set) for each in ("forward", "backward")}
        self.table = cpu_library.KernelTable(f"kernels_{cpu_library.NUMBERS[dtype]}", instruction_set)

    def panel_words(self, summed, columns):
        """The number of int32 of a matrix whose products are summed along `summed` numbers, packed into panels of its columns."""
        return ceil_div(summed, 4 // self.operand.itemsize) * padded(columns)

    def row_panels(self, rows, num_rows, size, panels):
        self._pack("row_panels", rows, num_rows, size, self._panels(panels, size, num_rows))

    def column_panels(self, rows, num_rows, size, panels):
        self._pack("column_panels", rows, num_rows, size, self._panels(panels, num_rows, size))

    def normalize(self, weight, classes, size, normalized, unit, panels):
        """Write the unit rows of a slab. weight: float32 or bfloat16."""
        self._call(
            "normalize",
            PRODUCTS_OF_NUMBER * classes * size,
            table=rows_of_table("weight", weight, classes * size),
            unit=self._operands("unit rows", unit, classes * size),
            panels=self._panels(panels, classes, size),
            classes=classes,
            size=size,
            is_bfloat16=weight.dtype == torch.bfloat16,
            normalized=normalized,
        )

    def exponentials(self, product, shift, e, e_panels, pieces, hard=None):
        """Write E to e (B, N) and e_panels, where given, and row sums. hard: (4, N), or None."""
        self._call(
            "exponentials",
            product.multiplications,
            of=self._exponents(product),
            shifts=floats("shift", shift, product.num_rows),
            e=self._numbers("exponentials", e, product.classes * product.num_rows),
            e_panels=self._panels(e_panels, product.classes, product.num_rows),
            **self._pieces(product, pieces),
            hard=floats("hard negatives", hard, 4 * product.num_rows),
        )

    def maxima(self, product, centers, exponents, pieces, hard=None):
        """Write row maxima, and the exponents (B, N) where given. hard: as in `exponentials`."""
        self._call(
            "maxima",
            product.multiplications,
            of=self._exponents(product),
            exponents=floats("exponents", exponents, product.classes * product.num_rows),
            **self._pieces(product, pieces),
            hard=floats("hard negatives", hard, 4 * product.num_rows),
            centers=centers,
        )

    def accumulate(self, e_panels, unit_panels, classes, num_rows, size, pull):
        self._call(
            "accumulate",
            num_rows * classes * size,
            e_panels=self._panels(e_panels, classes, num_rows),
            unit_panels=self._panels(unit_panels, classes, size),
            pull=pointer("pull", pull, torch.float64, num_rows * padded(size)),
            num_rows=num_rows,
            classes=classes,
            size=size,
        )

    def table_gradient(self, e, x_panels, rows, factors, common, *, first_class, normalized, scratch, grad, step):
        """Write a slab of dW, or step with it. e: (B, N), or more rows; rows, grad: (B, D), float32 or bfloat16; factors:
        SlabFactors; common: theirs, (padded(D),); scratch: (threads, scratch_numbers). With a step grad is None.
        """
        (classes, size), num_rows, num_targets, threads = rows.shape, e.shape[1], len(factors.target_rows), len(scratch)
        if step is not None:
            step.check(first_class, classes, size)
            threads = min(threads, step.threads)
        self._call(
            "table_gradient",
            num_rows * classes * size,
            threads=threads,
            e=self._numbers("exponentials", e, classes * num_rows),
            x_panels=self._panels(x_panels, num_rows, size),
            table=rows_of_table("weight", rows, classes * size),
            target_classes=integers("target rows", factors.target_rows, num_targets),
            target_sums=floats("target sums", factors.target_sums, num_targets * size),
            common=floats("the common row", common, padded(size)),
            scratch=floats("scratch", scratch, threads * self.scratch_numbers(num_rows, size)),
            grad=None if step else rows_of_table("the gradient", grad, classes * size),
            step=step.address if step else None,
            num_rows=num_rows,
            classes=classes,
            size=size,
            first_class=first_class,
            num_targets=num_targets,
            scratch_size=scratch.shape[1],
            unscale=float(factors.unscale),
            is_bfloat16=rows.dtype == torch.bfloat16,
            normalized=normalized,
            grad_is_bfloat16=step is None and grad.dtype == torch.bfloat16,
        )

    def add_up(self, partial, pieces, num_rows, totals):
        self.table.call(
            "add_up",
            1,
            partial=floats("partial results", partial, pieces * num_rows),
            totals=pointer("totals", totals, torch.float64, num_rows),
            pieces=pieces,
            num_rows=num_rows,
        )

    def finish_sums(self, totals, shift):
        """(total in float32, log-sum-exp) of each row (N,)."""
        rounded, lse = torch.empty_like(shift), torch.empty_like(shift)
        self.table.call(
            "finish_sums",
            1,
            totals=pointer("totals", totals, torch.float64, len(shift)),
            shifts=floats("shift", shift, len(shift)),
            rounded=rounded.data_ptr(),
            lse=lse.data_ptr(),
            num_rows=len(shift),
        )
        return rounded, lse

    def loop_room(self, direction, *sizes):
        """The floats that csrc/cpu/loop.h's "forward" or "backward" divides among its steps; sizes: N, D, B, threads, a flag."""
        return self._room[direction](*sizes)

    def _pack(self, name, rows, num_rows, size, panels):
        rows = self._numbers("rows", rows, num_rows * size)
        self._call(name, PRODUCTS_OF_NUMBER * num_rows * size, rows=rows, panels=panels, num_rows=num_rows, size=size)

    def _exponents(self, product):
        num_rows, classes, size = product.num_rows, product.classes, product.size
        return cpu_library.filled(
            cpu_library.EXPONENTS,
            x_panels=self._panels(product.x_panels, size, num_rows),
            unit=self._operands("unit rows", product.unit, classes * size),
            targets=integers("targets", product.targets, num_rows),
            num_rows=num_rows,
            classes=classes,
            size=size,
            first_class=product.first_class,
            log2_scale=product.log2_scale,
        )

    def _pieces(self, product, pieces):
        count = ceil_div(product.classes, self.sum_classes) * product.num_rows
        return {
            "partial": floats("partial results", pieces.partial, count),
            "values": floats("largest products", pieces.values, count),
            "places": pointer("their places", pieces.places, torch.int32, count),
        }

    def _numbers(self, name, tensor, count):
        return pointer(name, tensor, self.dtype, count)

    def _operands(self, name, tensor, count):
        return pointer(name, tensor, self.operand, count)

    def _panels(self, panels, summed, columns):
        return pointer("panels", panels, torch.int32, self.panel_words(summed, columns))

    def _call(self, name, products, *, threads=None, **fields):
        """Run a kernel. products: the multiplications that it does, or could do while it moves its numbers."""
        threads = min(threads or torch.get_num_threads(), max(products // PRODUCTS_OF_THREAD, 1))
        self.table.call(name, threads, **fields)


@functools.cache
def kernels(dtype):
    """The kernels for the best instruction set that both the library and this processor have."""
    return Kernels(dtype, cpu_library.available()[0])


@functools.cache
def batch_kernels():
    """The kernels of csrc/cpu/batch.cpp, for the work on a batch, of the best instruction set."""
    return cpu_library.KernelTable("batch_kernels", cpu_library.available()[0])
