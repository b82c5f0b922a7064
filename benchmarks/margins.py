"""Measures each margin beside CosFace: python -m benchmarks.margins [--options] [--processor-time] [--classes N] [--json FILE]

A margin is N numbers of work in a step of 6 N C D flops, so it should cost nothing. Each one's forward and backward through
margin_softmax_loss is timed next to one of cosface_loss, in turns, which of the two goes first alternating, so that drift
cancels: the figure is the median of the pairs' ratios. The row "CosFace" is the same loss twice, and shows the noise. Below are
the relatives that cost more by design: logits that are no cosines need a pass that finds each row's largest, 2 N C D flops more;
sub-centres have three rows to a class, and so a third of the classes here. With --options what goes beside CosFace's margin is
measured instead: options.py, and steps.py, whose whole steps are timed next to the same without.

Loss and gradients are checked first, at a small size, against the same formulas in plain PyTorch in float64; features have norms
as those of a trained backbone. A row, with a pair at each place of the last two:
{"name", "precision", "normalised", "whole_step", "errors", "wrong", "seconds", "cosface_seconds"}
"""

import itertools
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cosface_kernels import cosface_loss, margin_softmax_loss, margins, reference

from . import harness, measure
from .options import OPTIONS
from .peers import PRECISIONS, SCALE, in_precision, inputs, step
from .record import fail, keep, parser, say
from .steps import STEPS, Step

# A normalised margin that takes more than this many times CosFace's time is named.
LIMIT = 1.05
# Rows and classes of the check: many targets, and negatives that matter.
CHECK_SHAPE = 64, 3000
FEATURE_NORMS = 20.0, 60.0
CENTERS = 3


class Case(NamedTuple):
    name: str
    margin: margins.Margin
    psi: Callable | None = None  # ψ from (θ, ‖x‖), (N,) each, written anew; None: the target's logit stays as it is
    penalty: Callable | None = None  # of ‖x‖, added to each row's loss
    normalised: bool = True  # logits are cosines, with one row to a class
    bias: bool = False
    options: dict = {}  # noqa: RUF012  never changed

    def tensors(self, features, weight, labels):
        """The problem for this loss: the given table, cut to whole classes."""
        centers = self.options.get("centers_per_class", 1)
        classes = len(weight) // centers
        if centers > 1:
            weight = weight.detach()[: classes * centers].requires_grad_()
            labels = (labels // centers).clamp(max=classes - 1)
        bias = [torch.linspace(-1, 1, classes, device=weight.device).requires_grad_()] if self.bias else []
        return features, weight, labels, *bias

    def loss(self, features, weight, labels, bias=None):
        return margin_softmax_loss(features, weight, labels, margin=self.margin, bias=bias, **self.options)

    def plain(self, features, weight, labels, bias=None):
        """The same loss with an N x C matrix. Of the package's margins it uses only the flags of normalisation."""
        unit_features = self.options.get("normalize_features", self.margin.normalize_features)
        form = {"normalize_features": unit_features, "normalize_weight": self.margin.normalize_weight}
        scale = SCALE if all(form.values()) else 1.0
        centers = self.options.get("centers_per_class", 1)
        logits = reference.logits(features, weight, scale=scale, bias=bias, centers_per_class=centers, **form).to(features.dtype)
        norm = features.norm(dim=1)
        if self.psi is not None:
            length = scale * (1 if unit_features else norm)
            length = length * (1 if self.margin.normalize_weight else weight.norm(dim=1)[labels])
            angle = (logits.gather(1, labels[:, None])[:, 0] / length).acos()
            logits = logits.scatter(1, labels[:, None], (length * self.psi(angle, norm))[:, None])
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses if self.penalty is None else losses + self.penalty(norm)).mean()


def arcface(angle, norm, m=0.5):
    return torch.where(angle <= math.pi - m, (angle + m).cos(), angle.cos() - m * math.sin(m))


def falling(angle):
    """cos, mirrored and lowered after each π."""
    turns = (angle / math.pi).detach().floor()
    return torch.where(turns % 2 == 0, angle.cos(), -angle.cos()) - 2 * turns


def adaface(angle, norm, m=0.4, h=0.333):
    norm = norm.detach()
    quality = (h * (norm - norm.mean()) / (norm.std() + 1e-3)).clamp(-1, 1)
    return (angle - m * quality).clamp(1e-3, math.pi - 1e-3).cos() - m - m * quality


