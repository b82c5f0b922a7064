"""Options beside a margin, for `python -m benchmarks.margins --options`: each one's loss, and the same in plain PyTorch.

An option is a few N-vectors of work, or a few operations on each product in registers, in a step of 6 N C D flops. Those that
only a whole step has are in steps.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cosface_kernels import margin_softmax_loss, margins, reference

from .peers import SCALE

SMOOTHING, M = 0.1, 0.35


@dataclass(frozen=True)
class PerRow(margins.Margin):
    """CosFace's margin, with a number for each row of the batch."""

    m: float | torch.Tensor = M

    def psi(self, cosine):
        return cosine - self.m


@dataclass(frozen=True)
class EvenOnes(PerRow):
    """CosFace's margin for classes with an even number, none for the others."""

    def for_labels(self, labels):
        return PerRow(m_of_even_ones(labels, None))


class Option(NamedTuple):
    name: str
    given: Callable = lambda labels, classes: {}  # options of margin_softmax_loss for a batch
    written: Callable = lambda z, labels, given: F.cross_entropy(z, labels)  # of logits with the margin, N x C
    m: Callable = lambda labels, classes: M  # of CosFace's margin: a number, or each row's
    normalised: bool = True
    learns_scale: bool = False
    several: int = 0  # classes to a row

    def tensors(self, features, weight, labels):
        """(features, weight, labels), and a scale that is learnt."""
        if self.several:
            steps = torch.arange(self.several, device=labels.device) * 7
            labels = (labels[:, None] + steps) % len(weight)
        scale = [torch.tensor(SCALE, dtype=features.dtype, requires_grad=True)] if self.learns_scale else []
        return features, weight, labels, *scale

    def loss(self, features, weight, labels, scale=SCALE):
        given = {"margin": margins.CosFace(M)} | self.given(labels, len(weight))
        found = margin_softmax_loss(features, weight, labels, scale=scale, **given)
        return found[0] if given.get("return_statistics") else found

    def plain(self, features, weight, labels, scale=SCALE):
        """The same loss with an N x C matrix."""
        given = self.given(labels, len(weight))
        cosines = reference.logits(features, weight, scale=1.0).to(features.dtype)
        own = labels if self.several else labels[:, None]
        m = self.m(labels, len(weight))
        target = cosines.gather(1, own) - (m.to(features.dtype)[:, None] if isinstance(m, torch.Tensor) else m)
        if "negatives" in given:
            cosines = changed(given["negatives"], cosines, own, target.detach())
        return self.written(scale * cosines.scatter(1, own, target), labels, given)


def changed(negatives, cosines, own, target):
    """The cosines (N, C) that hard negatives of each kind make, by its paper; without a module CurricularFace's t is 0."""
    if isinstance(negatives, margins.CurricularFace):
        return torch.where(cosines > target, cosines.square(), cosines)
    if isinstance(negatives, margins.MVSoftmax):
        return torch.where(cosines > target, negatives.t * cosines + negatives.t - 1, cosines)
    if isinstance(negatives, margins.InterTopK):
        others = cosines.detach().scatter(1, own, -torch.inf)
        return torch.where(cosines > others.topk(negatives.k + 1).values[:, -1:], cosines + negatives.m, cosines)
    return torch.where(cosines > negatives.threshold, 0.0, cosines)


def spread(low, high, classes, labels):
    return torch.linspace(low, high, classes, device=labels.device)


def m_of_even_ones(labels, classes):
    return torch.where(labels % 2 == 0, M, 0.0)


def m_of_rows(labels, classes):
    return torch.linspace(0.1, 0.5, len(labels), device=labels.device)


def m_by_class(labels, classes):
    return spread(0.1, 0.5, classes, labels)[labels]


def weighted(z, labels, given):
    """The cross-entropy with soft targets."""
    return -(given["label_weights"] * z.log_softmax(1).gather(1, labels)).sum(1).mean()


def shares(labels, classes):
    return {"label_weights": torch.full(labels.shape, 1 / labels.shape[1], device=labels.device)}


OPTIONS = (
    Option("nothing"),
    Option(
        "label_smoothing",
        lambda labels, classes: {"label_smoothing": SMOOTHING},
        lambda z, labels, given: F.cross_entropy(z, labels, label_smoothing=SMOOTHING),
    ),
    Option(
        "class_weight",
        lambda labels, classes: {"class_weight": spread(0.5, 2, classes, labels)},
        lambda z, labels, given: F.cross_entropy(z, labels, weight=given["class_weight"].to(z.dtype)),
    ),
    Option(
        "numbers by class", lambda labels, classes: {"margin": margins.CosFace(spread(0.1, 0.5, classes, labels))}, m=m_by_class
    ),
    Option("margins that see the labels", lambda labels, classes: {"margin": EvenOnes()}, m=m_of_even_ones),
    Option("a number for each row", lambda labels, classes: {"margin": PerRow(m_of_rows(labels, classes))}, m=m_of_rows),
    Option("a learnt scale", learns_scale=True),
    Option("return_statistics", lambda labels, classes: {"return_statistics": True}),
    Option("InterclassFiltering", lambda labels, classes: {"negatives": margins.InterclassFiltering(0.4)}, normalised=False),
    Option("MVSoftmax", lambda labels, classes: {"negatives": margins.MVSoftmax(1.12)}, normalised=False),
    Option("CurricularFace", lambda labels, classes: {"negatives": margins.CurricularFace()}, normalised=False),
    Option("InterTopK", lambda labels, classes: {"negatives": margins.InterTopK(5, 0.06)}, normalised=False),
    Option("2 classes to a row", shares, weighted, normalised=False, several=2),
    Option("8 classes to a row", shares, weighted, normalised=False, several=8),
)
