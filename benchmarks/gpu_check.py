"""Everything that only a GPU can tell, in one command of at most eight minutes:  python -m benchmarks.gpu_check --out DIR

DIR/gpu_check.json: the environment and a result or an error of each part. It is written again after every part, so whatever ends
the command loses nothing. Runs from a source tree with torch and triton alone; pytest and the peers are used where they can be
imported (wheels on PYTHONPATH will do). Each part is a process of its own: a lost GPU or a hang costs that part only.

    ceilings       matrix products of 8192 x 8192 x 8192 and a copy on the device
    tests          python -m pytest -m gpu
    overhead       benchmarks/overhead.py: what the host costs at a small table, in eager mode and not in a CUDA graph
    kernels        what each kernel of a step takes, from torch.profiler
    large table    C = 100,000,000, D = 512 in bfloat16 (102 GB): forward and the features' gradient
    bench N C D    `cosface bench` at four sizes; what does not fit says so
"""

import argparse
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from cosface_kernels import cosface_loss

from . import bench, measure
from .overhead import overhead
from .peers import PLAIN, PRECISIONS, inputs, peers, step

SECONDS = 470.0  # of the eight minutes; the rest is for ending
SHAPES = [(512, 100_000, 512), (1024, 1_000_000, 512), (4096, 1_000_000, 512), (1024, 10_000_000, 512)]
LARGE_TABLE = [(1024, 100_000_000, 512), (1024, 50_000_000, 512)]  # the second for a GPU of 80 GB
PROFILED = (1024, 1_000_000, 512)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="default: ./gpu-check")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: there is no GPU that this torch can use", file=sys.stderr)
        return 1
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](torch.device("cuda"))))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    return check(arguments.out)


def check(out):
    path, deadline = out / "gpu_check.json", time.monotonic() + SECONDS
    content = {"environment": measure.environment(torch.device("cuda")), "parts": {}, "complete": False}
    for name, limit, function in plan(out, deadline):
        started = time.monotonic()
        limit = min(limit, deadline - started)
        print(f"gpu_check: {name}, at most {limit:.0f} s", file=sys.stderr, flush=True)
        try:
            result = function(limit) if limit > 5 else {"error": "no time was left for it"}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        result["part_seconds"] = round(time.monotonic() - started, 1)
        content["parts"][name] = result
        bench.write_json(path, content)
        if "error" in result:
            print(f"gpu_check: {name}: {result['error']}", file=sys.stderr, flush=True)
    content["complete"] = True
    bench.write_json(path, content)
    print(f"gpu_check: {path}")
    return 0


def plan(out, deadline):
    """(name, seconds at most, function of the seconds) of every part; the sizes share evenly what the others leave."""
    yield "ceilings", 40, part("ceilings")
    yield "tests", 130, run_tests
    yield "overhead", 25, part("overhead")
    yield "kernels", 45, part("kernels")
    yield "large table", 60, part("large table")
    for index, shape in enumerate(SHAPES):
        share = (deadline - time.monotonic()) / (len(SHAPES) - index)
        yield "bench {} {} {}".format(*shape), share, benchmark(shape, out)


def run_tests(limit):
    if importlib.util.find_spec("pytest") is None:
        return {"error": "pytest is not installed"}
    # Compiling kernels takes most of it: in several processes where pytest-xdist is there.
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-ra", *parallel, "tests"]
    status, output = _run(command, limit)
    return {"status": status, "output": output[-8000:], **({"error": "tests failed or ran out of time"} if status else {})}


def part(name):
    """A part of PARTS in a process of its own."""

    def run(limit):
        status, output = _run([sys.executable, "-m", "benchmarks.gpu_check", "--part", name], limit)
        if status:
            return {"error": f"exit status {status}: {output[-2000:]}"}
        return json.loads(output.splitlines()[-1])

    return run


