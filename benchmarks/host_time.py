"""The host's time for a call beside the GPU's, as predicted without one:  python -m benchmarks.host_time

    host   CALL + LAUNCH for every kernel and product that is launched; tests/test_launches.py counts those
    GPU    for each class the longer of arithmetic and traffic of each kernel that a slab is made of: normalise w, exponentials,
           U = E ŵ in forward; dŵ = Eᵀ x̂, project in backward, and the first two again where E was not kept

Only what grows with the classes is counted on the GPU, and nothing but launches on the host, so that the host's share comes out
too large rather than too small. In bfloat16, of a float32 table.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from cosface_kernels.ops import slabs
from cosface_kernels.ops.table import Table

# Launches of a table of one slab, and of each further one: Triton's and PyTorch's, products included.
FORWARD, SLAB_FORWARD = 11, 4
BACKWARD, SLAB_BACKWARD = 10, 2  # where E is kept
BACKWARD_RECOMPUTED, SLAB_RECOMPUTED = 13, 4
# Seconds, assumed: 1.5 times what Python and PyTorch take on one core of an AMD EPYC (Zen 5), and 2.5 us of a driver.
CALL, LAUNCH = 120e-6, 16e-6


class Gpu(NamedTuple):
    chip: slabs.Chip
    flops: float  # a second, of a large product
    exponentials: float  # flops a second
    bandwidth: float  # bytes a second


# docs/notes/gpu.md has where they come from.
H200 = Gpu(slabs.Chip(132, 150 * 10**9), 650e12, 0.6 * 989e12, 4.3e12)
H100 = Gpu(slabs.Chip(132, 85 * 10**9), 650e12, 0.6 * 989e12, 3.0e12)


class Prediction(NamedTuple):
    slabs: int
    launches: int
    host: float  # seconds
    gpu: float  # seconds

    @property
    def share(self):
        return self.host / self.gpu


def slab_rows(num_rows, num_classes, size, chip):
    features = SimpleNamespace(shape=(num_rows, size), device=torch.device("cuda"))
    table = Table(torch.empty(num_classes, size, device="meta"))
    return slabs.slab_rows(features, table, torch.bfloat16, chip)


def forward(num_rows, num_classes, size, gpu):
    count = slabs.ceil_div(num_classes, slab_rows(num_rows, num_classes, size, gpu.chip))
    product, normalised, exponentials = _parts(num_rows, size, gpu)
    return _predicted(count, FORWARD, SLAB_FORWARD, num_classes * (normalised + exponentials + product))


def backward(num_rows, num_classes, size, gpu, *, kept):
    count = slabs.ceil_div(num_classes, slab_rows(num_rows, num_classes, size, gpu.chip))
    product, normalised, exponentials = _parts(num_rows, size, gpu)
    projected = 12 * size / gpu.bandwidth  # dŵ read, w read, dW written, and dŵ written under the product
    seconds = product + projected + (0 if kept else normalised + exponentials)
    first = BACKWARD if kept else BACKWARD_RECOMPUTED
    return _predicted(count, first, SLAB_BACKWARD if kept else SLAB_RECOMPUTED, num_classes * seconds)


def _parts(num_rows, size, gpu):
    """Seconds for each class: a product of E, normalise, exponentials."""
    flops, traffic = 2 * num_rows * size, 2 * (num_rows + size) / gpu.bandwidth
    return max(flops / gpu.flops, traffic), 6 * size / gpu.bandwidth, max(flops / gpu.exponentials, traffic)


def _predicted(count, first, further, seconds):
    launches = first + further * (count - 1)
    return Prediction(count, launches, CALL + LAUNCH * launches, seconds)


def main():
    print("D = 512, forward / backward of kept / of recomputed exponentials\n")
    print("| GPU | N | C | slabs | launches | host, ms | GPU, ms | host of GPU, % |\n| --- " + "| --- " * 7 + "|")
    for name, gpu in (("H100", H100), ("H200", H200)):
        for num_classes in (10**6, 10**7):
            for num_rows in (256, 512, 1024, 4096):
                shape = num_rows, num_classes, 512, gpu
                found = forward(*shape), backward(*shape, kept=True), backward(*shape, kept=False)
                columns = [[p.launches for p in found], [f"{p.host * 1e3:.2f}" for p in found]]
                columns += [[f"{p.gpu * 1e3:.1f}" for p in found], [f"{p.share:.0%}"[:-1] for p in found]]
                cells = [name, num_rows, num_classes, found[0].slabs, *(" / ".join(map(str, column)) for column in columns)]
                print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
