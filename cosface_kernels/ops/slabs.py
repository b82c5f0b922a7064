"""The plan of one call over the class table: precision, the exponentials' shift, slab size, and which slabs are kept.

Everything here is a pure function of sizes, dtypes and the device, never of its load, so results do not depend on load.
"""

import functools
import math
from typing import NamedTuple

import torch

from .memory import UNASKED_SHARE, total_memory

# E_nj = 2^{k cos - h} with a constant h needs no running maximum while every E, and a sum of C of them, is a normal number with
# room to spare for the products of backward: k |cos| + log2(C) / 2 within this many powers of two.
CONSTANT_SHIFT_RANGE = {torch.float64: 1000.0, torch.float32: 112.0, torch.bfloat16: 112.0}
# Bytes of exponentials that memory_budget "auto" keeps in any case: below them time counts, and memory does not.
KEPT_ANYWAY = 2**23
# The same beside a table whose gradient never exists: at most one part in so many of the device's memory.
KEPT_SHARE = 64
# A correction of sampled classes adds up to this power of two to E with the full range above to spare: one class of 65,536 is
# drawn. The most that may be asked for, in natural logarithms, is 13 powers of two more, which float32 still has.
CORRECTION_RANGE, CORRECTION_MOST = 16.0, 20
# A bfloat16 unit row may be 0.4% too long, so a cosine of two may reach 1.008.
COSINE_LIMIT = 1.008

# Numbers in one slab: E (N x B), and B rows of D in the two forms that a backend may hold. On a CPU they should stay in cache, in
# float32 beside E once more, and be enough that the threads rarely wait for each other (docs/notes/cpu.md).
SLAB_ELEMENTS = 2**21
SLAB_CLASSES_MIN = 256
SLAB_CLASSES_MAX = 2**20
# B is a multiple of this; the last slab's width is rounded up to ROW_ALIGNMENT, so that each row of E starts aligned for vector
# loads and tensor cores.
SLAB_ALIGNMENT = 128
ROW_ALIGNMENT = 16
# On a GPU a slab's launches take the host 50 us or more, so forward's kernels should take half a millisecond: this many flops
# of each processor at the 4.5e12 a second that one of an H100 reaches. A class is 4 N D of them, in two products, and its row is
# read and written in the time of 1024 D more.
# That costs memory: on an H100 at N = 4096, D = 512 a slab takes 353 MB, 2.2% of the logits in float32 at C = 10^6. Below 1% of
# them it would be one wave of 8448 classes, whose launches take the host more than half of the time that its kernels take
# (benchmarks/host_time.py): too near to waiting for the host. It does not grow with C, and SLAB_SHARE bounds it.
SLAB_FLOPS = 2**31
ROW_FLOPS = 1024
# But at most this share of the memory goes to what there is of one slab: E, ŵ in the same dtype, dŵ in float32.
SLAB_SHARE = 128
# The largest tile of a kernel, and a quarter of one for each processor: with B a multiple of both the tiles of 128 rows of E, and
# those of dŵ, fill all processors to the end wherever N is a multiple of 512.
GPU_TILE, GPU_CLASSES = 256, 64


class Chip(NamedTuple):
    """The properties of a GPU that slab sizes depend on."""

    processors: int
    memory: int  # bytes

    @classmethod
    @functools.cache
    def of(cls, device):
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, properties.total_memory)


class Plan(NamedTuple):
    """The arguments of a backend beside its tensors."""

    log2_scale: float  # k = s log2(e): e^{s cos} = 2^{k cos}
    shift: float | None  # h in E = 2^{k cos - h}; None: logits too wide for a constant, so each row's maximum is found first
    dtype: torch.dtype  # of the matrix products' operands: bfloat16, float32 or float64
    slab: int  # B, rows of the table per slab, a multiple of SLAB_ALIGNMENT and whole classes; the last slab may be shorter
    kept_slabs: int  # exponentials of this many slabs, the first ones, are kept from forward for backward
    kept_elements: int  # numbers in those slabs

    @property
    def wide(self):
        """The dtype in which the matrix products accumulate, and which they return."""
        return wide_dtype(self.dtype)

    def slabs(self, table):
        """(index, first row of the table, one past the last) of every slab."""
        for index, start in enumerate(range(0, table.num_rows, self.slab)):
            yield index, start, min(start + self.slab, table.num_rows)

    def kept_view(self, kept, index, num_rows, width):
        """Slab `index` of kept exponentials (N, width), or None when it is not kept."""
        if index >= self.kept_slabs:
            return None
        start = index * num_rows * self.slab
        return kept[start : start + num_rows * width].view(num_rows, width)


