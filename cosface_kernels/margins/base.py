"""The base class of margins, and their numbers, which may be tensors: () for one, or (C,) for one of each class."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..validation import shown

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
    return {name: each for name, each in _other_tensors(margin).items() if each.shape[:1] == (num_rows,)}


def other_lengths(margin, num_rows):
    """{name: shape} of the fields of a margin that are tensors, neither of `by_class` nor with a number for each of the rows."""
    return {name: each.shape for name, each in _other_tensors(margin).items() if each.shape not in ((), (num_rows,))}


def _other_tensors(margin):
    values = {field.name: getattr(margin, field.name) for field in fields(margin) if field.name not in margin.by_class}
    return {name: each for name, each in values.items() if isinstance(each, Tensor)}


def replaced(margin, values):
    """A copy of a margin with other values in some of its fields, which are not checked again."""
    if not values:
        return margin
    copy = object.__new__(type(margin))
    for field in fields(margin):
        object.__setattr__(copy, field.name, values.get(field.name, getattr(margin, field.name)))
    return copy


def number(value, like):
    """A number as a float, or a tensor in the dtype of another."""
    return value.to(like.dtype) if isinstance(value, Tensor) else float(value)


def inside(cosine):
    """cosine, held a rounding short of ±1: for a ψ of the angle, whose derivative is infinite there."""
    limit = 1 - torch.finfo(cosine.dtype).eps
    return cosine.clamp(-limit, limit)
