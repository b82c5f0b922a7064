"""time.png and memory.png: what a step takes against C, a line for each peer that ends where it no longer fits."""

import itertools
import statistics

from matplotlib import colormaps
from matplotlib.figure import Figure


def draw(reports, folder):
    """Draws the reports of one sweep over C into `folder`; the paths of both figures."""
    paths = [folder / "time.png", folder / "memory.png"]
    _figure(reports, "seconds", lambda row: row["seconds"] and statistics.median(row["seconds"])).savefig(paths[0])
    # A peak that drowns in what the process holds anyway has no place on a logarithmic axis.
    _figure(reports, "peak memory beyond inputs and gradients, bytes", lambda row: row["peak_bytes"]).savefig(paths[1])
    return paths


def _figure(reports, label, value):
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    names = _names(reports)
    colors = dict(zip(dict.fromkeys(name for name, _ in names), itertools.cycle(colormaps["tab20"].colors), strict=False))
    for name, precision in names:
        points = [(report["shape"][1], value(row)) for report in reports for row in _rows(report, name, precision)]
        points = [(classes, y) for classes, y in points if y]
        if not points:
            continue
        style = {"color": colors[name], "linestyle": "-" if precision == "float32" else "--"}
        width = 2.5 if name.startswith("cosface_loss") else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=width, label=f"{name}, {precision}", **style)
        if any("does not fit" in (row["error"] or "") for report in reports for row in _rows(report, name, precision)):
            axes.plot(*points[-1], marker="x", markersize=10, color=colors[name])
    num_rows, _, size = reports[0]["shape"]
    axes.set(xscale="log", yscale="log", xlabel="classes C", ylabel=label)
    device = (reports[0]["environment"] or {}).get("device", "")
    axes.set_title(f"One forward and backward, N = {num_rows}, D = {size}; x: larger does not fit\n{device}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _names(reports):
    """(name, precision) of every peer, in the order of the first report."""
    return dict.fromkeys((row["name"], row["precision"]) for report in reports for row in report["rows"])


def _rows(report, name, precision):
    return [row for row in report["rows"] if (row["name"], row["precision"]) == (name, precision)]
