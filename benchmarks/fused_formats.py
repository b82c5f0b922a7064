"""Measures what a bfloat16 table and momentum cost in a step of FusedSGD:  python -m benchmarks.fused_formats [--json FILE]

Whole steps in processor time of one thread, on a CPU. A head in float32 and one in bfloat16, under autocast, take turns in one
process; the ratio is the median over the turns.
"""

import statistics

import torch

from cosface_kernels import CosFaceLoss, FusedSGD

from . import harness, measure
from .record import keep, parser, say

FORMATS = "float32", "bfloat16"
TURNS = 8  # at least; more with few classes, until some 10^7 have passed


def main():
    arguments = parser(__doc__, rows=128, classes=1_000_000, size=256).parse_args()
    torch.set_num_threads(1)
    shape = arguments.rows, arguments.classes, arguments.size
    found = {"kind": "fused_formats", "environment": measure.environment(torch.device("cpu")), "shape": shape}
    found |= {"rows": [{"format": format, "seconds": []} for format in FORMATS], "complete": False}

    def work(save):
        steps = [(step_of(format, *shape), row) for format, row in zip(FORMATS, found["rows"], strict=True)]
        turns = max(TURNS, 10**7 // arguments.classes)
        for turn, (step, row) in harness.in_turns(steps, turns + 1):
            say(f"turn {turn} of {turns}: {row['format']}")
            took = measure.processor_seconds(step)
            if turn:  # the first warms up
                row["seconds"].append(took)
            save()

    return keep(found, arguments.json, work, table)


def step_of(format, num_rows, num_classes, size):
    """A function that makes a step with table and momentum of this format."""
    head = CosFaceLoss(size, num_classes, table_format=format)
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, state_format=format)
    features, labels = torch.randn(num_rows, size, requires_grad=True), torch.randint(num_classes, (num_rows,))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=format == "bfloat16"):
            loss = head(features, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(record):
    """Markdown."""
    facts, (num_rows, num_classes, size) = record["environment"], record["shape"]
    first, second = (row["seconds"] for row in record["rows"])
    lines = [
        f"Processor time of a step of FusedSGD, N = {num_rows}, C = {num_classes:,}, D = {size}, on {facts['device']}, "
        f"torch {facts['torch']}, {facts['date']}: medians of {len(second)} turns.",
        "",
        "| float32 table and momentum, s | bfloat16, s | bfloat16 / float32 |",
        "| --- | --- | --- |",
    ]
    if second:
        ratio = statistics.median(low / high for high, low in zip(first, second, strict=False))
        lines.append(f"| {statistics.median(first):.2f} | {statistics.median(second):.2f} | {ratio:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
