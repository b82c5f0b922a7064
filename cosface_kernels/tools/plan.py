"""`cosface plan`: the memory of a training step before any of it is allocated, and the way to train that fits.

    table + state + gradient + kept exponentials + rest        bytes on each device

Slab size and kept exponentials are those of slabs.py. The rest is estimated: a slab's buffers, the batch, and what a process
holds that has made a step.
"""

import bisect
import collections
import itertools
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..heads.plain import MarginSoftmaxLoss
from ..margins import NormSoftmax
from ..ops import formats, page_pool
from ..ops.memory import available_bytes, total_memory
from ..ops.slabs import Chip, automatic_budget, automatic_fused_budget, kept_size, slab_rows
from ..ops.table import Table
from ..optim.fused import FusedSGD


class Optimizer(NamedTuple):
    """A line of code, and buffers of the table's shape: `states` from step to step, `temporaries` within one."""

    code: str
    states: int
    temporaries: int = 0  # of torch.optim's default steps: g + λ w; √v and √v / √(1 - β2^t)


OPTIMIZERS = {
    "sgd": Optimizer('FusedSGD(\n    head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, state_format="{}"\n)', 1),
    "adamw": Optimizer('FusedAdamW(head.parameters(), lr=1e-3, state_format="{}")', 2),
    "plain-sgd": Optimizer("FusedSGD(head.parameters(), lr=0.1, weight_decay=5e-4)", 0),
    "torch-sgd": Optimizer("torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)", 1, 1),
    "torch-adamw": Optimizer("torch.optim.AdamW(head.parameters(), lr=1e-3)", 2, 2),
}
TABLES, STATES = list(formats.TABLE_FORMATS), list(formats.STATE_FORMATS)
USABLE = 0.9  # of the memory; the rest is to spare
MOST_DEVICES = 2**16
MOST_NUMBERS = 2**56  # bytes of so many, several times over, are a 64-bit integer
BATCH_MATRICES = 10  # N x D numbers in float32 that are alive at once, from features to their gradient
# A CUDA context, cuBLAS' workspace, and what the allocator rounds up: an estimate, where the process cannot be measured.
GPU_PROCESS_BYTES = 10**9
GPU_PROCESSORS = 132  # of a GPU that is not here: an H100's
COLUMNS = 100
ROWS = 12  # that are printed, shared evenly by the numbers of devices


class Training(NamedTuple):
    """A training: sizes, optimiser, formats, sample rate and number of devices."""

    identities: int
    dim: int
    batch: int  # N, the rows of all devices together
    optimizer: str = "sgd"
    table_format: str = "float32"
    state_format: str = "float32"
    sample_rate: float = 1.0
    devices: int = 1
    precision: str = "bfloat16"
    device_type: str = "cpu"
    hard_classes: int = 0  # named for each class, where classes are sampled

    @property
    def is_fused(self):
        return not self.optimizer.startswith("torch-")

    @property
    def rank(self):
        """The smaller, the better: all classes, as a sample of them is another loss; then exactness of the table, then of the
        state, then few devices.
        """
        exactness = TABLES.index(self.table_format), STATES.index(self.state_format)
        return -self.sample_rate, *exactness, self.devices, list(OPTIMIZERS).index(self.optimizer)

    def __str__(self):
        """The plan in words, without the number of devices."""
        sampled = "all classes" if self.sample_rate == 1 else f"{self.sample_rate:.3g} of the classes in a step"
        state = f", {self.state_format} state" if OPTIMIZERS[self.optimizer].states else ""
        return f"{self.optimizer} with a {self.table_format} table{state} and {sampled}"

    def code(self):
        """The statements that make the head, its optimiser, and a step."""
        arguments = f"{self.dim}, {self.identities:_}"
        if self.table_format != "float32":
            arguments += f', table_format="{self.table_format}"'
        if self.sample_rate < 1:
            arguments += f", sample_rate={self.sample_rate:g}"
        hard = [f"head.hard_classes = head.confusions({self.hard_classes})[1]"] * (self.sample_rate < 1 and self.hard_classes > 0)
        return [
            f"head = {'Sharded' * (self.devices > 1)}CosFaceLoss({arguments})",
            *hard,
            f"optimizer = {OPTIMIZERS[self.optimizer].code.format(self.state_format)}",
            "head(features, labels).backward(); optimizer.step(); optimizer.zero_grad()",
        ]


class Device(NamedTuple):
    memory: int  # bytes for the training and its process
    process: int  # of them, taken before the table is made
    total: int | None = None  # of the whole device, of which a step takes shares; None: memory


