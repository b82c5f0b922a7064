"""Measures from how many classes on a step is faster than plain PyTorch's:  python -m benchmarks.break_even [--json FILE]

One forward and backward in float32 on a CPU, N = 128, D = 128, in processor time of one thread, which other processes of a busy
machine change little. The two take turns in one process; a ratio is the median over the turns, of plain PyTorch's time to ours.
"""

import statistics

import torch

from cosface_kernels import cosface_loss

from . import harness, measure
from .peers import inputs, plain, step
from .record import keep, parser, say

CLASSES = (100, 200, 300, 400, 500, 700, 1000, 1500, 2000, 3000, 5000)
TURNS = 200
PEERS = {"plain": plain, "ours": cosface_loss}


def main():
    arguments = parser(__doc__, rows=128, size=128).parse_args()
    device = torch.device("cpu")
    torch.set_num_threads(1)
    shape = arguments.rows, arguments.size
    found = {"kind": "break_even", "environment": measure.environment(device), "shape": shape, "rows": [], "complete": False}

    def work(save):
        for classes in CLASSES:
            say(f"C = {classes:,}")
            found["rows"].append({"classes": classes, "seconds": _seconds(*shape, classes)})
            save()

    return keep(found, arguments.json, work, table)


def _seconds(num_rows, size, classes):
    """{peer: [seconds of processor time of a step in each turn]}"""
    tensors = inputs(num_rows, classes, size)
    found = {name: [] for name in PEERS}
    for turn, name in harness.in_turns(list(PEERS), TURNS + TURNS // 5):
        took = measure.processor_seconds(lambda name=name: step(PEERS[name], *tensors))
        if turn >= TURNS // 5:
            found[name].append(took)
    return found


def table(record):
    """Markdown."""
    facts, (num_rows, size) = record["environment"], record["shape"]
    lines = [
        f"Processor time of one forward and backward in float32, N = {num_rows}, D = {size}, on {facts['device']}, "
        f"torch {facts['torch']}, {facts['date']}: medians.",
        "",
        "| C | plain PyTorch, ms | cosface_loss, ms | times plain |",
        "| --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        plain_seconds, ours = row["seconds"]["plain"], row["seconds"]["ours"]
        ratio = statistics.median(p / o for p, o in zip(plain_seconds, ours, strict=True))
        milliseconds = (f"{1e3 * statistics.median(seconds):.2f}" for seconds in (plain_seconds, ours))
        lines.append(f"| {row['classes']:,} | {' | '.join(milliseconds)} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
