"""What a training step will take, before any of it is allocated: bytes by part, flops, bytes moved, seconds.  `cosface plan`

    memory     table + state + gradient + kept exponentials + slab buffers + batch + process, on each device
    flops      2 N R D for each of cosines, U = E ŵ and dŵ = Eᵀ x̂, and for the cosines of backward where E was not kept
    seconds    flops / rate of arithmetic + bytes moved / rate of a copy: the stages of a slab follow one another

R are the rows of the table that a device reads in one step. Slab size and kept exponentials are those of slabs.py.
"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..heads.plain import MarginSoftmaxLoss
from ..margins import NormSoftmax
from ..ops import backends, formats, page_pool, recording
from ..ops.slabs import Chip, kept_size, slab_rows
from ..ops.table import Table
from ..optim.fused import FusedSGD

# Buffers of the table's shape, which the optimiser keeps from step to step.
STATES = {"sgd": 1, "adamw": 2, "plain-sgd": 0, "torch-sgd": 1, "torch-adamw": 2}
# Of torch.optim's default steps, in tables of float32: g + λ w; √v and √v / √(1 - β2^t).
TEMPORARIES = {"torch-sgd": 1, "torch-adamw": 2}
PRECISIONS = ("bfloat16", "float32")
# N x D numbers in float32 that are alive at once beside the slabs: x, x̃, w̃_y, pull, dx and three on the way to it.
BATCH_MATRICES = 8
# rules.Part.apply without native kernels, for each number of a slab: decoded rows and state, int64 words of random bits.
ROUNDING_BYTES = 64
# A CUDA context, cuBLAS' workspace, and what the allocator rounds up: an estimate, where the process cannot be measured.
GPU_PROCESS_BYTES = 10**9
GPU_PROCESSORS = 132  # of a GPU that is not here: an H100's
MOST_NUMBERS = 2**56  # whose bytes, several times over, are a 64-bit integer
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


class Training(NamedTuple):
    """What is to be trained, and how."""

    identities: int
    dim: int
    batch: int  # N, the rows of all devices together
    optimizer: str = "sgd"  # a key of STATES; SGD with momentum but for plain-sgd
    table_format: str = "float32"
    state_format: str = "float32"
    sample_rate: float = 1.0
    devices: int = 1
    precision: str = "bfloat16"
    device_type: str = "cpu"

    @property
    def is_fused(self):
        return not self.optimizer.startswith("torch-")


class Ceilings(NamedTuple):
    """What bounds a step's time on a device."""

    flops: float  # a second, of a step over 8 N R D of them, without its memory traffic
    bytes: float  # read and written a second, of a copy


class Step(NamedTuple):
    """What a step takes on each device."""

    parts: dict  # bytes by name, all alive at the peak
    flops: int
    moved: int  # bytes to and from memory
    exchanged: int  # bytes that a device sends

    @property
    def total(self):
        return sum(self.parts.values())

    def seconds(self, ceilings):
        """(of arithmetic, of memory traffic): a step takes their sum, and the exchange between devices besides."""
        return self.flops / ceilings.flops, self.moved / ceilings.bytes


