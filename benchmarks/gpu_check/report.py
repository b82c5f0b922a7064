"""Markdown of a record: how each stage ended, what was fastest, and every time beside its prediction."""

import statistics

from . import forms

HIDDEN = {
    "kind",
    "seconds",
    "predicted",
    "error",
    "line",
    "wrong",
    "errors",
    "peak_bytes",
    "own",
    "losses",
    "flops",
    "another_loss",
}


def markdown(record):
    yield "| stage | | s | SM clock, MHz | power, W | throttled |\n| --- | --- | --- | --- | --- | --- |"
    for name, entry in record["stages"].items():
        ended = f"{entry['status']}{': ' * bool(entry['line'])}{entry['line']}"
        conditions = entry.get("conditions") or {}
        spread = (_spread(conditions.get(key)) for key in ("sm_mhz", "power_w"))
        throttled = ", ".join(conditions.get("throttled", []))
        yield f"| {name} | {ended} | {entry.get('seconds', 0):.0f} | {' | '.join(spread)} | {throttled} |"
    yield from decisions(record)
    for name, entry in record["stages"].items():
        rows = [row for row in entry["rows"] if row.get("seconds") or row.get("error") or row.get("line")]
        if rows:
            yield f"\n| {name} | ms | predicted, ms | | peak, MB |\n| --- | --- | --- | --- | --- |"
            yield from map(_line, rows)


def decisions(record):
    """The fastest tile, form and slab of each shape beside the package's own, of those that were right."""
    yield "\n| fastest | N | D | | ms | as it is, ms | less time, % |\n| --- | --- | --- | --- | --- | --- | --- |"
    for each in (*forms.table(record)["compared"], *forms.slabs(record)):
        options = ", ".join(f"{name} {value}" for name, value in each["options"].items()) or "by default"
        times = " | ".join(f"{1e3 * each[key]:.3g}" for key in ("seconds", "own_seconds"))
        yield f"| {each['kernel']} | {each['rows']} | {each['size']} | {options} | {times} | {100 * each['faster_by']:.1f} |"


def _line(row):
    case = ", ".join(f"{key} {value}" for key, value in row.items() if key not in HIDDEN and value not in (None, {}, []))
    said = row.get("error") or ("WRONG" if row.get("wrong") else row.get("line") or "")
    peak = f"{row['peak_bytes'] / 1e6:,.0f}" if row.get("peak_bytes") else ""
    if not row.get("seconds"):
        return f"| {case} | | | {said} | {peak} |"
    median = statistics.median(row["seconds"])
    predicted = row.get("predicted")
    if predicted and not said:
        said = "faster" if median < predicted[0] else "slower" if median > predicted[1] else "as predicted"
    expected = " to ".join(f"{1e3 * end:.3g}" for end in predicted or ())
    return f"| {case} | {1e3 * median:.3g} | {expected} | {said} | {peak} |"


def _spread(values):
    return "" if values is None else f"{values[1]:.0f} ({values[0]:.0f} to {values[2]:.0f})"
