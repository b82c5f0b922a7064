"""Do the losses stay right where numbers are extreme: converged and hopeless rows, scales, margins, norms, NaN, infinity?"""

import math
from functools import partial

import pytest
import torch
from cases import evaluate, make
from rounding import SIZE, assert_close, assert_equals_reference, draw, tolerance

from cosface_kernels import cosface_loss, cosine_lse, reference

DTYPES = [torch.float32, torch.float64]

pytestmark = pytest.mark.usefixtures("small_slabs")


@pytest.mark.parametrize("dtype", DTYPES)
# 1000 and 10000 are past a constant shift in float32, 1000 nearly and 10000 far past one in float64.
@pytest.mark.parametrize("scale", [1e-3, 64, 100.0, 1000.0, 1e4])
def test_scales(scale, dtype, device):
    assert_equals_reference(*draw(device, dtype), scale=scale, reduction="none")


@pytest.mark.parametrize("margin", [-0.5, 0, 1, 3.0])
def test_margins(margin, device):
    assert_equals_reference(*draw(device), margin=margin, reduction="none")


def at_cosine(cosine, device, dtype):
    """Classes are the axes; each row has this cosine with its own class and the rest of its length where no class is."""
    num_classes = SIZE - 1
    features = torch.zeros(num_classes, SIZE, dtype=torch.float64)
    features[:, -1] = (1 - cosine**2) ** 0.5
    features.fill_diagonal_(cosine)
    return features.to(device, dtype), torch.eye(num_classes, SIZE).to(device, dtype), torch.arange(num_classes, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [0.81, 1.0])
def test_converged_rows_keep_their_digits(cosine, dtype, device):
    """Losses of 2e-12 and 1e-17: formed as -log(1 - small) they would be multiples of 6e-8 in float32, mostly 0."""
    losses, *_ = assert_equals_reference(*at_cosine(cosine, device, dtype), reduction="none")
    exact = torch.full_like(losses, (SIZE - 2) * math.exp(-64 * (cosine - 0.35)), dtype=torch.float64)
    # A cosine near 1 is off by a few float32 roundings of 6e-8, times s = 64.
    assert_close(losses, exact, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hopeless_rows_have_no_ceiling(dtype, device):
    losses, *_ = assert_equals_reference(*at_cosine(-1.0, device, dtype), scale=100.0, reduction="none")
    assert (losses > 135).all()  # s (1 + m), plus the negatives' share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
# The shift of the exponentials is constant up to a scale of 74 at this C.
@pytest.mark.parametrize("scale", [64.0, 73.0, 76.0, 90.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_every_negative_on_one_side(side, scale, dtype, device):
    """All exponentials huge, or all tiny: their sum, and what backward divides by it, stay in range."""
    features, weight, labels = draw(device)
    direction = torch.nn.functional.normalize(features[:1])
    features, weight = (3 * direction + features / 12).to(dtype), (3 * side * direction + weight / 12).to(dtype)
    upstream = torch.linspace(1, 2, len(labels), device=device)

    def negatives(function, dtype):
        tensors = (features.to(dtype), weight.to(dtype), labels, upstream)
        return evaluate(lambda *tensors: function(*tensors, scale=scale)[0], *tensors)

    ours, exact = negatives(cosine_lse, dtype), negatives(reference.cosine_lse, torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        bound = negatives(reference.cosine_lse, torch.float32)
    for tensor, wanted, plain in zip(ours, exact, bound, strict=True):
        # Twice the error of the plain reference in the same precision, which is sound here because its logits are.
        assert_close(tensor, wanted, 2 * (plain - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [0.0, 1e-13])
def test_rows_without_a_direction(norm, dtype, device):
    """A row shorter than 1e-12 counts as zero: cosine 0 with everything, gradient exactly 0."""
    features, weight, labels = draw(device, dtype)
    labels[0], labels[1] = 3, 290
    features[[0, 2]] *= norm / features[[0, 2]].norm(dim=1, keepdim=True)
    weight[[3, 7, 290]] *= norm / weight[[3, 7, 290]].norm(dim=1, keepdim=True)
    _, dx, dw = assert_equals_reference(features, weight, labels, reduction="none")
    assert not dx[[0, 2]].any() and not dw[[3, 7, 290]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
@pytest.mark.parametrize("norm", [1e-9, 1e15, 1e30])
def test_norms_do_not_matter(norm, dtype, device):
    """Cosines, so losses, are those of rows of norm 1, and gradients are 1 / norm of theirs."""
    features, weight, labels = draw(device, dtype)
    upstream = torch.linspace(1, 2, len(labels), device=device)
    losses = partial(cosface_loss, reduction="none", scale=2.0)
    # A power of two changes no bits of a row.
    power = 2.0 ** round(torch.tensor(norm).log2().item())
    plain = evaluate(losses, features, weight, labels, upstream)
    scaled = evaluate(losses, features * power, weight * power, labels, upstream)
    for tensor, wanted, factor in zip(scaled, plain, (1, power, power), strict=True):
        assert_close(tensor.double() * factor, wanted.double(), tolerance(torch.promote_types(dtype, torch.float32)))


# 1000: each row's maximum is found first, and a maximum may drop a NaN.
@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.bfloat16, 2.0), (torch.float32, 2.0), (torch.float64, 2.0), (torch.float32, 1000.0), (torch.float64, 1000.0)],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["features", "weight", "weight of a target"])
def test_nan_and_infinity_come_out_as_nan(scale, which, value, dtype, device):
    """NaN wherever the reference has it, and everything else untouched: never a finite lie."""
    features, weight, labels = draw(device, dtype)
    if which == "features":
        features[1, 3] = value
    else:
        weight[labels[1] if which == "weight of a target" else (labels.max() + 1) % len(weight), 3] = value
    upstream = torch.linspace(1, 2, len(labels), device=device)
    options = {"reduction": "none", "scale": scale}
    ours = evaluate(partial(cosface_loss, **options), features, weight, labels, upstream)
    exact = evaluate(partial(reference.cosface_loss, **options), features.double(), weight.double(), labels, upstream)
    for tensor, wanted in zip(ours, exact, strict=True):
        assert wanted.isnan().any()
        assert torch.equal(tensor.isnan(), wanted.isnan())
        assert_close(tensor[~wanted.isnan()], wanted[~wanted.isnan()], tolerance(dtype, scale))


def test_huge_upstream_gradient_of_rows_that_are_wrong_by_far(device, backend):
    """Its product with e^z, z about 40, is no float32."""
    features, weight, labels = draw(device, torch.float32)
    assert_equals_reference(features, weight, labels, torch.full((7,), 1e30, device=device), reduction="none", backend=backend)


def test_zero_class_row_has_zero_gradient_even_beside_nan(device, backend):
    features, weight, labels = draw(device, torch.float32)
    weight[5] = 0
    features[0, 0] = torch.nan
    *_, weight_grad = evaluate(partial(cosface_loss, backend=backend), features, weight, labels, torch.ones((), device=device))
    assert not weight_grad[5].any()
    assert weight_grad[4].isnan().all()


def test_gradient_past_floats_range(device, backend):
    """Norms of 1e37 and upstream gradients of 1e-37: what is below float32's range is 0, not NaN."""
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 4, 300, 16))
    weight = weight * 1e37
    upstream = torch.full((4,), 1e-37, device=device)
    for scale in (1e-3, 0.01, 1.0, 64.0):
        *_, dw = evaluate(
            partial(cosface_loss, backend=backend, reduction="none", scale=scale), features, weight, labels, upstream
        )
        assert not dw.any()