def benchmark(shape, out):
    """`cosface bench` at one size; once more without a peer that took the GPU down with it, while time is left."""

    def run(limit):
        deadline, without, path = time.monotonic() + limit, [], out / "bench.json"
        while True:
            path.unlink(missing_ok=True)
            sizes = [f"--{name}={value}" for name, value in zip(("rows", "classes", "size"), shape, strict=True)]
            command = [sys.executable, "-m", "benchmarks", "--device=cuda", *sizes, f"--json={path}"]
            command += [f"--without={row['name']}, {row['precision']}" for row in without]
            status, output = _run(command, deadline - time.monotonic(), echo=True)
            if not path.exists():
                return {"error": f"exit status {status}: {output[-2000:]}"}
            report = json.loads(path.read_text())
            path.unlink()
            lost = [row for row in report["rows"] if row.get("lost_device")]
            if not lost or deadline - time.monotonic() < 20:
                return {**report, "rows": report["rows"] + without, **({"output": output[-2000:]} if status else {})}
            without += lost

    return run


def _run(command, limit, echo=False):
    """(exit status, output) of a command from the source tree; past the limit it is interrupted, then killed."""
    paths = os.pathsep.join([str(measure.ROOT), *measure.search_path()])
    process = subprocess.Popen(
        command,
        cwd=measure.ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=8)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        output += f"\nstopped after {limit:.0f} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if echo:
        print(output, flush=True)
    return process.returncode, output


def _ceilings(device):
    rates = {precision: measure.product_rate(device, precision) / 1e12 for precision in PRECISIONS}
    return {"TFLOP/s of 8192 x 8192 x 8192": rates, "GB/s of a copy": measure.copy_rate(device) / 1e9}


def _large_table(device):
    """Forward and the features' gradient over a frozen bfloat16 table; the error is that with fewer classes."""
    result = {"error_at_20000_classes": _error_of_low_table(device), "runs": []}
    for num_rows, num_classes, size in LARGE_TABLE:
        needed, free = 1.05 * num_classes * size * 2 + 2e9, measure.free_bytes(device)
        run = {"shape": [num_rows, num_classes, size]}
        result["runs"].append(run)
        if needed > free:
            run["error"] = f"does not fit: needs about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB there"
            continue
        features, weight, labels = inputs(num_rows, num_classes, size, device, torch.bfloat16)
        weight.requires_grad_(False)
        table = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        one_step = functools.partial(_features_step, features, weight, labels)
        run["seconds"] = [measure.seconds(one_step, device) for _ in range(4)]
        run["bytes_beyond_the_table"] = torch.cuda.max_memory_allocated(device) - table
        run["TFLOP/s of 4 N C D"] = 4 * num_rows * num_classes * size / min(run["seconds"]) / 1e12
        break
    return result


def _features_step(features, weight, labels):
    with torch.autocast(features.device.type, dtype=torch.bfloat16):
        loss = cosface_loss(features, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss, features)


def _error_of_low_table(device):
    """Relative errors of (loss, dX): ours, and plain PyTorch's under autocast."""
    features, weight, labels = inputs(1024, 20_000, 512, device, torch.bfloat16)
    check = measure.Check((features, weight, labels))
    plain = next(peer for peer in peers(device, ["bfloat16"]) if peer.name == PLAIN)
    ours = _features_step(features, weight.detach(), labels)
    return {"cosface_loss": check.relative(ours), PLAIN: check.errors(plain.function)[:2]}


def _kernels(device):
    """Milliseconds and calls of each kernel in one step, the longest first."""
    tensors = inputs(*PROFILED, device)
    results = {"shape": list(PROFILED)}
    for peer in peers(device):
        if peer.missing or not peer.name.startswith("cosface_loss, triton"):
            continue
        for _ in range(2):
            step(peer.function, *tensors)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(peer.function, *tensors)
            torch.cuda.synchronize()
        events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
        results[peer.key] = [[event.key[:80], event.count, event.self_device_time_total / 1e3] for event in events[:12]]
    return results


PARTS = {"ceilings": _ceilings, "overhead": overhead, "large table": _large_table, "kernels": _kernels}

if __name__ == "__main__":
    raise SystemExit(main())
