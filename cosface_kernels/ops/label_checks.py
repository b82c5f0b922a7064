"""Checks of the values of labels and classes, inside the operator, so that torch.compile keeps them. On a GPU they would wait for
the device: they are made there only if COSFACE_CHECK_LABELS=1.
"""

import math
import os

from . import batch_rows
from .slabs import CORRECTION_MOST


def check_labels(labels, num_classes, ignore_index, foreign_index=None):
    """Raise an IndexError for a label that is neither in [0, C) nor ignore_index, if values are checked."""
    if not _checks_values(labels):
        return
    if labels.numel():
        low, high = map(int, labels.aminmax())
        if low >= 0 and high < num_classes:
            return
    outside = ((labels < 0) | (labels >= num_classes)) & batch_rows.needs_target(labels, ignore_index, foreign_index)
    if outside.any():
        row, place = _first(outside)
        raise IndexError(
            f"labels[{place}] is {int(labels[row])}, but a label must be in [0, {num_classes}) or be ignore_index = "
            f"{ignore_index}"
        )


def check_sampled(labels, table, options):
    """Raise an IndexError for a label that is not among the classes, if values are checked."""
    if table.index is None or not _checks_values(labels):
        return
    missing = (table.positions(labels) < 0) & batch_rows.needs_target(labels, options.ignore_index, options.foreign_index)
    if missing.any():
        row, place = _first(missing)
        label = int(labels[row])
        raise IndexError(f"labels[{place}] is {label}, but classes must hold the class of every row, and {label} is not in it")


def check_index(table):
    """Raise for classes that are outside [0, C) or do not ascend, if values are checked."""
    if table.index is None or not _checks_values(table.index):
        return
    classes = table.index[:: table.centers] // table.centers
    first, last = int(classes[0]), int(classes[-1])
    descents = (classes.diff() <= 0).nonzero()
    if len(descents):
        place = int(descents[0])
        raise ValueError(
            f"classes must ascend, each number once, got {int(classes[place])} before {int(classes[place + 1])} at {place}"
        )
    if first < 0 or last >= table.num_classes:
        raise IndexError(f"classes must be in [0, {table.num_classes}), got {first if first < 0 else last}")


def check_correction(table):
    """Raise for corrections of sampled classes that a constant shift does not allow, if values are checked."""
    if table.correction is None or not _checks_values(table.correction):
        return
    most = CORRECTION_MOST * math.log2(math.e)
    low, high = table.correction.aminmax()
    if not (low >= 0 and high <= most * (1 + 2**-8)):  # of a NaN both are
        got = low if low < 0 else high
        raise ValueError(
            f"sample_correction must be from 0 to {CORRECTION_MOST}, -log of the probability that a class was drawn with, got "
            f"{float(got) * math.log(2):.6g}"
        )


def _checks_values(tensor):
    """True if values of labels and classes are checked: on a CPU, or with COSFACE_CHECK_LABELS=1, which waits for the device."""
    return tensor.device.type == "cpu" or os.environ.get("COSFACE_CHECK_LABELS") == "1"


def _first(flags):
    """(index, its text) of the first flag that is set."""
    index = tuple(flags.nonzero()[0].tolist())
    return index, ", ".join(map(str, index))