def magface(angle, norm):
    m = 0.45 + (0.8 - 0.45) * (norm - 10) / (110 - 10)
    return torch.where(angle <= math.pi - m, (angle + m).cos(), angle.cos() - m * m.sin())


def magface_penalty(norm):
    return 35 * (1 / norm + norm / 110**2)


def cosface(angle, norm, m=0.35):
    return angle.cos() - m


def sphereface(angle, norm, m=4):
    return falling(m * angle)


CASES = (
    Case("CosFace", margins.CosFace(0.35), cosface),
    Case("NormSoftmax", margins.NormSoftmax()),
    Case("ArcFace", margins.ArcFace(0.5), arcface),
    Case("SphereFace", margins.SphereFace(4), sphereface),
    Case("Combined", margins.Combined(1.2, 0.3, 0.1), lambda angle, norm: falling(1.2 * angle + 0.3) - 0.1),
    Case("AdaFace", margins.AdaFace(0.4, h=0.333), adaface),
    Case("MagFace", margins.MagFace(10, 110, 0.45, 0.8, 35), magface, magface_penalty),
    Case(
        "CosFace, normalize_features=False",
        margins.CosFace(0.35),
        cosface,
        normalised=False,
        options={"normalize_features": False},
    ),
    Case("Softmax with bias", margins.Softmax(), normalised=False, bias=True),
    Case("LSoftmax", margins.LSoftmax(4), sphereface, normalised=False),
    Case(
        f"CosFace, {CENTERS} sub-centres",
        margins.CosFace(0.35),
        cosface,
        normalised=False,
        options={"centers_per_class": CENTERS},
    ),
)


def main(argv=None):
    """Returns the exit status: 0, 1 where it cannot be done, 130 after Ctrl-C."""
    asked = parser(__doc__, rows=512, classes=100_000, size=512, repeats=9)
    asked.add_argument("--options", action="store_true", help="measure what goes beside a margin, not the margins")
    asked.add_argument("--processor-time", action="store_true", help="for a busy machine: count that, of one thread")
    arguments = asked.parse_args(argv)
    if arguments.classes < CENTERS:
        asked.error(f"argument --classes: sub-centres need at least {CENTERS} rows")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.processor_time:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    shape = arguments.rows, arguments.classes, arguments.size
    # The table, its gradient, and at most as much again of exponentials; of whole steps two tables and momenta more.
    if shortage := measure.shortage((32 if arguments.options else 12) * arguments.classes * arguments.size, device):
        return fail("margins", f"C = {arguments.classes:,} {shortage}")
    precisions = PRECISIONS if arguments.dtype == "both" else [arguments.dtype]
    rows = [_row(case, precision) for precision in precisions for case in (OPTIONS + STEPS if arguments.options else CASES)]
    report = {
        **{"kind": "margins", "shape": list(shape), "environment": measure.environment(device)},
        **{"processor_time": arguments.processor_time, "rows": rows, "complete": False},
    }

    def work(save):
        check(report, device)
        time_pairs(report, device, arguments.repeats, save)

    return keep(report, arguments.json, work, table)


def _row(case, precision):
    facts = {"name": case.name, "precision": precision, "normalised": case.normalised, "whole_step": isinstance(case, Step)}
    return {**facts, "errors": None, "wrong": False, "seconds": [], "cosface_seconds": []}


def _entries(report):
    """(row, its case) of each."""
    by_name = {case.name: case for case in CASES + OPTIONS + STEPS}
    return [(row, by_name[row["name"]]) for row in report["rows"]]


def problem(num_rows, num_classes, size, device):
    """(features (N, D), weight (C, D), labels (N,)): `inputs` with features that have lengths."""
    features, weight, labels = inputs(num_rows, num_classes, size, device)
    lengths = torch.linspace(*FEATURE_NORMS, num_rows, device=device)
    return (features.detach() * lengths[:, None]).requires_grad_(), weight, labels


def check(report, device):
    """Write every row's errors, and "wrong" if they are too large."""
    tensors = problem(*CHECK_SHAPE, report["shape"][2], device)
    checks = {case.name: measure.Check(case.tensors(*tensors), case.plain) for _, case in _entries(report)}
    for row, case in _entries(report):
        found, precision = checks[case.name], row["precision"]
        if isinstance(case, Step):
            row |= found.judged(case.results(precision, *found.tensors), precision, case.rounding)
        else:
            row |= found.judged(found.run(in_precision(precision, case.loss)), precision)


