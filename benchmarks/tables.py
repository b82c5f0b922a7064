"""Markdown tables from measured results:  python -m benchmarks.tables FILE.json ...

A file is what any benchmark wrote with --json (record.py), or `python -m benchmarks.gpu_check`.
"""

import importlib
import json
import statistics
import sys

from .peers import PLAIN, PRECISIONS

HEADER = (
    "| | products | ms, median (fastest to slowest) | times plain | TFLOP/s | of ceiling | GB/s | memory, MB "
    "| error of loss | dX | dW |"
)


def markdown(report):
    """The table of one report and the lines that explain it."""
    columns = HEADER.count("|") - 1
    lines = [_caption(report), "", HEADER, "|" + " --- |" * columns]
    lines += [f"| {' | '.join(_cells(row, report))} |" for row in sorted(report["rows"], key=_order)]
    if report["missing"]:
        lines += ["", f"Not measured: {_missing(report['missing'])}."]
    return "\n".join([*lines, "", *_explanation(report)])


def _missing(reasons):
    """name, name (reason); name (reason)"""
    names = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(group)} ({reason})" for reason, group in names.items())


def _order(row):
    return PRECISIONS.index(row["precision"])


def _caption(report):
    num_rows, num_classes, size = report["shape"]
    facts = report["environment"]
    where = f"{facts['device']}, torch {facts['torch']}, {facts['date']}"
    return f"One forward and backward, N = {num_rows:,}, C = {num_classes:,}, D = {size:,}, float32 tensors, on {where}" + (
        "." if report["complete"] else "; interrupted."
    )


def _cells(row, report):
    """The row's columns as text; one that could not be measured has its reason in place of the time."""
    cells = [row["name"], row["precision"], *_speed(row, report)]
    cells.append("-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}")
    if row["another_loss"]:
        return [*cells, "another loss", "-", "-"]
    errors = ["-" if error is None else f"{error:.1e}" for error in row["errors"] or [None] * 3]
    if row["wrong"]:
        errors[0] = f"WRONG {errors[0]}"
    return [*cells, *errors]


def _speed(row, report):
    if row["error"]:
        return [row["error"].replace("|", "/"), *"----"]
    if not row["seconds"]:
        return ["not measured", *"----"]
    num_rows, num_classes, size = report["shape"]
    median = statistics.median(row["seconds"])
    rate = row["flops"] * num_rows * num_classes * size / median
    moved = 2 * num_classes * size * 4 / median
    spread = f"{_ms(min(row['seconds']))} to {_ms(max(row['seconds']))}" if len(row["seconds"]) > 1 else "one step"
    return [
        f"{_ms(median)} ({spread})",
        _times_plain(median, report),
        f"{rate / 1e12:.3g}",
        f"{rate / report['ceilings'][row['precision']]:.0%}",
        f"{moved / 1e9:.3g}",
    ]


def _times_plain(median, report):
    """The speed as a multiple of that of plain PyTorch in float32."""
    plain = next((row["seconds"] for row in report["rows"] if (row["name"], row["precision"]) == (PLAIN, "float32")), None)
    return f"{statistics.median(plain) / median:.2f}" if plain else "-"


def _ms(seconds):
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _explanation(report):
    rates = [f"{report['ceilings'][name] / 1e12:.3g} in {name}" for name in PRECISIONS if name in report["ceilings"]]
    only = " One step: the only one." if any(len(row["seconds"] or ()) == 1 for row in report["rows"]) else ""
    yield f"Times plain: the speed of {PLAIN} in float32 is 1.{only}"
    yield (
        "TFLOP/s: 6 N C D flops over the time for every peer, but 8 N C D where memory_budget=0 computes the exponentials twice, "
        "and 0.6 N C D where a tenth of the classes is sampled; "
        f"the ceiling is this machine's own matrix product, {' and '.join(rates)} TFLOP/s. "
        f"GB/s: W read once and dW written once, over the time; a copy moves {report['ceilings']['copy'] / 1e9:.3g} GB/s here. "
        "Products in bfloat16 are under autocast."
    )
    at = "" if report["check_classes"] in (None, report["shape"][1]) else f", at C = {report['check_classes']:,}"
    yield (
        f"Memory: the peak beyond inputs and gradients. Errors: ‖result - exact‖ / ‖exact‖, exact being {PLAIN} in float64{at}; "
        f"WRONG is more than twice the error of {PLAIN} in the same precision, plus one rounding."
    )


def main(paths):
    if not paths:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    for path in paths:
        with open(path) as file:
            print(text(json.load(file)))
    return 0


def text(record):
    """The table of a record of any kind."""
    kind = record["kind"]
    if kind == "bench":
        return markdown(record) if record["environment"] else ""
    if kind == "sweep":
        return "\n\n".join(filter(None, map(text, record["rows"])))
    if kind == "gpu_check":
        from .gpu_check import report

        return "\n".join(report.markdown(record))
    return importlib.import_module(f".{kind}", __package__).table(record)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
