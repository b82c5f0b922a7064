"""`cosface bench`: each peer is checked against float64, then timed in turns with the others; a table, JSON and two figures.

A report is record.py's shape with "shape": [N, C, D], "ceilings", "check_classes" and "missing"; a sweep's rows are reports.
A row: {"name", "precision", "flops", "seconds", "peak_bytes", "errors", "wrong", "another_loss", "error"}. What is unknown yet is
null or empty; "error" says why nothing can be. `tables.py` makes the rest of it.
"""

import torch

from . import harness, measure, tables
from .peers import PRECISIONS, inputs, peers, step
from .record import fail, keep, say

# A peer gets no further turn once its turns took this long, so that a slow one has fewer.
SECONDS_PER_PEER = 6.0
# Steps in one turn: on a GPU one untimed step first brings its memory back from the others.
STEPS_PER_TURN = {"cpu": 1, "cuda": 3}
# With --plot: the C of the figures, and the seconds past which a peer's next step is not tried.
SWEEP = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
SWEEP_SECONDS = 60.0


def main(arguments):
    """Run the comparison that the `cosface bench` options ask for. Returns the exit status."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        return fail("cosface", "there is no GPU that this torch can use")
    if arguments.plot:
        try:
            from . import plot
        except ModuleNotFoundError as error:
            return fail("cosface", f"--plot needs {error.name}, which is not installed")
    precisions = PRECISIONS if arguments.dtype == "both" else [arguments.dtype]
    chosen = [peer for peer in peers(device, precisions) if arguments.peers.lower() in peer.name.lower()]
    if not chosen:
        return fail("cosface", f'no peer\'s name contains "{arguments.peers}"')
    if all(peer.missing for peer in chosen):
        return fail(
            "cosface", "none of these can be measured here: " + "; ".join(f"{peer.key}: {peer.missing}" for peer in chosen)
        )
    sizes = SWEEP if arguments.plot else [arguments.classes]
    reports = [blank((arguments.rows, classes, arguments.size), chosen) for classes in sizes]
    found = reports[0]
    if arguments.plot:
        found = {"kind": "sweep", "environment": None, "rows": reports, "complete": False}
        try:
            arguments.plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return fail("cosface", f"cannot write to {error.filename}: {error.strerror}")

    def work(save):
        shared = {"environment": measure.environment(device), "ceilings": ceilings(device, precisions)}
        found["environment"] = shared["environment"]
        for report in reports:
            report.update(shared)
            run(report, chosen, device, arguments.repeats, save, _seconds_at(reports, report["shape"]))

    status = keep(found, arguments.json, work, tables.text)
    if arguments.plot and status != 1:
        for path in plot.draw(reports, arguments.plot):
            print(f"\n{path}")
    return status


def blank(shape, chosen):
    """A report without any measurement."""
    return {
        "kind": "bench",
        "shape": list(shape),
        "environment": None,
        "ceilings": {},
        "check_classes": None,
        "rows": [_row(peer) for peer in chosen if not peer.missing],
        "missing": {peer.name: peer.missing for peer in chosen if peer.missing},
        "complete": False,
    }


def _row(peer):
    facts = {"name": peer.name, "precision": peer.precision, "flops": peer.flops, "another_loss": peer.another_loss}
    return {**facts, "seconds": [], "peak_bytes": None, "errors": None, "wrong": False, "error": None}


def ceilings(device, precisions):
    """Flops a second of a matrix product in each precision, and bytes a second of a copy."""
    say("ceilings of this machine")
    return {**{name: measure.product_rate(device, name) for name in precisions}, "copy": measure.copy_rate(device)}


def run(report, chosen, device, repeats, save=lambda: None, expected=lambda row: 0.0):
    """Fill a blank report. Calls save() whenever it has grown; expected(row): the seconds that a step should take."""
    by_key = {peer.key: peer for peer in chosen}
    entries = [(row, by_key[f"{row['name']}, {row['precision']}"]) for row in report["rows"]]
    try:
        _run(report, entries, device, repeats, save, expected)
    except (RuntimeError, MemoryError) as error:  # out of memory for the inputs or the exact result: other sizes go on
        for row, _ in _open(entries):
            row["error"] = f"not measured: {harness.first_line(error)}"
    report["complete"] = True
    save()


def _run(report, entries, device, repeats, save, expected):
    shape = tuple(report["shape"])
    for row, peer in entries:
        row["error"] = measure.shortage(peer.bytes_needed(*shape), device)
        if not row["error"] and expected(row) > SWEEP_SECONDS:
            row["error"] = f"not run: a step would take about {expected(row):.0f} s"
    if device.type == "cpu":
        for row, peer in _open(entries):
            say(f"C = {shape[1]:,}: memory of {peer.key}")
            with harness.recorded(row):
                row["peak_bytes"] = measure.cpu_peak_bytes(peer, shape)
            save()
    if _open(entries):
        torch.compiler.reset()  # compiled code of other sizes counts against a limit
        _measure(report, entries, device, repeats, save)


def _measure(report, entries, device, repeats, save):
    shape = num_rows, num_classes, size = tuple(report["shape"])
    tensors = inputs(*shape, device)
    report["check_classes"] = measure.check_classes(num_rows, num_classes, device)
    fits = report["check_classes"] == num_classes
    say(f"the exact result, C = {report['check_classes']:,}")
    check = measure.Check(tensors if fits else inputs(num_rows, report["check_classes"], size, device))
    for row, peer in _open(entries):
        say(f"C = {num_classes:,}: {peer.key}")
        with harness.recorded(row):
            took = _judge(row, peer, check, device)
            if peer.compiled and not fits:
                step(peer.function, *tensors)
            if fits and took > SECONDS_PER_PEER and not peer.compiled:
                row["seconds"].append(took)  # no other turn, then
            else:
                _turn(row, peer, tensors, device)
        save()
        if row["error"] and _device_is_lost(device):
            _mark_lost(entries, row)
            return
    del check
    for turn, (row, peer) in harness.in_turns(entries, repeats - 1):
        if not row["error"] and sum(row["seconds"]) < SECONDS_PER_PEER:
            say(f"C = {num_classes:,}, turn {turn + 2} of {repeats}: {peer.key}")
            with harness.recorded(row):
                _turn(row, peer, tensors, device)
            save()


def _judge(row, peer, check, device):
    """Write a row's errors, and "wrong" if they are too large. Returns the seconds of the step."""
    if device.type == "cuda":
        check.run(peer.function)  # compiles: its seconds are no step's
    results = []
    took = measure.seconds(lambda: results.append(check.run(peer.function)), device)
    row |= check.judged(results.pop(), peer.precision)
    row["wrong"] &= not peer.another_loss
    return took


