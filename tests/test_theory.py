"""Do the paper's bounds hold for tables that are built to reach them, and does CosFaceLoss warn of what is outside, once?"""

import linecache
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from cosface_kernels import CosFaceLoss, MarginSoftmaxLoss, margins, reference, theory

# Tables here are float64: some tens of roundings of cosines, multiplied by a scale below 64.
ROUNDING = 64 * 50 * torch.finfo(torch.float64).eps


def simplex(num_classes):
    """(C, C-1): unit vectors whose cosines are all -1/(C-1)."""
    corners = torch.eye(num_classes, dtype=torch.float64)
    centred = corners - corners.mean(0)
    # The centred rows lie in the C-1 dimensions orthogonal to (1, ..., 1), which neighbours' differences span.
    basis = torch.linalg.qr(corners[:, :-1] - corners[:, 1:]).Q
    return reference.unit_rows(centred @ basis)


def circle(num_classes):
    angles = torch.arange(num_classes, dtype=torch.float64) * (2 * math.pi / num_classes)
    return torch.stack([angles.cos(), angles.sin()], 1)


def random_table(num_classes, embedding_size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_classes, embedding_size, generator=generator, dtype=torch.float64)


def smallest_gap(table):
    """min over pairs of classes of 1 - cos."""
    cosines = reference.logits(table, table, scale=1.0)
    return 1 - cosines.fill_diagonal_(-math.inf).max().item()


def centre_losses(table, scale):
    """-log p_i (C,), p_i being the softmax probability of class i for a feature on its centre, without margin."""
    return reference.cosface_loss(table, table, torch.arange(len(table)), scale=scale, margin=0.0, reduction="none")


# The paper's examples and two larger tables.
@pytest.mark.parametrize(
    "num_classes, bounds",
    [(10_575, (11.46, 13.86, 16.17)), (10**6, (16.01, 18.41, 20.72)), (10**7, (18.32, 20.71, 23.02))],
)
def test_min_scale_has_known_values(num_classes, bounds):
    assert tuple(round(theory.min_scale(num_classes, probability), 2) for probability in (0.9, 0.99, 0.999)) == bounds


def test_default_probability():
    assert theory.min_scale(1000) == theory.min_scale(1000, 0.9)


# From just above 1/C of two classes to the float before 1.
@pytest.mark.parametrize("probability", [0.51, 0.9, 0.999, 1 - 2**-53])
@pytest.mark.parametrize("num_classes", [2, 3, 8, 100])
def test_simplex_reaches_the_probability_at_min_scale(num_classes, probability):
    table, scale = simplex(num_classes), theory.min_scale(num_classes, probability)
    odds_against = centre_losses(table, scale).expm1()  # (1 - p) / p, without the difference
    expected = torch.full_like(odds_against, (1 - probability) / probability)
    torch.testing.assert_close(odds_against, expected, rtol=ROUNDING, atol=0)
    assert (centre_losses(table, 0.999 * scale).expm1() > expected).all()


@pytest.mark.parametrize("probability", [1e-3, 0.9, 1 - 2**-53])
@pytest.mark.parametrize("num_classes", [10_575, 10**7, 10**30])
def test_large_simplex_in_closed_form(num_classes, probability):
    """(C-1) e^{s(cos - 1)} = (1-p)/p, where every cos = -1/(C-1)."""
    scale = theory.min_scale(num_classes, probability)
    log_odds = scale * (1 + 1 / (num_classes - 1)) - math.log(num_classes - 1)
    exact = Fraction(probability) / (1 - Fraction(probability))
    assert log_odds == pytest.approx(math.log(exact), rel=1e-14, abs=1e-13)


