"""Is every wrong number of a margin refused at construction, and every wrong argument of the functions and the module?

Tensors and options that cosface_loss takes too are in test_validation.py.
"""

import math
from dataclasses import FrozenInstanceError, fields, replace
from functools import partial

import feature_table
import numpy as np
import pytest
import torch
from cases import evaluate
from margin_rows import ROWS, every_row
from rounding import draw

from cosface_kernels import (
    CosFaceLoss,
    MarginSoftmaxLoss,
    ShardedCosFaceLoss,
    ShardedMarginSoftmaxLoss,
    margin_softmax_loss,
    margins,
    validation,
)

MARGINS = {type(row.margin).__name__: type(row.margin) for row in ROWS.values()}
NUMBERS, FLAGS = (
    [(kind, field.name) for kind, margin in MARGINS.items() for field in fields(margin) if type(field.default) in types]
    for types in ((int, float), (bool,))
)
WRONG_NUMBERS = [
    *[(value, TypeError) for value in (True, "0.5", None, 1j, [0.5])],
    *[(value, ValueError) for value in (math.nan, math.inf, -math.inf, 10**400)],
]
OUTSIDE = [
    ("ArcFace", {"m": -0.1}),
    ("ArcFace", {"m": 3.15}),
    ("SphereFace", {"m": 0.99}),
    ("LSoftmax", {"m": 0}),
    ("Combined", {"m1": -0.1}),
    ("Combined", {"m2": -0.1}),
    ("AdaFace", {"m": -0.1}),
    ("AdaFace", {"m": 1.6}),
    ("AdaFace", {"t_alpha": -0.1}),
    ("AdaFace", {"t_alpha": 1.1}),
    ("MagFace", {"l_a": 0}),
    ("MagFace", {"l_a": 110.0}),
    ("MagFace", {"u_a": 9}),
    ("MagFace", {"l_margin": -0.1}),
    ("MagFace", {"l_margin": 0.9}),
    ("MagFace", {"u_margin": 3.15}),
    ("MagFace", {"lambda_g": -1}),
]
AT_THE_EDGE = [
    margins.CosFace(-1),
    margins.ArcFace(0),
    margins.ArcFace(math.pi),
    margins.SphereFace(1),
    margins.Combined(0, 0, -1),
    margins.AdaFace(m=0, h=0, t_alpha=0),
    margins.AdaFace(m=math.pi / 2, t_alpha=1),
    margins.AdaFace(h=-0.333),
    margins.MagFace(l_margin=0.8, lambda_g=0),
    margins.MagFace(u_a=1e200),
]
# Numbers of the papers, their published code and their authors' advice.
PUBLISHED = [
    margins.ArcFace(1.0),
    margins.SphereFace(1.35),
    margins.SphereFace(1.5),
    margins.LSoftmax(2),
    margins.Combined(1.0, 0.3, 0.2),
    margins.Combined(0.9, 0.4, 0.15),
    margins.CosFace(-0.3),  # "Negative margin matters", arXiv 2003.12060
    margins.AdaFace(m=0.75, h=0.66),
    margins.AdaFace(t_alpha=1.0),
    margins.AdaFace(h=-0.333),
    margins.AdaFace(h=0.0),
    margins.MagFace(lambda_g=20),
    margins.MagFace(l_a=1, u_a=51, l_margin=0.45, u_margin=1),
    margins.MagFace(l_margin=0.5, u_margin=0.5),
]


@pytest.mark.parametrize("kind, name", NUMBERS)
@pytest.mark.parametrize("value, error", WRONG_NUMBERS)
def test_wrong_number(kind, name, value, error):
    with pytest.raises(error, match=rf"^{name} must be "):
        MARGINS[kind](**{name: value})


@pytest.mark.parametrize("kind, name", FLAGS)
@pytest.mark.parametrize("value", [0, "no", None])
def test_wrong_flag(kind, name, value):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got {value!r}"):
        MARGINS[kind](**{name: value})


@pytest.mark.parametrize("kind, wrong", OUTSIDE)
def test_number_out_of_range(kind, wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}.* got .*{next(iter(wrong.values()))}"):
        MARGINS[kind](**wrong)


@pytest.mark.parametrize("value", ["Exact", "", None, True])
def test_wrong_gradient(value):
    with pytest.raises(ValueError, match=f'gradient of ArcFace must be "exact" or "straight_through", got {value!r}'):
        margins.ArcFace(gradient=value)


@pytest.mark.parametrize("margin", [*AT_THE_EDGE, *PUBLISHED], ids=str)
def test_ends_of_each_range_and_published_numbers(margin):
    loss, *gradients = evaluate(partial(margin_softmax_loss, margin=margin), *draw("cpu"), torch.ones(()))
    assert loss > 0 and all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@every_row
def test_frozen(row):
    with pytest.raises(FrozenInstanceError):
        row.margin.m = 0.1
    assert hash(row.margin) == hash(replace(row.margin)) and row.margin == replace(row.margin)


