"""Measures the cost of an identity as the table grows:  python -m benchmarks.identities [--rows N] [--size D] [--json FILE]

A step over C = 10^4 .. 4 * 10^6 classes that recomputes exponentials, in nanoseconds for each class. "reused": the slab loop
alone, forward and backward, into a dW that exists already; "fresh": all of cosface_loss, whose dW is new memory at each step,
none that an earlier step left.
Turns are interleaved; medians. A table that does not fit is left out with a line that says so.
"""

import statistics

import torch

from cosface_kernels import cosface_loss
from cosface_kernels.ops import backends, page_pool
from cosface_kernels.ops.batch_rows import SlabFactors
from cosface_kernels.ops.normalize import unit_rows
from cosface_kernels.ops.operands import Options
from cosface_kernels.ops.slabs import make_plan
from cosface_kernels.ops.table import Table, TableGradient

from . import harness, measure
from .peers import SCALE, inputs
from .record import keep, parser, say

CLASSES = (10_000, 100_000, 1_000_000, 4_000_000)
TURNS = 5
# A turn covers about this many classes, so that a small table's step is not timed alone.
TURN_CLASSES = 400_000


def main():
    arguments = parser(__doc__, rows=512, size=128).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"environment": measure.environment(device), "shape": (arguments.rows, arguments.size)}
    found = {"kind": "identities", **facts, "rows": [], "complete": False}

    def work(save):
        steps, seconds = {}, {}
        for num_classes in CLASSES:
            if shortage := measure.shortage(12 * num_classes * arguments.size, device):
                say(f"C = {num_classes:,} {shortage}")
                continue
            tensors = inputs(arguments.rows, num_classes, arguments.size, device)
            steps |= {(num_classes, "reused"): reused(*tensors), (num_classes, "fresh"): fresh(*tensors)}
        for turn, (num_classes, kind) in harness.in_turns(list(steps), TURNS + 1):
            say(f"turn {turn} of {TURNS}: C = {num_classes:,}, {kind}")
            step = steps[num_classes, kind]
            taken = [measure.seconds(step, device) for _ in range(max(1, TURN_CLASSES // num_classes))]
            if turn:  # the first warms up
                seconds.setdefault(num_classes, {}).setdefault(kind, []).extend(taken)
                found["rows"] = [_row(*pair) for pair in sorted(seconds.items()) if len(pair[1]) == 2]
                save()

    return keep(found, arguments.json, work, table)


def _row(num_classes, kinds):
    nanoseconds = {kind: 1e9 * statistics.median(kinds[kind]) / num_classes for kind in ("reused", "fresh")}
    return {"classes": num_classes, "nanoseconds": nanoseconds}


def reused(features, weight, labels):
    """The slab loop's two passes, dW written to one buffer."""
    weight = weight.detach()
    unit = unit_rows(features.detach())[0]
    table = Table(weight)
    plan = make_plan(features, table, Options(SCALE, -100, True, True, 1, torch.bfloat16, 0, "auto", None), keep=True)
    backend = backends.choose("auto", features.device, torch.bfloat16)
    gradient = TableGradient(torch.zeros_like(weight), None)
    classes, sums = labels.sort().values, torch.zeros_like(unit)
    unscale = torch.ones((), device=features.device)

    def step():
        found = backend.forward(unit, table, labels, plan, need_pull=True)
        factors = SlabFactors(labels, 1.0 / found.total, unscale, classes, sums)
        backend.backward(unit, table, factors, found.shift, found.kept, plan=plan, sink=gradient)

    return step


def fresh(features, weight, labels):
    def step():
        page_pool.release()
        with torch.autocast(features.device.type, dtype=torch.bfloat16):
            loss = cosface_loss(features, weight, labels, memory_budget=0)
        torch.autograd.grad(loss, (features, weight))

    return step


def table(found):
    """Markdown."""
    facts, (num_rows, size) = found["environment"], found["shape"]
    lines = [
        f"One step in bfloat16, recomputing, N = {num_rows}, D = {size}, on {facts['device']}, torch {facts['torch']}, "
        f"{facts['date']}: nanoseconds for each identity, and times the first row's.",
        "",
        "| C | dW's buffer reused | | fresh | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        kinds, first = row["nanoseconds"], found["rows"][0]["nanoseconds"]
        cells = [f"{kinds[kind]:.0f} | {kinds[kind] / first[kind]:.2f}" for kind in ("reused", "fresh")]
        lines.append(f"| {row['classes']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