def time_pairs(report, device, repeats, save=lambda: None):
    """Add `repeats` pairs to every row, after one that warms up. Calls save() after each turn."""
    tensors = problem(*report["shape"], device)
    clocked = measure.processor_seconds if report.get("processor_time") else lambda run: measure.seconds(run, device)
    for turn, (row, case) in harness.in_turns(_entries(report), repeats + 1):
        say(f"turn {turn} of {repeats}: {row['name']}, {row['precision']}")
        pair = [*zip(("seconds", "cosface_seconds"), _pair(case, row["precision"], tensors), strict=True)]
        taken = {name: clocked(run) for name, run in (pair if turn % 2 else reversed(pair))}
        if turn:
            for name, seconds in taken.items():
                row[name].append(seconds)
            save()


def _pair(case, precision, tensors):
    """(a step of the case, one of cosface_loss or without the option), functions without arguments."""
    if isinstance(case, Step):
        return case.pair(precision, *tensors)
    ours, cosface = (in_precision(precision, function) for function in (case.loss, cosface_loss))
    own = case.tensors(*tensors)
    return lambda: step(ours, *own), lambda: step(cosface, *tensors)


def table(report):
    """The Markdown table of a record."""
    num_rows, num_classes, size = report["shape"]
    facts = report["environment"]
    clock = ", processor time" if report.get("processor_time") else ""
    lines = [
        f"One forward and backward{clock}, N = {num_rows:,}, C = {num_classes:,}, D = {size:,}, float32 tensors, "
        f"on {facts['device']}, torch {facts['torch']}, {facts['date']}{'' if report['complete'] else '; interrupted'}.",
        "",
        "| | products | ms, median | times cosface_loss, median (quartiles) | error of loss | dX | dW |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(_cells(row))} |" for row in report["rows"]),
        "",
        *_conclusions(report),
    ]
    return "\n".join(lines)


def _cells(row):
    errors = ["-"] * 3
    if row["errors"]:
        loss, dx, *table_errors = row["errors"]
        errors = [f"{error:.1e}" for error in (loss, dx, max(table_errors))]
    if row["wrong"]:
        errors[0] = f"WRONG {errors[0]}"
    if not row["seconds"]:
        return [row["name"], row["precision"], "not measured", "-", *errors]
    low, median, high = _quartiles(row)
    time = f"{1e3 * statistics.median(row['seconds']):.4g}"
    return [row["name"], row["precision"], time, f"{median:.3f} ({low:.3f} to {high:.3f})", *errors]


def _quartiles(row):
    """(first quartile, median, third quartile) of the ratios of a row's pairs."""
    ratios = [ours / cosface for ours, cosface in zip(row["seconds"], row["cosface_seconds"], strict=False)]
    return torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


def _conclusions(report):
    timed = [row for row in report["rows"] if row["normalised"] and row["seconds"]]
    beyond = [f"{row['name']} in {row['precision']} ({_quartiles(row)[1]:.3f})" for row in timed if _quartiles(row)[1] > LIMIT]
    if beyond:
        yield f"Normalised margins beyond {LIMIT - 1:.0%} of cosface_loss: {', '.join(beyond)}."
    elif timed:
        yield f"No normalised margin is beyond {LIMIT - 1:.0%} of cosface_loss."
    own = {}
    for precision, rows in itertools.groupby(report["rows"], key=lambda row: row["precision"]):
        own[precision] = [seconds for row in rows if not row.get("whole_step") for seconds in row["cosface_seconds"]]
    own = [f"{1e3 * statistics.median(seconds):.4g} ms in {name}" for name, seconds in own.items() if seconds]
    if own:
        yield f"cosface_loss itself: {' and '.join(own)}, the medians of all its steps."
    if steps := dict.fromkeys(row["name"] for row in report["rows"] if row.get("whole_step")):
        yield f"A head's whole step, times one without the option: {'; '.join(steps)}."
    rows, classes = CHECK_SHAPE
    yield (
        f"Errors: ‖result - exact‖ / ‖exact‖, exact being plain PyTorch in float64, at N = {rows}, C = {classes:,}; "
        "of dW and the bias's the larger. WRONG is more than twice the error of plain PyTorch in the same precision, plus one "
        "rounding."
    )


if __name__ == "__main__":
    raise SystemExit(main())