WRONG_CALLS = {
    "no margin": ({"margin": None}, TypeError, r"margin must be one of cosface_kernels\.margins.* got None"),
    "a number": ({"margin": 0.35}, TypeError, r"margin must be one of .* got 0\.35"),
    "a number past floats": ({"margin": 10**400}, TypeError, r"margin must be one of .* CosFace\(0\.35\), got 10000"),
    "a class": ({"margin": margins.ArcFace}, TypeError, r"margin must be one of .* got <class"),
    "bias of CosFace": ({"bias": torch.zeros(5)}, ValueError, r"bias goes with margins\.Softmax\(\) alone.* CosFace"),
    "bias of LSoftmax": ({"margin": margins.LSoftmax(), "bias": torch.zeros(5)}, ValueError, "bias goes with .* LSoftmax"),
    "bias a list": ({"margin": margins.Softmax(), "bias": [0.0] * 5}, TypeError, r"bias must be a tensor .* got list"),
    "bias float64": ({"margin": margins.Softmax(), "bias": torch.zeros(5).double()}, TypeError, "dtype of weight, .*float64"),
    "bias too short": ({"margin": margins.Softmax(), "bias": torch.zeros(4)}, ValueError, r"shape \(5,\), got \(4,\)"),
    "bias a column": ({"margin": margins.Softmax(), "bias": torch.zeros(5, 1)}, ValueError, r"shape \(5,\), got \(5, 1\)"),
    "normalize_features 1": ({"normalize_features": 1}, TypeError, "normalize_features must be True, False or None, got 1"),
    "two centres of five rows": ({"centers_per_class": 2}, ValueError, r"centers_per_class = 2 .* got 5 rows"),
    "no centre": ({"centers_per_class": 0}, ValueError, "centers_per_class must be 1 or more, got 0"),
    "half a centre": ({"centers_per_class": 0.5}, TypeError, r"centers_per_class must be an int, got 0\.5"),
    "True centre": ({"centers_per_class": True}, TypeError, "centers_per_class must be an int, got True"),
    "no class": ({"weight": torch.zeros(0, 3)}, ValueError, r"at least one class .* got shape \(0, 3\)"),
    "scale 0": ({"scale": 0}, ValueError, r"scale must be .* got 0"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be .* got 'avg'"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_call(case):
    wrong, error, message = WRONG_CALLS[case]
    tensors = {"features": torch.ones(4, 3), "weight": torch.ones(5, 3), "labels": torch.tensor([0, 4, 2, 2])}
    with pytest.raises(error, match=message):
        margin_softmax_loss(**{**tensors, "margin": margins.CosFace(), **wrong})


WRONG_HEADS = {
    **{
        name: WRONG_CALLS[name]
        for name in ("no margin", "a class", "normalize_features 1", "no centre", "half a centre", "scale 0")
    },
    "bias of CosFace": ({"bias": True}, ValueError, r"bias goes with margins\.Softmax\(\) alone.* CosFace"),
    "bias of LSoftmax": ({"margin": margins.LSoftmax(), "bias": True}, ValueError, "bias goes with .* LSoftmax"),
    "bias a word": ({"margin": margins.Softmax(), "bias": "no"}, TypeError, "bias must be True or False, got 'no'"),
    "bias a tensor": ({"margin": margins.Softmax(), "bias": torch.zeros(5)}, TypeError, "bias must be True .*got a tensor"),
    "no class": ({"num_classes": 0}, ValueError, "num_classes must be 1 or more, got 0"),
    "no size": ({"embedding_size": 0}, ValueError, "embedding_size must be 1 or more, got 0"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be .* got 'avg'"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be .* got 'gpu'"),
    "memory_budget": ({"memory_budget": -1}, ValueError, "memory_budget must be .* got -1"),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, r"ignore_index must be .* got 0\.5"),
}


@pytest.mark.parametrize("case", WRONG_HEADS)
def test_wrong_head(case):
    wrong, error, message = WRONG_HEADS[case]
    with pytest.raises(error, match=message):
        MarginSoftmaxLoss(**{"embedding_size": 3, "num_classes": 5, "margin": margins.CosFace(), **wrong})


WRONG_NAMES = {
    "CosFaceLoss": (lambda: CosFaceLoss(3, 5, sample_rat=0.1), "CosFaceLoss has no option sample_rat; did you mean sample_rate"),
    "a margin's": (lambda: CosFaceLoss(3, 5, m=0.4), "CosFaceLoss has no option m; did you mean margin"),
    "elsewhere": (
        lambda: CosFaceLoss(3, 5, sub_centers=3),
        "CosFaceLoss has no option sub_centers; did you mean centers_per_class",
    ),
    "sharded": (lambda: ShardedCosFaceLoss(3, 5, margn=0.4), "ShardedCosFaceLoss has no option margn; did you mean margin"),
    "no margin": (lambda: ShardedMarginSoftmaxLoss(3, 5), "ShardedMarginSoftmaxLoss.* missing .*'margin'"),
    "sharded, with a margin": (
        lambda: ShardedMarginSoftmaxLoss(3, 5, margin=margins.ArcFace(), scal=8.0),
        "ShardedMarginSoftmaxLoss has no option scal; did you mean scale",
    ),
}


@pytest.mark.parametrize("case", WRONG_NAMES)
def test_a_wrong_option_is_that_of_the_class_that_was_called(case):
    make, message = WRONG_NAMES[case]
    with pytest.raises(TypeError, match=f"^{message}"):
        make()


ATTRIBUTES = {
    "set": (lambda head: setattr(head, "s", 30.0), "s; did you mean scale"),
    "set to a margin": (lambda head: setattr(head, "m", 0.1), "m; did you mean margin"),
    "read": (lambda head: head.kernel, "kernel; did you mean weight"),
    "called": (lambda head: head.predict(None), r"predict; did you mean topk\(features, k\)"),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
def test_an_attribute_of_another_librarys_head(case):
    use, message = ATTRIBUTES[case]
    with pytest.raises(AttributeError, match=f"^CosFaceLoss has no attribute {message}"):
        use(CosFaceLoss(3, 5))


def test_every_name_that_is_suggested_is_there():
    head = CosFaceLoss(3, 5, centers_per_class=2)
    assert (head.embedding_size, head.num_classes) == (3, 5)
    names = {name.split("(")[0] for name in validation.ELSEWHERE.values()} - {"head"}
    assert all(hasattr(head, name) for name in names)


def test_a_margin_object_for_a_head_of_one_margin():
    with pytest.raises(TypeError, match=r"the margin of a CosFaceLoss is the number m, got ArcFace\(m=0.3.*MarginSoftmaxLoss"):
        CosFaceLoss(3, 5, margin=margins.ArcFace(0.3))


SHOWN = {
    "a text": ("0.2", r"got '0\.2', a text: float\(\) makes a number of it"),
    "a list": ([0.25] * 5000, r"^.{1,80}, got \[0\.25, .{93}…, a list$"),
    "an array": (np.full(5000, 0.25), r"got an array of shape \(5000,\), float64$"),
}


@pytest.mark.parametrize("case", SHOWN)
@pytest.mark.parametrize("make", [lambda m: CosFaceLoss(3, 5, margin=m), margins.ArcFace], ids=["a head's", "a margin's"])
def test_a_wrong_number_is_not_printed_in_full(make, case):
    value, message = SHOWN[case]
    with pytest.raises(TypeError, match=message):
        make(value)


def test_a_number_in_a_margins_place():
    with pytest.raises(TypeError, match=r"for example CosFace\(0\.2\), got 0\.2"):
        MarginSoftmaxLoss(3, 5, margin=0.2)


SET_LATER = {
    "a number": (margins.ArcFace(), 0.2, TypeError, r"margin must be one of cosface_kernels\.margins, .* got 0\.2"),
    "an object for a number": (None, margins.ArcFace(), TypeError, r"the margin of a CosFaceLoss is the number m, got ArcFace"),
}


@pytest.mark.parametrize("case", SET_LATER)
def test_wrong_margin_set_on_a_head(case):
    first, margin, error, message = SET_LATER[case]
    head = CosFaceLoss(3, 5) if first is None else MarginSoftmaxLoss(3, 5, margin=first)
    head.margin = margin
    with pytest.raises(error, match=message):
        head(torch.ones(4, 3), torch.arange(4))


def test_an_own_margin_with_numbers_for_another_batch():
    head = MarginSoftmaxLoss(3, 5, margin=feature_table.PerRow(torch.zeros(6)))
    head(torch.ones(6, 3), torch.arange(6) % 5)
    with pytest.raises(ValueError, match=r"^psi of PerRow failed .* N = 4 rows needs N numbers .*: m has shape \(6,\)$"):
        head(torch.ones(4, 3), torch.arange(4))


@pytest.mark.parametrize("shape", [(-1, 1), (1, -1)], ids=str)
@pytest.mark.parametrize("method", ["psi", "penalty", "terms"])
def test_what_an_own_margin_returns_has_a_number_for_each_row(method, shape):
    def wrong(self, values, *_):
        return (values.view(shape),) if method == "terms" else values.view(shape)

    own = type("Own", (margins.Margin,), {"psi": lambda self, cosine, *terms: cosine, "needs_norm": True, method: wrong})
    tensors = torch.ones(4, 3), torch.eye(3), torch.tensor([0, 1, 2, 2])
    with pytest.raises(
        ValueError, match=rf"{method}.* of Own must return shape \(N,\) = \(4,\).*, got \({'4, 1' if shape[0] < 0 else '1, 4'}\)"
    ):
        margin_softmax_loss(*tensors, margin=own())


def test_a_penalty_that_is_no_tensor():
    own = type("Own", (margins.CosFace,), {"penalty": lambda self, norm: 1.0})
    with pytest.raises(TypeError, match="penalty of Own must be a tensor, got float"):
        margin_softmax_loss(torch.ones(4, 3), torch.eye(3), torch.tensor([0, 1, 2, 2]), margin=own())
