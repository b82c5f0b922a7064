"""Does every margin equal its formula written out, is its ψ of the shape that its docstring says, and does it compile?

The rows of margin_rows.py, through margin_softmax_loss; the module, and what it carries from step to step, is in
test_margin_modules.py.
"""

import math
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import assert_as_accurate
from margin_rows import REPRESENTATIVES, ROWS, Row, adaface, batch, every_kind, every_row, steepness, written_out
from rounding import SIZE, assert_close, tolerance
from selection import interpreted, repeats_when, slab_loop_when, slow_when

from cosface_kernels import margin_softmax_loss, margins, reference

DTYPES = [torch.float32, torch.float64]
GRID = torch.linspace(0, math.pi, 100_000, dtype=torch.float64)  # π/2, where easy margins jump, lies between two of its points
REACH = 1e-3  # AdaFace keeps its angle this far within (0, π)

pytestmark = pytest.mark.usefixtures("small_slabs")


def ours(row, features, weight, labels, bias=None, **options):
    return margin_softmax_loss(features, weight, labels, bias=bias, margin=row.margin, **row.options, **options)


def results(loss, features, weight, labels, *bias, upstream=None):
    """[loss, dX, dW, and db]."""
    leaves = [tensor.detach().requires_grad_() for tensor in (features, weight, *bias)]
    value = loss(*leaves[:2], labels, *leaves[2:])
    upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def psi_of(row, theta, norm, cosine=None):
    """(ψ, ψ written out) at θ or at a given cosine, for rows of this norm; deviations of 5 put AdaFace's norms far apart."""
    cosine = theta.cos() if cosine is None else cosine
    norms = torch.full_like(theta, norm)
    state = {name: torch.tensor(5.0 if name == "batch_std" else value) for name, value in row.state.items()}
    terms = row.margin.terms(norms.to(cosine), torch.ones_like(norms, dtype=torch.bool), state)
    return row.margin.psi(cosine, *terms), row.psi(theta, norms, state)


def norms_of(row):
    return row.norms if row.margin.needs_norm else row.norms[:1]


@every_row
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_its_formula(row, reduction, device):
    """Loss and every gradient; two ignored rows hold NaN, and reach nothing, AdaFace's statistics included."""
    features, weight, labels, *bias = batch(row, device)
    ignored = [1, 6]
    labels[ignored], features[ignored] = -100, torch.nan
    tensors = features, weight, labels, *bias
    got = results(partial(ours, row, reduction=reduction), *tensors)
    exact = results(partial(written_out, row, reduction=reduction), *tensors)
    assert not got[1][ignored].any()  # NaN counts as nonzero
    relative = tolerance(torch.float64, steepness(row, features, weight))
    for what, tensor, wanted in zip(("loss", "dX", "dW", "db"), got, exact, strict=False):
        assert tensor.shape == wanted.shape
        assert_close(tensor, wanted, relative, what)


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.exact], ids=[name for name in ROWS if ROWS[name].exact])
def test_gradcheck(row, device):
    """AdaFace's norms count as constants, so there features are turned at a fixed length."""
    features, weight, labels, *bias = batch(row, device, num_rows=5, num_classes=9)
    labels[3] = -100
    lengths = features.norm(dim=1, keepdim=True)

    def call(features, *tensors):
        if isinstance(row.margin, margins.AdaFace):
            features = lengths * reference.unit_rows(features)
        return ours(row, features, tensors[0], labels, *tensors[1:], scale=min(row.scale, 4.0), reduction="none")

    leaves = [tensor.requires_grad_() for tensor in (features, weight, *bias)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["AdaFace", "AdaFace x3"])
def test_adaface_has_no_gradient_through_the_norm(name, device):
    features, weight, labels = batch(ROWS[name], device)
    _, dx, _ = results(partial(ours, ROWS[name], reduction="none"), features, weight, labels)
    along = (dx * features).sum(1).abs() / (dx.norm(dim=1) * features.norm(dim=1))
    assert (along < tolerance(torch.float64)).all() and (dx.norm(dim=1) > 0).all()


def test_adaface_with_a_negative_h(device):
    """The longest features then have the lowest quality."""
    row = ROWS["AdaFace"]._replace(margin=margins.AdaFace(h=-0.333), psi=partial(adaface, h=-0.333))
    tensors = batch(row, device)
    relative = tolerance(torch.float64, steepness(row, *tensors[:2]))
    for tensor, wanted in zip(results(partial(ours, row), *tensors), results(partial(written_out, row), *tensors), strict=True):
        assert_close(tensor, wanted, relative)


