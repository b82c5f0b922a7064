"""What the host's memory is and how large results are backed by it."""

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14


def empty(shape, dtype, device):
    """torch.empty; a large tensor on a Linux host asks for huge pages.

    A table's gradient is fresh memory at each step. Its first touch costs one fault a page: 42 ms for 200 MB in pages of 4 KB,
    12 ms in huge ones (docs/performance.md).
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and sys.platform == "linux" and tensor.nbytes >= 4 * HUGE_PAGE:
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # advice: a refusal changes nothing
    return tensor


@functools.cache
def total_memory(device):
    """Bytes of the device's memory; for a device that does not tell, the host's, and 8 GiB where that does not tell either."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return 2**33
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes(device):
    """What can be allocated without harm: on Linux what the system and the container's limit leave, else half of the memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return total_memory(device) // 2
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


@functools.cache
def _libc():
    return ctypes.CDLL(None)
