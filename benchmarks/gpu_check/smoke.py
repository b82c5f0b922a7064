"""The first minute: does the GPU answer, what machine is it, and does every kernel do what float64 does?

python -m benchmarks.gpu_check.smoke [I ...]      the calls of the stage, or these of them, as the sanitizer's stages run them
"""

import copy
import functools
import hashlib
import json
import os
import platform
import sys
import timeit
from pathlib import Path

import torch
import torch.nn.functional as F

from cosface_kernels import CosFaceLoss, FusedSGD, cosface_loss, margin_softmax_loss, margins, reference
from cosface_kernels.heads import float8

from .. import harness, measure
from ..peers import MARGIN, SCALE, autocast, in_precision, inputs, step
from ..source import first_line
from . import gpu, stages

# Formats of table and state, and a table's error after one step: rounded once more where it has fewer bits.
STEPS = {
    "float32": ("float32", "float32", 1e-5),
    "bfloat16": ("bfloat16", "bfloat16", 2.0**-8),
    "int8": ("bfloat16", "int8", 2.0**-8),
    "float8": ("float8", "int8", 2.0**-4),
}


def answers(cases):
    """Check in a new process that copies and a kernel end."""
    sent = torch.arange(1024.0)
    there = sent.cuda()
    torch.add(there, 1)
    torch.cuda.synchronize()
    if not torch.equal(there.cpu(), sent):
        raise RuntimeError("what was sent to the GPU did not come back")
    yield {"answers": True}


def probe(cases):
    device = gpu.device()
    properties = torch.cuda.get_device_properties(device)
    import triton
    from triton.runtime.cache import triton_key

    key = hashlib.sha256(triton_key().encode()).hexdigest()
    prepared = Path(os.environ.get("TRITON_CACHE_DIR", "")) / "prepared.json"
    if prepared.exists():
        same = json.loads(prepared.read_text())["triton_key"] == key
        yield {"line": f"the prepared Triton cache is {'used' if same else 'of no use: another Triton made it'}"}
    yield {
        "kind": "probe",
        **measure.environment(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "triton": triton.__version__,
        "triton_key": key,
        "numpy": first_line(sys.executable, "-c", "import numpy; print(numpy.__version__)"),
        "gcc": first_line("gcc", "--version"),
        "cpu": platform.processor() or platform.machine(),
        "python_us": min(timeit.repeat("sum(range(1000))", number=1000, repeat=5)) * 1e3,
    }


def smoke(cases, device=None):
    """Every call's errors beside float64; allowed is twice plain PyTorch's in the same precision, and a rounding."""
    device = device or gpu.device()
    for case in cases:
        check = _check_update if "update" in case else _check_graph if "graph" in case else _check
        try:
            yield {"kind": "smoke", **case, **check(case, device)}
        except (RuntimeError, ValueError, TypeError) as error:
            message = harness.first_line(error)
            yield {"kind": "smoke", **case, "error": message}
            harness.ensure(device, message)


def _loss(case, precision):
    """(ours, the plain expression), functions of features, weight, labels."""
    scale, centers = case.get("scale", SCALE), case.get("centers", 1)

    def ours(features, weight, labels):
        options = {
            "scale": scale,
            "backend": "triton",
            "memory_budget": gpu.BUDGETS[case.get("budget", "auto")],
            "centers_per_class": centers,
        }
        return margin_softmax_loss(features, weight, labels, margin=margins.CosFace(MARGIN), **options)

    def plain(features, weight, labels):
        logits = reference.logits(features, weight, scale=scale, centers_per_class=centers)
        return F.cross_entropy(logits - scale * MARGIN * F.one_hot(labels, logits.shape[1]), labels)

    return in_precision(precision, ours), plain


def _check(case, device):
    precision, centers = case.get("precision", "float32"), case.get("centers", 1)
    ours, plain = _loss(case, precision)
    table = getattr(torch, case.get("table", "float32"))
    features, weight, labels = inputs(case["rows"], case["classes"] * centers, case["size"], device, table)
    tensors = features, weight, labels // centers
    check = measure.Check(tensors, plain)
    with gpu.slabs(case.get("slab")), gpu.forms(case.get("forms")):
        results = check.run(ours)
    return check.judged(results, precision)


def _check_graph(case, device):
    """Check that a replay of a CUDA graph has the bits of the eager step."""
    tensors = inputs(case["rows"], case["classes"], case["size"], device)
    function = functools.partial(step, autocast(functools.partial(cosface_loss, backend="triton")), *tensors)
    eager, results = function(), []
    if device.type == "cuda":
        graph = harness.captured(lambda: results.append(function()))
        graph.replay()
        torch.cuda.synchronize()
    else:
        results.append(function())
    return {"wrong": not all(map(torch.equal, results[-1], eager))}


def _check_update(case, device):
    """Check one step of FusedSGD against the same step in plain PyTorch on the CPU."""
    table, state, allowed = STEPS[case["update"]]
    tables = []
    for where, backend in ((device, "triton"), (torch.device("cpu"), "torch")):
        features, weight, labels = (tensor.detach() for tensor in inputs(case["rows"], case["classes"], case["size"]))
        head = CosFaceLoss(case["size"], case["classes"], device=where, backend=backend, table_format=table)
        float8.put(head.weight, head.weight_scale, slice(None), weight)
        before = _table(head)
        optimizer = FusedSGD(head.parameters(), lr=1.0, momentum=0.9, state_format=state)
        with torch.autocast(where.type, torch.bfloat16, enabled=case.get("precision") == "bfloat16"):
            loss = head(features.to(where).requires_grad_(), labels.to(where))
        loss.backward()
        optimizer.step()
        tables.append(_table(head))
    moved = harness.relative_error(tables[1], before)
    error = harness.relative_error(*tables)
    return {"errors": [error], "moved": moved, "wrong": not error <= allowed < moved}


def _table(head):
    return copy.deepcopy(head).double().weight.detach().cpu()


def main(numbers=None):
    wrong, numbers = False, sys.argv[1:] if numbers is None else numbers
    for row in smoke([stages.SMOKE[int(number)] for number in numbers] or stages.SMOKE):
        print(json.dumps(row), flush=True)
        wrong |= bool(row.get("wrong") or row.get("error"))
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