@every_row
def test_shape_of_psi(row):
    """On a dense grid: its formula, falling, continuous but for the jumps that are known, and never above cos θ."""
    for norm in norms_of(row):
        psi, exact = psi_of(row, GRID, norm)
        step = GRID[1].item()
        # acos of a rounded cosine is off by up to sqrt(2 eps) at the ends, and ψ by that times its slope.
        rounding = 4 * row.lipschitz * math.sqrt(2 * torch.finfo(torch.float64).eps)
        jumps = row.jumps(norm)
        at = [int((theta > GRID).sum()) - 1 for theta in jumps]
        assert (psi - exact).abs().max() < rounding
        rises = psi.diff()
        for index, rise in zip(at, jumps.values(), strict=True):
            assert abs(rises[index] - rise) < row.lipschitz * step + rounding
            rises[index] = 0
        assert rises.abs().max() <= row.lipschitz * step + rounding
        assert rises.max() <= 8 * torch.finfo(torch.float64).eps * psi.abs().max()
        assert psi[-1] < psi[0]
        assert (psi <= GRID.cos().clamp(min=-math.cos(REACH)) + rounding).all()


@every_row
def test_derivative_of_psi(row):
    """By autograd, against the formula's and central differences, along θ. No point is within 1e-5 of a kink."""
    theta = torch.linspace(0.01, math.pi - 0.01, 1000, dtype=torch.float64).requires_grad_()
    for norm in norms_of(row):
        psi, exact = psi_of(row, theta, norm)
        (slope,), (wanted,) = (torch.autograd.grad(values.sum(), theta) for values in (psi, exact))
        # 1 / sin 0.01 = 100 on the way from cos θ to θ.
        assert_close(slope, wanted, 100 * tolerance(torch.float64, row.lipschitz**2))
        if row.exact:
            with torch.no_grad():
                above, below = (psi_of(row, theta + shift, norm)[0] for shift in (1e-5, -1e-5))
            # A third derivative of at most lipschitz³, and twice a rounding of ψ and of cos θ over the distance.
            allowed = 1e-10 * row.lipschitz**3 / 6 + 200 * torch.finfo(torch.float64).eps * psi.abs().max() / 1e-5
            assert ((above - below) / 2e-5 - slope).abs().max() < allowed


@every_row
@pytest.mark.parametrize("dtype", DTYPES)
def test_psi_at_and_beyond_the_ends(row, dtype):
    """Finite at cosines of ±1 and of what rounding makes of them, with a finite derivative; ψ(0) and ψ(π) as known."""
    cosine = torch.tensor([1, 1 + 1e-7, -1, -1 - 1e-7], dtype=dtype, requires_grad=True)
    psi, _ = psi_of(row, cosine.detach().clamp(-1, 1).acos(), row.norms[0], cosine)
    (slope,) = torch.autograd.grad(psi.sum(), cosine)
    assert psi.dtype == dtype and slope.isfinite().all()
    # Where the cosine is held just inside ±1, θ is off by sqrt(2 eps).
    allowed = row.lipschitz * math.sqrt(2 * torch.finfo(dtype).eps) + 2e-7
    assert (psi - torch.tensor(row.ends, dtype=dtype).repeat_interleave(2)).abs().max() < allowed


@every_row
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_along_and_against_their_class(row, dtype, device):
    """Cosines of ±1 with the target: the loss of ψ(0) and ψ(π), and finite gradients."""
    features, weight, labels, *bias = batch(row, device)
    along = torch.where(torch.arange(len(labels), device=device) % 2 == 0, 1.0, -1.0)[:, None]
    features = along * features.norm(dim=1, keepdim=True) * reference.unit_rows(weight[labels * row.centers])
    low_bias = (tensor.to(dtype) for tensor in bias)
    got = results(partial(ours, row, reduction="none"), features.to(dtype), weight.to(dtype), labels, *low_bias)
    exact = written_out(row, features, weight, labels, *bias, reduction="none")
    assert all(tensor.isfinite().all() for tensor in got)
    # The target's logit is off by its slope times sqrt(2 eps), any logit by SIZE roundings.
    eps = torch.finfo(dtype).eps
    allowed = steepness(row, features, weight) * (math.sqrt(2 * eps) + SIZE * eps)
    assert (got[0] - exact).abs().max() < allowed


PRECISE = ["CosFace raw", "ArcFace", "ArcFace x3", "SphereFace 4 raw", "AdaFace", "MagFace easy", "Softmax bias", "LSoftmax 2"]


