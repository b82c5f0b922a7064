"""Checks of one value: a number, an integer, a flag, a choice."""

import math
import numbers
import sys

import torch

LONGEST_SHOWN = 100  # letters of a value in a message


def shown(value):
    """The text of a value in a message. A tensor's shape and dtype: PyTorch's repr of one without memory ends the process."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if getattr(value, "ndim", 0):
        return f"an array of shape {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…, a {type(value).__name__}"


def check_number(name, value, wanted="a real number"):
    if type(value) is not float and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
        hint = ", a text: float() makes a number of it" if isinstance(value, str) else ""
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}{hint}")
    if not _is_finite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _is_finite(value):
    if torch.compiler.is_compiling():  # a number that moves from step to step is a symbol, which isfinite does not take
        return -sys.float_info.max <= value <= sys.float_info.max
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def check_integer(name, value):
    if type(value) is not int and (not isinstance(value, numbers.Integral) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an int, got {shown(value)}")


def check_size(name, size):
    check_integer(name, size)
    if size < 1:
        raise ValueError(f"{name} must be 1 or more, got {size}")


def check_count(name, count):
    check_integer(name, count)
    if not 0 <= count < 2**63:
        raise ValueError(f"{name} must be in [0, 2^63), got {count}")


def check_k(k, most, meaning="the number of classes"):
    check_integer("k", k)
    if not 0 <= k <= most:
        raise ValueError(f"k must be from 0 to {meaning}, {most}, got {k}")


def check_rate(name, rate):
    check_number(name, rate)
    if not 0 < rate <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {rate}")


def check_probability(probability):
    check_number("probability", probability)
    if not 0 < float(probability) < 1:  # as a float: a fraction next to 1 may round to it
        raise ValueError(f"probability must be between 0 and 1, both excluded, got {probability}")


def check_at_least_zero(name, value):
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")


def check_more_than_zero(name, value):
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be more than 0, got {value}")


def check_flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {shown(value)}")
