"""Compares trainings whose table and state are stored in other formats:  python -m benchmarks.formats [--json FILE] [--plot FILE]

1,797 identities, each one of scikit-learn's handwritten digits, seen shifted and under noise: 200 steps in every format, from the
same start and with the same batches. The change by a format is to be compared with the change by another seed.
"""

import itertools
import operator
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD
from cosface_kernels.heads import float8
from cosface_kernels.ops import formats

from . import measure
from .record import keep, parser, say

ROWS, SIZE, STEPS, LAST = 128, 64, 200, 40
SEEDS = range(5)
TABLES_AND_STATES = tuple(itertools.product(formats.TABLE_FORMATS, formats.STATE_FORMATS))
OPTIMIZERS = {
    "SGD": (FusedSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "AdamW": (FusedAdamW, {"lr": 3e-3}),
}


def losses(optimizer, table_format, state_format, seed):
    """The loss of each step."""
    images = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, SIZE), nn.BatchNorm1d(SIZE))
    head = CosFaceLoss(SIZE, len(images), scale=32.0, margin=0.2, table_format=table_format)
    with torch.no_grad():
        start = 0.01 * torch.randn(head.weight.shape)  # the same in every format
        float8.put(head.weight, head.weight_scale, slice(None), start)
    kind, options = OPTIMIZERS[optimizer]
    optimizers = torch.optim.Adam(backbone.parameters(), 1e-3), kind(head.parameters(), state_format=state_format, **options)
    found = []
    for _ in range(STEPS):
        labels = torch.randperm(len(images))[:ROWS]
        views = torch.stack([images[label].roll((dx, dy), (0, 1)) for label, (dx, dy) in zip(labels, shifts(), strict=True)])
        loss = head(backbone((views + 0.1 * torch.randn_like(views)).flatten(1)), labels)
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        found.append(loss.item())
    return found


def shifts():
    return (torch.randint(3, (ROWS, 2)) - 1).tolist()


def last(curve):
    """The loss that a run ends with: a mean, because batches differ."""
    return statistics.mean(curve[-LAST:])


def main():
    asked = parser(__doc__)
    asked.add_argument("--plot", type=Path, metavar="FILE")
    arguments = asked.parse_args()
    torch.set_num_threads(1)
    environment = measure.environment(torch.device("cpu"))
    record = {"kind": "formats", "environment": environment, "rows": [], "complete": False}

    def work(save):
        for optimizer, (table, state) in itertools.product(OPTIMIZERS, TABLES_AND_STATES):
            say(f"{optimizer}, {table}, {state}")
            found = [losses(optimizer, table, state, seed) for seed in SEEDS]
            names = {"optimizer": optimizer, "table": table, "state": state}
            record["rows"].append({**names, "last": [last(curve) for curve in found], "curves": found})
            save()

    status = keep(record, arguments.json, work, table)
    if arguments.plot:
        draw(record["rows"]).savefig(arguments.plot)
    return status


def table(record):
    """Markdown."""
    environment, last, more = record["environment"], {}, {}
    base = {row["optimizer"]: row["last"] for row in record["rows"] if row["table"] == row["state"] == "float32"}
    for row in record["rows"]:
        found = row["last"]
        more.setdefault(row["table"], []).extend(map(operator.truediv, found, base[row["optimizer"]]))
        cell = f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"
        last[row["optimizer"], row["table"], row["state"]] = cell
    lines = [
        f"The mean loss of the last {LAST} of {STEPS} steps, mean over {len(SEEDS)} seeds (least to most), on "
        f"{environment['device']}, torch {environment['torch']}, {environment['date']}.",
        "",
        "| table | state | " + " | ".join(OPTIMIZERS) + " |",
        "| --- | --- |" + " --- |" * len(OPTIMIZERS),
    ]
    for pair in TABLES_AND_STATES:
        lines.append(f"| {' | '.join(pair)} | {' | '.join(last.get((optimizer, *pair), '-') for optimizer in OPTIMIZERS)} |")
    beside = "; ".join(f"{name} {min(found) - 1:+.2%} to {max(found) - 1:+.2%}" for name, found in more.items())
    lines += ["", f"The same loss over that of float32 for both, of the same seed, by table: {beside}."]
    return "\n".join(lines)


def draw(rows):
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    for place, optimizer in enumerate(OPTIMIZERS):
        axes = figure.add_subplot(1, len(OPTIMIZERS), place + 1)
        for row in rows:
            if row["optimizer"] == optimizer:
                means = [statistics.mean(step) for step in zip(*row["curves"], strict=True)]
                axes.plot(range(1, STEPS + 1), means, linewidth=1, label=f"{row['table']}, {row['state']}")
        axes.set_title(f"Fused{optimizer}: table and state in every format")
        axes.set(xlabel="step", ylabel=f"loss, mean of {len(SEEDS)} seeds", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
