"""The class table of a case: the numbers that a float8 one keeps, and which of its classes take part in a step."""

import math
import random
from typing import NamedTuple

import torch

from cosface_kernels import sample_classes
from cosface_kernels.heads import float8
from cosface_kernels.ops import formats
from cosface_kernels.sampling import correction

LEAST = 2.0**-9  # the least number of e4m3, in units of a row's scale


def fill(weight, row_scale, rows):
    """Encode rows into a table; (R, D) float32, what it then has, each number the nearest one that its row's scale allows."""
    float8.put(weight, row_scale, slice(None), rows)
    if row_scale is None:
        return weight.detach()
    decoded, rows = weight.detach().float() * row_scale[:, None], rows.float()
    known = rows.isfinite().all(1, keepdim=True)
    error, half = (decoded - rows).abs(), torch.maximum(rows.abs() / 16, row_scale[:, None] * LEAST / 2)
    assert (torch.where(known, error, 0.0) <= torch.where(known, half, 1.0)).all(), "rows were not encoded to the nearest"
    return decoded


def stored(rows, dtype):
    """Rows of a dtype, or the float32 numbers that a float8 table keeps of them."""
    if dtype != formats.FLOAT8:
        return rows.to(dtype)
    return fill(torch.empty(rows.shape, dtype=dtype), torch.empty(len(rows)), rows)


class Sample(NamedTuple):
    classes: torch.Tensor  # (M,) that take part
    by_class: torch.Tensor  # (M,), what is added to their logits


def hard_classes(case):
    """(C, k), which the case draws along with each class, or None."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = case["classes"], case["hard_classes"]
    return torch.randint(-1, case["classes"], shape, generator=generator) if case["hard_classes"] else None


def sample(case, labels, rate):
    """The Sample of a step, for the labels (N,) or (N, K) of its batch, checked against what sample_classes promises."""
    hard, num_classes, seed = hard_classes(case), case["classes"], case["seed"]
    certain = labels.flatten()
    if hard is not None:
        certain = torch.cat([certain, torch.where(certain[:, None] >= 0, hard[certain.clamp(min=0)], -1).flatten()])
    certain = certain.tolist()
    must = {j for j in certain if j >= 0}
    classes = sample_classes(torch.tensor(certain, dtype=torch.int64), num_classes, rate, seed=seed)
    drawn = classes.tolist()
    assert drawn == sorted({*drawn}) and must <= {*drawn} <= {*range(num_classes)}, "not the classes of the labels, ascending"
    wanted = min(max(len(certain), round(rate * num_classes), 1), num_classes)
    assert len(drawn) == wanted, f"{len(drawn)} classes, not {wanted}"
    return Sample(classes, _by_class(case, classes, torch.tensor(certain, dtype=torch.int64), must))


def _by_class(case, classes, certain, must):
    """Nothing, log((C - 1) / (M - 1)) or -log of each class's probability, or any numbers."""
    num_classes, drawn, generator = case["classes"], classes.tolist(), random.Random(case["seed"])
    match case["sampled"]:
        case "sampled":
            shifts = [0.0] * len(drawn)
        case "corrected" if not case["hard_classes"]:
            shifts = [math.log((num_classes - 1) / (len(drawn) - 1)) if len(drawn) > 1 else 0.0] * len(drawn)
        case "corrected":
            others = len(drawn) - len(must)
            shifts = [0.0 if j in must else math.log((num_classes - len(must)) / others) for j in drawn]
            found = correction(classes, certain, num_classes)
            error = (found.double() - torch.tensor(shifts, dtype=torch.float64)).abs().max()
            assert found.dtype == torch.float32 and error <= 8 * torch.finfo(torch.float32).eps, "correction"
            return found  # in float32, whatever the loss has
        case "numbers":
            shifts = [generator.choice((0.0, 20 * generator.random())) for _ in drawn]
    return torch.tensor(shifts, dtype=torch.float64)


def correction_of(case, found):
    """The argument sample_correction of a function, for such a Sample."""
    by_class = case["sampled"] == "numbers" or (case["sampled"] == "corrected" and case["hard_classes"])
    return found.by_class if by_class else case["sampled"] == "corrected"
