"""Whole steps, forward and backward in bfloat16 with a float32 table: by budget, slab and form, eager and as a CUDA graph."""

import functools
import gc
import itertools

import torch

from cosface_kernels import cosface_loss
from cosface_kernels.ops import slabs
from cosface_kernels.ops.table import Table

from .. import harness, measure
from ..ends import Skip
from ..peers import autocast, inputs, step
from . import gpu

CHECK_CLASSES = 5000  # of the errors: a last slab that is ragged
BYTES_A_WEIGHT = 12  # the table, its gradient, and the one that the step before it made


def steps(cases, device=None):
    device = device or gpu.device()
    for shape, group in itertools.groupby(cases, lambda case: (case["rows"], case["classes"], case["size"])):
        yield from _of_one_shape(shape, list(group), device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _of_one_shape(shape, cases, device):
    n, c, d = shape
    if short := gpu.shortage(BYTES_A_WEIGHT * c * d, device):
        yield from ({**case, "line": short} for case in cases)
        return
    tensors, fitting = inputs(*shape, device), []
    for case in cases:
        kept = 2 * n * c if case["budget"] == "all" else 0
        if short := gpu.shortage(8 * c * d + kept, device):
            yield {**case, "line": short}
        else:
            fitting.append(_case(case, tensors, device))
    yield from harness.measure(fitting, device, turns=2)


def loss(case):
    """cosface_loss with a case's budget, under autocast."""
    return autocast(functools.partial(cosface_loss, backend="triton", memory_budget=gpu.BUDGETS[case["budget"]]))


def _case(case, tensors, device):
    function = loss(case)

    def run(index=0):
        with gpu.slabs(case.get("slab")), gpu.forms(case.get("forms")):
            return step(function, *tensors)

    def check():
        """A form's errors, the memory of its step and the slab size."""
        found = {}
        with gpu.slabs(case.get("slab")), gpu.forms(case.get("forms")):
            if case.get("forms"):
                found.update(_errors(function, case["rows"], case["size"], device))
            if device.type == "cuda":
                found["slab_rows"] = slabs.slab_rows(tensors[0], Table(tensors[1].detach()), torch.bfloat16)
                found["peak_bytes"] = measure.gpu_peak_bytes(function, tensors)
        return found

    calls = max(1, min(10, 10**9 // (case["rows"] * case["classes"]))) if device.type == "cuda" else 1
    return harness.Case(case, run, check, calls=calls, graph=case.get("graph", True))


def _errors(function, num_rows, size, device):
    """Errors beside float64, few classes; right is at most twice the error of plain PyTorch under autocast, and a rounding."""
    check = measure.Check(inputs(num_rows, CHECK_CLASSES, size, device))
    return check.judged(check.run(function), "bfloat16")


def profile(cases, device=None):
    """Milliseconds and calls of each kernel in one step, the longest first."""
    device = device or gpu.device()
    for case in cases:
        num_rows, num_classes, size = case["shape"]
        if short := gpu.shortage(BYTES_A_WEIGHT * num_classes * size, device):
            yield {**case, "line": short}
            continue
        tensors, function = inputs(num_rows, num_classes, size, device), loss(case)
        for _ in range(2):
            step(function, *tensors)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            step(function, *tensors)
            torch.cuda.synchronize()
        events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
        kernels = [[event.key[:80], event.count, event.self_device_time_total / 1e3] for event in events[:16]]
        yield {**case, "kernels": kernels}


def candidates(cases, device=None):
    """A step that keeps no E, with the slab loop as it is and with the forms that the package has beside it."""
    device = device or gpu.device()
    known = gpu.known_forms()
    wanted = [case for case in cases if all(known.get(kernel, set()) >= set(form) for kernel, form in case["forms"].items())]
    wanted = [case for case in wanted if case["forms"].keys() <= known.keys()]
    if not any(case["forms"] for case in wanted):
        raise Skip("the package's table of forms lists none of these")
    yield from steps(wanted, device)
