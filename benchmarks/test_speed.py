"""pytest-benchmark suites:  python -m pytest benchmarks

A step, forward alone and with backward, of every peer; and each native kernel of the cpu backend on one slab.
"""

import functools

import pytest
import torch

from cosface_kernels import cosface_loss
from cosface_kernels.ops.backends import cpu_kernels, cpu_library

from .measure import synchronize
from .peers import inputs, peers, step

SHAPES = [(128, 10_000, 512), (512, 100_000, 128)]
SLAB = (512, 2688, 512)  # one slab's classes
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("part", ["forward", "forward + backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("peer", peers(DEVICE), ids=lambda peer: peer.key)
def test_step(benchmark, peer, shape, part):
    if peer.missing:
        pytest.skip(peer.missing)
    tensors = inputs(*shape, DEVICE)

    def run():
        results = [peer.function(*tensors).detach()] if part == "forward" else step(peer.function, *tensors)
        synchronize(DEVICE)
        return results

    benchmark.group = f"{part}, {shape}"
    assert all(result.isfinite().all() for result in benchmark(run))


@pytest.mark.skipif(not cpu_library.available(), reason=f"no native kernels: {cpu_library.unavailable()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", ["normalize", "exponentials", "accumulate", "table_gradient"])
def test_kernel(benchmark, part, dtype, monkeypatch):
    """Calls a kernel again with the arguments of a step."""
    calls, kernel = [], getattr(cpu_kernels.kernels(dtype), part)

    def record(*arguments, **named):
        calls.append((arguments, named))
        kernel(*arguments, **named)

    monkeypatch.setattr(cpu_kernels.kernels(dtype), part, record)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        step(functools.partial(cosface_loss, backend="cpu"), *inputs(*SLAB))
    ((arguments, named),) = calls
    benchmark.group = f"{part}, {SLAB}"
    benchmark(kernel, *arguments, **named)
    tensors = [each for given in (*arguments, *named.values()) for each in (given if isinstance(given, tuple) else [given])]
    floats = [argument for argument in tensors if isinstance(argument, torch.Tensor) and argument.is_floating_point()]
    assert all(tensor.isfinite().all() for tensor in floats)
