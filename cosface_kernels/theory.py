"""The paper's two bounds, on the scale and on the margin, in plain floats, and values to start from."""

import math
import warnings
from typing import NamedTuple

from . import validation

PAPER_SCALE, PAPER_MARGIN = 64.0, 0.35
PROBABILITY = 0.9  # P at which `suggest` and `warn_if_out_of_bounds` apply eq. 6


class Suggestion(NamedTuple):
    scale: float
    margin: float
    reason: str


def min_scale(num_classes: int, probability: float = PROBABILITY) -> float:
    """The smallest scale with which every class centre can have softmax probability P for its own class.

        s >= (C-1)/C ln( (C-1) P / (1-P) )

    A feature on the centre ŵ_i, without margin, has p_i = e^s / (e^s + Σ_{j≠i} e^{s cos_ij}). By Jensen's inequality, and because
    Σ_{i≠j} cos_ij = ‖Σ_i ŵ_i‖² - C >= -C, the mean of 1/p_i over the classes is at least 1 + (C-1) e^{-s C/(C-1)}. So below the
    bound some class has p_i < P, whatever the table is; single classes may have more. At the bound every class has exactly P if
    all cosines are -1/(C-1): a regular simplex, which needs D >= C-1. In fewer dimensions the bound is necessary, not sufficient.

    Args:
        num_classes: C, an int, 1 or more.
        probability: P, the paper's P_W, between 0 and 1, both excluded.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Returns:
        float, 0.0 or more. 0.0 says that every scale will do: for P <= 1/C, where the formula is negative, and for C = 1.

    Source: CosFace, arXiv 1801.09414, eq. 6.
    """
    validation.check_size("num_classes", num_classes)
    validation.check_probability(probability)
    others, probability = int(num_classes) - 1, float(probability)
    if others == 0:
        return 0.0
    return max(0.0, others / (others + 1) * (math.log(others) + math.log(probability) - math.log1p(-probability)))


def max_margin(num_classes: int, embedding_size: int) -> float:
    """The largest margin with room for all class centres: max over C directions of the smallest gap, min_{i≠j} (1 - cos_ij).

        C <= D+1            C/(C-1)           reached by the regular simplex
        C > D+1,  D = 1     0                 two of the classes share a direction
                  D = 2     1 - cos(2π/C)     reached by equal steps on the circle
                  D >= 3    C/(C-1)           an upper bound that is never reached: the paper's m << C/(C-1)

    The paper's formula for D = 2 agrees with the first row where both apply, at C = 2 and 3; it does not treat D = 1.

    Args:
        num_classes: C, an int, 1 or more.
        embedding_size: D, the paper's K, an int, 1 or more.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Returns:
        float, in units of cosine; math.inf for C = 1, which has no other class.

    Source: CosFace, arXiv 1801.09414, eq. 7.
    """
    validation.check_size("num_classes", num_classes)
    validation.check_size("embedding_size", embedding_size)
    num_classes, embedding_size = int(num_classes), int(embedding_size)
    if num_classes == 1:
        return math.inf
    if num_classes <= embedding_size + 1 or embedding_size >= 3:
        return num_classes / (num_classes - 1)
    if embedding_size == 1:
        return 0.0
    return 2 * math.sin(math.pi / num_classes) ** 2  # as a difference, 1 - cos(2π/C) would be 0 from C = 10^9


def suggest(num_classes: int, embedding_size: int) -> Suggestion:
    """A scale and a margin to start from: the paper's s = 64 and m = 0.35 where its bounds leave room for them.

        scale = max(64, min_scale(C, 0.9)),    margin = 0.35 if 0.35 <= max_margin(C, D) else max_margin(C, D) / 2

    Half of the bound lies within what the paper's toy experiment covers: m up to 0.2 with 8 classes in 2 dimensions, where the
    bound is 0.29. For C > D+1, D >= 3 the bound is loose: with very few dimensions and many classes 0.35 may be too much.

    Args:
        num_classes, embedding_size: as in `max_margin`.

    Raises:
        As `max_margin`.

    Returns:
        Suggestion(scale, margin, reason): two floats, and why.

    Source: CosFace, arXiv 1801.09414, eq. 6 and 7, section 4 (s = 64, m = 0.35; figure 4 is the toy experiment).
    """
    needed, room = min_scale(num_classes), max_margin(num_classes, embedding_size)
    scale = max(PAPER_SCALE, needed)
    margin = PAPER_MARGIN if room >= PAPER_MARGIN else room / 2
    scale_is = "the paper's" if scale == PAPER_SCALE else "more than the paper's"
    margin_is = "the paper's" if margin == PAPER_MARGIN else "half of the bound"
    reason = (
        f"scale = {scale:.4g} is {scale_is}: {_scale_bound(num_classes, needed)}. "
        f"margin = {margin:.4g} is {margin_is}: {_margin_bound(num_classes, embedding_size, room)}."
    )
    return Suggestion(scale, margin, reason)


def warn_if_out_of_bounds(num_classes: int, embedding_size: int, scale: float, margin: float, stacklevel: int = 1) -> None:
    """One UserWarning, if scale < min_scale(C, 0.9) or margin > max_margin(C, D) by more than rounding.

    Args:
        num_classes, embedding_size: as in `max_margin`.
        scale, margin: as in `cosface_loss`.
        stacklevel: the frame whose line the warning shows: 1 is the caller, 2 the caller's caller.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Source: CosFace, arXiv 1801.09414, eq. 6 and 7.
    """
    needed, room = min_scale(num_classes), max_margin(num_classes, embedding_size)
    validation.check_scale(scale)
    validation.check_number("margin", margin)
    scale, margin = float(scale), float(margin)
    faults = []
    if scale < needed and not _is_rounding(scale, needed):
        faults.append(f"scale = {scale:.6g} is too small: {_scale_bound(num_classes, needed)}.")
    if margin > room and not _is_rounding(margin, room):
        faults.append(f"margin = {margin:.6g} is too large: {_margin_bound(num_classes, embedding_size, room)}.")
    if faults:
        better = suggest(num_classes, embedding_size)
        advice = f"cosface_kernels.theory.suggest: scale = {better.scale:.4g}, margin = {better.margin:.4g}."
        warnings.warn(" ".join([*faults, advice]), UserWarning, stacklevel=stacklevel + 1)


def _is_rounding(value, bound):
    """True if value and bound differ by rounding: the absolute part is for a bound that the caller computed as 1 - cos."""
    return math.isclose(value, bound, rel_tol=1e-9, abs_tol=1e-15)


def _scale_bound(num_classes, needed):
    return f"eq. 6 asks for at least {needed:.4g}, for probability {PROBABILITY:g} at the centres of {_count(num_classes)}"


def _margin_bound(num_classes, embedding_size, room):
    is_loose = num_classes - 1 > embedding_size >= 3
    return (
        f"eq. 7 allows {'well below' if is_loose else 'at most'} {room:.4g}, "
        f"for {_count(num_classes)} with embedding size {embedding_size}"
    )


def _count(num_classes):
    return f"{num_classes:,} class{'es' if num_classes > 1 else ''}"
