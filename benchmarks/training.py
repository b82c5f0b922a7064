"""Whole training steps of large tables:  python -m benchmarks.training [step | tables | identities | ranks] ... [--json FILE]

    step         1M identities x 512, N = 128 under autocast: FusedSGD beside torch.optim.SGD, fused=True and default, on the same
                 head; on a GPU with N = 1024, and 10M with N = 256. By turns, each in a process of its own with nothing beside
                 it: the host of a virtual machine takes back memory that waits for another's turn. A turn's time is the median
                 of its steps but the first, which allocates; "faster" is the median ratio of a turn.
    tables       20 steps of 10M identities: x 256 with a float32 and a bfloat16 table and bfloat16 momentum, with all classes and
                 with a tenth of them; x 512 with a bfloat16 table and 8-bit momentum. On a GPU 100M. A process each.
    identities   what an identity costs in a step as their number grows, N and D fixed.
    ranks        the head alone, sharded over two processes with half of the batch and of the threads each, beside one process.

The batches are demo/million.py's: views of 2,048 identities among all, through a backbone that is trained too. Peak memory is all
that a process holds, on a GPU all that its tensors do. A table that does not fit is left out with a line that says so; a
run that is stopped prints its rows so far.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from cosface_kernels import CosFaceLoss, FusedSGD, ShardedCosFaceLoss
from cosface_kernels.tools.demo import million

from . import harness, measure, source
from .record import keep, parser

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 128
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
STEPS = 20
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1, "int8": 1}
TABLES = {
    "cpu": [
        {"identities": 10_000_000, "size": 256, "table_format": "float32", "state_format": "bfloat16"},
        {"identities": 10_000_000, "size": 256, "table_format": "float32", "state_format": "bfloat16", "sample_rate": 0.1},
        {"identities": 10_000_000, "size": 256, "table_format": "bfloat16", "state_format": "bfloat16"},
        {"identities": 10_000_000, "size": 256, "table_format": "bfloat16", "state_format": "bfloat16", "sample_rate": 0.1},
        {"identities": 10_000_000, "size": 512, "table_format": "bfloat16", "state_format": "int8"},
    ],
    "cuda": [
        {"identities": 100_000_000, "size": 512, "table_format": "bfloat16", "momentum": 0.0},
        {"identities": 100_000_000, "size": 256, "table_format": "bfloat16", "state_format": "bfloat16"},
    ],
}
STEP = {
    "cpu": [{"identities": 1_000_000, "size": 512}],
    "cuda": [{"identities": 1_000_000, "size": 512, "rows": 1024}, {"identities": 10_000_000, "size": 512, "rows": 256}],
}
OPTIMIZERS = {
    "FusedSGD": lambda params: FusedSGD(params, **OPTIONS),
    "torch.optim.SGD(fused=True)": lambda params: torch.optim.SGD(params, **OPTIONS, fused=True),
    "torch.optim.SGD": lambda params: torch.optim.SGD(params, **OPTIONS),
}
STEP_TURNS, TURN_STEPS = 5, 5
TURNS = 7
GROWTH = (10_000, 100_000, 1_000_000, 4_000_000)
GROWTH_SIZE = 128
RANKS = {"identities": 500_000, "size": 256, "rows": 256}


class Run:
    """A head, its optimiser and a backbone, and one training step of them."""

    def __init__(self, identities, size, optimizer, rows=ROWS, **options):
        torch.manual_seed(0)
        self.head = CosFaceLoss(size, identities, device=DEVICE, **options)
        self.backbone = million.make_backbone(size).to(DEVICE)
        self.draw_batch = million.generator(identities, rows, DEVICE)
        backbone_optimizer = torch.optim.SGD(self.backbone.parameters(), lr=million.BACKBONE_RATE, momentum=0.9)
        self.optimizers = backbone_optimizer, optimizer(self.head.parameters())

    def step(self):
        views, labels = self.draw_batch()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = self.head(self.backbone(views), labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.loss = loss.item()

    def timed(self):
        """Seconds of a step."""
        return measure.seconds(self.step, DEVICE)


def peak_bytes():
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else measure.high_water_bytes()


def alone(what, *launcher, **arguments):
    """The result of `what(**arguments)` in a process of its own, or why there is none; launcher: options of its Python."""
    command = [sys.executable, *launcher, "-m", "benchmarks.training", "--alone", what, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=source.ROOT, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": f"exit status {done.returncode}"}


def table_run(identities, size, table_format, state_format="float32", momentum=OPTIONS["momentum"], sample_rate=1.0):
    """A row of `tables`: losses, seconds of each step and the peak."""
    options = {**OPTIONS, "momentum": momentum, "state_format": state_format}
    sampled = {} if sample_rate == 1 else {"sample_rate": sample_rate}
    run = Run(identities, size, lambda params: FusedSGD(params, **options), table_format=table_format, **sampled)
    losses, seconds = [], []
    for _ in range(STEPS):
        seconds.append(run.timed())
        losses.append(run.loss)
        print(f"loss {losses[-1]:.2f}, {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    return {"losses": losses, "seconds": seconds, "peak_bytes": peak_bytes()}


def table_bytes(identities, size, table_format, state_format="float32", momentum=OPTIONS["momentum"], **_):
    """Approximate bytes of the table in a fused step: its rows and momentum in their formats, and a twentieth for slabs."""
    held = NUMBER_BYTES[table_format] + (NUMBER_BYTES[state_format] if momentum else 0)
    return 1.05 * identities * size * held


def step_run(optimizer, **shape):
    """A turn of `step`: seconds of its steps but the first, and the peak."""
    run = Run(**shape, optimizer=OPTIMIZERS[optimizer])
    _, *seconds = (run.timed() for _ in range(TURN_STEPS + 1))
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def tables():
    for arguments in TABLES[DEVICE.type]:
        if shortage := measure.shortage(table_bytes(**arguments), DEVICE):
            print(f"{describe(arguments)}: {shortage}", file=sys.stderr)
            continue
        print(describe(arguments), file=sys.stderr, flush=True)
        yield {**arguments, **alone("table_run", **arguments)}


def steps():
    """Rows of `step`: our optimiser and another in turns, for each other."""
    ours, *others = OPTIMIZERS
    for shape, other in itertools.product(STEP[DEVICE.type], others):
        # Two numbers for each of the table's with ours, four with theirs.
        if shortage := measure.shortage(16 * shape["identities"] * shape["size"], DEVICE):
            print(f"{other}, {shape['identities']:,} x {shape['size']}: {shortage}", file=sys.stderr)
            continue
        runs = {name: [] for name in (ours, other)}
        for _, name in harness.in_turns(list(runs), STEP_TURNS):
            runs[name].append(alone("step_run", optimizer=name, **shape))
            print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
        if error := next((run["error"] for found in runs.values() for run in found if "error" in run), None):
            print(f"{other}, {shape['identities']:,} x {shape['size']}: {error}", file=sys.stderr)
            continue
        seconds = {name: [_median(run["seconds"]) for run in found] for name, found in runs.items()}
        peaks = {name: max(run["peak_bytes"] for run in found) for name, found in runs.items()}
        yield {**shape, "optimizer": other, "seconds": seconds, "peak_bytes": peaks}


def growth():
    """Seconds of a step for each number of identities, in turns."""
    runs = {identities: Run(identities, GROWTH_SIZE, OPTIMIZERS["FusedSGD"]) for identities in GROWTH}
    seconds = {identities: [] for identities in GROWTH}
    for turn, identities in harness.in_turns(GROWTH, TURNS + 1):
        repeats = max(1, 200_000 // identities)
        taken = [runs[identities].timed() for _ in range(repeats)]
        seconds[identities] += taken if turn else []
    for identities, taken in seconds.items():
        yield {"identities": identities, "size": GROWTH_SIZE, "seconds": taken}


def ranks():
    for size in (1, 2):
        launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)
        yield {**RANKS, "ranks": size, **alone("rank_run", *launcher, threads=torch.get_num_threads() // size)}


def rank_run(threads):
    """Seconds of each step of this rank's part of a batch; rank 0 prints them."""
    torch.set_num_threads(max(1, threads))
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    head = ShardedCosFaceLoss(RANKS["size"], RANKS["identities"])
    optimizer = FusedSGD(head.parameters(), **OPTIONS)
    rows = RANKS["rows"] // size
    seconds = []
    for _ in range(TURNS + 1):
        features = torch.randn(rows, RANKS["size"], requires_grad=True)
        labels = torch.randint(RANKS["identities"], (rows,))
        torch.distributed.barrier()
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(features, labels)
        loss.backward()
        optimizer.step()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        print(json.dumps({"seconds": seconds[1:]}), flush=True)
    torch.distributed.barrier()
    os._exit(0)  # PyTorch 2.13 with a DeviceMesh over gloo sometimes aborts at a normal exit


