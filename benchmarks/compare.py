"""cosface_loss beside plain PyTorch: time, memory and error of one forward and backward, as a Markdown table.

    python -m benchmarks.compare [--rows N] [--classes C] [--size D] [--repeats R]

Time: medians over interleaved repeats in one process. Memory: peak beyond inputs and gradients, each peer in a process of its own
(VmHWM; on a GPU the allocator's peak). Error: relative to the plain expression in float64, on classes in groups at cosine 0.8.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from .peers import PEERS, inputs, plain, step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 512), ("classes", 100_000), ("size", 512), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory-of", metavar="PEER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = arguments.rows, arguments.classes, arguments.size
    if arguments.memory_of:
        print(peak_memory(PEERS[arguments.memory_of], shape, device))
        return
    features, weight, labels = inputs(*shape, device)
    exact = step(plain, features.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels)
    seconds = {name: [] for name in PEERS}
    errors = {}
    for repeat in range(arguments.repeats + 1):
        for name, function in PEERS.items():
            start = time.perf_counter()
            results = step(function, features, weight, labels)
            synchronize(device)
            if repeat == 0:  # warm-up, and the check of correctness
                errors[name] = [float((got - true).norm() / true.norm()) for got, true in zip(results, exact, strict=True)]
            else:
                seconds[name].append(time.perf_counter() - start)
    print(f"N = {shape[0]}, C = {shape[1]:,}, D = {shape[2]}, {processor(device)}, torch {torch.__version__}\n")
    print("| | ms (median) | times plain PyTorch's speed | extra peak memory, MB | error of loss | dX | dW |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    base = statistics.median(seconds["plain PyTorch"])
    for name in PEERS:
        median = statistics.median(seconds[name])
        memory = int(subprocess.check_output([*command(arguments), "--memory-of", name], text=True))
        figures = f"{1e3 * median:.0f} | {base / median:.2f} | {memory / 1e6:.0f}"
        print(f"| {name} | {figures} | " + " | ".join(f"{error:.1e}" for error in errors[name]) + " |", flush=True)


def peak_memory(function, shape, device):
    """Bytes at the peak of a step beyond inputs and gradients, after a warm-up at C = 1,000."""
    step(function, *inputs(shape[0], 1000, shape[2], device))
    tensors = inputs(*shape, device)
    gradients = [torch.ones_like(tensor) for tensor in tensors[:2]]
    reset_high_water(device)
    before = high_water(device)
    del gradients
    step(function, *tensors)
    return high_water(device) - before


def high_water(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) * 1024


def reset_high_water(device):
    """From here on: making the inputs took more than they do."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def command(arguments):
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("rows", "classes", "size")]
    return [sys.executable, "-m", "benchmarks.compare", *sizes]


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def processor(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    main()
