"""The slab loop on a GPU: the kernels of triton_exponentials.py and triton_slab.py around cuBLAS products, or those of
triton_attend.py if triton_forms.py asks for them.

Per slab: normalize_rows, exponentials (matmul, exponential, row sums in one), E w̃, add_pull, after the last one finish_sums; in
backward the first two again where E was not kept, dw̃ = Eᵀ diag(row_scale) x, project_rows. Memory beyond the results: one slab
each of w̃, E and, where dW is not in float32, dw̃, and the parts of one slab's E w̃, up to 16 N x D.
"""

import functools

import torch

from ..operands import Largest
from ..slabs import aligned, ceil_div
from . import Sums, exponents, triton_attend, triton_exponentials, triton_forms, triton_rows, triton_slab, triton_update
from .products import accumulated, in_parts
from .triton_launch import Launcher

row_functions = triton_rows
# Columns are padded to this: the matmul needs no mask along D, and every row starts aligned.
D_ALIGNMENT = 64
# The approximate size of an output tile of E ŵ, and the number of tiles that fill a GPU of 132 processors.
PULL_TILE, PULL_TILES, PULL_PARTS_MAX = (128, 256), 128, 16
PULL_BLOCK = {"BLOCK": 512, "num_warps": 4, **triton_slab.FUSE}
FINISH_BLOCKS = {"BLOCK_N": 32, "BLOCK_T": 32, "num_warps": 4, **triton_slab.FUSE}


def tiles(num_rows, size, dtype, capability, narrow=False, hard=False):
    """Launch configuration of `exponentials` for N rows of (padded) size D; docs/notes/gpu.md has the arithmetic behind it.

    narrow, hard: whether the epilogue needs registers beside E's, and whether it changes hard negatives.
    """
    block_n = 64 if num_rows <= 64 or dtype == torch.float32 else 128
    if dtype == torch.float32:
        shape = 64, 32, 4, 2 if hard else 3  # twice the registers and shared memory for each element
    elif capability[0] not in (9, 10):
        shape = 128, 32, 8 if hard and block_n == 128 else 4, 4  # no more than 99 KB of shared memory, which every chip has
    elif block_n == 128 and size >= 512 and not narrow:
        shape = 256, 64, 8, 4  # bound by what L2 delivers: the larger tile reads less
    else:
        shape = 128, 64, block_n // 16, 3  # two programs on a processor: one's exponential under the other's product
    return {"BLOCK_N": block_n, **dict(zip(("BLOCK_C", "BLOCK_K", "num_warps", "num_stages"), shape, strict=True))}