def plan(training, device):
    """Bytes by name, all alive at a step's peak on each of the devices that share the table."""
    batch, dim, optimizer = training.batch, training.dim, OPTIMIZERS[training.optimizer]
    held = -(-training.identities // training.devices)
    hard = training.hard_classes if training.sample_rate < 1 else 0
    rows = max(round(training.sample_rate * held), min(batch * (1 + hard), held))
    dtype, state = getattr(torch, training.precision), formats.STATE_FORMATS[training.state_format]
    weight = torch.empty(held, dim, dtype=formats.TABLE_FORMATS[training.table_format], device="meta")
    is_float8 = weight.dtype == formats.FLOAT8
    # The attributes of features that slabs.py reads, without a tensor.
    features = SimpleNamespace(shape=(batch, dim), device=torch.device(training.device_type))
    table = Table(weight[:rows])
    total = device.total or device.memory
    slab = slab_rows(features, table, dtype, Chip(GPU_PROCESSORS, total))
    budget = (automatic_fused_budget if training.is_fused else automatic_budget)(weight.nbytes, total)
    kept = kept_size(features, table, dtype, budget, slab)[1] * dtype.itemsize
    # E and its exponents, (N, B); rows of the table and of dW, (B, D), each in two forms; decoded rows, and as 16 bits.
    buffers = 8 * slab * (batch + 2 * dim) + 6 * slab * dim * is_float8
    lent = training.device_type == "cpu" and kept >= page_pool.LARGE
    # The peak of backward, or of torch.optim's step, when what backward had is free but for what page_pool.py holds.
    kept, buffers = max((kept, buffers), (kept if lent else 0, optimizer.temporaries * weight.nbytes), key=sum)
    return {
        "table": weight.nbytes + 4 * held * is_float8,
        "state": held * optimizer.states * (dim * state.itemsize + 4 * (state in formats.LARGEST_CODE)),
        "gradient": 0 if training.is_fused else weight.nbytes,
        "kept": kept,
        "rest": buffers + 4 * BATCH_MATRICES * batch * dim + 4 * training.identities * hard + device.process,
    }


def trainings(*, optimizers, table_formats, state_formats, sample_rates, devices, **common):
    """Every valid combination of these options: torch.optim's optimisers take float32 and all classes."""
    found, each = {}, {"devices": devices, "sample_rate": sample_rates, "optimizer": optimizers}
    each |= {"table_format": table_formats, "state_format": state_formats}
    for values in itertools.product(*each.values()):
        training = Training(**common, **dict(zip(each, values, strict=True)))
        if not OPTIMIZERS[training.optimizer].states:
            training = training._replace(state_format="float32")
        formats_and_rate = training.table_format, training.state_format, training.sample_rate
        if training.is_fused or formats_and_rate == ("float32", "float32", 1.0):
            found[training] = None
    return list(found)


def recommended(totals, device):
    """The Training of {Training: bytes} to take, or None."""
    fitting = [training for training, total in totals.items() if total <= USABLE * device.memory]
    return min(fitting, key=lambda training: training.rank, default=None)


def devices_needed(training, device):
    """The number of devices on which a training fits with room to spare; None: no number."""

    def fits(number):
        return sum(plan(training._replace(devices=number), device).values()) <= USABLE * device.memory

    most = min(MOST_DEVICES, training.identities)
    number = bisect.bisect_left(range(1, most + 1), True, key=fits) + 1
    return number if number <= most else None


def process_bytes(device_type):
    """Bytes that this process holds after a step over a small table, which loads all code that a step needs; an estimate for a
    GPU, and if the system does not report it.
    """
    status = Path("/proc/self/status")
    if device_type != "cpu" or not status.exists():
        return GPU_PROCESS_BYTES
    head = MarginSoftmaxLoss(64, 1000, margin=NormSoftmax(), device="cpu", dtype=torch.float32)
    optimizer = FusedSGD(head.parameters(), momentum=0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = torch.randn(16, 64, dtype=torch.float32, device="cpu", requires_grad=True)
        loss = head(features, torch.arange(16, dtype=torch.int64, device="cpu"))
    loss.backward()
    optimizer.step()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) * 1024


def report(arguments):
    """The text that `cosface plan` prints: the best of the trainings that the command's arguments allow, and the one to take.
    ValueError: they leave none.
    """
    has_gpu = torch.cuda.is_available()
    device_type = arguments.device or ("cuda" if has_gpu else "cpu")
    if device_type == "cuda" and not (has_gpu or arguments.memory):
        raise ValueError("there is no GPU here to measure: --device cuda needs --memory")
    most = arguments.identities if arguments.memory else torch.cuda.device_count() if device_type == "cuda" else 1
    found = trainings(
        optimizers=arguments.optimizer or ("sgd", "adamw", "torch-sgd"),
        table_formats=arguments.table_format or TABLES,
        state_formats=arguments.state_format or STATES,
        sample_rates=arguments.sample_rate or (1.0, 0.1),
        devices=arguments.devices or [number for number in (1, 2, 4, 8) if number <= most],
        device_type=device_type,
        **{name: getattr(arguments, name) for name in ("identities", "dim", "batch", "precision", "hard_classes")},
    )
    if not found:
        raise ValueError("torch.optim's optimizers go with float32 for table and state and a sample rate of 1")
    if max(arguments.identities, arguments.batch) * arguments.dim > MOST_NUMBERS:
        raise ValueError(f"a table or a batch of more than {MOST_NUMBERS:,} numbers is beyond any plan")
    if max(training.devices for training in found) > arguments.identities:
        raise ValueError(f"{arguments.identities} identities cannot be shared by more devices than that")
    process = process_bytes(device_type)
    here = torch.device(device_type)
    device = (
        Device(arguments.memory, process)
        if arguments.memory
        else Device(available_bytes(here) + process, process, total_memory(here))
    )
    plans = {training: plan(training, device) for training in found}
    totals = {training: sum(parts.values()) for training, parts in plans.items()}
    paragraphs = [
        f"{arguments.identities:,} identities, D = {arguments.dim}, N = {arguments.batch}, products in {arguments.precision}, on "
        f"{device_type} devices of {_gigabytes(device.memory)} GB. All sizes are GB, 10^9 bytes, on each device.",
        *_recommendation(totals, device),
    ]
    first, *advice = [textwrap.fill(paragraph, COLUMNS) for paragraph in paragraphs]
    training = recommended(totals, device)
    code = ["", textwrap.indent("\n".join(training.code()), "    ")] if training else []
    return "\n".join([first, "", *_table(plans, totals, device), "", *advice, *code])


def _gigabytes(size):
    return f"{size / 1e9:.2f}"


def _table(plans, totals, device):
    """A line for each of the best ROWS of {Training: parts}, with aligned columns: what fits, by rank, then the smallest of what
    does not.
    """
    fits = {each: (total > USABLE * device.memory) + (total > device.memory) for each, total in totals.items()}
    order = sorted(plans, key=lambda each: (fits[each], totals[each] if fits[each] == 2 else 0, each.rank))
    few = max(1, ROWS // len({each.devices for each in plans}))
    places, lines = collections.defaultdict(itertools.count), []
    for training in (each for each in order if next(places[each.devices]) < few):
        names = training.optimizer, f"{training.table_format} {training.state_format}"
        sizes = map(_gigabytes, (*plans[training].values(), totals[training]))
        answer = "yes", "barely", "no"
        lines.append([*names, f"{training.sample_rate:g}", str(training.devices), *sizes, answer[fits[training]]])
    head = ["optimizer", "table, state", "rate", "devices", "table", "state", "dW", "kept", "rest", "total", "fits"]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    hidden = len(plans) - len(lines)
    note = f"Not shown: {hidden} less exact or larger ones; --devices, --table-format and the other options choose."
    return ["  ".join(map(str.rjust, line, widths)) for line in (head, *lines)] + [note] * (hidden > 0)


def _recommendation(totals, device):
    """Sentences: the training to take and why, or the memory that would be needed."""
    training, best = recommended(totals, device), min(totals, key=lambda training: training.rank)
    if training is None:
        smallest = min(totals, key=totals.get)
        needed = devices_needed(smallest, device)
        if needed is None:
            return [f"Nothing fits on any number of devices: each needs {_gigabytes(totals[smallest])} GB or close to it."]
        return [f"Nothing fits with {1 - USABLE:.0%} to spare. {smallest} would, on {needed} devices."]
    why = f"Of what fits with {1 - USABLE:.0%} to spare it samples least, then is the most exact, then on the fewest devices."
    if training != best:
        why += f" Before it comes {best} on {_devices(best.devices)}, which needs {_gigabytes(totals[best])} GB."
    sizes = f"{_gigabytes(totals[training])} GB of {_gigabytes(device.memory)} on each"
    return [f"Recommended: {training} on {_devices(training.devices)}: {sizes}.", why]


def _devices(number):
    return f"{number} device{'s' * (number > 1)}"