def _turn(row, peer, tensors, device):
    if device.type == "cuda":
        row["peak_bytes"] = measure.gpu_peak_bytes(peer.function, tensors)
    for _ in range(STEPS_PER_TURN[device.type]):
        row["seconds"].append(measure.seconds(lambda: step(peer.function, *tensors), device))


def _open(entries):
    """The rows that can still be measured."""
    return [(row, peer) for row, peer in entries if not row["error"]]


def _device_is_lost(device):
    """True if the GPU refuses all further work of this process, as after an illegal access."""
    try:
        harness.synchronize(device)
    except RuntimeError:
        return True
    return False


def _mark_lost(entries, culprit):
    for row, _ in entries:
        if not row["seconds"] and not row["error"]:
            row["error"] = f"not run: the GPU was lost to {culprit['name']}, {culprit['precision']}"


def _seconds_at(reports, shape):
    """A function of a row: the seconds that its step should take at this C, from the largest C measured so far."""

    def expected(row):
        for report in reversed(reports[: [each["shape"] for each in reports].index(list(shape))]):
            for other in report["rows"]:
                if (other["name"], other["precision"]) == (row["name"], row["precision"]) and other["seconds"]:
                    return min(other["seconds"]) * shape[1] / report["shape"][1]
        return 0.0

    return expected
