"""Training and the largest tables: a hundred million identities where the memory is, losses that fall."""

import functools
import gc

import torch

from cosface_kernels import cosface_loss

from .. import harness, measure
from ..peers import inputs
from . import gpu

SMALLER = 2  # a table that does not fit is tried with so many times fewer identities


def train(cases, device=None):
    device = device or gpu.device()
    for case in cases:
        run = _features if case["kind"] == "features" else _training
        try:
            yield run(case, device)
        except (RuntimeError, ValueError, TypeError) as error:
            message = harness.first_line(error)
            yield {**case, "error": message}
            harness.ensure(device, message)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _fitting(case, name, needed, device):
    """The case with as many identities as fit, and a line where those are fewer."""
    wanted = case[name]
    while short := gpu.shortage(needed(case), device):
        case = {**case, name: case[name] // SMALLER, "line": f"{wanted:,} {name}: {short}"}
    return case


def _features(case, device):
    """Forward and the features' gradient over a frozen bfloat16 table."""
    case = _fitting(case, "classes", lambda case: 1.05 * case["classes"] * case["size"] * 2 + 2e9, device)
    features, weight, labels = inputs(case["rows"], case["classes"], case["size"], device, torch.bfloat16)
    weight.requires_grad_(False)

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16), gpu.slabs(case["slab"]):
            loss = cosface_loss(features, weight, labels)
        return torch.autograd.grad(loss, features)

    table = measure.settled_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = [measure.seconds(step, device) for _ in range(4)][1:]
    return {**case, "seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated(device) - table}


def _training(case, device):
    """Steps of a head, its fused optimiser and a backbone, on batches that can be learnt."""
    try:
        from .. import training
    except ModuleNotFoundError as error:
        return {**case, "line": f"needs {error.name}, which is not installed"}
    keys = ("identities", "size", "table_format", "state_format", "momentum")

    def needed(case):
        return training.table_bytes(**{key: case[key] for key in keys if key in case}) + 4e9

    case = _fitting(case, "identities", needed, device)
    optimizer = functools.partial(
        training.FusedSGD,
        **{**training.OPTIONS, "momentum": case.get("momentum", training.OPTIONS["momentum"])},
        state_format=case.get("state_format", "float32"),
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = training.Run(case["identities"], case["size"], optimizer, rows=case["rows"], table_format=case["table_format"])
    losses, seconds = zip(*(run.step() for _ in range(case["steps"])), strict=True)
    falls = case["steps"] < 20 or losses[-1] < losses[0]
    return {**case, "losses": losses, "seconds": seconds[1:], "peak_bytes": training.peak_bytes(), "wrong": not falls}
