"""Stages that are other programs: the tests, the sanitizer and the profiler. They stay in the stage's process group."""

import collections
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from ..ends import Skip
from ..source import ROOT
from . import gpu

WORKERS = 12
# Of the stage's 150: then pytest is asked to end, and leaves suite.xml; and how long it may wait for its workers to do so.
SUITE_SECONDS, SUITE_GRACE = 125, 15
SECONDS_PER_TEST = 60
KERNELS = "exponential|exponents|maxima|attend|normalize|project|add_pull|finish|sum_targets|update|rows"


def suite(cases, out):
    """`pytest -m gpu`, compiling in several processes; suite.xml and suite.log in `out`."""
    gpu.device()
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-ra",
        "-vv",  # a line for each test, should there be no time for suite.xml
        f"--junitxml={out}/suite.xml",
        "tests",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count()))]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={SECONDS_PER_TEST}", "--timeout-method=thread"]
    with (out / "suite.log").open("w") as log:
        process, stopped = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT), ""
        try:
            process.wait(SUITE_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            stopped = f", asked to after {SUITE_SECONDS} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SUITE_GRACE)
            process.kill()
        status = process.wait()
    found = results(out / "suite.xml") if (out / "suite.xml").exists() else {}
    yield {"kind": "suite", **found, **({"error": f"pytest ended with {status}{stopped}"} if status else {})}


def results(path):
    """{"passed": n, "failed": n, ..., "failures": [[test, first line of its message]]} of a JUnit file."""
    counts, failures = collections.Counter(), []
    for test in ElementTree.parse(path).iter("testcase"):
        ends = {child.tag: child for child in test}
        kind = next((tag for tag in ("error", "failure", "skipped") if tag in ends), "passed")
        counts[kind] += 1
        if kind in ("error", "failure"):
            failures.append([f"{test.get('classname')}::{test.get('name')}", (ends[kind].get("message") or "")[:300]])
    return {**counts, "failures": failures}


def sanitizer(cases):
    """compute-sanitizer over calls of the stage smoke. Without PyTorch's cache each tensor is an allocation of its own."""
    gpu.device()
    for case in cases:
        command = [_tool("compute-sanitizer"), "--tool", case["tool"], "--error-exitcode", "9", "--print-limit", "20"]
        command += [option for name in case.get("kernels", ()) for option in ("--kernel-name", f"kns={name}")]
        command += [sys.executable, "-m", "benchmarks.gpu_check.smoke", *map(str, case.get("calls", ()))]
        variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(run.stdout, flush=True)
        lines = [line for line in run.stdout.splitlines() if line.startswith("=========")]
        row = {"kind": "sanitizer", **case, "lines": lines[:60]}
        yield {**row, **({"error": f"exit status {run.returncode}"} if run.returncode else {})}


def ncu(cases, out):
    """Nsight Compute over one step's `exponentials` and a product; ncu.txt in `out`. The clocks stay as they are."""
    gpu.device()
    target = [sys.executable, "-m", "benchmarks.gpu_check.profiled"]
    command = [_tool("ncu"), "--clock-control", "none", "--set", "full", "-k", f"regex:{KERNELS}|gemm", "-c", "8", *target]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (out / "ncu.txt").write_text(run.stdout)
    wanted = (
        r"^\s+(\w[\w:]*).*Context|^\s+(Duration|SM Frequency|Compute \(SM\) Throughput|Memory Throughput|L2 Hit Rate)\s+(.*)$"
    )
    lines = [line.strip() for line in run.stdout.splitlines() if re.match(wanted, line)]
    yield {"kind": "ncu", "lines": lines, **({"error": f"exit status {run.returncode}"} if run.returncode else {})}


def _tool(name):
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin:/opt/nvidia/nsight-compute/2025.3.1")
    if not found:
        raise Skip(f"{name} is not installed")
    return found
