"""Options that only a whole training step has, for `python -m benchmarks.margins --options`: a step with one, and one without.

A step is forward, backward and FusedSGD's step, with momentum; for a parametrization, which excludes a fused optimiser, that of
torch.optim.SGD. At the check the table's change over the learning rate is its gradient.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

from cosface_kernels import CosFaceLoss, FusedSGD, sample_classes
from cosface_kernels.sampling import correction

from .peers import MARGIN, SAMPLE_RATE, SCALE, in_precision

LR = 0.1
CHECK_LR = 2.0**10  # so that the table after the step, whose rounding to float8 counts, is nearly its gradient alone
FLOAT8_ROUNDING = 2.0**-3  # of e4m3, stochastic
MOVED = 48.0, 0.2
HARD = 2  # classes to a class


class Step(NamedTuple):
    name: str
    head: Callable = lambda classes: {}  # options of the head
    beside: Callable = lambda classes: {}  # options of the head without
    max_row_norm: float | None = None
    moves: bool = False  # scale and margin are set before the step
    parametrised: bool = False
    rounding: float = 0.0  # of the table
    normalised: bool = False  # costs no more than cosface_loss

    def tensors(self, features, weight, labels):
        """The problem, with the weight as the table has it."""
        return features, self._training(weight).table().requires_grad_(), labels

    def results(self, precision, features, weight, labels):
        """(loss, dX, dW)."""
        training = self._training(weight, CHECK_LR)
        before = training.table()
        loss, dx = training.step(precision, features, labels)
        return loss, dx, (before - training.table()) / CHECK_LR

    def pair(self, precision, features, weight, labels):
        """(a step with the option, one without), functions without arguments."""
        beside = _Training(weight, self.beside(len(weight)), self._rule(), LR)
        both = self._training(weight), beside
        for each in both:  # their state exists afterwards
            each.step(precision, features, labels)
        return tuple(lambda each=each: each.step(precision, features, labels) for each in both)

    def plain(self, features, weight, labels):
        """The loss with an N x M matrix of the classes that take part."""
        table = weight.clone()
        if self.max_row_norm:
            table.register_hook(lambda grad: grad * (self.max_row_norm / grad.norm(dim=1, keepdim=True)).clamp(max=1))
        classes, correct = torch.arange(len(weight), device=weight.device), 0.0
        if "hard_classes" in self.head(len(weight)):
            certain = torch.cat([labels, hard_classes(len(weight)).to(labels)[labels].flatten()])
            classes = sample_classes(certain, len(weight), SAMPLE_RATE)
            correct = correction(classes, certain, len(weight)).to(weight.dtype)
        scale, margin = MOVED if self.moves else (SCALE, MARGIN)
        cosines = F.linear(F.normalize(features), F.normalize(table[classes]))
        is_own = (classes == labels[:, None]).to(weight.dtype)
        return F.cross_entropy(scale * (cosines - margin * is_own) + correct, torch.searchsorted(classes, labels))

    def _training(self, weight, lr=LR):
        rule = self._rule(**({"max_row_norm": self.max_row_norm} if self.max_row_norm else {}))
        return _Training(weight, self.head(len(weight)), rule, lr, moves=self.moves, parametrised=self.parametrised)

    def _rule(self, **options):
        return functools.partial(torch.optim.SGD if self.parametrised else FusedSGD, momentum=0.9, **options)


class _Training:
    """A head over a copy of a table, and its optimiser."""

    def __init__(self, weight, options, rule, lr, *, moves=False, parametrised=False):
        classes, size = weight.shape
        self.head = CosFaceLoss(size, classes, scale=SCALE, margin=MARGIN, device=weight.device, **options)
        self.head.load_state_dict({"weight": weight.detach()}, strict=False)  # not strict: a sampled head counts steps
        if parametrised:
            weight_norm(self.head, "weight", dim=0)
        self.moves, self.optimizer = moves, rule(self.head.parameters(), lr=lr)

    def step(self, precision, features, labels):
        """(loss, dX)."""
        if self.moves:
            self.head.scale, self.head.margin = MOVED
        loss = in_precision(precision, self.head)(features, labels)
        features.grad = None
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), features.grad

    def table(self):
        """(C, D), a copy."""
        *_, weight = self.head.parameters()  # of weight_norm the direction
        scale = self.head.weight_scale
        return weight.detach().float() * scale[:, None] if scale is not None else weight.detach().clone()


def hard_classes(classes):
    return (torch.arange(classes)[:, None] + torch.arange(1, HARD + 1) * 7) % classes


STEPS = (
    Step("head.margin, head.scale that move", moves=True, normalised=True),
    Step(
        "hard classes",
        lambda classes: {"sample_rate": SAMPLE_RATE, "hard_classes": hard_classes(classes), "sample_correction": True},
        lambda classes: {"sample_rate": SAMPLE_RATE},
    ),
    Step("float8", lambda classes: {"table_format": "float8"}, rounding=FLOAT8_ROUNDING),
    Step("max_row_norm", max_row_norm=0.1),
    Step("weight_norm", parametrised=True),
)
