"""The slab loop around the native CPU kernels of csrc/cpu: bfloat16 products with float32 cosines, or float32.

Per slab: normalize, exponentials (matmul, exponential and row sums in one), accumulate U += E w̃; in backward the first two again
where E was not kept, then table_gradient (matmul, projection and the targets' share in one). E is stored transposed, (B, N).
For the commonest problem cpu_loop.py does all that in one native call each way, with the same bits.
Memory beyond the results: one slab each of w̃ and E, each in the two layouts that the products read, and x twice.
"""

import functools

import torch
import torch.nn.functional as F

from .. import page_pool
from ..operands import Largest
from ..slabs import aligned, ceil_div
from . import Sums, cpu_kernels, cpu_library, cpu_loop, cpu_rows, exponents
from .cpu_kernels import Pieces, Product

row_functions, in_one_call = cpu_rows, cpu_loop
SMALLEST = torch.finfo(torch.float64).tiny


def forward(x, table, targets, plan, *, need_pull, need_largest=False, need_row_sum=False, hard=None):
    num_rows, size = x.shape
    slab = _Slab(x, table, targets, plan, hard)
    shift = exponents.shift(plan, num_rows, x.device, slab.largest_exponents)
    if need_largest:
        slab.find_largest()
    total = torch.zeros(num_rows, dtype=torch.float64, device="cpu")
    pull = torch.zeros(num_rows if need_pull else 0, cpu_library.padded(size), dtype=torch.float64, device="cpu")
    kept = page_pool.empty((plan.kept_elements,), plan.dtype, x.device)
    e_panels = slab.panels(plan.slab, num_rows) if need_pull else None
    unit_panels = slab.panels(plan.slab, size) if need_pull else None
    row_sum = torch.zeros(size, dtype=torch.float64, device="cpu") if need_row_sum else None
    for index, start, stop in plan.slabs(table):
        slab.normalize(start, stop, unit_panels)
        if need_row_sum:
            row_sum += slab.unit[: stop - start].sum(0, dtype=torch.float64)
        e = _kept(plan, kept, index, start, stop, num_rows)
        if e is not None:
            e[stop - start :] = 0
        parts = slab.exponentials(start, stop, shift, e, e_panels)
        slab.kernels.add_up(parts, len(parts), num_rows, total)
        if need_pull:
            slab.kernels.accumulate(e_panels, unit_panels, stop - start, num_rows, size, pull)
    # The pull of a total of 0 is 0.
    pull = pull[:, :size].div_(total.clamp(min=SMALLEST)[: len(pull), None]).float()
    total, lse = slab.kernels.finish_sums(total, shift)
    return Sums(lse, shift, total, pull, kept, largest=slab.largest, row_sum=row_sum)


def backward(x, table, factors, shift, kept, plan, sink, *, hard=None):
    num_rows, size = x.shape
    update = sink.native_update()
    slab = _Slab(x, table, factors.targets, plan, hard)
    scaled = slab.panels(num_rows, size)
    slab.kernels.column_panels((x * factors.row_scale[:, None]).to(plan.dtype), num_rows, size, scaled)
    common = factors.common
    if common is not None:
        common = F.pad(common, (0, cpu_library.padded(size) - size))
    # A bias may be in another dtype than the weight.
    out_dtype = None if table.bias is None and table.weight.dtype in cpu_library.TABLE_DTYPES else torch.float32
    for index, start, stop in plan.slabs(table):
        e = _kept(plan, kept, index, start, stop, num_rows)
        if e is None:
            e = slab.e
            slab.normalize(start, stop, None)
            slab.exponentials(start, stop, shift, e, None)
        out = None if update else sink.room(start, stop, out_dtype)
        slab.kernels.table_gradient(
            e=e,
            x_panels=scaled,
            rows=slab.rows(start, stop),
            factors=factors,
            common=common,
            first_class=start,
            normalized=table.normalize,
            scratch=slab.scratch,
            grad=out,
            step=update,
        )
        if not update:
            sink.put(start, stop, out)


