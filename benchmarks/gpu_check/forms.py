"""Makes the table of forms that the package reads after a review, DIR/forms.json, of a record of measurements.

The format is cosface_kernels/ops/backends/triton_forms.json's; "compared" beside its rows says by what each was chosen. A form
has a row only where it was right and took less time than the package's own by more than MARGIN, which noise does not reach.
"""

import itertools
import math
import statistics

MARGIN = 0.03


def table(record):
    """The table of forms for a record of gpu_check."""
    stages = record["stages"]
    probe = next(iter(stages.get("probe", {}).get("rows", [])), {})
    measured = _measured(record)
    compared = [*_exponentials(measured), *_attend(measured)]
    rows = [
        {
            **{"kernel": each["kernel"], "chip": probe.get("capability"), "dtype": "bfloat16"},
            **{"num_rows": _around(each["rows"], compared, each["kernel"]), "size": _sizes(each["size"])},
            "options": each["options"],
        }
        for each in compared
        if each["faster_by"] > MARGIN
    ]
    told = [probe.get(key) for key in ("device", "driver", "torch", "triton", "date")]
    command = "python -m benchmarks.gpu_check" + " --dry-run" * record["dry_run"]
    commit = stages.get("exponentials", {}).get("commit")
    return {"measured": ", ".join(map(str, [*told, commit, command])), "rows": rows, "compared": compared}


def slabs(record):
    """The fastest rows of a slab for each shape and budget, beside the package's own."""
    rows = [row for row in _measured(record) if "slab" in row and "forms" not in row and row.get("graph")]
    for (n, c, d, budget), group in _groups(rows, lambda row: (row["rows"], row["classes"], row["size"], row["budget"])):
        own = next((row for row in group if not row["slab"]), None)
        best = min(group, key=_seconds)
        if own and len(group) > 1:
            yield _compared("slab", n, d, {"C": c, "budget": budget, "slab": best["slab"] or "as it is"}, best, own)


def _measured(record):
    rows = [row for entry in record["stages"].values() for row in entry["rows"]]
    return [row for row in rows if row.get("seconds") and not row.get("error") and not row.get("wrong")]


def _exponentials(measured):
    """The fastest options of each N and D, E stored, beside the package's own."""
    rows = [row for row in measured if row.get("kind") == "exponentials" and row["store"]]
    for (n, d), group in _groups(rows, lambda row: (row["rows"], row["size"])):
        own = next((row for row in group if row.get("own")), None)
        best = min(group, key=_seconds)
        blocks = dict(zip(("BLOCK_N", "BLOCK_C", "BLOCK_K"), map(int, best["tile"].split("x")), strict=True))
        options = {**blocks, "num_warps": best["warps"], "num_stages": best["stages"], **best.get("options", {})}
        if own:
            yield _compared("exponentials", n, d, options, best, own)


def _attend(measured):
    """The fastest options of either kernel for each N and D, in a step that keeps nothing, beside the slab loop."""
    rows = [row for row in measured if "forms" in row]
    for (n, d), group in _groups(rows, lambda row: (row["rows"], row["size"])):
        own = next((row for row in group if not row["forms"]), None)
        for kernel, forms in _groups([row for row in group if len(row["forms"]) == 1], lambda row: next(iter(row["forms"]))):
            best = min(forms, key=_seconds)
            if own:
                yield _compared(kernel, n, d, best["forms"][kernel], best, own)


def _compared(kernel, n, d, options, best, own):
    seconds = {"seconds": _seconds(best), "own_seconds": _seconds(own)}
    return {
        **{"kernel": kernel, "rows": n, "size": d, "options": options},
        **seconds,
        "faster_by": 1 - seconds["seconds"] / seconds["own_seconds"],
    }


def _seconds(row):
    return statistics.median(row["seconds"])


def _groups(rows, key):
    found = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found.items()


def _around(n, compared, kernel):
    """[first, last] N that a measured one stands for: half way to its neighbours, by ratio. None: no end."""
    measured = sorted({each["rows"] for each in compared if each["kernel"] == kernel})
    place = measured.index(n)
    ends = [math.isqrt(low * high) for low, high in itertools.pairwise(measured)]
    return [ends[place - 1] + 1 if place else 1, ends[place] if place < len(ends) else None]


def _sizes(d):
    """[first, last] D: rows are padded up to a power of two."""
    return [d // 2 + 1, d]
