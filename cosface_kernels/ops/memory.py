"""Total, available and peak memory of a device."""

import functools
import math
import os
import sys
from pathlib import Path

import torch

# Of a device's memory, at most one part in so many is taken for exponentials unasked, and kept for the next step.
UNASKED_SHARE = 8


@functools.cache
def total_memory(device):
    """Bytes of the device's memory; those of host or container for a device that has no such number, 8 GiB if they have none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return 2**33
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _container("memory.max"))


def _container(name):
    """A number that Linux has for this process's container; infinity where there is none."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return math.inf
    return math.inf if text == "max" else int(text)


def available_bytes(device):
    """Bytes that can be allocated without harm: on Linux as many as system and container leave, else half of the memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return total_memory(device) // 2
    limit = _container("memory.max")
    return available if limit == math.inf else min(available, limit - _container("memory.current"))


def peak_bytes(device):
    """The peak memory so far: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
