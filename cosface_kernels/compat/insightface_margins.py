"""Translates InsightFace's margin objects after calling them on test cosines: their source is copied and changed, and one name
stands for several functions. ArcFace's gradient is exact in some releases and straight-through (∂ψ/∂cos θ = 1) in others.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..margins import ArcFace, Combined, CosFace, Margin

KNOWN = ("ArcFace", "CombinedMarginLoss", "CosFace")


def translate(margin_loss: Callable[..., Tensor]) -> tuple[Margin, float]:
    """(margin, scale) of this package that compute what an InsightFace margin object computes, as measured.

    The object is called on a few cosines in float64, and its values and gradients must be s ψ(cos θ) at the labels and s cos θ
    elsewhere, for angles with θ + m <= π (past it releases differ, ours goes on falling). The gradient decides between
    ArcFace(gradient="exact") and "straight_through".

    One object becomes another function, with a warning: CombinedMarginLoss with m3 > 0 drops m1 and m2 without a word, and is
    translated to what it says, Combined(m1, m2, m3).

    Args:
        margin_loss: CosFace(s, m), ArcFace(s, margin) of any release, or CombinedMarginLoss(s, m1, m2, m3), by class name.

    Raises:
        TypeError: an object of another class.
        ValueError: interclass_filtering_threshold > 0; an object that raises, or computes something else.

    Source: CosFace arXiv 1801.09414, ArcFace arXiv 1801.07698 (eq. 4 for Combined).
    """
    name = type(margin_loss).__name__
    if name not in KNOWN:
        raise TypeError(f"margin_loss must be an InsightFace {', '.join(KNOWN[:-1])} or {KNOWN[-1]}, got {name}")
    if getattr(margin_loss, "interclass_filtering_threshold", 0) > 0:
        raise ValueError(
            f"interclass_filtering_threshold = {margin_loss.interclass_filtering_threshold} belongs to no margin: make the "
            "object with 0, and give the head cosface_kernels.margins.InterclassFiltering of it as `negatives`"
        )
    scale = _attribute(margin_loss, "s", "scale")
    candidates, composed = _candidates(name, margin_loss)
    margin = _measured(margin_loss, candidates, scale)
    if composed is not None and margin != composed:
        warnings.warn(f"{name} drops m1 and m2 where m3 > 0: it computes {margin}. Translated to {composed}.", stacklevel=2)
        margin = composed
    return margin, scale


def _candidates(name, margin_loss):
    """(the margins that the object may compute, the one that its arguments name if it is known to compute another)."""
    if name == "CosFace":
        return [CosFace(_attribute(margin_loss, "m"))], None
    if name == "ArcFace":
        if hasattr(margin_loss, "sin_m"):
            return _arcfaces(math.atan2(margin_loss.sin_m, margin_loss.cos_m)), None
        return _arcfaces(_attribute(margin_loss, "m", "margin")), None
    m1, m2, m3 = (_attribute(margin_loss, f"m{i}") for i in (1, 2, 3))
    if m1 == 1 and m3 == 0:
        return _arcfaces(m2), None
    if m1 == 1 and m2 == 0:
        return [CosFace(m3)], None
    composed = Combined(m1, m2, m3)
    return [composed, CosFace(m3)], composed


def _arcfaces(m):
    """Every form of ArcFace. Easy ones first: they are compared at all angles, so nothing else passes for one (unless m = 0)."""
    forms = (True, False) if m else (False,)
    return [ArcFace(m, easy_margin=easy, gradient=how) for easy in forms for how in ("exact", "straight_through")]


def _attribute(margin_loss, *names):
    for name in names:
        if hasattr(margin_loss, name):
            return float(getattr(margin_loss, name))
    raise ValueError(f"{type(margin_loss).__name__} has no attribute {' or '.join(names)}: it is of no release that is known")


def _measured(margin_loss, candidates, scale):
    """The candidate that has the object's values and gradients."""
    angles = torch.linspace(0.3, math.pi - 0.3, 24, dtype=torch.float64, device="cpu")
    labels = torch.arange(len(angles), dtype=torch.int64, device="cpu") % 3
    # Beside each target, cosines of both signs.
    cosines = torch.stack([angles.cos(), angles.flip(0).cos(), (angles + 0.5).cos()], 1)
    cosines[torch.arange(len(angles), dtype=torch.int64, device="cpu"), labels] = angles.cos()
    try:
        theirs = _values_and_gradients(lambda copy: margin_loss(copy, labels), cosines)
    except Exception as error:
        raise ValueError(f"{type(margin_loss).__name__} raises when called on cosines: {error!r}") from error
    for margin in candidates:
        ours = _values_and_gradients(lambda copy, margin=margin: scale * _with_margin(copy, labels, margin), cosines)
        rows = _comparable(margin, angles)
        # Theirs may hold the margin, or compute, in float32: an error of eps in the cosine, in sin θ and in the margin, over
        # sin² θ >= 0.08 in the gradient.
        allowed = 64 * scale * torch.finfo(torch.float32).eps
        if all((a[rows] - b[rows]).abs().max() <= allowed for a, b in zip(ours, theirs, strict=True)):
            return margin
    raise ValueError(
        f"{type(margin_loss).__name__} computes something else than scale {scale} and {' or '.join(map(str, candidates))}"
    )


def _values_and_gradients(function, cosines):
    leaf = cosines.clone().requires_grad_()
    values = function(leaf.clone())  # they write in place
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def _with_margin(cosines, labels, margin):
    index = labels[:, None]
    return cosines.scatter(1, index, margin.psi(cosines.gather(1, index)))


def _comparable(margin, angles):
    """Bool: the angles at which all releases of a margin agree, θ + m up to π, and all of them with easy_margin."""
    if isinstance(margin, ArcFace) and not margin.easy_margin:
        return angles + margin.m <= math.pi
    if isinstance(margin, Combined):
        return margin.m1 * angles + margin.m2 <= math.pi
    return torch.ones_like(angles, dtype=torch.bool)
