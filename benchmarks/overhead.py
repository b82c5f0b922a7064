"""What a call costs beside its kernels, under bfloat16 autocast:  python -m benchmarks.overhead

On a GPU, at N = 512, C = 10,000, D = 512: a step as Python runs it, and as a CUDA graph replays it, without a host. The
difference is the overhead.

On a CPU the host's own time for the triton backend's call, which is a GPU's lower bound where kernels take less: nothing is
launched (what Triton takes for each kernel that tests/test_launches.py counts comes on top), products are empty, PyTorch's small
operators are those of a CPU.

Beside it plain PyTorch. Medians, in microseconds.
"""

import contextlib
import functools
import json
import time
from statistics import median
from unittest import mock

import torch

from cosface_kernels import cosface_loss, reference
from cosface_kernels.ops import backends, operators

from .measure import environment
from .peers import inputs

SHAPE = {"cuda": (512, 10_000, 512), "cpu": (8, 128, 64)}
PEERS = {
    "cosface_loss, triton": functools.partial(cosface_loss, backend="triton"),
    "plain PyTorch": reference.cosface_loss,
}
CALLS = 300


def overhead(device):
    """{peer: {what: microseconds}}."""
    features, weight, labels = inputs(*SHAPE[device.type], device)
    tensors = features.detach().bfloat16().requires_grad_(), weight, labels
    with _launching_nothing() if device.type == "cpu" else contextlib.nullcontext():
        return {name: _times(function, tensors) for name, function in PEERS.items()}


def _times(function, tensors):
    def forward():
        with torch.autocast(tensors[0].device.type, torch.bfloat16):
            return function(*tensors)

    def step():
        loss = forward()
        return loss.detach(), *torch.autograd.grad(loss, tensors[:2])

    found = {"forward": _microseconds(forward), "forward and backward": _microseconds(step)}
    if tensors[0].is_cuda:
        found["replayed by a CUDA graph"] = _microseconds(_captured(step).replay)
        found["overhead"] = found["forward and backward"] - found["replayed by a CUDA graph"]
    return found


def _captured(step):
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph


def _microseconds(function):
    """Of one call, the device being done with it."""
    times = []
    for _ in range(CALLS + CALLS // 5):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[CALLS // 5 :]) * 1e6


@contextlib.contextmanager
def _launching_nothing():
    """The triton backend takes tensors of a CPU, and computes nothing."""
    from triton.runtime.jit import JITFunction

    from cosface_kernels.ops.backends import triton_backend

    def product(left, right, out=None):
        return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32) if out is None else out

    def parts(left, right, count):
        return left.new_empty(count, left.shape[0], right.shape[1], dtype=torch.float32)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", lambda *arguments, **keywords: None),
            (backends, "unusable", lambda *arguments: None),
            (operators, "check_labels", lambda *arguments: None),
            (triton_backend, "accumulated", product),
            (triton_backend, "in_parts", parts),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


if __name__ == "__main__":
    found_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    print(json.dumps({"environment": environment(found_device), **overhead(found_device)}, indent=1))
