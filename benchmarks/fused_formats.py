"""Measures what a format costs in a step of a fused optimiser:  python -m benchmarks.fused_formats [CASE ...] [--json FILE]

    float32, bfloat16               FusedSGD, table and momentum in this format (default: these two)
    float8                          FusedSGD, the table in float8, momentum in bfloat16
    adamw-float32, adamw-bfloat16   FusedAdamW, table and state in this format
    all-of-E                        as float32, with a memory_budget for all exponentials
    torch.optim.SGD                 float32, by torch.optim.SGD

Whole steps in processor time of one thread, on a CPU; under autocast where the table is not float32. The heads of all cases take
turns in one process; ratios to the first case are medians over the turns.
"""

import math
import statistics

import torch

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD

from . import harness, measure
from .record import keep, parser, say

CASES = "float32", "bfloat16", "float8", "adamw-float32", "adamw-bfloat16", "all-of-E", "torch.optim.SGD"
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
TURNS = 8  # at least; more of short steps


def main():
    asked = parser(__doc__, rows=128, classes=1_000_000, size=256)
    asked.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    arguments = asked.parse_args()
    cases = arguments.cases or CASES[:2]
    if unknown := set(cases) - set(CASES):
        asked.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    shape = arguments.rows, arguments.classes, arguments.size
    found = {"kind": "fused_formats", "environment": measure.environment(torch.device("cpu")), "shape": shape}
    found |= {"rows": [{"case": case, "seconds": []} for case in cases], "complete": False}

    def work(save):
        steps = [(step_of(row["case"], *shape), row) for row in found["rows"]]
        turns = max(TURNS, 10**11 // math.prod(shape))
        for turn, (step, row) in harness.in_turns(steps, turns + 1):
            say(f"turn {turn} of {turns}: {row['case']}")
            took = measure.processor_seconds(step)
            if turn:  # the first warms up
                row["seconds"].append(took)
            save()

    return keep(found, arguments.json, work, table)


def step_of(case, num_rows, num_classes, size):
    """A function that makes a step of this case."""
    low = case.endswith(("bfloat16", "float8"))
    state = "bfloat16" if low else "float32"
    budget = 8 * num_rows * num_classes if case == "all-of-E" else "auto"
    head = CosFaceLoss(size, num_classes, table_format=case.removeprefix("adamw-") if low else "float32", memory_budget=budget)
    if case == "torch.optim.SGD":
        optimizer = torch.optim.SGD(head.parameters(), **SGD)
    elif case.startswith("adamw"):
        optimizer = FusedAdamW(head.parameters(), state_format=state)
    else:
        optimizer = FusedSGD(head.parameters(), **SGD, state_format=state)
    features, labels = torch.randn(num_rows, size, requires_grad=True), torch.randint(num_classes, (num_rows,))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = head(features, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(record):
    """Markdown."""
    facts, (num_rows, num_classes, size) = record["environment"], record["shape"]
    first, *_ = rows = record["rows"]
    lines = [
        f"Processor time of a step, N = {num_rows}, C = {num_classes:,}, D = {size}, on {facts['device']}, "
        f"torch {facts['torch']}, {facts['date']}: medians of {len(rows[-1]['seconds'])} turns.",
        "",
        f"| case | s | times {first['case']} |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        if row["seconds"]:
            ratio = statistics.median(one / other for one, other in zip(row["seconds"], first["seconds"], strict=False))
            lines.append(f"| {row['case']} | {statistics.median(row['seconds']):.2f} | {ratio:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
