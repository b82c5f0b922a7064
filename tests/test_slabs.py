"""Does a GPU's slab fill its processors, for long enough, within its memory? slabs.py as arithmetic: no GPU is needed."""

import math
from types import SimpleNamespace

import pytest
import torch

from cosface_kernels.ops import slabs
from cosface_kernels.ops.table import Table

H100, A100, LAPTOP = slabs.Chip(132, 85 * 10**9), slabs.Chip(108, 42 * 10**9), slabs.Chip(46, 8 * 10**9)
BATCHES = (1, 64, 256, 512, 1024, 4096, 16384, 65536)


def slab(num_rows, size, *, chip=H100, classes=10**7, dtype=torch.bfloat16, centers=1):
    features = SimpleNamespace(shape=(num_rows, size), device=torch.device("cuda"))
    table = Table(torch.empty(classes * centers, size, device="meta"), centers=centers)
    return slabs.slab_rows(features, table, dtype, chip)


def slab_bytes(num_rows, size, rows, dtype):
    return rows * (dtype.itemsize * (num_rows + size) + 4 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chip", [H100, A100, LAPTOP])
@pytest.mark.parametrize("size", [64, 128, 512, 1024])
@pytest.mark.parametrize("num_rows", BATCHES)
def test_whole_waves_and_whole_tiles_within_memory(num_rows, size, chip, dtype):
    rows = slab(num_rows, size, chip=chip, dtype=dtype)
    wave = math.lcm(256, 64 * chip.processors)
    assert rows % 256 == 0 and (rows % wave == 0 or rows < wave or rows == slabs.SLAB_CLASSES_MAX)
    assert slab_bytes(num_rows, size, rows, dtype) <= chip.memory / 128 or rows == 256
    more = slab_bytes(num_rows, size, rows + wave, dtype)
    flops = rows * size * (4 * num_rows + 1024)
    assert flops >= 2**31 * chip.processors or more > chip.memory / 128 or rows == slabs.SLAB_CLASSES_MAX  # half a millisecond


@pytest.mark.parametrize("num_rows", [512, 1024, 2048, 4096, 8192])
def test_tiles_of_both_products_come_out_even(num_rows):
    """At D = 512, of 128 x 256 each: E in `exponentials`, and dŵ in cuBLAS."""
    rows = slab(num_rows, 512)
    assert num_rows // 128 * (rows // 256) % 132 == 0 and rows // 128 * 2 % 132 == 0


@pytest.mark.parametrize("centers", [1, 3, 8])
def test_whole_classes_and_no_more_than_there_are(centers):
    assert slab(512, 512, centers=centers) % math.lcm(256, centers) == 0
    assert slab(512, 512, classes=1000, centers=centers) == -(-1000 * centers // math.lcm(128, centers)) * math.lcm(128, centers)


def test_kept_exponentials_of_a_gpu_that_is_not_here():
    """In whole slabs, as many as the budget takes."""
    features = SimpleNamespace(shape=(512, 512), device=torch.device("cuda"))
    table = Table(torch.empty(10**6, 512, device="meta"))
    rows = slab(512, 512, classes=10**6)
    budget = 3 * 512 * rows * 2 + 1
    assert slabs.kept_size(features, table, torch.bfloat16, budget, rows) == (3, 3 * 512 * rows)