@pytest.mark.parametrize("name", PRECISE)
@pytest.mark.parametrize("autocast", [False, True])
@slow_when(lambda backend, name, autocast: interpreted(backend) and (autocast or name not in ("ArcFace x3", "Softmax bias")))
@slab_loop_when(lambda name: name not in ("ArcFace", "AdaFace", "MagFace easy"))
def test_precision(name, autocast, backend, device):
    """The rule of cases.py, against the formula in the same precision."""
    row = ROWS[name]
    plain = partial(written_out, row, reduction="none")
    loss = partial(ours, row, reduction="none", backend=backend)
    found = []
    for seed in range(1 if interpreted(backend) else 3):
        wide = batch(row, device, num_rows=24, seed=seed, dtype=torch.float32)
        exact = results(plain, *(tensor.double() if tensor.is_floating_point() else tensor for tensor in wide))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            found.append(list(zip(results(loss, *wide), exact, results(plain, *wide), strict=True)))
    for index, what in enumerate(("loss", "dX", "dW", "db")[: len(found[0])]):
        tensors = (torch.cat(parts) for parts in zip(*(triples[index] for triples in found), strict=True))
        exponent = 0.0 if autocast else steepness(row, *wide[:2]) * torch.finfo(torch.float32).eps / 2
        # As in check_accuracy: a CPU rounds a gradient's bfloat16 product once.
        product = torch.finfo(torch.bfloat16).eps / 2 if autocast and device.type == "cpu" else exponent
        assert_as_accurate(what, *tensors, luck=not autocast, rounded=exponent if what == "loss" else product)


@every_kind
@pytest.mark.slow
@repeats_when(lambda row: row not in REPRESENTATIVES)  # test_margin_modules.py compiles the others in heads
def test_compile(row, device):
    """Column-major features through torch.compile, row-major ones without."""
    torch._dynamo.reset()
    features, *rest = batch(row, device, dtype=torch.float32)
    rest[1][2] = -100
    compiled = torch.compile(partial(ours, row), fullgraph=True, backend="aot_eager")
    got = results(compiled, features.T.contiguous().T, *rest)
    for tensor, wanted in zip(got, results(partial(ours, row), features, *rest), strict=True):
        # The same operators; only a sum along a row may go in another order.
        assert_close(tensor, wanted.double(), SIZE * torch.finfo(torch.float32).eps)


class Bent(margins.Margin):
    """A user's own: nothing but ψ, of no known class."""

    def psi(self, cosine):
        return cosine - 0.1 * (1 - cosine) ** 2


@pytest.mark.parametrize("raw", [pytest.param("", marks=pytest.mark.slow), "features"])
def test_a_margin_of_ones_own(raw, device):
    row = Row(Bent(), lambda theta, *_: theta.cos() - 0.1 * (1 - theta.cos()) ** 2, (1, -1.4), raw=raw)
    tensors = batch(row, device)
    exact = results(partial(written_out, row), *tensors)
    for got in (
        results(partial(ours, row), *tensors),
        results(torch.compile(partial(ours, row), fullgraph=True, backend="aot_eager"), *tensors),
    ):
        for tensor, wanted in zip(got, exact, strict=True):
            assert_close(tensor, wanted, tolerance(torch.float64, steepness(row, *tensors[:2])))


class Nothing(margins.Margin):
    pass


class Mean(margins.Margin):
    def psi(self, cosine):
        return cosine.mean()


class Comma(Bent):
    def terms(self, norm, counted, state):
        return counted.float()


@pytest.mark.parametrize(
    ("margin", "error", "what"),
    [
        (Nothing(), NotImplementedError, "Nothing defines no psi"),
        (Mean(), ValueError, r"psi of Mean must return shape \(N,\) = \(\d+,\), got \(\)"),
        (Comma(), TypeError, "terms of Comma must return a tuple, got Tensor"),
    ],
)
def test_mistakes_in_a_margin_of_ones_own(margin, error, what, device):
    features, weight, labels, *_ = batch(ROWS["ArcFace"], device)
    with pytest.raises(error, match=what):
        margin_softmax_loss(features, weight, labels, margin=margin)


def test_softmax_of_unit_features_with_a_bias(device):
    """The op has D + 1 columns there, and features D."""
    features, weight, labels, bias = batch(ROWS["Softmax bias"], device)
    labels[1] = -100

    def plain(x, w, y, b):
        return F.cross_entropy(F.linear(F.normalize(x), w, b), y, reduction="sum")

    def loss(x, w, y, b):
        return margin_softmax_loss(x, w, y, bias=b, margin=margins.Softmax(), normalize_features=True, reduction="sum")

    for tensor, wanted in zip(*(results(each, features, weight, labels, bias) for each in (loss, plain)), strict=True):
        assert_close(tensor, wanted, tolerance(torch.float64))


@every_row
def test_fractions_are_numbers(row, device):
    numbers = {field.name: Fraction(getattr(row.margin, field.name)) for field in fields(row.margin) if field.type is float}
    tensors = batch(row, device)
    exact = results(partial(ours, row), *tensors)
    same = row._replace(margin=replace(row.margin, **numbers))
    for tensor, wanted in zip(results(partial(ours, same), *tensors), exact, strict=True):
        assert_close(tensor, wanted, tolerance(torch.float64, steepness(row, *tensors[:2])))
