"""What `cosface plan` prints: a row for every way to train, and the one to take."""

import argparse
import bisect
import itertools
import math
import re

from ..ops import formats
from . import memory_model

# In capitals.
SIZES = {f"{prefix}B": 1000**power for power, prefix in enumerate(["", *"KMGTP"])}
SIZES |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGTP", 1)}
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
SPARE = 0.1
MOST_DEVICES = 2**16
HEADS = {True: "CosFaceLoss", False: "ShardedCosFaceLoss"}
OPTIMIZERS = {
    "sgd": 'FusedSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, state_format="{}")',
    "adamw": 'FusedAdamW(head.parameters(), lr=1e-3, state_format="{}")',
    "plain-sgd": "FusedSGD(head.parameters(), lr=0.1, weight_decay=5e-4)",
    "torch-sgd": "torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)",
    "torch-adamw": "torch.optim.AdamW(head.parameters(), lr=1e-3)",
}


def count(text):
    """A number of things: 10e6, 10M, 10_000_000 or 10,000,000."""
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text.strip()):
        text = text.replace(",", "")
    return _whole(text, COUNTS, "a number such as 10e6, 10M or 10,000,000")


def size(text):
    """Bytes: 141GB, 24GiB."""
    return _whole(text, SIZES, "a size with its unit such as 141GB or 24GiB")


def rate(text):
    return _number(text, lambda value: 0 < value <= 1, "a rate above 0 and up to 1")


def speed(text):
    return _number(text, lambda value: 0 < value < math.inf, "a positive number")


def _whole(text, units, what):
    found = re.fullmatch(r"\s*([\d_.]+(?:[eE]\+?\d+)?)\s*([A-Za-z]*)\s*", text)
    if found and found[2].upper() in units:
        value = _number(found[1], math.isfinite, what) * units[found[2].upper()]
        if value >= 1 and (value == int(value) or units is SIZES) and value < 2**62:
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")


