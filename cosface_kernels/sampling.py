"""Which classes take part in a step of sampled softmax: every class of the batch, and as many others as the rate asks for.

Partial FC, arXiv 2010.05222 and 2203.15565. Theirs ranks a random number for each of C classes; here a step costs O(rate C),
because the others are drawn one from each of as many strata:

    others ranked 0 .. C - P - 1:   | · x · · | x · · · | · · x · |    turned by a random offset, so that each is as likely

With P classes in the batch and M wanted, every other class is drawn with probability (M - P) / (C - P) exactly.
"""

import torch

from . import validation
from .functional import class_indices

# Neighbouring seeds get streams far from each other: 2^64 over the golden ratio.
SEED_STRIDE = 0x9E3779B97F4A7C15


@torch.no_grad()
def sample_classes(labels, num_classes, rate, *, seed=0, step=0):
    """The classes that take part in a step: those of `labels`, and others drawn at random, max(P, M) in all, M = rate C.

    A pure function of its arguments, on one kind of device: a run that is resumed at the same step draws the same classes. On a
    GPU it waits for the device, because how many classes there are depends on the labels.

    Args:
        labels: (N,), any integer dtype. Numbers outside [0, C) are ignored.
        num_classes: C.
        rate: of classes that take part, 0 < rate <= 1; M = rate C is rounded, and 1 at least. P is the number of classes in
            labels.
        seed, step: what a sample is drawn from; ints from 0 on.

    Returns:
        (max(P, M),) int64, ascending, on the device of labels: the `classes` of `margin_softmax_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Source: Partial FC, X. An et al., arXiv 2010.05222, section 3.2.
    """
    validation.check_labels(labels)
    validation.check_size("num_classes", num_classes)
    validation.check_rate("rate", rate)
    validation.check_count("seed", seed)
    validation.check_count("step", step)
    labels = class_indices(labels)
    positives = labels[(labels >= 0) & (labels < num_classes)].unique()
    others = num_classes - len(positives)
    wanted = max(1, round(float(rate) * num_classes))
    count = min(max(wanted - len(positives), 0), others)
    generator = torch.Generator(labels.device).manual_seed((int(seed) * SEED_STRIDE + int(step)) % 2**64)
    ranks = _stratified(others, count, generator)
    # An other class is its rank plus the positives below it, of which the i-th has positives[i] - i others below it.
    before = torch.searchsorted(positives - _range_like(positives), ranks, right=True)
    negatives = ranks + before
    classes = torch.empty(len(positives) + count, dtype=torch.int64, device=labels.device)
    classes[_range_like(ranks) + before] = negatives
    classes[_range_like(positives) + torch.searchsorted(negatives, positives)] = positives
    return classes


def _stratified(population, count, generator):
    """(count,) ascending distinct numbers below population, each number as likely as any other."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=generator.device)
    # 63 bits modulo a stratum's size: no number is likelier than another by more than size / 2^63.
    draws = torch.randint(2**63 - 1, (count + 1,), generator=generator, device=generator.device)
    return _one_of_each_stratum(population, draws[:-1], draws[-1] % population)


def _one_of_each_stratum(population, draws, offset):
    """Number draws[i] of the i-th of as many strata as there are draws, turned by offset, ascending."""
    edges = torch.arange(len(draws) + 1, device=draws.device) * population // len(draws)
    numbers = edges[:-1] + draws % edges.diff() + offset
    wrapped = (numbers >= population).sum()
    turned = (_range_like(numbers) - wrapped) % len(numbers)
    return (numbers % population)[turned]


def _range_like(tensor):
    return torch.arange(len(tensor), device=tensor.device)