# D below, at and above C-1.
@pytest.mark.parametrize("num_classes, embedding_size", [(3, 1), (8, 2), (5, 4), (20, 64), (100, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_below_min_scale_some_class_misses_the_probability(num_classes, embedding_size, seed):
    """Jensen's inequality, as in the docstring: of 1/p_i the mean over the classes, for any table."""
    table = random_table(num_classes, embedding_size, seed)
    p = (-centre_losses(table, theory.min_scale(num_classes, 0.9))).exp()
    assert (1 / p).mean() >= (1 / 0.9) * (1 - ROUNDING)
    assert p.min() < 0.9


def test_a_single_class_may_reach_the_probability_with_less():
    """Only "every class" makes eq. 6 a bound: here one centre is opposite to all others."""
    table = torch.tensor([[1.0], [-1.0], [-1.0]], dtype=torch.float64)
    p = (-centre_losses(table, 0.999 * theory.min_scale(3, 0.9))).exp()
    assert p[0] > 0.9 > p[1]


@pytest.mark.parametrize("num_classes, probability", [(1, 0.9), (1, 1 - 1e-9), (2, 0.5), (2, 0.1), (10, 0.05), (2, 5e-324)])
def test_every_scale_will_do(num_classes, probability):
    """p_i is at least 1/C on a simplex, with any scale; and 1 where there is no other class."""
    assert theory.min_scale(num_classes, probability) == 0.0


def test_max_margin_of_the_toy_experiment():
    assert round(theory.max_margin(8, 2), 4) == 0.2929


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10, 100])
def test_simplex_reaches_max_margin(num_classes):
    table = simplex(num_classes)
    assert smallest_gap(table) == pytest.approx(num_classes / (num_classes - 1), abs=ROUNDING)
    # In C-1 dimensions, and in more.
    for embedding_size in (num_classes - 1, num_classes, 512):
        assert theory.max_margin(num_classes, embedding_size) == pytest.approx(smallest_gap(table), abs=ROUNDING)


# From 2, where the circle is a line and its gap is the simplex's.
@pytest.mark.parametrize("num_classes", [2, 3, 4, 8, 101])
def test_circle_reaches_max_margin(num_classes):
    gap = smallest_gap(circle(num_classes))
    assert gap == pytest.approx(1 - math.cos(2 * math.pi / num_classes), abs=ROUNDING)
    assert theory.max_margin(num_classes, 2) == pytest.approx(gap, abs=ROUNDING)


# Where 1 - cos in float64 keeps 8 digits, and where it is 0.
@pytest.mark.parametrize("num_classes", [10**4, 10**9, 10**12])
def test_max_margin_on_a_circle_of_many_classes(num_classes):
    """1 - cos t = t²/2 - t⁴/24 + ..."""
    t = 2 * math.pi / num_classes
    assert theory.max_margin(num_classes, 2) == pytest.approx(t**2 / 2 * (1 - t**2 / 12), rel=1e-14, abs=0)


def test_max_margin_on_a_line():
    assert theory.max_margin(2, 1) == smallest_gap(torch.tensor([[1.0], [-1.0]])) == 2
    assert theory.max_margin(3, 1) == smallest_gap(torch.tensor([[1.0], [-1.0], [1.0]])) == 0


def test_one_class_allows_every_margin():
    assert theory.max_margin(1, 1) == theory.max_margin(1, 512) == math.inf


# Each row of the docstring's table.
@pytest.mark.parametrize("num_classes, embedding_size", [(2, 1), (3, 1), (2, 2), (3, 2), (5, 2), (4, 3), (5, 3), (6, 3), (30, 8)])
def test_no_table_exceeds_max_margin(num_classes, embedding_size):
    gaps = [smallest_gap(random_table(num_classes, embedding_size, seed)) for seed in range(300)]
    assert max(gaps) <= theory.max_margin(num_classes, embedding_size) + ROUNDING


def test_more_classes_than_a_simplex_has_stay_below_the_bound():
    """The best table of six classes in three dimensions: the axes, both ways, with a gap of 1."""
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    assert smallest_gap(axes) == 1 < theory.max_margin(6, 3) == 6 / 5


@pytest.mark.parametrize(
    "num_classes, embedding_size, scale, margin",
    [
        (10**6, 512, 64.0, 0.35),
        (8, 2, 64.0, theory.max_margin(8, 2) / 2),
        (10**30, 512, theory.min_scale(10**30), 0.35),  # 71.3
        (2, 1, 64.0, 0.35),
        (3, 1, 64.0, 0.0),
        (1, 4, 64.0, 0.35),
    ],
)
def test_suggest(num_classes, embedding_size, scale, margin):
    suggestion = theory.suggest(num_classes, embedding_size)
    assert suggestion[:2] == (scale, margin) == (suggestion.scale, suggestion.margin)
    for number in (scale, margin, theory.min_scale(num_classes), theory.max_margin(num_classes, embedding_size)):
        assert f"{number:.4g}" in suggestion.reason
    assert f"{num_classes:,} class" in suggestion.reason and f"size {embedding_size}." in suggestion.reason
    assert ("more than the paper's" in suggestion.reason) == (scale != 64)
    assert ("half of the bound" in suggestion.reason) == (margin != 0.35)
    assert ("well below" in suggestion.reason) == (num_classes > embedding_size + 1 > 3)


def test_suggestions_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_classes in (1, 2, 3, 4, 8, 100, 10**6, 10**9, 10**30):
            for embedding_size in (1, 2, 3, 4, 512):
                scale, margin, _ = theory.suggest(num_classes, embedding_size)
                theory.warn_if_out_of_bounds(num_classes, embedding_size, scale, margin)


SCALE_FAULT = "scale = 3 is too small: eq. 6 asks for at least 3.625, for probability 0.9 at the centres of 8 classes. "
MARGIN_FAULT = "margin = 0.3 is too large: eq. 7 allows at most 0.2929, for 8 classes with embedding size 2. "
ADVICE = "cosface_kernels.theory.suggest: scale = 64, margin = 0.1464."


@pytest.mark.parametrize(
    "scale, margin, faults",
    [(3.0, 0.2, SCALE_FAULT), (64.0, 0.3, MARGIN_FAULT), (Fraction(3), np.float64(0.3), SCALE_FAULT + MARGIN_FAULT)],
    ids=["scale", "margin", "both"],
)
def test_construction_warns_once_at_the_callers_line(scale, margin, faults):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CosFaceLoss(2, 8, scale=scale, margin=margin)
    (warning,) = caught
    assert warning.category is UserWarning and str(warning.message) == faults + ADVICE
    assert warning.filename == __file__
    assert linecache.getline(__file__, warning.lineno).strip() == "CosFaceLoss(2, 8, scale=scale, margin=margin)"


def test_stacklevel_1_is_the_callers_line():
    with pytest.warns(UserWarning, match="^scale = 3 ") as caught:
        theory.warn_if_out_of_bounds(8, 2, 3.0, 0.1)
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert "warn_if_out_of_bounds(8" in linecache.getline(__file__, caught[0].lineno)


def test_loose_bound_says_so():
    with pytest.warns(UserWarning, match=r"^margin = 1.3 is too large: eq. 7 allows well below 1.2, for 6 classes"):
        CosFaceLoss(3, 6, margin=1.3)


def test_the_module_of_every_margin_warns_for_cosface():
    with pytest.warns(UserWarning, match=r"^margin = 0.5 is too large") as caught:
        MarginSoftmaxLoss(2, 8, margin=margins.CosFace(0.5))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MarginSoftmaxLoss(2, 8, margin=margins.CosFace(0.1))
        MarginSoftmaxLoss(2, 8, margin=margins.CosFace(0.5), normalize_features=False)  # eq. 6 and 7 are about unit rows
        MarginSoftmaxLoss(2, 8, margin=margins.ArcFace(0.5))


def test_a_step_does_not_warn():
    with pytest.warns(UserWarning):
        head = CosFaceLoss(2, 8, scale=3.0, margin=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(torch.ones(3, 2), torch.tensor([0, 1, 7])).backward()


# The last two bounds are computed as a caller would.
@pytest.mark.parametrize(
    "embedding_size, num_classes, options",
    [
        (512, 1000, {}),
        (3, 1, {"scale": 1e-3, "margin": 5.0}),
        (1, 3, {"margin": 0.0}),
        (2, 8, {"margin": -1.0}),
        (512, 1000, {"scale": theory.min_scale(1000)}),
        (2, 8, {"margin": theory.max_margin(8, 2)}),
        (512, 1000, {"scale": 0.999 * math.log(999 * 0.9 / (1 - 0.9))}),
        (2, 5000, {"margin": 1 - math.cos(2 * math.pi / 5000)}),
    ],
)
def test_in_bounds_does_not_warn(embedding_size, num_classes, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CosFaceLoss(embedding_size, num_classes, **options)


# Just outside, where the allowance for rounding would hide it if it were wide.
@pytest.mark.parametrize(
    "embedding_size, num_classes, options",
    [
        (512, 1000, {"scale": theory.min_scale(1000) * (1 - 1e-6)}),
        (2, 8, {"margin": theory.max_margin(8, 2) * (1 + 1e-6)}),
        (2, 5000, {"margin": theory.max_margin(5000, 2) * (1 + 1e-6)}),
        (1, 3, {"margin": 1e-6}),
    ],
)
def test_just_out_of_bounds_warns(embedding_size, num_classes, options):
    with pytest.warns(UserWarning, match=f"^{next(iter(options))} = "):
        CosFaceLoss(embedding_size, num_classes, **options)


WRONG_SIZES = [
    *[(value, ValueError, "1 or more") for value in (0, -1)],
    *[(value, TypeError, "an int") for value in (1.5, "3", None, True)],
]
WRONG_PROBABILITIES = [
    *[(value, ValueError, "between 0 and 1") for value in (0, 1, 0.0, 1.0, -0.1, 1.5, 1 - Fraction(1, 10**20))],
    *[(value, ValueError, "finite") for value in (math.nan, math.inf, 10**400)],
    *[(value, TypeError, "a real number") for value in ("0.9", None, True)],
]
TAKE_SIZES = {
    "min_scale": lambda num_classes, embedding_size: theory.min_scale(num_classes),
    "max_margin": theory.max_margin,
    "suggest": theory.suggest,
    "warn_if_out_of_bounds": lambda *sizes: theory.warn_if_out_of_bounds(*sizes, 64.0, 0.35),
}


@pytest.mark.parametrize("function", TAKE_SIZES)
@pytest.mark.parametrize("value, error, right", WRONG_SIZES)
def test_wrong_size(function, value, error, right):
    with pytest.raises(error, match=f"^num_classes must be {right}, got {value!r}"):
        TAKE_SIZES[function](value, 512)
    if function != "min_scale":
        with pytest.raises(error, match=f"^embedding_size must be {right}, got {value!r}"):
            TAKE_SIZES[function](1, value)


@pytest.mark.parametrize("value, error, right", WRONG_PROBABILITIES)
def test_wrong_probability(value, error, right):
    shown = value if error is ValueError else repr(value)
    with pytest.raises(error, match=f"^probability must be {right}.*, got {shown}(, a text: float.*)?$"):
        theory.min_scale(1, value)


@pytest.mark.parametrize("scale, margin, name", [(0.0, 0.35, "scale"), ("64", 0.35, "scale"), (64.0, math.nan, "margin")])
def test_wrong_scale_and_margin(scale, margin, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must "):
        theory.warn_if_out_of_bounds(8, 2, scale, margin)


def test_any_real_number_and_int_is_accepted():
    assert theory.min_scale(np.int8(100), Fraction(9, 10)) == theory.min_scale(100, 0.9)
    largest = theory.max_margin(np.int8(127), np.int8(127))  # one more would not fit an int8
    assert largest == theory.max_margin(127, 127) and type(largest) is float
    assert theory.suggest(np.int64(8), np.int64(2)) == theory.suggest(8, 2)
