"""Every margin ψ: the function that replaces the cosine of a row with its own class. Everything here works on N-vectors.

    loss_n = -log( e^{s l_n ψ(cos θ_n)} / ( e^{s l_n ψ(cos θ_n)} + Σ_{j≠y_n} e^{s x̃_n·w̃_j} ) ),    cos θ_n of x_n and w_{y_n}

x̃ and w̃ are unit rows, or the rows as they are; l_n is the product of the lengths of x̃_n and w̃_{y_n}: 1 for unit rows. The
negatives do not depend on the margin, so a new one is a frozen dataclass with `psi`; what changes them is in hard_negatives.py,
whose classes are here too. Autograd differentiates ψ; one of the angle first moves the cosine just `inside` ±1, where an arc
cosine's derivative is infinite (and the cosine's own gradient is zero).

The numbers of a margin are numbers, or tensors: () for one, or (C,) for one of each class, which `for_labels` turns into one of
each row before ψ.

A parameter of the wrong type or outside its
range is a TypeError or ValueError at construction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from .hard_negatives import CurricularFace, HardNegatives, InterclassFiltering, InterTopK, MVSoftmax  # noqa: F401 (for callers)
from .validation import check_fields, check_flag, shown

Number = float | Tensor  # a number, or a tensor of shape () or, a number for each class, (C,)


@dataclass(frozen=True)
class Margin:
    """Base class of margins. A subclass overrides psi, and any other method that it needs."""

    normalize_features: ClassVar[bool] = True  # default: divide features by their norms
    normalize_weight: ClassVar[bool] = True  # divide the rows of the table by their norms
    needs_norm: ClassVar[bool] = False  # `terms` and `penalty` are given ‖x‖
    state: ClassVar[dict] = {}  # initial values of running statistics by name; the module keeps them as buffers
    by_class: ClassVar[tuple[str, ...]] = ()  # fields that may be tensors, () or (C,); the module keeps them as buffers

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in ("__repr__", "__eq__"):  # else `dataclass` writes its own, which print and compare tensors in full
            setattr(cls, name, getattr(cls, name))

    if TYPE_CHECKING:  # a subclass takes the terms that its own `terms` returns
        psi: ClassVar[Callable[..., Tensor]]
    else:

        def psi(self, cosine, *terms):
            """ψ(cos θ) (N,); terms: what `terms` returned."""
            raise NotImplementedError(f"{type(self).__name__} defines no psi(self, cosine, *terms)")

    def for_labels(self, labels: Tensor) -> "Margin":
        """This margin for rows of these classes: labels (N,) int64, in [0, C); for ignored rows any class.

        Each field that `by_class` names and that is a tensor (C,) becomes one of (N,). A margin of your own may return any other.
        """
        return replaced(self, {name: value[labels] for name, value in class_tensors(self).items() if value.dim()})

    def __repr__(self):
        given = ", ".join(f"{field.name}={shown(getattr(self, field.name))}" for field in fields(self) if field.repr)
        return f"{type(self).__qualname__}({given})"

    def __eq__(self, other):
        if type(self) is not type(other):
            return NotImplemented
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self) if field.compare]
        return all(a is b or (not (isinstance(a, Tensor) or isinstance(b, Tensor)) and a == b) for a, b in pairs)

    def target_logit(self, product: Tensor, length: Tensor | None, *terms: Tensor) -> Tensor:
        """The target's logit over s (N,): l ψ(product / l). length: l (N,), or None where it is 1."""
        if length is None:
            return self.psi(product, *terms)
        return length * self.psi(product / torch.where(length == 0, 1.0, length), *terms)

    def terms(self, norm: Tensor | None, counted: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Arguments of `psi` that differ from row to row or step to step: a tuple of tensors (N,) or 0-dim.

        norm: ‖x‖ (N,), None without needs_norm; counted: bool (N,), False for ignored rows; state: the running statistics, {}
        without a module to keep them.
        """
        return ()

    def update(self, norm: Tensor | None, counted: Tensor, state: dict[str, Tensor]) -> None:
        """Update the running statistics in place, by `state[name] += change`. Called before `terms` in each training step.

        torch.compile leaves out an `add_` of a float64 number on a CPU, whose result nobody takes.
        """

    def penalty(self, norm: Tensor | None) -> Tensor | None:
        """A term (N,) that is added to the loss of each row, or None."""
        return None


def class_tensors(margin):
    """The numbers of a margin that are tensors, () or (C,), by the names of their fields."""
    return {name: getattr(margin, name) for name in margin.by_class if isinstance(getattr(margin, name), Tensor)}


def row_tensors(margin, num_rows):
    """The fields of a margin that are tensors with a number for each of a batch's rows, by name; none of `by_class` is."""
    named = {field.name: getattr(margin, field.name) for field in fields(margin) if field.name not in margin.by_class}
    return {name: each for name, each in named.items() if isinstance(each, Tensor) and each.shape[:1] == (num_rows,)}


def other_lengths(margin, num_rows):
    """{name: shape} of the fields of a margin that are tensors, neither of `by_class` nor with a number for each of the rows."""
    values = {field.name: getattr(margin, field.name) for field in fields(margin) if field.name not in margin.by_class}
    return {name: each.shape for name, each in values.items() if isinstance(each, Tensor) and each.shape not in ((), (num_rows,))}


def replaced(margin, values):
    """A copy of a margin with other values in some of its fields, which are not checked again."""
    if not values:
        return margin
    copy = object.__new__(type(margin))
    for field in fields(margin):
        object.__setattr__(copy, field.name, values.get(field.name, getattr(margin, field.name)))
    return copy


def _number(value, like):
    """A number as a float, or a tensor in the dtype of another."""
    return value.to(like.dtype) if isinstance(value, Tensor) else float(value)


@dataclass(frozen=True)
class CosFace(Margin):
    """ψ(cos θ) = cos θ - m. Source: CosFace (LMCL), arXiv 1801.09414, eq. 4; m = 0.35 is the paper's, InsightFace uses 0.40."""

    m: Number = 0.35

    by_class: ClassVar = ("m",)

    def __post_init__(self):
        check_fields(self, m=(-math.inf, math.inf))

    def psi(self, cosine: Tensor) -> Tensor:
        return cosine - _number(self.m, cosine)

    def target_logit(self, product: Tensor, length: Tensor | None) -> Tensor:
        """l cos θ - l m without dividing by l, so that a row of zeros keeps its gradient."""
        m = _number(self.m, product)
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
        value = _rotated(cosine, _number(self.m, cosine), self.easy_margin)
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
        value = _continued(_number(self.m, cosine) * inside(cosine).acos())
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
        m1, m2, m3 = (_number(m, cosine) for m in (self.m1, self.m2, self.m3))
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
        m = _number(self.m, cosine)
        shift = m * quality
        angle = (inside(cosine).acos() - shift).clamp(1e-3, math.pi - 1e-3)
        return angle.cos() - (m + shift)

    def terms(self, norm: Tensor | None, counted: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        norm = self._clipped(norm)
        mean, std = (state["batch_mean"], state["batch_std"]) if state else self._statistics(norm, counted)
        return ((_number(self.h, norm) * (norm - mean) / (std + 1e-3)).clamp(-1, 1),)

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
        l_a, u_a, l_margin, u_margin = (_number(getattr(self, name), norm) for name in names)
        return ((u_margin - l_margin) / (u_a - l_a) * (self._clipped(norm) - l_a) + l_margin,)

    def penalty(self, norm: Tensor | None) -> Tensor | None:
        norm, u_a = self._clipped(norm), _number(self.u_a, norm)
        return _number(self.lambda_g, norm) * (1 / norm + norm / u_a / u_a)

    def _clipped(self, norm):
        return norm.clamp(min=_number(self.l_a, norm)).clamp(max=_number(self.u_a, norm))


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


def check_kind(margin):
    """Check that a value is a Margin."""
    if isinstance(margin, HardNegatives):
        raise TypeError(f"{type(margin).__name__} goes beside a margin: margin=ArcFace(0.5), negatives={margin}")
    if not isinstance(margin, Margin):
        m = margin if isinstance(margin, (int, float)) and abs(margin) < 100 else 0.35  # else it is no angle, or NaN
        raise TypeError(f"margin must be one of cosface_kernels.margins, for example CosFace({m:g}), got {shown(margin)}")


def check_classes(margin, num_classes, device):
    """Check that the tensors of a margin have a number for each class, on the device of the features."""
    for name, value in class_tensors(margin).items():
        if value.shape not in ((), (num_classes,)):
            raise ValueError(
                f"{name} of {type(margin).__name__} must be a number, or a tensor with one for each class, shape (C,) = "
                f"({num_classes},), got shape {tuple(value.shape)}; numbers for rows belong into a margin of your own"
            )
        if value.device != device:
            raise ValueError(
                f"{name} of {type(margin).__name__} must be on the device of features ({device}), got {value.device}"
            )


def check(margin, has_bias, normalize_features):
    """A Margin, and what goes with it."""
    check_kind(margin)
    if not (normalize_features is None or isinstance(normalize_features, bool)):
        raise TypeError(f"normalize_features must be True, False or None, got {shown(normalize_features)}")
    if has_bias and not isinstance(margin, Softmax):
        raise ValueError(f"a bias goes with margins.Softmax() alone, got margin = {margin}")


def inside(cosine):
    """cosine, held a rounding short of ±1: for a ψ of the angle, whose derivative is infinite there."""
    limit = 1 - torch.finfo(cosine.dtype).eps
    return cosine.clamp(-limit, limit)


def _rotated(cosine, m, easy_margin):
    """cos(θ + m) where it falls, and what ArcFace takes elsewhere; m: a float, or a tensor (N,) or ()."""
    cosine = inside(cosine)
    cos_m, sin_m = (m.cos(), m.sin()) if isinstance(m, Tensor) else (math.cos(m), math.sin(m))
    rotated = cosine * cos_m - (1 - cosine.square()).sqrt() * sin_m
    if easy_margin:
        return torch.where(cosine > 0, rotated, cosine)
    return torch.where(cosine >= -cos_m, rotated, cosine - m * sin_m)


def _all(holds):
    """Whether a comparison of numbers or tensors holds; of tensors that have no numbers while torch.compile traces, True."""
    return bool(holds) if not isinstance(holds, Tensor) else torch.compiler.is_compiling() or bool(holds.all())


def _continued(angle):
    """cos(angle) on [0, π], going on falling past π: (-1)^k cos(angle) - 2k on [kπ, (k+1)π]."""
    k = (angle.detach() / math.pi).floor()
    return (1 - 2 * torch.remainder(k, 2)) * angle.cos() - 2 * k
