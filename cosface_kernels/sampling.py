"""Sampled classes (Partial FC): which ones take part in a step, for a caller and for the heads."""

import torch
from torch import Tensor

from . import validation
from .ops import operators
from .positives import class_indices


def sample_classes(labels: Tensor, num_classes: int, rate: float, *, seed: int = 0, step: int = 0) -> Tensor:
    """The classes that take part in a step: those of the labels, and others drawn at random.

    M = rate C in all, rounded, or the smaller of N and C if that is more: so there is room for the classes of any labels, and
    nothing waits for a GPU. A class of no label is drawn with probability (M - P) / (C - P), where P is the number of
    different classes among the labels. A pure function of its arguments, on one kind of device: a run resumed at the same step
    draws the same classes.

    Args:
        labels: (N,), any integer dtype. Numbers outside [0, C) are ignored.
        num_classes: C.
        rate: 0 < rate <= 1.
        seed, step: ints from 0 on. The draw is a function of both.

    Returns:
        (M,) int64, ascending, on the device of labels: the `classes` of `margin_softmax_loss`.

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


def correction(classes: Tensor, certain: Tensor, num_classes: int) -> Tensor:
    """-log of each class's probability to be in a sample: 0 if it was certain to be, else log((C - P) / (M - P)).

        certain = torch.cat([labels, hard_classes[labels].flatten()])
        classes = sample_classes(certain, num_classes, 0.1, step=step)
        loss = cosface_loss(..., classes=classes, sample_correction=correction(classes, certain, num_classes))

    With it the sum of a row's exponentials over the sample is, on average over the draws, that over all classes. P is the number
    of classes that were certain, and the probabilities are those of `sample_classes(certain, ...)`.

    Args:
        classes: (M,), what `sample_classes` returned.
        certain: (any number,), the labels that it was given.
        num_classes: C.

    Returns:
        (M,) float32, the `sample_correction` of `margin_softmax_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Source: Y. Bengio and J.-S. Senécal, Quick Training of Probabilistic Neural Nets by Importance Sampling, AISTATS 2003.
    """
    validation.check_labels(classes)
    validation.check_labels(certain)
    validation.check_size("num_classes", num_classes)
    # Not torch.isin, which waits for a GPU.
    classes, ordered = class_indices(classes), class_indices(certain).sort().values
    after_all = torch.nn.functional.pad(ordered, (0, 1), value=-1)  # a place past the last
    is_certain = after_all[torch.searchsorted(ordered, classes)] == classes
    of_each = torch.where(is_certain, 0.0, 1.0).to(torch.float32)
    num_others = of_each.sum()
    population = num_classes - len(classes) + num_others
    return of_each * (population.clamp(min=1).log() - num_others.clamp(min=1).log())


def with_hard_classes(labels, ignore_index, hard_classes):
    """The classes that are certain to be in a head's sample, any number below 0 for none: those of the labels, and the k hard
    classes (C, k) of each of these. Ignored rows add none.
    """
    labels = class_indices(labels)
    counted = torch.where(labels == ignore_index, -1, labels)
    if hard_classes is None:
        return counted
    known = (counted >= 0) & (counted < len(hard_classes))
    hard = hard_classes[torch.where(known, counted, 0)]
    return torch.cat([counted, torch.where(known[:, None], hard, -1).flatten()])


def classes_of_step(certain, num_classes, rate, seed, step):
    """`sample_classes` for a head, whose step is a 0-dim int64 tensor that counts forward passes."""
    return operators.sample_classes(certain, step, int(num_classes), float(rate), int(seed), True)