def _number(text, is_right, what):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not is_right(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def trainings(*, optimizers, table_formats, state_formats, sample_rates, devices, **common):
    """Every combination that there is: torch.optim's optimisers take float32 and all classes."""
    found = []
    for combination in itertools.product(devices, sample_rates, optimizers, table_formats, state_formats):
        number, sample_rate, optimizer, table_format, state_format = combination
        training = memory_model.Training(
            optimizer=optimizer,
            table_format=table_format,
            state_format=state_format if memory_model.STATES[optimizer] else "float32",
            sample_rate=sample_rate,
            devices=number,
            **common,
        )
        takes_any = training.is_fused or (table_format, state_format, sample_rate) == ("float32", "float32", 1.0)
        if takes_any and training not in found:
            found.append(training)
    return found


def rank(training):
    """The smaller, the better: exactness of the table, then of the state, then no sampling, then few devices."""
    tables, states = list(formats.TABLE_FORMATS), list(formats.STATE_FORMATS)
    return (
        *(tables.index(training.table_format), states.index(training.state_format), -training.sample_rate, training.devices),
        list(memory_model.STATES).index(training.optimizer),
    )


def recommended(steps, memory):
    """The Training of {Training: Step} to take on devices of that memory, or None."""
    fitting = [training for training, step in steps.items() if step.total <= (1 - SPARE) * memory]
    return min(fitting, key=rank, default=None)


def devices_needed(training, memory, process):
    """On how many devices it would fit with room to spare; None: on no number of them."""

    def fits(number):
        return memory_model.plan(training._replace(devices=number), memory, process).total <= (1 - SPARE) * memory

    most = min(MOST_DEVICES, training.identities)
    number = bisect.bisect_left(range(1, most + 1), True, key=fits) + 1
    return number if number <= most else None


def code(training):
    """The three lines that make the head, its optimiser, and a step."""
    arguments = f"{training.dim}, {training.identities:_}"
    if training.table_format != "float32":
        arguments += f', table_format="{training.table_format}"'
    if training.sample_rate < 1:
        arguments += f", sample_rate={training.sample_rate:g}"
    return [
        f"head = {HEADS[training.devices == 1]}({arguments})",
        f"optimizer = {OPTIMIZERS[training.optimizer].format(training.state_format)}",
        "head(features, labels).backward(); optimizer.step(); optimizer.zero_grad()",
    ]


def report(found, *, memory, process, ceilings, origin):
    """All lines: what was assumed, a row for every Training of found, and which one to take.

    memory: bytes of each device; ceilings: memory_model.Ceilings, and where they are from, in words.
    """
    first = found[0]
    steps = {training: memory_model.plan(training, memory, process) for training in found}
    return [
        f"{first.identities:,} identities, D = {first.dim}, N = {first.batch}, products in {first.precision}, on "
        f"{first.device_type} devices of {gigabytes(memory)} GB. All sizes are GB, 10^9 bytes, on each device.",
        f"Seconds of a step are a prediction from {ceilings.flops / 1e12:.3g} TFLOP/s and {ceilings.bytes / 1e9:.3g} GB/s, "
        f"{origin}, without what devices send.",
        "",
        *_table(steps, memory, ceilings),
        "",
        *_recommendation(steps, memory, process, ceilings),
    ]


def gigabytes(size):
    return f"{size / 1e9:.3f}"


def _table(steps, memory, ceilings):
    """A line for each Training, its columns aligned."""
    parts = list(dict.fromkeys(name for step in steps.values() for name in step.parts))
    lines = [
        [
            "optimizer",
            "table_format",
            "state_format",
            "rate",
            "devices",
            *parts,
            "total",
            "fits",
            "TFLOP",
            "moved",
            "sent",
            "seconds",
        ]
    ]
    for training, step in steps.items():
        fits = "no" if step.total > memory else "barely" if step.total > (1 - SPARE) * memory else "yes"
        names = training.optimizer, training.table_format, training.state_format
        sizes = [gigabytes(step.parts.get(name, 0)) for name in parts]
        work = f"{step.flops / 1e12:.4g}", gigabytes(step.moved), gigabytes(step.exchanged)
        seconds = f"{sum(step.seconds(ceilings)):.3g}"
        lines.append(
            [*names, f"{training.sample_rate:g}", str(training.devices), *sizes, gigabytes(step.total), fits, *work, seconds]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _recommendation(steps, memory, process, ceilings):
    """What to take and why, and the code; or what would be needed."""
    best = min(steps, key=rank)
    training = recommended(steps, memory)
    if training is None:
        smallest = min(steps, key=lambda training: steps[training].total)
        needed = devices_needed(smallest, memory, process)
        if needed is None:
            return [f"Nothing fits on any number of devices: each needs {gigabytes(steps[smallest].total)} GB or close to it."]
        return [f"Nothing fits with {SPARE:.0%} to spare. {describe(smallest)} would, on {needed} devices."]
    step = steps[training]
    why = f"It is the most exact that fits with {SPARE:.0%} to spare, then without sampling, then on the fewest devices."
    if training != best:
        why += f" Before it comes {describe(best)} on {_devices(best.devices)}, which needs {gigabytes(steps[best].total)} GB."
    return [
        f"Recommended: {describe(training)} on {_devices(training.devices)}: {gigabytes(step.total)} GB of "
        f"{gigabytes(memory)} on each, {sum(step.seconds(ceilings)):.3g} s a step as predicted.",
        why,
        "",
        *(f"    {line}" for line in code(training)),
    ]


def describe(training):
    """In words, but for the devices."""
    sampled = "all classes" if training.sample_rate == 1 else f"{training.sample_rate:.3g} of the classes in a step"
    state = f", {training.state_format} state" if memory_model.STATES[training.optimizer] else ""
    return f"{training.optimizer} with a {training.table_format} table{state} and {sampled}"


def _devices(number):
    return f"{number} device{'s' * (number > 1)}"