def make_plan(features, table, options, *, keep):
    """The plan for features (N, D), a Table and operands.Options. keep: whether backward will want exponentials."""
    log2_scale, dtype = options.scale * math.log2(math.e), options.dtype
    half = (math.log2(table.num_rows) + (0.0 if table.correction is None else CORRECTION_RANGE)) / 2
    bounded = options.cosines and log2_scale * options.bound * COSINE_LIMIT + half <= CONSTANT_SHIFT_RANGE[dtype]
    slab = slab_rows(features, table, dtype)
    kept_slabs, kept_elements = kept_size(features, table, dtype, options.memory_budget, slab) if keep else (0, 0)
    return Plan(
        log2_scale=log2_scale,
        shift=float(round(half)) if bounded else None,
        dtype=dtype,
        slab=slab,
        kept_slabs=kept_slabs,
        kept_elements=kept_elements,
    )


def slab_rows(features, table, dtype, chip=None):
    """B, the rows of a slab: whole classes, at most the table's.

    chip: the GPU to plan for; None: the one that holds the features.
    """
    # The table's D, since backward has features with a column more where there is a bias, and must find the same slabs.
    num_rows, size = features.shape[0], table.weight.shape[1]
    alignment = math.lcm(SLAB_ALIGNMENT, table.centers)
    if features.device.type == "cuda":
        wanted = _rows_on_gpu(num_rows, size, table.centers, dtype, chip or Chip.of(features.device))
    else:
        wanted = max(SLAB_ELEMENTS // (num_rows + 2 * size), SLAB_CLASSES_MIN)
    wanted = min(wanted, SLAB_CLASSES_MAX, table.num_rows)
    return ceil_div(wanted, alignment) * alignment


def _rows_on_gpu(num_rows, size, centers, dtype, chip):
    """Rows whose kernels take half a millisecond, in whole waves of the chip's processors, as far as the memory allows."""
    tile = math.lcm(GPU_TILE, centers)
    wave = math.lcm(tile, GPU_CLASSES * chip.processors)
    busy = ceil_div(SLAB_FLOPS * chip.processors, size * (4 * num_rows + ROW_FLOPS))
    fits = chip.memory // SLAB_SHARE // (dtype.itemsize * (num_rows + size) + 4 * size)
    if fits < wave:
        return max(fits // tile, 1) * tile
    return min(ceil_div(busy, wave), fits // wave) * wave


def kept_size(features, table, dtype, memory_budget, slab):
    """(slabs, elements) of exponentials that fit the budget in bytes, for slabs of `slab` rows.

    None: that of `automatic_budget`.
    """
    num_rows, classes = features.shape[0], table.num_rows
    if memory_budget is None:
        gradient = classes * table.weight.shape[1] * table.weight.element_size()
        memory_budget = automatic_budget(gradient, total_memory(features.device))
    slabs = min(memory_budget // (max(num_rows, 1) * slab * dtype.itemsize), ceil_div(classes, slab))
    return slabs, num_rows * min(slabs * slab, aligned(classes))


def automatic_budget(gradient, memory):
    """The bytes that memory_budget "auto" stands for: those of the weight's gradient, at least KEPT_ANYWAY, at most an eighth of
    the device's memory.
    """
    return min(max(gradient, KEPT_ANYWAY), memory // UNASKED_SHARE)


def automatic_fused_budget(table, memory):
    """The same beside a table whose gradient never exists: a tenth of the table's bytes; all of them, at least KEPT_ANYWAY, while
    the device's memory hardly shows it.
    """
    return max(table // 10, min(max(table, KEPT_ANYWAY), memory // KEPT_SHARE))


def aligned(classes):
    """The width of a slab of E: its rows of the table, rounded up to ROW_ALIGNMENT."""
    return ceil_div(classes, ROW_ALIGNMENT) * ROW_ALIGNMENT


def ceil_div(number, divisor):
    """Quotient, rounded up. triton.cdiv is the same, but takes the host longer."""
    return -(-number // divisor)


def wide_dtype(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32
