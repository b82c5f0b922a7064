"""Sampled classes (Partial FC): which ones take part in a step, for a caller and for the heads."""

import torch
from torch import Tensor

from . import validation
from .loss import class_indices
from .ops import operators


def sample_classes(labels: Tensor, num_classes: int, rate: float, *, seed: int = 0, step: int = 0) -> Tensor:
    """The classes that take part in a step: those of the labels, and others drawn at random.

    M = rate C in all, rounded, or P if that is more; P is the number of different classes among the labels. Each other class is
    drawn with probability (M - P) / (C - P). A pure function of its arguments, on one kind of device: a run resumed at the same
    step draws the same classes. On a GPU it waits for the device only if N > M, because then P may be more than M.

    Args:
        labels: (N,), any integer dtype. Numbers outside [0, C) are ignored.
        num_classes: C.
        rate: 0 < rate <= 1.
        seed, step: ints from 0 on. The draw is a function of both.

    Returns:
        (max(P, M),) int64, ascending, on the device of labels: the `classes` of `margin_softmax_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Source: Partial FC, X. An et al., arXiv 2010.05222, section 3.2, which ranks a random number for each of C classes.
    """
    validation.check_labels(labels)
    validation.check_size("num_classes", num_classes)
    validation.check_rate("rate", rate)
    validation.check_count("seed", seed)
    validation.check_count("step", step)
    step = torch.full((), step, dtype=torch.int64, device=labels.device)
    return operators.sample_classes(class_indices(labels), step, int(num_classes), float(rate), int(seed), False)


def classes_of_step(labels, ignore_index, num_classes, rate, seed, step):
    """The same for a head, whose step is a 0-dim int64 tensor that counts forward passes; ignored rows add no class."""
    labels = class_indices(labels)
    counted = torch.where(labels == ignore_index, -1, labels)
    return operators.sample_classes(counted, step, int(num_classes), float(rate), int(seed), True)
