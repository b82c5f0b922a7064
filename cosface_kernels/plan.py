"""How one call goes over the class table: precision, the exponentials' shift, slab size, and which slabs are kept.

Everything here is a pure function of sizes, dtypes and the device, never of its load, so results never depend on load.
"""

import math
from typing import NamedTuple

import torch

from .memory import total_memory

# E_nj = 2^{k cos - h} with a constant h needs no running maximum while every E, and a sum of C of them, is a normal number with
# room to spare for the products of backward: k |cos| + log2(C) / 2 within this many powers of two.
CONSTANT_SHIFT_RANGE = {torch.float64: 1000.0, torch.float32: 112.0, torch.bfloat16: 112.0}
# A bfloat16 unit row may be 0.4% too long, so a cosine of two may reach 1.008.
COSINE_LIMIT = 1.008

# Numbers in one slab: E (N x B), and B rows of D in the two forms that a backend may hold. On a CPU they should stay in cache,
# and be enough that the threads rarely wait for each other; on a GPU a slab must fill the machine.
SLAB_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
SLAB_CLASSES_MIN = 256
SLAB_CLASSES_MAX = 2**16
# B is a multiple of this, a tile of every kernel; the last slab's width is rounded up to ROW_ALIGNMENT, so that each row of E
# starts aligned for vector loads and tensor cores.
SLAB_ALIGNMENT = 128
ROW_ALIGNMENT = 16


class Plan(NamedTuple):
    """What a backend is told, beside its tensors."""

    log2_scale: float  # k = s log2(e): e^{s cos} = 2^{k cos}
    shift: float | None  # h in E = 2^{k cos - h}; None: logits are too wide for a constant, so each row's maximum is found first
    dtype: torch.dtype  # what the matrix products read: bfloat16, float32 or float64
    slab: int  # B, classes per slab, a multiple of SLAB_ALIGNMENT; the last slab may be shorter
    kept_slabs: int  # exponentials of this many slabs, the first ones, are kept from forward for backward
    kept_elements: int  # how many numbers that is

    @property
    def wide(self):
        """What the matrix products accumulate and return."""
        return wide_dtype(self.dtype)

    def slabs(self, num_classes):
        """(index, first class, one past the last class) of every slab."""
        for index, start in enumerate(range(0, num_classes, self.slab)):
            yield index, start, min(start + self.slab, num_classes)

    def kept_view(self, kept, index, num_rows, width):
        """Slab `index` of kept exponentials (N, width), or None when it is not kept."""
        if index >= self.kept_slabs:
            return None
        start = index * num_rows * self.slab
        return kept[start : start + num_rows * width].view(num_rows, width)


def make_plan(features, weight, *, scale, dtype, memory_budget, keep):
    """The plan for unit features (N, D) and a class table (C, D). keep: whether backward will want exponentials."""
    log2_scale = scale * math.log2(math.e)
    half = math.log2(len(weight)) / 2
    bounded = log2_scale * COSINE_LIMIT + half <= CONSTANT_SHIFT_RANGE[dtype]
    kept_slabs, kept_elements = kept_size(features, weight, dtype, memory_budget) if keep else (0, 0)
    return Plan(
        log2_scale=log2_scale,
        shift=float(round(half)) if bounded else None,
        dtype=dtype,
        slab=slab_classes(features, weight),
        kept_slabs=kept_slabs,
        kept_elements=kept_elements,
    )


def slab_classes(features, weight):
    """B: as many classes as fill a slab, within bounds, and no more than there are."""
    elements = SLAB_ELEMENTS.get(features.device.type, SLAB_ELEMENTS["cpu"])
    num_rows, size = features.shape
    wanted = elements // (num_rows + 2 * size)
    wanted = min(max(wanted, SLAB_CLASSES_MIN), SLAB_CLASSES_MAX, weight.shape[0])
    return -(-wanted // SLAB_ALIGNMENT) * SLAB_ALIGNMENT


def kept_size(features, weight, dtype, memory_budget):
    """(slabs, elements) of exponentials that fit the budget in bytes.

    None: at most what the weight's gradient takes and at most an eighth of the device's memory.
    """
    if memory_budget is None:
        memory_budget = min(weight.numel() * weight.element_size(), total_memory(features.device) // 8)
    num_rows, slab = features.shape[0], slab_classes(features, weight)
    slabs = min(memory_budget // (max(num_rows, 1) * slab * dtype.itemsize), -(-weight.shape[0] // slab))
    return slabs, num_rows * min(slabs * slab, aligned(weight.shape[0]))


def aligned(classes):
    """The width of a slab's rows of E: its classes, rounded up."""
    return -(-classes // ROW_ALIGNMENT) * ROW_ALIGNMENT


def wide_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