def describe(row):
    sampled = f", {row['sample_rate']:.0%} sampled" if row.get("sample_rate", 1) < 1 else ""
    momentum = f"{row['state_format']} momentum" if row.get("momentum", 1) else "no momentum"
    return f"{row['identities']:,} x {row['size']}, {row['table_format']} table, {momentum}{sampled}"


def table(record):
    """Markdown."""
    found = {}
    for row in record["rows"]:
        found.setdefault(row["part"], []).append(row)
    return "\n".join(_tables(found, record["environment"]))


def _tables(found, environment):
    where = f"N = {ROWS}, bfloat16 autocast, on {environment['device']}, torch {environment['torch']}, {environment['date']}"
    yield f"Whole training steps, {where}."
    if "tables" in found:
        yield "\n| table | step, s | peak of the process, GB | loss in 20 steps |\n| --- | --- | --- | --- |"
        for row in found["tables"]:
            if "error" in row:
                yield f"| {describe(row)} | {row['error']} | | |"
                continue
            loss = f"{row['losses'][0]:.1f} -> {row['losses'][-1]:.1f}"
            yield f"| {describe(row)} | {_median(row['seconds']):.2f} | {row['peak_bytes'] / 1e9:.1f} | {loss} |"
    for shape, rows in itertools.groupby(found.get("step", ()), _shape):
        yield f"\n| {shape} | step, s | FusedSGD, s | faster | peak, GB | FusedSGD, GB | share |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        for row in rows:
            names = row["optimizer"], "FusedSGD"
            seconds, (theirs, ours) = (
                [row["seconds"][name] for name in names],
                [row["peak_bytes"][name] / 1e9 for name in names],
            )
            ratio = _median([other / fused for other, fused in zip(*seconds, strict=True)])
            times = " | ".join(f"{median:.2f}" if median > 0.1 else f"{median:.4f}" for median in map(_median, seconds))
            yield f"| {row['optimizer']} | {times} | {ratio:.2f} x | {theirs:.1f} | {ours:.1f} | {ours / theirs:.0%} |"
        yield "\nFaster: the median, over the turns, of the ratio of the two times."
    if "identities" in found:
        yield f"\n| identities, D = {GROWTH_SIZE} | step, ms | ns for each identity |\n| --- | --- | --- |"
        for row in found["identities"]:
            median = _median(row["seconds"])
            yield f"| {row['identities']:,} | {1e3 * median:.1f} | {1e9 * median / row['identities']:.0f} |"
    if "ranks" in found:
        yield f"\n| ranks, {RANKS['identities']:,} x {RANKS['size']}, N = {RANKS['rows']} in all | step, s | times one rank's |"
        yield "| --- | --- | --- |"
        one = next((row for row in found["ranks"] if row["ranks"] == 1 and "seconds" in row), None)
        for row in found["ranks"]:
            if "error" in row:
                yield f"| {row['ranks']} | {row['error']} | |"
                continue
            ratio = f"{_median(row['seconds']) / _median(one['seconds']):.2f}" if one else "-"
            yield f"| {row['ranks']} | {_median(row['seconds']):.2f} | {ratio} |"


def _shape(row):
    batch = f"N = {row['rows']:,}, " if "rows" in row else ""
    return f"{batch}{row['identities']:,} x {row['size']}"


def _median(numbers):
    return statistics.median(numbers)


PARTS = {"step": steps, "tables": tables, "identities": growth, "ranks": ranks}


def main():
    asked = parser(__doc__)
    asked.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    asked.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    arguments = asked.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        asked.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.alone:
        name, given = arguments.alone
        functions = {"table_run": table_run, "step_run": step_run, "rank_run": rank_run}
        print(json.dumps(functions[name](**json.loads(given))))
        return 0
    facts = {"environment": measure.environment(DEVICE), "rows_of_a_batch": ROWS}
    record = {"kind": "training", **facts, "rows": [], "complete": False}

    def work(save):
        for part in arguments.parts or PARTS:
            for row in PARTS[part]():
                record["rows"].append({"part": part, **row})
                save()

    return keep(record, arguments.json, work, table)


if __name__ == "__main__":
    raise SystemExit(main())
