"""Measures the time of a call beside its kernels, under bfloat16 autocast:  python -m benchmarks.overhead

On a GPU, at N = 512, C = 10,000, D = 512: a step as Python runs it, and as a CUDA graph replays it, without a host. The
difference is the overhead.

On a CPU the host's own time for the triton backend's call, which is a GPU's lower bound where kernels take less: nothing is
launched (what Triton takes for each kernel that tests/test_launches.py counts comes on top), products are empty, PyTorch's small
operators are those of a CPU.

Beside it plain PyTorch. Medians, in microseconds.
"""

import contextlib
import functools
from statistics import median
from unittest import mock

import torch

from cosface_kernels import cosface_loss, reference
from cosface_kernels.ops import backends, label_checks

from . import harness, measure
from .peers import inputs
from .record import keep, parser

SHAPE = {"cuda": (512, 10_000, 512), "cpu": (8, 128, 64)}
PEERS = {
    "cosface_loss, triton": functools.partial(cosface_loss, backend="triton"),
    "plain PyTorch": reference.cosface_loss,
}
CALLS = 300


def rows(device):
    """{"name": peer, "microseconds": {what: of a call}} of each."""
    features, weight, labels = inputs(*SHAPE[device.type], device)
    tensors = features.detach().bfloat16().requires_grad_(), weight, labels
    with _launching_nothing() if device.type == "cpu" else contextlib.nullcontext():
        for name, function in PEERS.items():
            yield {"name": name, "microseconds": _times(function, tensors)}


def _times(function, tensors):
    device = tensors[0].device

    def forward():
        with torch.autocast(device.type, torch.bfloat16):
            return function(*tensors)

    def step():
        loss = forward()
        return loss.detach(), *torch.autograd.grad(loss, tensors[:2])

    found = {"forward": _microseconds(forward, device), "forward and backward": _microseconds(step, device)}
    if device.type == "cuda":
        found["replayed by a CUDA graph"] = _microseconds(harness.captured(step).replay, device)
        found["overhead"] = found["forward and backward"] - found["replayed by a CUDA graph"]
    return found


def _microseconds(function, device):
    """Microseconds of one call, until the device is done with it."""
    times = [measure.seconds(function, device) for _ in range(CALLS + CALLS // 5)]
    return median(times[CALLS // 5 :]) * 1e6


@contextlib.contextmanager
def _launching_nothing():
    """Context manager in which the triton backend takes CPU tensors and computes nothing."""
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
            (label_checks, "check_labels", lambda *arguments: None),
            (triton_backend, "accumulated", product),
            (triton_backend, "in_parts", parts),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def table(record):
    """Markdown."""
    columns = list(record["rows"][0]["microseconds"])
    lines = [f"| us on {record['environment']['device']} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row in record["rows"]:
        times = [f"{row['microseconds'][name]:.1f}" for name in columns]
        lines.append(f"| {row['name']} | {' | '.join(times)} |")
    return "\n".join(lines)


def main():
    arguments = parser(__doc__).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    record = {"kind": "overhead", "environment": measure.environment(device), "rows": [], "complete": False}
    return keep(record, arguments.json, lambda save: record["rows"].extend(rows(device)), table)


if __name__ == "__main__":
    raise SystemExit(main())
