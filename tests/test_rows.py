"""Do the kernels before and after the slab loop agree with the plain PyTorch that they stand in for?"""

import pytest
import torch

from cosface_kernels.ops import backends, batch_rows
from cosface_kernels.ops.operands import Options, Saved, TableFactors, Vectors
from cosface_kernels.ops.table import Table

NUM_CLASSES, SIZE, IGNORED = 40, 70, 7
OPTIONS = Options(64.0, IGNORED, True, True, 1, torch.float32, None, "auto", None)


@pytest.fixture(params=["triton", "cpu"])
def kernels(request, device):
    why = backends.unusable(request.param, device)
    if why:
        pytest.skip(why)
    return backends.choose(request.param, device, torch.float32).row_functions


def draw(device, num_rows):
    """(features, table, labels): every class several times, ignored ones, and labels that are no class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=generator)
    labels[3::11] = IGNORED
    labels[5::50], labels[6::50] = NUM_CLASSES, -(2**63)
    tensors = torch.randn(num_rows, SIZE, generator=generator), torch.randn(NUM_CLASSES, SIZE, generator=generator), labels
    return [tensor.to(device) for tensor in tensors]


def assert_close(ours, plain):
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enter_and_x_gradient(device, kernels, dtype):
    x, weight, labels = draw(device, 67)
    x[3], x[14] = torch.nan, torch.inf  # ignored rows, which come out as zero
    x, weight = x.T.contiguous().T.to(dtype), weight.to(dtype)
    ours, plain = (module.enter(x, Table(weight), labels, OPTIONS, torch.float32) for module in (kernels, batch_rows))
    assert_close(ours, plain)
    unit, none = plain.unit, plain.unit.new_empty(0)
    assert not unit[labels == IGNORED].any() and unit[5].isnan().all()
    gradients = Vectors(plain.inverse_norm.cos(), plain.product.cos(), None, None, None)
    saved = Saved(unit, plain.target_unit, plain.inverse_norm, unit.roll(1, 0), none, none, none, none)
    arguments = gradients, saved, OPTIONS, x.shape, dtype
    assert_close([kernels.x_gradient(*arguments)], [batch_rows.x_gradient(*arguments)])


@pytest.mark.parametrize(
    "num_rows, size, dtype",
    [
        (1, 1e-30, torch.float32),
        (23, 1.0, torch.bfloat16),
        (1, 1e30, torch.float32),
        pytest.param(613, 1.0, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_slab_factors(device, kernels, num_rows, size, dtype):
    """613: past the rows that `order_targets` compares at once."""
    unit, weight, labels = draw(device, num_rows)
    weight = weight.to(dtype)
    lse_grad, product_grad, total = size * unit[:, 0], unit[:, 2:3].clone(), unit[:, 1].exp()
    lse_grad[1::100], lse_grad[2::100], total[4::100] = torch.nan, torch.inf, 0
    factors = TableFactors(unit, labels, None, total, lse_grad, product_grad, None, None, None, None)
    ours, plain = (module.slab_factors(factors, Table(weight), OPTIONS) for module in (kernels, batch_rows))
    assert_close(ours[:3], plain[:3])
    for found in (ours, plain):
        rows = found.target_rows
        assert torch.equal(rows, rows.sort().values)
        assert set(rows.tolist()) - {NUM_CLASSES} == set(found.targets.tolist()) - {-1}
    assert_close(*([dense(found.target_rows, found.target_sums)] for found in (ours, plain)))


def dense(classes, sums):
    """(C, D): each class's sum, as a table's rows look it up."""
    every = torch.arange(NUM_CLASSES, device=classes.device)
    slots = torch.searchsorted(classes, every).clamp(max=len(classes) - 1)
    return torch.where((classes[slots] == every)[:, None], sums[slots], 0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_rows", [0, 1, 1500])
def test_losses(device, kernels, num_rows, reduction):
    """1500: past the rows that the kernel holds at once. Exponents from converged to hopeless, and none at all."""
    exponent = torch.linspace(-80, 80, max(num_rows, 3), device=device)[:num_rows]
    logit = torch.full_like(exponent, 0.25)
    lse, counted = exponent + 64 * logit, torch.arange(num_rows, device=device) % 7 != 3
    lse[5::100], lse[3::70] = -torch.inf, torch.nan  # of a table of one class; of rows that are ignored
    ours, plain = (module.losses(lse, logit, counted, 64.0, reduction) for module in (kernels, batch_rows))
    for one, other in zip(ours, plain, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=2e-5, atol=0)
