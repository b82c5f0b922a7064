"""Measures the machine's ceilings, and the time, peak memory and error of a step.

python -m benchmarks.measure PEER PRECISION N C D     the peak memory of one step on the CPU, in this process alone
"""

import contextlib
import datetime
import importlib.metadata
import operator
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from cosface_kernels.ops.memory import available_bytes
from cosface_kernels.training.environment import cpu_model

from .harness import relative_error, synchronize
from .peers import in_precision, inputs, peers, plain, step
from .source import commit, first_line, search_path

# Matrix products that the ceilings are taken from: M, N, K. On a CPU all three matrices stay in cache.
PRODUCT = {"cpu": (512, 512, 1024), "cuda": (8192, 8192, 8192)}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
CEILING_CALLS, CEILING_SECONDS = 50, 0.5  # of one measurement; cosface bench makes one in every turn and keeps the best
# Errors are measured with at most this many logits: float64 takes up to seven matrices of them, half a GB each.
CHECK_LOGITS = 2**26
CHECK_BYTES_PER_LOGIT = 56
# An error may be this many times plain PyTorch's in the same precision, plus one rounding: of an exponent of up to 64 in float32,
# of the result in bfloat16.
ERROR_FACTOR = 2.0
ERROR_ROUNDING = {"float32": 64 * 2.0**-24, "bfloat16": 2.0**-9}


def environment(device):
    """The facts that a figure depends on beside the code: device, date, versions, commit."""
    found = {
        "device": machine(device),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    for package in ("triton", "pytorch-metric-learning", "cut-cross-entropy", "liger-kernel", "quack-kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"


def product_rate(device, precision):
    """Flops a second of a matrix product."""
    rows, columns, depth = PRODUCT[device.type]
    left = torch.randn(rows, depth, device=device).to(getattr(torch, precision))
    right = torch.randn(depth, columns, device=device).to(left.dtype)
    return 2 * rows * columns * depth / _best_seconds(lambda: torch.mm(left, right), device)


def copy_rate(device):
    """Bytes read and written a second by a copy on the device."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(function, device):
    """The fastest of some 50 calls after the first, of fewer where they take long."""
    seconds(function, device)
    taken = []
    while not taken or (len(taken) < CEILING_CALLS and sum(taken) < CEILING_SECONDS):
        taken.append(seconds(function, device))
    return min(taken)


def seconds(function, device):
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def processor_seconds(function):
    """Seconds of processor time of all threads of this process, by which other processes show little."""
    start = time.process_time()
    function()
    return time.process_time() - start


def free_bytes(device):
    """Bytes that can still be allocated, PyTorch's own cache included."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return available_bytes(device) + cached


def shortage(needed, device):
    """A sentence saying why that many bytes do not fit, or None."""
    free = free_bytes(device)
    return f"does not fit: needs about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB there" if needed > free else None


def check_classes(num_rows, num_classes, device):
    """The most classes, up to num_classes, with which the expression in float64 fits comfortably."""
    logits = min(CHECK_LOGITS, free_bytes(device) // (2 * CHECK_BYTES_PER_LOGIT))
    return min(num_classes, max(logits // num_rows, 2))


class Check:
    """The errors of peers on one problem, and whether they are right."""

    def __init__(self, tensors, expression=plain):
        """expression: what all of them should compute, in plain PyTorch."""
        self.tensors, self.expression = tensors, expression
        wide = (tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors)
        self.exact = step(expression, *wide)
        self._allowed = {}

    def run(self, function):
        return step(function, *self.tensors)

    def errors(self, function):
        return self.relative(self.run(function))

    def relative(self, results):
        """‖got - exact‖ / ‖exact‖ of loss, dX, dW and db, or of the first of them."""
        return [relative_error(got, exact) for got, exact in zip(results, self.exact, strict=False)]

    def judged(self, results, precision, rounding=0.0):
        """{"errors", "wrong"} of results in a precision: right are those within ERROR_FACTOR of plain PyTorch's in it, and a
        rounding; rounding: another one, of the last.
        """
        if precision not in self._allowed:
            errors = self.errors(in_precision(precision, self.expression))
            self._allowed[precision] = [ERROR_FACTOR * error + ERROR_ROUNDING[precision] for error in errors]
        errors, (*allowed, last) = self.relative(results), self._allowed[precision]
        # Written so that a NaN is wrong too.
        return {"errors": errors, "wrong": not all(map(operator.le, errors, [*allowed, last + rounding]))}


def gpu_peak_bytes(function, tensors):
    """The allocator's peak in one step beyond its inputs and gradients."""
    device = tensors[0].device
    before = settled_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = step(function, *tensors)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before - sum(result.nbytes for result in results)


def settled_bytes(device):
    """Bytes of living tensors, after autograd's thread has freed those of the last step, which may be after the step returned."""
    synchronize(device)
    held, before = torch.cuda.memory_allocated(device), None
    while held != before:
        time.sleep(0.01)
        held, before = torch.cuda.memory_allocated(device), held
    return held


def cpu_peak_bytes(peer, shape):
    """The peak in one step on the CPU, in a process of its own; None if the system does not report it.

    Raises:
        RuntimeError: that process failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Large blocks go back to the system when they are freed, so that the first step leaves nothing for the second to reuse.
    variables = {"PYTHONPATH": search_path(), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", "benchmarks.measure", peer.name, peer.precision, *map(str, shape)]
    run = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if run.returncode < 0:
        raise RuntimeError(f"its process was killed by signal {-run.returncode}")
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeError(f"in a process of its own: {lines[-1]}")
    return int(run.stdout.split()[-1])


def own_peak_bytes(peer, shape):
    """VmHWM of one step beyond inputs and gradients, after a warm-up: at the same size where that compiles."""
    num_rows, num_classes, size = shape
    step(peer.function, *inputs(num_rows, num_classes if peer.compiled else min(num_classes, 1000), size))
    tensors = inputs(*shape)
    gradients = [torch.ones_like(tensor) for tensor in tensors[:2]]
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark starts again from what is held now
    before = high_water_bytes()
    del gradients
    step(peer.function, *tensors)
    return max(high_water_bytes() - before, 0)


def high_water_bytes():
    """The peak of this process's memory. ru_maxrss would be the parent's if that was larger."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main():
    name, precision, *shape = sys.argv[1:]
    (peer,) = (peer for peer in peers("cpu", [precision]) if peer.name == name)
    print(own_peak_bytes(peer, tuple(map(int, shape))))


if __name__ == "__main__":
    main()
