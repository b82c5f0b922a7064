"""Checks of the options of losses, heads and margins."""

import math
import numbers
from typing import Literal, get_args

import torch

from . import tensors
from .tensors import FLOAT_DTYPES
from .values import check_choice, check_integer, check_number, shown

# Types of arguments, for a type checker.
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "torch", "cpu", "triton"]
MemoryBudget = int | Literal["auto"]
TableFormat = Literal["float32", "bfloat16", "float8"]
StateFormat = Literal["float32", "bfloat16", "int8"]
Device = torch.device | str | int | None
REDUCTIONS, BACKENDS = get_args(Reduction), get_args(Backend)
NUMBERS = "a real number, or a float tensor of shape () or (C,)"  # the values that a margin's m may have


def check_options(*, scale, reduction, ignore_index, memory_budget, backend, features=None):
    """Check the options that functions and modules have in common."""
    check_scale(scale, features)
    check_choice("reduction", reduction, REDUCTIONS)
    check_ignore_index(ignore_index)
    check_memory_budget(memory_budget)
    check_choice("backend", backend, BACKENDS)


def check_scale(scale, features=None):
    """Check a number, or a tensor of one, whose value is checked where it is read: on a GPU, reading waits for the device.

    features: what a tensor must go with, or None.
    """
    if isinstance(scale, torch.Tensor):
        _check_scale_tensor(scale, features)
        return
    check_number("scale", scale)
    if not 0 < scale <= 1e30:
        raise ValueError(f"scale must be in (0, 1e30], got {scale}")


def _check_scale_tensor(scale, features):
    wrong = TypeError if scale.dtype not in FLOAT_DTYPES else ValueError if scale.dim() else None
    if wrong is not None:
        raise wrong(f"scale must be a number, or a tensor of shape () and a float dtype, got {shown(scale)}")
    tensors.check_dense("scale", "()", scale)
    if features is None:
        return
    tensors.check_one_kind(features=features, scale=scale)
    if scale.device not in (features.device, torch.device("cpu")):
        raise ValueError(f"scale must be on the CPU or on the device of features ({features.device}), got {scale.device}")


def check_ignore_index(ignore_index):
    check_integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a 64-bit integer, got {ignore_index}")


def check_memory_budget(memory_budget):
    if memory_budget == "auto":
        return
    if not isinstance(memory_budget, numbers.Integral) or isinstance(memory_budget, bool):
        raise TypeError(f'memory_budget must be "auto" or a number of bytes (an int), got {shown(memory_budget)}')
    if memory_budget < 0:
        raise ValueError(f"memory_budget must be 0 bytes or more, got {memory_budget}")


def check_label_smoothing(label_smoothing, centers_per_class):
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if label_smoothing and centers_per_class > 1:
        raise ValueError(
            "label_smoothing needs the mean of all logits, and with sub-centres that would take a second pass: "
            f"centers_per_class must be 1, got {centers_per_class}"
        )


def check_margins(margin):
    """Check a number, or a tensor of such, one for each class."""
    if isinstance(margin, torch.Tensor):
        check_numbers("margin", margin, -math.inf, math.inf)
    else:
        check_number("margin", margin, NUMBERS)


def check_fields(owner, **ranges):
    """Check that each named field is a finite number within its closed range; those of owner.by_class may be tensors of such."""
    for name, (low, high) in ranges.items():
        value, by_class = getattr(owner, name), name in getattr(owner, "by_class", ())
        if by_class and isinstance(value, torch.Tensor):
            wrong = check_numbers(name, value, low, high)
        else:
            check_number(name, value, *([NUMBERS] if by_class else []))
            wrong = None if low <= value <= high else value
        if wrong is not None:
            unit = " radians" if high in (math.pi, math.pi / 2) else ""
            raise ValueError(f"{name} of {type(owner).__name__} must be from {low:g} to {high:g}{unit}, got {wrong}")


def check_numbers(name, tensor, low, high):
    """Check a tensor of numbers, () or (C,), and return the text of the first that is outside of a closed range, or None."""
    if not tensor.is_floating_point() or tensor.dim() > 1:
        raise TypeError(f"{name} must be {NUMBERS}, got {shown(tensor)}")
    tensors.check_dense(name, "() or (C,), or a real number", tensor)
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return None
    wrong = (~(tensor.isfinite() & (tensor >= low) & (tensor <= high))).flatten().nonzero()
    if not len(wrong):
        return None
    place = int(wrong[0])
    return f"{float(tensor.flatten()[place])}" + (f" for class {place}" if tensor.dim() else "")
