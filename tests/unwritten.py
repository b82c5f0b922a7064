"""Fills memory that the package allocates with NaN, or with integers that are outside the classes, codes and rows.

Tests then see a result that reads it, or returns it.
"""

import ctypes
import functools
import sys

import torch
from torch.utils._python_dispatch import _disable_current_modes

from cosface_kernels.ops import page_pool

# The byte to fill with. With all bits set every float is NaN, and so are the pairs of bfloat16 in an int32 of the native kernels.
ONES, OTHERS = 0xFF, 0x5A
NUMBERS = torch.int64, torch.int8, torch.uint8


def poison(tensor):
    """Unseen by modes that count operators or trace them. Tensors of shapes alone stay as they are."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
        byte, storage = OTHERS if tensor.dtype in NUMBERS else ONES, tensor.untyped_storage()
        if tensor.is_cpu:
            ctypes.memset(storage.data_ptr(), byte, storage.nbytes())
        else:
            with _disable_current_modes():
                storage.fill_(byte)
    return tensor


def poisoned(allocate):
    @functools.wraps(allocate)
    def call(*arguments, **keywords):
        tensor = allocate(*arguments, **keywords)
        if torch.compiler.is_compiling() or not _from_the_package(sys._getframe(1)):
            return tensor
        return poison(tensor)

    return call


def _from_the_package(frame):
    return frame.f_globals.get("__name__", "").startswith("cosface_kernels.")


def install():
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided"))):
        for name in names:
            setattr(owner, name, poisoned(getattr(owner, name)))
    lend = page_pool.empty  # a block of the pool holds the numbers of its last owner
    page_pool.empty = lambda *arguments: poison(lend(*arguments))
