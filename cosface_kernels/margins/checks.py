"""Checks of a margin, and of what goes with it."""

from ..validation import shown
from .base import Margin, class_tensors
from .formulas import Softmax
from .hard_negatives import HardNegatives


def check(margin, has_bias, normalize_features):
    """A Margin, and what goes with it."""
    check_kind(margin)
    if not (normalize_features is None or isinstance(normalize_features, bool)):
        raise TypeError(f"normalize_features must be True, False or None, got {shown(normalize_features)}")
    if has_bias and not isinstance(margin, Softmax):
        raise ValueError(f"a bias goes with margins.Softmax() alone, got margin = {margin}")


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