@functools.cache
def pull_parts(num_rows, size, width):
    """The number of parts of the sum over `width` classes in E ŵ. Each part has aligned rows."""
    output_tiles = ceil_div(num_rows, PULL_TILE[0]) * ceil_div(size, PULL_TILE[1])
    most = max(1, min(PULL_PARTS_MAX, PULL_TILES // max(output_tiles, 1)))
    return next(parts for parts in range(most, 0, -1) if width % (8 * parts) == 0)


def forward(x, table, targets, plan, *, need_pull, need_largest=False, need_row_sum=False, hard=None):
    num_rows, size = x.shape
    needs = {"need_pull": need_pull, "need_largest": need_largest, "hard": hard}
    attend = triton_attend.constants("attend_features", x, table, targets, plan, **needs)
    slab = _Slab(_padded(x, plan.dtype, attend), table, targets, plan, hard, need_largest)
    features = triton_attend.Features(slab.low, size, targets, plan, attend) if attend else None
    shift = exponents.shift(plan, num_rows, x.device, slab.largest_exponents)
    pull = torch.empty(num_rows if need_pull else 0, size, dtype=torch.float32, device=x.device)
    kept = torch.empty(plan.kept_elements, dtype=plan.dtype, device=x.device)
    partial = None if features else slab.partial()
    if need_largest:
        slab.find_largest()
    lse, total = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    pull_sum, add_pull = None, Launcher(triton_slab.add_pull, **PULL_BLOCK)
    row_sum = torch.zeros(size, dtype=torch.float64, device=x.device) if need_row_sum else None
    for index, start, stop in plan.slabs(table):
        unit = slab.unit(start, stop)
        if need_row_sum:
            row_sum += unit[: stop - start, :size].sum(0, dtype=torch.float64)
        if features:
            parts = features.parts(unit, start, stop)
            partial = features.partial
        else:
            e = plan.kept_view(kept, index, num_rows, unit.shape[0])
            if e is None and need_pull:
                e = slab.scratch(unit.shape[0])
            slab.exponentials(unit, start, stop, shift, partial, store=e)
        first, last = start == 0, stop == table.num_rows
        if last and num_rows:
            triton_slab.finish_sums[(ceil_div(num_rows, FINISH_BLOCKS["BLOCK_N"]),)](
                partial, shift, lse, total, num_rows, partial.shape[0], **FINISH_BLOCKS
            )
        if need_pull and num_rows:
            if first and not last:
                pull_sum = torch.empty(pull.shape, dtype=torch.float64, device=x.device)
            if not features:
                columns = unit if size == unit.shape[1] else unit[:, :size]
                parts = in_parts(e, columns, pull_parts(num_rows, size, unit.shape[0]))
            add_pull(
                ceil_div(pull.numel(), PULL_BLOCK["BLOCK"]),
                *(parts, pull_sum, total if last else None, pull if last else None, num_rows * size, size),
                whole=not first and not last,
                PARTS=parts.shape[0],
                FIRST=first,
                LAST=last,
            )
    largest = Largest.of_parts(*slab.largest) if need_largest else None
    return Sums(lse, shift, total, pull, kept, largest=largest, row_sum=row_sum)


def backward(x, table, factors, shift, kept, plan, sink, *, hard=None):
    num_rows, size = x.shape
    attend = triton_attend.constants("attend_table", x, table, factors.targets, plan, common=factors.common, hard=hard)
    gluon = attend is not None and attend.get("GLUON", False)
    if attend and not gluon:
        triton_attend.backward(_padded(x, plan.dtype, attend), size, table, factors, plan, sink, constants=attend)
        return
    scaled = _padded(x, plan.dtype, attend, row_scale=factors.row_scale)
    if plan.kept_slabs * plan.slab < table.num_rows:
        slab = _Slab(_padded(x, plan.dtype, attend), table, factors.targets, plan, hard)
        partial = slab.partial()
    num_targets, blocks = factors.target_rows.shape[0], triton_slab.row_blocks(scaled.shape[1])
    constants = {"NORMALIZE": table.normalize, "SEARCH_STEPS": num_targets.bit_length(), **blocks}
    project = Launcher(triton_slab.project_rows, **constants)
    update = triton_update.of_slabs(sink, table, factors, plan)
    for index, start, stop in plan.slabs(table):
        out = sink.room(start, stop)
        # dŵ is written into dW's memory if that has its dtype and width: project_rows reads a row before it writes it.
        fits = out.dtype == torch.float32 and scaled.shape[1] == size and out.is_contiguous()
        room = out if fits else None
        if gluon:
            grad = slab.attended(start, stop, factors.row_scale, room)
        else:
            width = aligned(stop - start)
            e = plan.kept_view(kept, index, num_rows, width)
            if e is None:
                e = slab.scratch(width)
                slab.exponentials(slab.unit(start, stop), start, stop, shift, partial, store=e)
            grad = accumulated((e if width == stop - start else e[:, : stop - start]).T, scaled, room)
        if factors.common is not None:
            grad[:, :size] += factors.common
        if update is not None:
            update(start, stop, grad)
            continue
        rows = table.rows(start, stop)
        project(
            ceil_div(stop - start, blocks["BLOCK_R"]),
            *(rows, grad, factors.unscale, factors.target_rows, factors.target_sums, out),
            *(stop - start, size, num_targets, start, *rows.stride(), grad.shape[1]),
            whole=stop - start == plan.slab,
        )
        sink.put(start, stop, out)


class _Slab:
    """The buffers that every slab reuses, and the kernels that fill them, with the launch arguments of all slabs."""

    def __init__(self, low, table, targets, plan, hard=None, need_largest=False):
        self.low, self.table, self.plan = low, table, plan
        self.epilogue = exponents.Epilogue.of(table, targets, hard, plan)
        capability = triton_slab.capability(low.device)
        # An epilogue that holds more than E takes registers: with the widest tile they would spill.
        narrow = self.epilogue.in_pytorch or hard is not None or (need_largest and capability[0] == 10)
        self.config = tiles(*low.shape, plan.dtype, capability, narrow, hard is not None)
        if not narrow:
            size = table.weight.shape[1]
            self.config |= triton_forms.options("exponentials", low.shape[0], size, plan.dtype, capability) or {}
        self._descriptors = self.config.pop("DESCRIPTORS", False)
        # Compiled for 10.0 each half takes the exponents of the whole tile, and some of them spill.
        self._halves = self.config.pop("HALVES", False) and capability[0] == 9
        self._low = self._source(low, "BLOCK_N", self.config["BLOCK_K"])
        self.row_tiles = ceil_div(low.shape[0], self.config["BLOCK_N"])
        self._constants = {
            "PRECISION": triton_slab.precision(),
            "UPCAST": triton_slab.INTERPRETED,
            "DESCRIPTORS": self._descriptors,
            # One rounding of exponent and shift together would differ from the row maximum, whose product was rounded: at logits
            # of 10^9 by hundreds.
            "enable_fp_fusion": plan.shift is not None,
            **self.config,
        }
        self._normalize = Launcher(triton_slab.normalize_rows, NORMALIZE=table.normalize, **triton_slab.row_blocks(low.shape[1]))
        self._launchers = {}  # of kernels with a product
        self._unit = self._scratch = None
        self.largest = None, None

    def scratch(self, width):
        """Memory (N, width) for the exponentials of a slab that is not kept."""
        num_rows, slab = self.low.shape[0], self.plan.slab
        if self._scratch is None:
            self._scratch = self.low.new_empty(num_rows, slab)
        return self._scratch if width == slab else self._scratch.view(-1)[: num_rows * width].view(num_rows, width)

    def unit(self, start, stop):
        """w̃ of the table's rows start .. stop, with zero rows up to an aligned number of them."""
        rows, (size_padded, slab) = self.table.rows(start, stop), (self.low.shape[1], self.plan.slab)
        width = aligned(stop - start)
        if self._unit is None:
            self._unit = self.low.new_empty(slab, size_padded)
        unit = self._unit if width == slab else self._unit[:width]
        self._normalize(
            ceil_div(width, self._normalize.constants["BLOCK_R"]),
            *(rows, unit, stop - start, width, rows.shape[1], *rows.stride(), size_padded),
            whole=stop - start == slab,
        )
        return unit

    def partial(self, dtype=torch.float64):
        """(tiles, N) row sums of all slabs so far. The first slab fills it: no other has more tiles."""
        class_tiles = ceil_div(aligned(min(self.plan.slab, self.table.num_rows)), self.config["BLOCK_C"])
        return torch.empty(class_tiles, self.low.shape[0], dtype=dtype, device=self.low.device)

    def find_largest(self):
        """Have `largest` hold the (values, positions) of the largest products so far, each (tiles, N)."""
        self.largest = self.partial(torch.float32), self.partial(torch.int64)

    def exponentials(self, unit, start, stop, shift, partial, *, store=None):
        """Add row sums of E to `partial`; write E into `store` (N, width) if given, zero past `stop`."""
        if self.epilogue.in_pytorch:
            self._from_exponents(unit, start, stop, shift, partial, store)
            return
        halves, out = self._halves and store is not None, None
        if store is not None:
            out = self._source(store, "BLOCK_N", self.config["BLOCK_C"] // (2 if halves else 1))
        epilogue = shift, partial, *self.largest, self.epilogue.columns, out, unit.shape[0]
        self._launch(triton_exponentials.exponentials, unit, start, stop, *epilogue, HALVES=halves)

    def attended(self, start, stop, row_scale, out):
        """dŵ (rows, D padded) by triton_hopper, into `out` if given."""
        if out is None:
            out = torch.empty(stop - start, self.low.shape[1], dtype=torch.float32, device=self.low.device)
        unit, plan, hopper = self.unit(start, stop)[: stop - start], self.plan, triton_attend.hopper()
        launch = self._launchers.setdefault(hopper.attend, hopper.launcher(TABLE=True))
        slab = unit, self.low, self.epilogue.targets, row_scale, out, start
        hopper.table(launch, *slab, plan.log2_scale, plan.shift, stop - start == plan.slab)
        return out

    def exponents(self, unit, start, stop):
        """All exponents (N, B) in float32, with hard negatives all products, -inf at targets."""
        out = torch.empty(self.low.shape[0], unit.shape[0], dtype=torch.float32, device=self.low.device)
        epilogue = *self.largest, out, unit.shape[0]
        self._launch(triton_exponentials.exponents, unit, start, stop, *epilogue, CENTERS=self.table.centers)
        out = out[:, : stop - start]
        several = self.epilogue.several
        return out if several is None else exponents.leave_out(out, several, start, 1)

    def _from_exponents(self, unit, start, stop, shift, partial, store):
        """Do what `exponentials` does, from all exponents in float32."""
        summed, e = exponents.exponentials(self.exponents(unit, start, stop), shift, **self.epilogue.rest(self.table, start, 1))
        if start == 0:
            partial.zero_()
        partial[0] += summed.sum(1, dtype=torch.float64)
        if store is not None:
            store[:, : stop - start] = e
            store[:, stop - start :] = 0

    def largest_exponents(self):
        """The largest exponent of each row (N,)."""
        partial = self.partial()
        for _, start, stop in self.plan.slabs(self.table):
            self.maxima(self.unit(start, stop), start, stop, partial)
        return partial.amax(0).float()

    def maxima(self, unit, start, stop, partial):
        """Write row maxima of the exponents into `partial`."""
        if self.epilogue.finds_maxima:
            epilogue = partial, self.epilogue.columns
            self._launch(triton_exponentials.maxima, unit, start, stop, *epilogue, CENTERS=self.table.centers)
            return
        found = exponents.finished(self.exponents(unit, start, stop), **self.epilogue.rest(self.table, start, 1))[0].amax(1)
        partial[0] = found if start == 0 else torch.maximum(partial[0], found)
        partial[1:] = -torch.inf

    def _source(self, matrix, rows, columns):
        """The matrix, or its descriptor, of which a kernel loads or stores blocks."""
        return triton_exponentials.source(matrix, [self.config[rows], columns], self._descriptors)

    def _launch(self, kernel, unit, start, stop, *epilogue, **constants):
        """Launch a kernel over all tiles of a slab. epilogue, constants: its arguments beside those of the product."""
        num_rows, (width, size_padded), tile = self.low.shape[0], unit.shape, self.config["BLOCK_C"]
        targets, factor = self.epilogue.targets, self.epilogue.factor
        if num_rows:
            unit = self._source(unit, "BLOCK_C", self.config["BLOCK_K"])
            key = kernel, *(each is None for each in epilogue)  # one without memory for a result is another
            if key not in self._launchers:
                self._launchers[key] = Launcher(kernel, **self._constants, **constants)
            self._launchers[key](
                self.row_tiles * ceil_div(width, tile),
                *(self._low, unit, targets, num_rows, stop - start, size_padded, start, factor, *epilogue),
                whole=stop - start == self.plan.slab,
                RAGGED=(stop - start) % tile != 0,
            )


def _padded(rows, dtype, attend=None, row_scale=None):
    """rows, times row_scale, in dtype, with zero columns up to a multiple of D_ALIGNMENT, or as many as attend needs."""
    padding = attend["SIZE"] - rows.shape[1] if attend else -rows.shape[1] % D_ALIGNMENT
    padded = (torch.zeros if padding else torch.empty)(rows.shape[0], rows.shape[1] + padding, dtype=dtype, device=rows.device)
    inside = padded[:, : rows.shape[1]]
    if row_scale is None:
        inside.copy_(rows)
    else:
        torch.mul(rows, row_scale[:, None], out=inside)
    return padded
