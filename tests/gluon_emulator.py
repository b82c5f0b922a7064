"""Runs the source of a Gluon kernel of triton_hopper.py on a CPU, one thread for each warp group, with the hardware's freedoms.

A copy from global memory leaves NaN behind until it lands, late. A product reads its operands when it is waited for. A barrier
that nobody completes is an error. Not seen: what threads of one group do to each other, layouts, the fence between a store and
the product that reads it, time.

    attend = Kernel(triton_hopper.attend);  attend[(programs,)](arguments...)
"""

import builtins
import random
import threading
import time
import types
from types import SimpleNamespace

import torch

PATIENCE = 300  # seconds that a wait may take


class Kernel:
    def __init__(self, kernel, copy_seconds=0.0005):
        self.copy_seconds = copy_seconds
        self._program = threading.local()
        self._names = {**kernel.fn.__globals__, **self._language()}
        for name, value in kernel.fn.__globals__.items():
            if hasattr(value, "fn"):
                self._names[name] = self._emulated(value)
            elif type(value).__name__ == "constexpr":
                self._names[name] = value.value
        self.function = self._emulated(kernel)

    def _emulated(self, kernel):
        return types.FunctionType(kernel.fn.__code__, self._names, kernel.fn.__name__, kernel.fn.__defaults__)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            arguments = [_argument(value) for value in arguments]
            for program in range(grid[0]):
                self.program = program
                self.function(*arguments, **constants)

        return launch

    def _language(self):
        gl = SimpleNamespace(
            **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64")},
            program_id=lambda axis: torch.tensor(self.program),
            arange=lambda start, stop, layout: torch.arange(start, stop),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            exp2=torch.exp2,
            where=torch.where,
            sum=lambda tensor, axis: tensor.sum(axis),
            minimum=lambda one, other: torch.tensor(min(int(one), int(other))),
            static_range=range,
            load=lambda pointer, mask=None, other=0: pointer.load(mask, other),
            store=lambda pointer, value, mask: pointer.store(value, mask),
            allocate_shared_memory=lambda dtype, shape, layout: (
                Barriers(shape) if layout == "barriers" else Shared.new(shape, dtype)
            ),
            warp_specialize=lambda groups, warps, registers: _together(groups),
            NVMMADistributedLayout=lambda **rest: None,
            SliceLayout=lambda *rest: None,
        )
        return {
            "gl": gl,
            "range": lambda *bounds: builtins.range(*map(int, bounds)),
            "fence_async_shared": lambda: None,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=lambda barrier, count: barrier.init(count),
                expect=lambda barrier, size: barrier.expect(size),
                arrive=lambda barrier, count: barrier.arrive(count),
                wait=lambda barrier, phase: barrier.wait(int(phase)),
            ),
            "tma": SimpleNamespace(async_copy_global_to_shared=self._copy),
            "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=False: Product(a, b, acc, use_acc),
            "warpgroup_mma_init": lambda tensor: tensor,
            "warpgroup_mma_wait": lambda outstanding, deps: _waited(outstanding, *deps),
        }

    def _copy(self, source, place, barrier, out):
        (rows, columns), (row, column) = source.block_shape, map(int, place)
        out.tensor.fill_(torch.nan)

        def land():
            time.sleep(random.random() * self.copy_seconds)
            block = torch.zeros(rows, columns, dtype=out.dtype)
            inside = source.base[row : row + rows, column : column + columns]
            block[: inside.shape[0], : inside.shape[1]] = inside
            out.tensor.copy_(block)
            barrier.complete(block.nbytes)

        threading.Thread(target=land).start()


def _argument(value):
    if isinstance(value, torch.Tensor):
        return Pointer(value)
    if hasattr(value, "block_shape"):
        return SimpleNamespace(base=value.base, block_shape=value.block_shape, dtype=value.base.dtype, layout="shared")
    return torch.tensor(value) if isinstance(value, int) else value


class Pointer:
    """To an element of a contiguous tensor, or to one for each element of `place`."""

    def __init__(self, tensor, place=0):
        assert tensor.is_contiguous()
        self.tensor, self.place = tensor, place

    def __add__(self, steps):
        return Pointer(self.tensor, self.place + steps)

    def load(self, mask, other):
        mask = torch.ones_like(self.place, dtype=torch.bool) if mask is None else mask.expand(self.place.shape)
        loaded = torch.full(self.place.shape, other, dtype=self.tensor.dtype)
        loaded[mask] = self.tensor.view(-1)[self._inside(mask)]
        return loaded

    def store(self, value, mask):
        self.tensor.view(-1)[self._inside(mask)] = value[mask].to(self.tensor.dtype)

    def _inside(self, mask):
        place = self.place[mask]
        assert place.numel() == 0 or 0 <= place.min() <= place.max() < self.tensor.numel(), "out of the tensor"
        return place


class Shared:
    def __init__(self, tensor):
        self.tensor, self.dtype = tensor, tensor.dtype

    @classmethod
    def new(cls, shape, dtype):
        return cls(torch.full(shape, torch.nan, dtype=dtype))

    def index(self, place):
        return Shared(self.tensor[int(place)])

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def store(self, value):
        self.tensor.copy_(value)


class Product:
    """a b + acc, of what the operands hold when it is waited for."""

    def __init__(self, a, b, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc

    def value(self):
        acc = self.acc.value() if isinstance(self.acc, Product) else self.acc
        product = self.a.tensor.float() @ self.b.tensor.float()
        return acc + product if self.use_acc else product


def _waited(outstanding, product):
    assert outstanding == 0
    return product.value()


class Barriers:
    def __init__(self, shape):
        self.each = [Barrier() for _ in range(shape[0])]
        self.init, self.expect, self.wait, self.complete = (
            getattr(self.each[0], name) for name in ("init", "expect", "wait", "complete")
        )

    def index(self, place):
        return self.each[int(place)]


class Barrier:
    """Counts arrivals and bytes of one phase after the other; a wait for a phase's parity ends when that phase has."""

    def __init__(self):
        self.changed, self.parity = threading.Condition(), 0

    def init(self, count):
        self.count = self.pending = count
        self.bytes = 0

    def arrive(self, count):
        self._change(arrivals=count)

    def expect(self, size):
        self._change(arrivals=1, expected=size)

    def complete(self, size):
        self._change(expected=-size)

    def _change(self, arrivals=0, expected=0):
        with self.changed:
            self.pending -= arrivals
            self.bytes += expected
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if not self.pending and not self.bytes:
                self.parity, self.pending = self.parity ^ 1, self.count
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: self.parity != parity, timeout=PATIENCE), "a barrier that nobody completes"


def _together(groups):
    """Run the functions of all warp groups at once."""
    failures = []

    def run(function, arguments):
        try:
            function(*arguments)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=group) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
