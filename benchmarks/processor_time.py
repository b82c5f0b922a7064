"""Measures a step in seconds of processor time, for a machine that is busy:  python -m benchmarks.processor_time [--json FILE]

One thread, so that none waits for another; what other processes do then matters little. First forward and backward of the losses,
beside plain PyTorch, in turns; then a whole step of FusedSGD with momentum, N = 128, D = 256, over a million classes: table and
momentum in float32, and in bfloat16 under autocast.
"""

import gc
import math
import statistics

import torch

from . import harness, measure
from .fused_formats import step_of
from .peers import PLAIN, inputs, peers, step
from .record import keep, parser, say

COMPILED = "torch.compile of plain PyTorch"
OURS = "cosface_loss, cpu", "cosface_loss, cpu, memory_budget=0"
CASES = [(PLAIN, "float32"), (COMPILED, "float32"), *((name, low) for name in OURS for low in ("float32", "bfloat16"))]
STEP = 128, 1_000_000, 256
TURNS = 4


def main():
    arguments = parser(__doc__, rows=512, classes=100_000, size=512).parse_args()
    torch.set_num_threads(1)
    device, shape = torch.device("cpu"), (arguments.rows, arguments.classes, arguments.size)
    found = {"kind": "processor_time", "environment": measure.environment(device), "shape": shape, "step": STEP, "ceiling": 0.0}
    found |= {"rows": [], "complete": False}

    def work(save):
        found["rows"] += _losses(shape, found)
        save()
        for format in ("float32", "bfloat16"):
            say(f"FusedSGD, {format}")
            found["rows"].append({"name": "FusedSGD", "precision": format, "flops": 6.0, "seconds": _steps(format)})
            save()

    return keep(found, arguments.json, work, table)


def _losses(shape, found):
    """Rows of the losses. found["ceiling"] becomes the best rate of a float32 product in cache, over the run."""
    tensors, (rows, columns, depth) = inputs(*shape), measure.PRODUCT["cpu"]
    left, right = torch.randn(rows, depth), torch.randn(depth, columns)
    by_name = {(peer.name, peer.precision): peer for peer in peers("cpu")}
    entries = [(by_name[case], {"name": case[0], "precision": case[1], "seconds": []}) for case in CASES]
    for turn, (peer, row) in harness.in_turns(entries, TURNS + 1):
        say(f"turn {turn} of {TURNS}: {peer.key}")
        took = measure.processor_seconds(lambda peer=peer: step(peer.function, *tensors))
        fastest = min(measure.processor_seconds(lambda: torch.mm(left, right)) for _ in range(5))
        found["ceiling"] = max(found["ceiling"], 2 * rows * columns * depth / fastest)
        row["flops"] = peer.flops
        if turn:  # the first compiles and warms up
            row["seconds"].append(took)
    return [row for _, row in entries]


def _steps(format):
    """Seconds of steps that train a table and momentum of this format."""
    gc.collect()
    step = step_of(format, *STEP)
    return [measure.processor_seconds(step) for _ in range(TURNS + 1)][1:]


def table(record):
    """Markdown."""
    facts, rows = record["environment"], record["rows"]
    num_rows, num_classes, size = record["shape"]
    lines = [
        f"Processor time of one thread, N = {num_rows}, C = {num_classes:,}, D = {size}; steps of FusedSGD at N = {STEP[0]}, "
        f"C = {STEP[1]:,}, D = {STEP[2]}; on {facts['device']}, torch {facts['torch']}, {facts['date']}: medians.",
        "",
        f"| | precision | s | times plain | GFLOP/s | of {record['ceiling'] / 1e9:.1f}, the product in cache |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    plain = statistics.median(rows[0]["seconds"]) if rows else None
    for row in rows:
        seconds, is_step = statistics.median(row["seconds"]), row["name"] == "FusedSGD"
        problem = record["step"] if is_step else record["shape"]
        rate = row["flops"] * math.prod(problem) / seconds
        speed = "" if is_step else f"{plain / seconds:.2f}"
        share = f"{rate / record['ceiling']:.0%}"
        cells = row["name"], row["precision"], f"{seconds:.2f}", speed, f"{rate / 1e9:.1f}", share
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
