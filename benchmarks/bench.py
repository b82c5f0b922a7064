"""`cosface bench`: each peer is checked against float64, then timed in turns with the others; a table, JSON and two figures.

A report is record.py's shape with "shape": [N, C, D], "ceilings", "check_classes" and "missing"; a sweep's rows are reports.
A row: {"name", "precision", "flops", "seconds", "peak_bytes", "errors", "wrong", "another_loss", "error"}. Unknown facts are
null or empty; "error" says why nothing can be. `tables.py` makes the rest of it.
"""

import torch

from . import harness, measure, tables
from .peers import PLAIN, PRECISIONS, in_precision, inputs, peers, plain, step
from .record import fail, keep, say

# A peer gets no further turn once its turns took this long, so that a slow one has fewer.
SECONDS_PER_PEER = 6.0
# Steps in one turn: on a GPU one untimed step first brings its memory back from the others.
STEPS_PER_TURN = {"cpu": 1, "cuda": 3}
# A peer whose step should take longer is not run. On a CPU a step over the first of these classes says what it should take: where
# a processor has no bfloat16 product, PyTorch's takes a hundred times as long as that in float32.
SECONDS_PER_STEP, SECONDS_PER_CHECK = 60.0, 10.0
PROBE_CLASSES = 1000
# With --plot: the C of the figures.
SWEEP = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)


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
    rates = {name: measure.product_rate(device, name) for name in PRECISIONS}
    # Without a product of bfloat16 a processor computes it in float32.
    rates["bfloat16"] = max(rates.values())
    return {**{name: rates[name] for name in precisions}, "copy": measure.copy_rate(device)}


def raise_ceilings(known, device):
    """Measure them again and keep the best: the machine may have been busy before."""
    found = ceilings(device, [name for name in known if name != "copy"])
    known.update({name: max(rate, found[name]) for name, rate in known.items()})


def run(report, chosen, device, repeats, save=lambda: None, expected=lambda row: 0.0):
    """Fill a blank report. Calls save() whenever it has grown; expected(row): the seconds that a step should take."""
    by_key = {peer.key: peer for peer in chosen}
    entries = [(row, by_key[f"{row['name']}, {row['precision']}"]) for row in report["rows"]]
    shape = tuple(report["shape"])
    try:
        for row, peer in entries:
            row["error"] = measure.shortage(peer.bytes_needed(*shape), device)
            if not row["error"] and expected(row) > SECONDS_PER_STEP:
                row["error"] = f"not run: a step would take about {expected(row):.0f} s"
        check_most = _leave_out_the_slow(entries, shape) if device.type == "cpu" else shape[1]
        if device.type == "cpu":
            for row, peer in _open(entries):
                say(f"C = {shape[1]:,}: memory of {peer.key}")
                with harness.recorded(row):
                    row["peak_bytes"] = measure.cpu_peak_bytes(peer, shape)
                save()
        if _open(entries):
            torch.compiler.reset()  # compiled code of other sizes counts against a limit
            _measure(report, entries, device, repeats, check_most, save)
    except (RuntimeError, MemoryError) as error:  # out of memory for the inputs or the exact result: other sizes go on
        for row, _ in _open(entries):
            row["error"] = f"not measured: {harness.first_line(error)}"
    report["complete"] = True
    save()


def _leave_out_the_slow(entries, shape):
    """Write so into the rows of peers whose step takes too long. Returns the number of classes with which the plain expression,
    which results are compared with, takes seconds.
    """
    num_rows, num_classes, size = shape
    if num_classes <= 4 * PROBE_CLASSES or not _open(entries):
        return num_classes
    tensors, scale = inputs(num_rows, PROBE_CLASSES, size), num_classes / PROBE_CLASSES
    precisions = dict.fromkeys(row["precision"] for row, _ in _open(entries))
    plain_seconds = {name: _probed(f"{PLAIN}, {name}", in_precision(name, plain), tensors, scale) for name in precisions}
    for row, peer in _open(entries):
        whose, about = "a step", plain_seconds[peer.precision]
        if peer.compiled:  # a probe would compile too
            whose = f"a step of {PLAIN}, which has the same products,"
        elif peer.name != PLAIN:
            with harness.recorded(row):
                about = _probed(peer.key, peer.function, tensors, scale)
        if not row["error"] and about > SECONDS_PER_STEP:
            row["error"] = f"not run: {whose} would take about {about:.0f} s"
    slowest = max(plain_seconds.values(), default=0.0)
    return num_classes if slowest <= SECONDS_PER_STEP else max(int(num_classes * SECONDS_PER_CHECK / slowest), 2)


def _probed(name, function, tensors, scale):
    """Seconds of a step over `scale` times as many classes, from the second one where the first, which loads code, was slow."""
    say(f"C = {len(tensors[1]):,}: {name}")
    for _ in range(2):
        took = scale * measure.seconds(lambda: step(function, *tensors), torch.device("cpu"))
        if took < SECONDS_PER_STEP:
            break
    return took


def _measure(report, entries, device, repeats, check_most, save):
    shape = num_rows, num_classes, size = tuple(report["shape"])
    tensors = inputs(*shape, device)
    report["check_classes"] = measure.check_classes(num_rows, min(num_classes, check_most), device)
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
    last = 0
    for turn, (row, peer) in harness.in_turns(entries, repeats - 1):
        if turn != last and report["ceilings"]:
            raise_ceilings(report["ceilings"], device)
            last = turn
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
