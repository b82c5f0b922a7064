"""One optimiser step for some rows of a parameter and their state, given their gradient.

    Part      a class table or its bias, with its state and rule; `apply` updates rows of it
    Update    a Sink of the slab loop that applies each slab's gradient to a table's Part and a bias's Part, and drops the slab

The rules are torch.optim's own kernels on decoded rows. On a CPU with vector instructions csrc/cpu/update.cpp does the same to a
row while it is in the cache.
"""

import math
from typing import NamedTuple

import torch

from ..ops import backends, formats
from ..ops.backends import cpu_library
from ..ops.slabs import wide_dtype
from ..ops.table import Sink


class Numbers(NamedTuple):
    """The numbers of a rule, named as in csrc/cpu/update.h's Step and in triton_update.py."""

    lr: float
    weight_decay: float
    sign: float
    nesterov: float = 0.0
    eps: float = 0.0
    first_decay: float = 0.0  # μ, or β1
    second_decay: float = 0.0
    first_rate: float = 0.0  # 1 - β
    second_rate: float = 0.0


class SGD(NamedTuple):
    """g = ±grad + λ w,  m = μ m + g,  w -= η m, or with nesterov η (g + μ m); without momentum η g."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    maximize: bool

    def apply(self, rows, grad, states, skip):
        torch._fused_sgd_(
            *([rows], [grad], states),
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=self.maximize,
            is_first_step=False,
            found_inf=None if skip is None else skip.float(),
        )

    kind = 0  # of csrc/cpu/update.h's Step
    step = None  # see AdamW

    def numbers(self):
        sign = -1.0 if self.maximize else 1.0
        return Numbers(self.lr, self.weight_decay, sign, nesterov=float(self.nesterov), first_decay=self.momentum)

    def corrections(self):
        """The bias corrections (1 - β1^t, √(1 - β2^t)); zeros where the rule has none."""
        return 0.0, 0.0


class AdamW(NamedTuple):
    """w -= η λ w,  m = β1 m + (1 - β1) g,  v = β2 v + (1 - β2) g²,  w -= η / (1 - β1^t) m / (√(v / (1 - β2^t)) + ε)."""

    lr: float
    betas: tuple
    eps: float
    weight_decay: float
    maximize: bool
    step: torch.Tensor  # t, float32 (0-dim): steps that were not skipped, this one included

    def apply(self, rows, grad, states, skip):
        first, second = states
        torch._fused_adamw_(
            *([rows], [grad], [first], [second], [], [self.step]),
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=self.maximize,
            found_inf=None if skip is None else skip.float(),
        )

    kind = 1

    def numbers(self):
        (first, second), sign = self.betas, -1.0 if self.maximize else 1.0
        return Numbers(
            lr=self.lr,
            weight_decay=self.weight_decay,
            sign=sign,
            eps=self.eps,
            first_decay=first,
            second_decay=second,
            first_rate=1 - first,
            second_rate=1 - second,
        )

    def corrections(self):
        """(1 - β1^t, √(1 - β2^t))."""
        (first, second), step = self.betas, float(self.step)
        return 1 - first**step, math.sqrt(1 - second**step)


class Part(NamedTuple):
    """A parameter's rows in their format, and one step's update of them."""

    rows: torch.Tensor  # (R, D); (R, 1) of a bias
    states: list  # (buffer of rows' shape, scale (R,) or None), in the rule's order
    rule: SGD | AdamW
    key: int  # of the random bits for rounding: formats.rounding_key
    first_row: int  # number of the first of these rows in the whole table, which may lie on several ranks
    skip: torch.Tensor | None  # 0-dim bool: True changes nothing; None: False, known without waiting for the device
    max_row_norm: float | None = None  # a gradient of a row that is longer is made that long
    row_scale: torch.Tensor | None = None  # (R,) float32 beside float8 rows

    def apply(self, index, grad):
        """Update rows. index: a slice or int64 positions; grad: their gradient, in the dtype to compute in."""
        if self.is_native():
            cpu_library.update(self.native_update(), grad.float(), index)
            return
        if self.has_kernel() and self.rows.is_cuda and not backends.unusable("triton", self.rows.device):
            from ..ops.backends import triton_update

            with torch.cuda.device_of(self.rows):
                triton_update.update(self, index, grad.float())
            return
        rows = formats.read(self.rows, self.row_scale, index)
        states = [formats.read(*state, index) for state in self.states]
        self.rule.apply(rows, self._clipped(grad.to(rows.dtype)).contiguous(), states, self.skip)
        self._write(index, 0, self.rows, self.row_scale, rows)
        for stream, ((buffer, scale), changed) in enumerate(zip(self.states, states, strict=True), 1):
            self._write(index, stream, buffer, scale, changed)

    def _clipped(self, grad):
        if self.max_row_norm is None:
            return grad
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True, dtype=torch.float64)
        return grad * (self.max_row_norm / norm).clamp(max=1.0).to(grad.dtype)

    def native_update(self):
        """This update as the struct that `csrc/cpu/update.h` declares."""
        first, second = self.rule.corrections()
        numbers = self.rule.numbers()._asdict() | {"first_correction": first, "second_correction": second}
        numbers["max_row_norm"] = self.max_row_norm or 0.0
        return cpu_library.Step.of(self, numbers)

    def is_native(self):
        return cpu_library.has_vectors() and self.rows.device.type == "cpu" and self.rows.dtype != torch.float64

    def has_kernel(self):
        """True if ops/backends/triton_update.py can make this step."""
        return self.rows.dtype in (torch.float32, torch.bfloat16, formats.FLOAT8)

    def _write(self, index, stream, buffer, scale, rows):
        bits = None
        if formats.is_rounded(buffer.dtype):
            is_slice = isinstance(index, slice)
            numbers = torch.arange(index.start, index.stop, dtype=torch.int64, device=rows.device) if is_slice else index
            bits = formats.random_bits(self.key, numbers + self.first_row, rows.shape[1], stream)
        formats.write(buffer, scale, index, rows, bits, self.skip)


class Update(Sink):
    """A Sink that updates the table and its state with each slab's gradient."""

    def __init__(self, table, weight, bias):
        """table: its index has the rows with a gradient; weight, bias: a Part each, None for one that is not updated."""
        self.table, self.weight, self.bias = table, weight, bias
        self._room = None

    def room(self, start, stop, dtype=None):
        """The buffer for a slab's rows before `put`: the same memory for every slab."""
        weight = self.table.weight
        dtype = dtype or wide_dtype(weight.dtype)
        if self._room is None or len(self._room) < stop - start or self._room.dtype != dtype:
            size = weight.shape[1] + (self.table.bias is not None)
            self._room = torch.empty(stop - start, size, dtype=dtype, device=weight.device)
        return self._room[: stop - start]

    def put(self, start, stop, rows):
        size = self.table.weight.shape[1]
        index = slice(start, stop) if self.table.index is None else self.table.index[start:stop]
        if self.weight is not None:
            self.weight.apply(index, rows[:, :size])
        if self.bias is not None:
            self.bias.apply(index, rows[:, size:])

    def native_update(self):
        whole = self.table.index is None and self.bias is None and self.table.bias is None
        return self.weight.native_update() if whole and self.weight is not None and self.weight.is_native() else None

    def device_update(self):
        """See Sink."""
        parts = (self.weight, 0), (self.bias, self.table.weight.shape[1])
        parts = [(part, column) for part, column in parts if part is not None]
        return parts if all(part.has_kernel() for part, _ in parts) else None