class _Slab:
    """x in the layout that the kernels read, and the buffers that every slab reuses."""

    def __init__(self, x, table, targets, plan, hard):
        self.kernels = cpu_kernels.kernels(plan.dtype)
        self.x, self.table, self.plan = x, table, plan
        self.num_rows, self.size = x.shape
        self.epilogue = exponents.Epilogue.of(table, targets, hard, plan)
        self.scratch = self.empty(torch.get_num_threads(), self.kernels.scratch_numbers(self.num_rows, self.size))
        self.largest = self._values = self._places = self._exponents = None

    # Backward needs these where it computes exponentials again.
    @functools.cached_property
    def x_panels(self):
        panels = self.panels(self.size, self.num_rows)
        self.kernels.row_panels(self.x.to(self.plan.dtype), self.num_rows, self.size, panels)
        return panels

    @functools.cached_property
    def unit(self):
        return self.empty(self.plan.slab, self.size, dtype=self.kernels.operand)

    @functools.cached_property
    def partial(self):
        return self.empty(ceil_div(self.plan.slab, self.kernels.sum_classes), self.num_rows)

    @functools.cached_property
    def e(self):
        """Memory for the exponentials of a slab that is not kept."""
        return self.empty(self.plan.slab, self.num_rows, dtype=self.plan.dtype)

    def panels(self, summed, columns):
        """Memory for a matrix whose products are summed along `summed` numbers, packed into panels of its columns."""
        return self.empty(self.kernels.panel_words(summed, columns), dtype=torch.int32)

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="cpu")

    def find_largest(self):
        """Have `largest` hold the largest products of the slabs so far."""
        self._values, self._places = torch.empty_like(self.partial), self.empty(*self.partial.shape, dtype=torch.int32)

    def rows(self, start, stop):
        rows = self.table.rows(start, stop)
        return (rows if rows.dtype in cpu_library.TABLE_DTYPES else rows.to(torch.float32)).contiguous()

    def normalize(self, start, stop, panels):
        self.kernels.normalize(*(self.rows(start, stop), stop - start, self.size, self.table.normalize, self.unit, panels))

    def exponentials(self, start, stop, shift, e, panels):
        """Row sums of E in pieces (pieces, N); E goes to e and to panels, where given."""
        if self.epilogue.in_pytorch:
            return self._from_exponents(start, stop, shift, e, panels)
        self.kernels.exponentials(self._product(start, stop), shift, e, panels, self._pieces(), self.epilogue.columns)
        return self._parts(start, stop)

    def _product(self, start, stop):
        return Product(
            x_panels=self.x_panels,
            num_rows=self.num_rows,
            unit=self.unit,
            classes=stop - start,
            size=self.size,
            targets=self.epilogue.targets,
            first_class=start,
            log2_scale=self.epilogue.factor,
        )

    def _pieces(self):
        return Pieces(self.partial, self._values, self._places)

    def _parts(self, start, stop):
        """The numbers that a kernel has written for each piece of a slab (pieces, N). Its largest products are compared."""
        pieces = ceil_div(stop - start, self.kernels.sum_classes)
        if self._values is not None:
            values, places = self._values[:pieces], self._places[:pieces].long() + start
            before = [] if self.largest is None else [each[None] for each in self.largest]
            self.largest = Largest.of_parts(torch.cat([*before[:1], values]), torch.cat([*before[1:], places]))
        return self.partial[:pieces]

    def _from_exponents(self, start, stop, shift, e, panels):
        """Row sums and E as `exponentials` makes them, from all exponents in float32."""
        exact, to_keep = exponents.exponentials(self.exponents(start, stop), shift, **self.epilogue.rest(self.table, start, 0))
        low = to_keep.to(self.plan.dtype)
        if e is not None:
            e[: stop - start] = low
        if panels is not None:
            self.kernels.column_panels(low, stop - start, self.num_rows, panels)
        return exact

    def exponents(self, start, stop):
        """All exponents (B, N) in float32, with hard negatives all products, -inf at targets."""
        if self._exponents is None:
            self._exponents = self.empty(self.plan.slab, self.num_rows)
        self.maxima(start, stop, self._exponents)
        found = self._exponents[: stop - start]
        several = self.epilogue.several
        return found if several is None else exponents.leave_out(found, several, start, 0)

    def largest_exponents(self):
        """The largest exponent of each row (N,)."""
        largest = torch.full((self.num_rows,), -torch.inf, dtype=torch.float32, device="cpu")
        for _, start, stop in self.plan.slabs(self.table):
            self.normalize(start, stop, None)
            if self.epilogue.finds_maxima:
                found = self.maxima(start, stop)
            else:
                found, _ = exponents.finished(self.exponents(start, stop), **self.epilogue.rest(self.table, start, 0))
            largest = torch.maximum(largest, found.amax(0))
        return largest

    def maxima(self, start, stop, exponents=None):
        """Row maxima of the exponents in pieces (pieces, N); all of them go to `exponents` (B, N) float32, where given."""
        product, columns = self._product(start, stop), self.epilogue.columns
        self.kernels.maxima(product, self.table.centers, exponents, self._pieces(), columns)
        return self._parts(start, stop)


def _kept(plan, kept, index, start, stop, num_rows):
    """The place (B, N) of a slab's kept exponentials, its classes rounded up; None if they are not kept."""
    width = aligned(stop - start)
    place = plan.kept_view(kept, index, num_rows, width)
    return None if place is None else place.view(width, num_rows)
