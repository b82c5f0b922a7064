"""Every ψ(cos θ) of a paper, each a frozen dataclass.

Autograd differentiates ψ; one of the angle first moves the cosine just `inside` ±1, where an arc cosine's derivative is infinite
(and the cosine's own gradient is zero). A parameter of the wrong type or outside its range is a TypeError or ValueError at
construction.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..validation import check_fields, check_flag, shown
from .base import Margin, Number, inside, number


@dataclass(frozen=True)
class CosFace(Margin):
    """ψ(cos θ) = cos θ - m. Source: CosFace (LMCL), arXiv 1801.09414, eq. 4; m = 0.35 is the paper's, InsightFace uses 0.40."""

    m: Number = 0.35

    by_class: ClassVar = ("m",)

    def __post_init__(self):
        check_fields(self, m=(-math.inf, math.inf))

    def psi(self, cosine: Tensor) -> Tensor:
        return cosine - number(self.m, cosine)

    def target_logit(self, product: Tensor, length: Tensor | None) -> Tensor:
        """l cos θ - l m without dividing by l, so that a row of zeros keeps its gradient."""
        m = number(self.m, product)
        return product - (m if length is None else m * length)


@dataclass(frozen=True)
class NormSoftmax(Margin):
    """ψ(cos θ) = cos θ: no margin. Source: NormFace, arXiv 1704.06369; the CosFace paper's NSL, eq. 3."""

    def psi(self, cosine: Tensor) -> Tensor:
        return cosine

    def target_logit(self, product: Tensor, length: Tensor | None) -> Tensor:
        return product  # l ψ(product / l)


@dataclass(frozen=True)
class ArcFace(Margin):
    """ψ(cos θ) = cos(θ + m) for θ <= π - m, and cos θ - m sin m past that, so that it goes on falling. m in radians.

    Args:
        m: the margin, from 0 to π.
        easy_margin: cos(θ + m) only where cos θ > 0, and cos θ elsewhere.
        gradient: "exact", or "straight_through": ∂ψ/∂cos θ is taken to be 1, as some releases of InsightFace do unsaid.

    At θ = π - m the value falls from -1 to -cos m - m sin m (past m = 2.33 it rises); with easy_margin it rises at θ = π / 2 by
    sin m.

    Source: ArcFace, arXiv 1801.07698, eq. 3.
    """

    m: Number = 0.5
    easy_margin: bool = False
    gradient: Literal["exact", "straight_through"] = "exact"

    by_class: ClassVar = ("m",)

    def __post_init__(self):
        check_fields(self, m=(0.0, math.pi))
        check_flag("easy_margin", self.easy_margin)
        if self.gradient not in ("exact", "straight_through"):
            raise ValueError(f'gradient of ArcFace must be "exact" or "straight_through", got {self.gradient!r}')

    def psi(self, cosine: Tensor) -> Tensor:
        value = _rotated(cosine, number(self.m, cosine), self.easy_margin)
        return value if self.gradient == "exact" else cosine + (value - cosine).detach()


