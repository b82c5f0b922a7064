"""The slab loop on a GPU: the kernels of triton_kernels.py around cuBLAS products.

Per slab: normalize_rows, exponentials (matmul, exponential, row sums in one), U += E ŵ; in backward the first two again where E
was not kept, dŵ = Eᵀ diag(row_scale) x, project_rows. Memory beyond the results: one slab each of ŵ, E and dŵ.
"""

import torch
import triton

from ..plan import aligned
from . import Sums, triton_kernels
from .products import accumulated

# TRITON_INTERPRET=1 runs the kernels on CPU tensors; a GPU build of them refuses such tensors.
INTERPRETED = triton.knobs.runtime.interpret
# Columns are padded to this: the matmul needs no mask along D, and every row starts aligned.
D_ALIGNMENT = 64
# Elements that one program of a row kernel holds.
ROW_BLOCK_ELEMENTS = 4096


def tiles(dtype):
    """Launch configuration of `exponentials`: float32 operands take twice the registers and shared memory of bfloat16."""
    if dtype == torch.bfloat16:
        return {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


def row_blocks(size):
    """Launch configuration of the row kernels for (padded) embedding size `size`."""
    block_d = triton.next_power_of_2(size)
    return {"BLOCK_R": max(1, ROW_BLOCK_ELEMENTS // block_d), "BLOCK_D": block_d, "num_warps": 4 if block_d <= 4096 else 8}


def forward(x, weight, targets, plan, *, need_pull):
    num_rows, size = x.shape
    low = _padded(x, plan.dtype)
    slab = _Slab(low, weight, targets, plan)
    shift = _shift(slab, plan, num_rows)
    total = torch.zeros(num_rows, dtype=torch.float64, device=x.device)
    pull = torch.zeros(num_rows if need_pull else 0, size, dtype=torch.float64, device=x.device)
    kept = torch.empty(plan.kept_elements, dtype=plan.dtype, device=x.device)
    for index, start, stop in plan.slabs(weight.shape[0]):
        unit = slab.unit(start, stop)
        e = plan.kept_view(kept, index, num_rows, len(unit))
        if e is None and need_pull:
            e = slab.scratch(len(unit))
        total += slab.exponentials(unit, start, stop, shift, store=e).sum(0, dtype=torch.float64)
        if need_pull:
            pull += accumulated(e, unit)[:, :size]
    if need_pull:
        pull /= torch.where(total == 0, 1.0, total)[:, None]
    return Sums(shift, total.float(), pull.float(), kept)


def backward(x, weight, targets, row_scale, unscale, shift, target_classes, target_sums, kept, plan, weight_grad):
    num_rows, size = x.shape
    slab = _Slab(_padded(x, plan.dtype), weight, targets, plan)
    scaled = _padded(x * row_scale[:, None], plan.dtype)
    for index, start, stop in plan.slabs(weight.shape[0]):
        e = plan.kept_view(kept, index, num_rows, aligned(stop - start))
        if e is None:
            e = slab.scratch(aligned(stop - start))
            slab.exponentials(slab.unit(start, stop), start, stop, shift, store=e)
        grad = accumulated(e[:, : stop - start].T, scaled)
        rows = weight[start:stop]
        slots = torch.searchsorted(target_classes, torch.arange(start, stop, device=x.device))
        blocks = row_blocks(grad.shape[1])
        triton_kernels.project_rows[(triton.cdiv(stop - start, blocks["BLOCK_R"]),)](
            rows,
            grad,
            unscale,
            slots,
            target_classes,
            target_sums,
            weight_grad[start:stop],
            stop - start,
            size,
            num_rows,
            start,
            *rows.stride(),
            grad.shape[1],
            **blocks,
        )


class _Slab:
    """The buffers that every slab reuses, and the two kernels that fill them."""

    def __init__(self, low, weight, targets, plan):
        self.low, self.weight, self.targets, self.plan = low, weight, targets, plan
        self._unit = self._scratch = None

    def scratch(self, width):
        """(N, width) exponentials of a slab that is not kept."""
        if self._scratch is None:
            self._scratch = self.low.new_empty(len(self.low) * self.plan.slab)
        return self._scratch[: len(self.low) * width].view(len(self.low), width)

    def unit(self, start, stop):
        """ŵ of classes start .. stop, with zero rows up to an aligned number of them."""
        rows = self.weight[start:stop]
        width = aligned(stop - start)
        if self._unit is None:
            self._unit = self.low.new_empty(self.plan.slab, self.low.shape[1])
        unit = self._unit[:width]
        blocks = row_blocks(unit.shape[1])
        triton_kernels.normalize_rows[(triton.cdiv(width, blocks["BLOCK_R"]),)](
            rows, unit, stop - start, width, rows.shape[1], *rows.stride(), unit.shape[1], **blocks
        )
        return unit

    def exponentials(self, unit, start, stop, shift, *, store=None, maximum=False):
        """(tiles, N) row sums of E, or row maxima of k cos; E goes to `store` (N, width) when given, zero past `stop`."""
        num_rows, plan, config = len(self.low), self.plan, tiles(self.plan.dtype)
        class_tiles = triton.cdiv(unit.shape[0], config["BLOCK_C"])
        partial = torch.empty(class_tiles, num_rows, dtype=torch.float32, device=self.low.device)
        if num_rows:
            triton_kernels.exponentials[(triton.cdiv(num_rows, config["BLOCK_N"]) * class_tiles,)](
                self.low,
                unit,
                self.targets,
                shift,
                store,
                partial,
                num_rows,
                stop - start,
                unit.shape[1],
                start,
                plan.log2_scale,
                len(unit),
                STORE=store is not None,
                MAXIMUM=maximum,
                PRECISION=_precision(),
                UPCAST=INTERPRETED,
                **config,
            )
        return partial


def _shift(slab, plan, num_rows):
    """(N,): the plan's constant, or each row's largest k cos_nj (0 for a row without negatives)."""
    device = slab.low.device
    if plan.shift is not None:
        return torch.full((num_rows,), plan.shift, dtype=torch.float32, device=device)
    largest = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=device)
    for _, start, stop in plan.slabs(slab.weight.shape[0]):
        found = slab.exponentials(slab.unit(start, stop), start, stop, largest, maximum=True)
        largest = torch.maximum(largest, found.amax(0))
    return torch.where(largest == -torch.inf, 0.0, largest)


def _padded(rows, dtype):
    """rows in dtype, with zero columns up to a multiple of D_ALIGNMENT."""
    return torch.nn.functional.pad(rows.to(dtype), (0, -rows.shape[1] % D_ALIGNMENT)).contiguous()


def _precision():
    """PyTorch's own switch for float32 matrix products on a GPU, as Triton spells it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