def plan(training, memory, process):
    """The Step of a Training on devices of `memory` bytes, of which `process` are taken before the table is made."""
    held = -(-training.identities // training.devices)
    rows = max(round(training.sample_rate * held), min(training.batch, held))
    dtype = getattr(torch, training.precision)
    weight = torch.empty(held, training.dim, dtype=formats.TABLE_FORMATS[training.table_format], device="meta")
    features, table = _features(training), Table(weight[:rows])
    # The second is kept_size's own rule, of a device that need not be here.
    budget = recording.automatic_budget(weight) if training.is_fused else min(weight.nbytes, memory // 8)
    chip = Chip(GPU_PROCESSORS, memory)
    slab, (kept_slabs, elements) = slab_rows(features, table, dtype, chip), kept_size(features, table, dtype, budget, chip)
    kept = elements * dtype.itemsize
    parts = {
        "table": weight.nbytes,
        "state": held * _state_row_bytes(training),
        "gradient": 0 if training.is_fused else weight.nbytes,
        "kept": kept,
        "slabs": _slab_bytes(training, slab, dtype) + (8 * rows if training.sample_rate < 1 else 0),
        "batch": 4 * training.batch * (BATCH_MATRICES * training.dim + 4),
        "process": process,
    }
    temporary = TEMPORARIES.get(training.optimizer, 0) * weight.nbytes
    lent = training.device_type == "cpu" and page_pool.LARGE <= kept <= memory // page_pool.SPARE_SHARE
    left = kept if lent else 0
    if left + temporary > kept + parts["slabs"]:  # step's, when those of backward are free again, but for what page_pool.py holds
        parts |= {"kept": left, "slabs": 0, "step": temporary}
    product = 2 * training.batch * training.dim
    flops = product * (4 * rows - min(kept_slabs * slab, rows))
    return Step(parts, flops, _moved(training, rows, weight.nbytes // held, kept), _exchanged(training))


def _features(training):
    """What slabs.py asks of features, without the device that they would be on."""
    return SimpleNamespace(shape=(training.batch, training.dim), device=torch.device(training.device_type))


def _moved(training, rows, row, kept):
    """Bytes to and from memory, with `row` bytes to a row of the table."""
    table = rows * 3 * row  # read by forward and backward, written by step, which finds it in the cache
    state = rows * 2 * _state_row_bytes(training)
    if training.is_fused:
        return table + state + 2 * kept  # written and read
    # dW is written and read, the table read once more, and temporaries are written and read.
    return table + state + 2 * kept + rows * row * (3 + 2 * TEMPORARIES[training.optimizer])


def _state_row_bytes(training):
    dtype = formats.STATE_FORMATS[training.state_format]
    scale = 4 if dtype in formats.LARGEST_CODE else 0
    return STATES[training.optimizer] * (training.dim * dtype.itemsize + scale)


def _slab_bytes(training, slab, dtype):
    """Every buffer of a slab, of a pass over the table that is at its largest: backward within step, or forward."""
    if training.device_type == "cpu" and not backends.unusable("cpu", torch.device("cpu"), dtype):
        return _native_slab_bytes(training, slab, dtype)
    batch, dim = training.batch, training.dim
    rows = slab * dim * (dtype.itemsize + 4)  # ŵ, dw
    pull = (8 + 64) * batch * dim  # the sum in float64, the parts of one slab's E ŵ
    is_rounded = {training.table_format, training.state_format} != {"float32"}
    return rows + slab * batch * (dtype.itemsize + 4) + pull + slab * dim * (ROUNDING_BYTES if is_rounded else 8)


def _native_slab_bytes(training, slab, dtype):
    """cpu_backend's buffers."""
    from ..ops.backends import cpu_library

    batch, dim = training.batch, training.dim
    kernels = cpu_library.kernels(dtype)

    def panels(summed, columns):
        return 4 * kernels.panel_words(summed, columns)

    both = (
        panels(dim, batch) + slab * dim * kernels.operand.itemsize + 4 * -(-slab // cpu_library.constant("sum_classes")) * batch
    )
    both += 4 * torch.get_num_threads() * kernels.scratch_numbers(batch, dim)
    both += 4 * slab * dim if training.sample_rate < 1 else 0
    forward = panels(slab, batch) + panels(slab, dim) + batch * (8 * cpu_library.padded(dim) + 12 * dim)
    backward = panels(batch, dim) + slab * batch * dtype.itemsize
    backward += 4 * slab * dim if training.is_fused else 0
    return both + max(forward, backward)


def _exchanged(training):
    """All-gather of features, reduce-scatter of their gradient, all-reduce of (N, 2) float64."""
    others = training.devices - 1
    return others * (2 * 4 * training.batch * training.dim + 2 * 16 * training.batch) // training.devices


def measure_ceilings(training):
    """Those of this machine, in a few seconds: the best of repeated steps over a few slabs, and of copies."""
    device = torch.device(training.device_type)
    source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best_seconds("target.copy_(source)", source=source, target=target)
    table = Table(torch.empty(training.identities, training.dim, dtype=torch.float32, device="meta"))
    rows = min(4 * slab_rows(_features(training), table, getattr(torch, training.precision)), training.identities)
    seconds = _best_seconds("step()", step=_step(rows, training.dim, training.batch, device, training.precision))
    # What its traffic took counts as such, but for what was in the cache.
    traffic = _moved(training._replace(optimizer="sgd", state_format="float32"), rows, 4 * training.dim, 0) / copied
    arithmetic = max(seconds - traffic, seconds / 2)
    return Ceilings(8 * training.batch * rows * training.dim / arithmetic, copied)


def measure_process(device_type):
    """Bytes that this process holds once a step over a small table has loaded all that a step needs; on a GPU, and where the
    system does not tell, an estimate.
    """
    status = Path("/proc/self/status")
    if device_type != "cpu" or not status.exists():
        return GPU_PROCESS_BYTES
    _step(1000, 64, 16, torch.device("cpu"), "bfloat16")()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) * 1024


def _step(identities, dim, batch, device, precision):
    """A function that trains a table by one step, recomputing exponentials."""
    head = MarginSoftmaxLoss(dim, identities, margin=NormSoftmax(), memory_budget=0, device=device, dtype=torch.float32)
    optimizer = FusedSGD(head.parameters(), momentum=0.9)
    features = torch.randn(batch, dim, dtype=torch.float32, device=device, requires_grad=True)
    labels = torch.arange(batch, dtype=torch.int64, device=device) % identities

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = head(features, labels)
        loss.backward()
        optimizer.step()

    return step


def _best_seconds(statement, **names):
    from torch.utils.benchmark import Timer  # it imports setuptools, which is not everywhere

    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.3).median for _ in range(4))
