"""Functions of a row's hard negatives, the margin's partners: `negatives=` of the losses and heads.

    A_n = log Σ_{j≠y_n} e^{s g_n(cos_nj)},    g_n(c) = p0_n + p1_n c + p2_n c²  where c > τ_n,  and c elsewhere

The margin changes the cosine of a row with its own class, this the cosines with others that pass the row's threshold τ_n. τ_n
and the three numbers have no gradient; that of c is g_n'(c). It goes with cosines alone: features and table normalised. Of
sub-centres the nearest counts, by its own cosine.

A logit may pass s: where s and the `bound` are too large for a constant shift, each row's largest one is found first, which takes
2 N C D flops more (docs/margins.md has figures). Statistics are of the cosines as they are.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..validation import check_fields, check_flag, check_size, shown


@dataclass(frozen=True)
class HardNegatives:
    """Base class. A subclass overrides `polynomial`, and `bound` where a changed cosine passes 1."""

    bound: ClassVar[float] = 1.0  # at least every |g(c)| for |c| <= 1 that is finite
    state: ClassVar[dict] = {}  # initial values of running statistics by name; the module keeps them as buffers
    num_nearest: ClassVar[int] = 0  # the number of a row's largest cosines with other classes that `polynomial` reads

    def polynomial(self, cosine: Tensor, target: Tensor, state: dict[str, Tensor]) -> tuple[float | Tensor, ...]:
        """(τ, p0, p1, p2), each a number, or a tensor () or (N,); p0 = -inf with p1 = p2 = 0 leaves a negative out of the sum.

        cosine, target: that with the own class (N,), before and after the margin, of ignored rows anything; state: the running
        statistics, {} without a module to keep them; where num_nearest is k, also nearest (N, k), those cosines, descending, -inf
        where there are fewer. They take a pass over the table of their own.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no polynomial(self, cosine, target, state)")

    def update(self, cosine: Tensor, counted: Tensor, state: dict[str, Tensor]) -> None:
        """Update the running statistics in place, as `Margin.update` does. Called before `polynomial` in each training step.

        counted: bool (N,), False for ignored rows.
        """


@dataclass(frozen=True)
class CurricularFace(HardNegatives):
    """g(c) = c (t + c) where c > ψ(cos θ_n). t: a running mean of the cosines with the own class, from 0.

    Easy rows count first, hard ones later: t grows in training, by `momentum` (mean - t) in each step. Without a module t is 0.
    Its margin is ArcFace's, of 0.5.

    Source: CurricularFace, arXiv 2004.00288, and its published code, whose τ is cos(θ + m) past π - m too, where ψ falls on.
    """

    momentum: float = 0.01

    bound: ClassVar[float] = 2.0
    state: ClassVar[dict] = {"t": 0.0}

    def __post_init__(self):
        check_fields(self, momentum=(0.0, 1.0))

    def polynomial(self, cosine: Tensor, target: Tensor, state: dict[str, Tensor]) -> tuple[float | Tensor, ...]:
        return target, 0.0, state.get("t", 0.0), 1.0

    def update(self, cosine: Tensor, counted: Tensor, state: dict[str, Tensor]) -> None:
        counted = counted & cosine.isfinite()
        count = counted.sum()
        mean = cosine.where(counted, 0.0).sum() / count.clamp(min=1)
        state["t"] += (float(self.momentum) * (mean - state["t"])).where(count > 0, 0.0)


@dataclass(frozen=True)
class MVSoftmax(HardNegatives):
    """g(c) = t c + t - 1 where c > ψ(cos θ_n), or c + t - 1 if not adaptive: mis-classified rows push harder.

    Args:
        t: 1 or more; 1 changes nothing.
        adaptive: whether what is added grows with c. MV-AM-Softmax is this with CosFace's margin, MV-Arc-Softmax with ArcFace's.

    Source: Mis-classified Vector Guided Softmax Loss, arXiv 1912.00833.
    """

    t: float = 1.12
    adaptive: bool = True

    def __post_init__(self):
        check_fields(self, t=(1.0, math.inf))
        check_flag("adaptive", self.adaptive)

    @property
    def bound(self):
        return 2 * float(self.t) - 1 if self.adaptive else float(self.t)

    def polynomial(self, cosine: Tensor, target: Tensor, state: dict[str, Tensor]) -> tuple[float | Tensor, ...]:
        t = float(self.t)
        return target, t - 1, t if self.adaptive else 1.0, 0.0


@dataclass(frozen=True)
class InterclassFiltering(HardNegatives):
    """g(c) = 0 where c > threshold: classes so near are taken for duplicates of the own one, and push no longer.

    Source: `interclass_filtering_threshold` of InsightFace's recognition/arcface_torch.
    """

    threshold: float = 0.4

    def __post_init__(self):
        check_fields(self, threshold=(-1.0, 1.0))

    def polynomial(self, cosine: Tensor, target: Tensor, state: dict[str, Tensor]) -> tuple[float | Tensor, ...]:
        return float(self.threshold), 0.0, 0.0, 0.0


@dataclass(frozen=True)
class InterTopK(HardNegatives):
    """g(c) = c + m for the k other classes that are nearest to a row; of classes equal to the next one none.

    Args:
        k: how many, 1 or more.
        m: from 0 to 1. Where it is an angle, cos(θ - m), c + m is nearly that at right angles, and more than that elsewhere.

    Source: Multi-Query Multi-Head Attention Pooling and Inter-TopK Penalty for Speaker Verification, arXiv 2110.05042.
    """

    k: int = 5
    m: float = 0.06

    def __post_init__(self):
        check_size("k", self.k)
        check_fields(self, m=(0.0, 1.0))

    @property
    def bound(self):
        return 1 + float(self.m)

    @property
    def num_nearest(self):
        return self.k + 1

    def polynomial(self, cosine: Tensor, target: Tensor, state: dict[str, Tensor]) -> tuple[float | Tensor, ...]:
        # Between the k-th and the next, so that no rounding of a product decides.
        return state["nearest"][:, -2:].mean(1), float(self.m), 1.0, 0.0


def check(negatives, cosines, scale, label_smoothing):
    """HardNegatives or None, and what goes with them. cosines: whether features and table are normalised."""
    if negatives is None:
        return
    check_kind(negatives)
    if not cosines:
        raise ValueError(f"negatives go with cosines, features and table normalised, got negatives = {negatives} without")
    if label_smoothing:
        raise ValueError(
            f"negatives and label_smoothing exclude each other, got label_smoothing = {label_smoothing}, negatives = {negatives}"
        )
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError(f"negatives go with a scale that is a number, got one that is learnt beside negatives = {negatives}")


def check_kind(negatives):
    """Check that a value is HardNegatives or None."""
    if negatives is not None and not isinstance(negatives, HardNegatives):
        raise TypeError(
            "negatives must be None or one of CurricularFace(), MVSoftmax(), InterTopK() and InterclassFiltering() of "
            f"cosface_kernels.margins, got {shown(negatives)}"
        )