@dataclass(frozen=True)
class SphereFace(Margin):
    """A-Softmax: ψ(cos θ) = (-1)^k cos(m θ) - 2k for θ in [kπ/m, (k+1)π/m].

    The original does not normalise features: normalize_features=False, with which the scale is 1.

    Args:
        m: the factor of the angle, 1 or more, not only whole numbers.
        annealing: the original's schedule: (λ cos θ + ψ(cos θ)) / (1 + λ), λ = max(5, 1000 / (1 + 0.12 t)) in training step t.
            Without a module, which counts the steps, t = 0.

    Source: SphereFace, arXiv 1704.08063, eq. 7 and section 4.1 (schedule: its published configuration).
    """

    m: Number = 4
    annealing: bool = False

    by_class: ClassVar = ("m",)

    def __post_init__(self):
        check_fields(self, m=(1.0, math.inf))
        check_flag("annealing", self.annealing)

    @property
    def state(self):
        return {"step": 0} if self.annealing else {}

    def psi(self, cosine: Tensor, step: Tensor | None = None) -> Tensor:
        value = _continued(number(self.m, cosine) * inside(cosine).acos())
        if step is None:
            return value
        weight = (1000.0 / (1.0 + 0.12 * step.to(cosine.dtype))).clamp(min=5.0)
        return (weight * cosine + value) / (1 + weight)

    def terms(self, norm: Tensor | None, counted: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if not self.annealing:
            return ()
        return (state["step"] if state else counted.new_zeros((), dtype=torch.int64),)

    def update(self, norm: Tensor | None, counted: Tensor, state: dict[str, Tensor]) -> None:
        if self.annealing:
            state["step"].add_(1)


@dataclass(frozen=True)
class Combined(Margin):
    """ψ(cos θ) = cos(m1 θ + m2) - m3, all three at once; m2 in radians, from 0 to π.

    Where φ = m1 θ + m2 passes π it goes on falling as SphereFace's does: (-1)^k cos φ - 2k - m3 for φ in [kπ, (k+1)π].
    InsightFace's CombinedMarginLoss drops m1 and m2 silently where m3 > 0.

    Source: ArcFace, arXiv 1801.07698, eq. 4.
    """

    m1: Number = 1.0
    m2: Number = 0.0
    m3: Number = 0.0

    by_class: ClassVar = ("m1", "m2", "m3")

    def __post_init__(self):
        check_fields(self, m1=(0.0, math.inf), m2=(0.0, math.pi), m3=(-math.inf, math.inf))

    def psi(self, cosine: Tensor) -> Tensor:
        m1, m2, m3 = (number(m, cosine) for m in (self.m1, self.m2, self.m3))
        return _continued(m1 * inside(cosine).acos() + m2) - m3


@dataclass(frozen=True)
class AdaFace(Margin):
    """ψ(cos θ) = cos(θ - m z) - (m + m z), z = clip(h (‖x‖ - mean) / (std + 0.001), -1, 1): the row's quality.

    mean and std are of ‖x‖, clipped to [0.001, 100] and without gradient. With a module they are running ones, which move by
    t_alpha (the batch's - the running one) in each training step; without one the batch's own. θ - m z is held within
    [0.001, π - 0.001].

    Args:
        m: the margin.
        h: z reaches ±1 at 1 / |h| standard deviations; below 0 where norms fall with quality, as its authors advise then.
        t_alpha: how far the running statistics move towards the batch's in a step, from 0 to 1.

    Source: AdaFace, arXiv 2204.00964, eq. 8 to 11; statistics as in the published code, where they start from 20 and 100. A
    batch of one row has no standard deviation, and moves no statistics.
    """

    m: Number = 0.4
    h: Number = 0.333
    t_alpha: float = 0.01

    by_class: ClassVar = ("m", "h")
    needs_norm: ClassVar[bool] = True
    state: ClassVar[dict] = {"batch_mean": 20.0, "batch_std": 100.0}

    def __post_init__(self):
        check_fields(self, m=(0.0, math.pi / 2), h=(-math.inf, math.inf), t_alpha=(0.0, 1.0))

    def psi(self, cosine: Tensor, quality: Tensor) -> Tensor:
        m = number(self.m, cosine)
        shift = m * quality
        angle = (inside(cosine).acos() - shift).clamp(1e-3, math.pi - 1e-3)
        return angle.cos() - (m + shift)

    def terms(self, norm: Tensor | None, counted: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        norm = self._clipped(norm)
        mean, std = (state["batch_mean"], state["batch_std"]) if state else self._statistics(norm, counted)
        return ((number(self.h, norm) * (norm - mean) / (std + 1e-3)).clamp(-1, 1),)

    def update(self, norm: Tensor | None, counted: Tensor, state: dict[str, Tensor]) -> None:
        norm = self._clipped(norm)
        enough = (counted & norm.isfinite()).sum() > 1
        for name, value in zip(self.state, self._statistics(norm, counted), strict=True):
            state[name] += torch.where(enough, float(self.t_alpha) * (value - state[name]), 0.0)

    @staticmethod
    def _clipped(norm):
        return norm.detach().clamp(1e-3, 100.0)

    @staticmethod
    def _statistics(norm, counted):
        """(mean, standard deviation) over the rows that count and are finite; (0, 0) over none."""
        counted = counted & norm.isfinite()
        count = counted.sum()
        mean = torch.where(counted, norm, 0.0).sum() / count.clamp(min=1)
        squares = torch.where(counted, (norm - mean).square(), 0.0).sum()
        return mean, (squares / (count - 1).clamp(min=1)).sqrt()


@dataclass(frozen=True)
class MagFace(Margin):
    """ψ(cos θ) = cos(θ + m(a)) with each row's own margin, continued as ArcFace's; λ_g g(a) is added to the row's loss.

        m(a) = (u_margin - l_margin) / (u_a - l_a) (a - l_a) + l_margin,    g(a) = 1/a + a/u_a²,    a = ‖x‖ clipped to [l_a, u_a]

    Args:
        l_a, u_a: the range of feature norms.
        l_margin, u_margin: the margins at its ends, radians.
        lambda_g: λ_g.
        easy_margin: see ArcFace; the published training code has it on.

    Source: MagFace, arXiv 2103.06627, eq. 3 and 4, and its published code.
    """

    l_a: Number = 10.0
    u_a: Number = 110.0
    l_margin: Number = 0.45
    u_margin: Number = 0.8
    lambda_g: Number = 35.0
    easy_margin: bool = False

    by_class: ClassVar = ("l_a", "u_a", "l_margin", "u_margin", "lambda_g")
    needs_norm: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self, l_a=(0.0, math.inf), u_a=(0.0, math.inf), lambda_g=(0.0, math.inf))
        check_fields(self, l_margin=(0.0, math.pi), u_margin=(0.0, math.pi))
        check_flag("easy_margin", self.easy_margin)
        if not _all(self.l_a > 0) or not _all(self.l_a < self.u_a):
            raise ValueError(f"MagFace needs 0 < l_a < u_a, got l_a = {shown(self.l_a)}, u_a = {shown(self.u_a)}")
        if not _all(self.l_margin <= self.u_margin):
            raise ValueError(f"MagFace needs l_margin <= u_margin, got {shown(self.l_margin)} and {shown(self.u_margin)}")

    def psi(self, cosine: Tensor, m: Tensor) -> Tensor:
        return _rotated(cosine, m, self.easy_margin)

    def terms(self, norm: Tensor | None, counted: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        names = ("l_a", "u_a", "l_margin", "u_margin")
        l_a, u_a, l_margin, u_margin = (number(getattr(self, name), norm) for name in names)
        return ((u_margin - l_margin) / (u_a - l_a) * (self._clipped(norm) - l_a) + l_margin,)

    def penalty(self, norm: Tensor | None) -> Tensor | None:
        norm, u_a = self._clipped(norm), number(self.u_a, norm)
        return number(self.lambda_g, norm) * (1 / norm + norm / u_a / u_a)

    def _clipped(self, norm):
        return norm.clamp(min=number(self.l_a, norm)).clamp(max=number(self.u_a, norm))


@dataclass(frozen=True)
class Softmax(NormSoftmax):
    """Plain softmax cross-entropy: logits x·w_j + b_j, nothing normalised, no margin. `bias` belongs to this one alone."""

    normalize_features: ClassVar[bool] = False
    normalize_weight: ClassVar[bool] = False


@dataclass(frozen=True)
class LSoftmax(SphereFace):
    """SphereFace's ψ with nothing normalised: the target's logit is ‖x‖ ‖w_y‖ ψ(cos θ), the others' are x·w_j.

    The annealing is SphereFace's too; L-Softmax has had schedules of its own.

    Source: L-Softmax, arXiv 1612.02295, eq. 4 to 6.
    """

    normalize_features: ClassVar[bool] = False
    normalize_weight: ClassVar[bool] = False


def _rotated(cosine, m, easy_margin):
    """cos(θ + m) where it falls, and what ArcFace takes elsewhere; m: a float, or a tensor (N,) or ()."""
    cosine = inside(cosine)
    cos_m, sin_m = (m.cos(), m.sin()) if isinstance(m, Tensor) else (math.cos(m), math.sin(m))
    rotated = cosine * cos_m - (1 - cosine.square()).sqrt() * sin_m
    if easy_margin:
        return torch.where(cosine > 0, rotated, cosine)
    return torch.where(cosine >= -cos_m, rotated, cosine - m * sin_m)


def _continued(angle):
    """cos(angle) on [0, π], going on falling past π: (-1)^k cos(angle) - 2k on [kπ, (k+1)π]."""
    k = (angle.detach() / math.pi).floor()
    return (1 - 2 * torch.remainder(k, 2)) * angle.cos() - 2 * k


def _all(holds):
    """True if a comparison of numbers or tensors holds, or if torch.compile traces tensors, which then have no numbers."""
    return bool(holds) if not isinstance(holds, Tensor) else torch.compiler.is_compiling() or bool(holds.all())
