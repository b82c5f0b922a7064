"""A pool of memory for large tensors on a CPU: a block is kept when the last tensor over it dies, and used for the next one.

A page that the process has not touched costs a fault: over a microsecond for 4 KB, as long as a row of dW takes to compute.
malloc keeps small blocks for itself and gives large ones back to the system each time; a GPU's allocator keeps all.
"""

import contextlib
import ctypes
import math
import weakref

import torch

from .memory import UNASKED_SHARE, total_memory

LARGE = 2**25  # bytes: glibc never takes a threshold above this for what goes back to the system

_spare = []


def empty(shape, dtype, device):
    """torch.empty, from the pool for a large tensor on a CPU, which then cannot be resized in place."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return _take(nbytes).lend(nbytes).view(dtype).view(shape)


def release():
    """Give all spare blocks back to the system, as torch.cuda.empty_cache does."""
    _spare.clear()


class _Block:
    def __init__(self, nbytes):
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def lend(self, nbytes):
        window = (ctypes.c_char * nbytes).from_address(self.bytes.data_ptr())
        weakref.finalize(window, self.give_back).atexit = False  # the tensor below holds the window
        return torch.frombuffer(window, dtype=torch.uint8)

    def give_back(self):
        _spare.append(self)  # before the sum, which another thread may take at the same time
        if sum(block.bytes.nbytes for block in _spare) > total_memory(self.bytes.device) // UNASKED_SHARE:
            with contextlib.suppress(ValueError):  # another thread has taken it
                _spare.remove(self)


def _take(nbytes):
    """The smallest spare block that is large enough and at most a quarter larger, so that exponentials do not take dW's; else a
    new one, and all spare ones are freed.
    """
    for block in sorted(_spare, key=lambda block: block.bytes.nbytes):
        if nbytes <= block.bytes.nbytes <= 5 * nbytes // 4:
            try:
                _spare.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    release()
    return _Block(nbytes)
