"""Are the kernels in Gluon for Hopper right, under an emulator of their barriers, late copies and late products?"""

import pytest
import torch
from cases import check_accuracy, draws
from gluon_emulator import Kernel
from selection import HAS_GPU, slow_when

from cosface_kernels import cosface_loss
from cosface_kernels.ops import backends

if backends.unusable("triton", torch.device("cuda" if HAS_GPU else "cpu")):
    pytest.skip("needs triton", allow_module_level=True)

from cosface_kernels.ops.backends import triton_attend, triton_forms, triton_hopper

SHIFT, LOG2_SCALE = 3.0, 20.0
GLUON = {"attend_features": {"GLUON": True}, "attend_table": {"GLUON": True}}


@pytest.fixture
def emulated(monkeypatch):
    """Counts launches of the kernel."""
    launches, kernel = [], Kernel(triton_hopper.attend)

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_hopper, "attend", Counted())
    monkeypatch.setattr(triton_attend, "hopper", lambda: triton_hopper)
    return launches


def unit_rows(count, generator, dtype):
    rows = torch.nn.functional.normalize(torch.randn(count, 512, generator=generator), dim=1)
    return rows.to(dtype)


def exact(queries, keys, dropped):
    e = torch.exp2(LOG2_SCALE * queries.double() @ keys.double().T - SHIFT)
    return e.masked_fill(dropped, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows, classes, parts", [(1, 1, 1), (67, 300, 1), (130, 128, 1), (64, 700, 3), (200, 513, 5)])
@slow_when(lambda num_rows, dtype: dtype == torch.float16 and num_rows != 67)
def test_features(emulated, num_rows, classes, parts, dtype):
    """Sums of two slabs, classes that fill no pair of blocks, parts that have none."""
    generator = torch.Generator().manual_seed(0)
    low, first = unit_rows(num_rows, generator, dtype), 7
    targets = torch.randint(-1, classes + 20, (num_rows,), generator=generator)
    partial, room = (
        torch.full((2 * parts, num_rows), torch.nan, dtype=torch.float64),
        torch.full((parts, num_rows, 512), torch.nan),
    )
    total, launch = 0, triton_hopper.launcher(TABLE=False)
    for start in (0, first):  # the first one fills `partial`
        unit = unit_rows(classes, generator, dtype)
        triton_hopper.features(launch, low, unit, targets, partial, room, start, LOG2_SCALE, SHIFT, False)
        e = exact(low, unit, targets[:, None] - start == torch.arange(classes))
        total = total + e.sum(1)
        bound = e @ unit.double().abs() * torch.finfo(dtype).eps + 1e-6
        assert ((room.double().sum(0) - e @ unit.double()).abs() <= bound).all()
    torch.testing.assert_close(partial.sum(0), total, rtol=1e-5, atol=0)
    assert len(emulated) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows, classes", [(1, 1), (67, 300), (128, 130), (300, 64)])
@slow_when(lambda num_rows, dtype: dtype == torch.float16 and num_rows != 67)
def test_table(emulated, num_rows, classes, dtype):
    generator = torch.Generator().manual_seed(0)
    low, unit, first = unit_rows(num_rows, generator, dtype), unit_rows(classes, generator, dtype), 40
    targets = torch.randint(-1, classes + 60, (num_rows,), generator=generator)
    column_scale, out = torch.randn(num_rows, generator=generator), torch.full((classes, 512), torch.nan)
    triton_hopper.table(triton_hopper.launcher(TABLE=True), unit, low, targets, column_scale, out, first, LOG2_SCALE, SHIFT, True)
    e = exact(unit, low, targets - first == torch.arange(classes)[:, None]) * column_scale.double()
    bound = e.abs() @ low.double().abs() * torch.finfo(dtype).eps + 1e-6
    assert ((out.double() - e @ low.double()).abs() <= bound).all()


@pytest.mark.parametrize("precision", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("shape", [(5, 131, 512), pytest.param((67, 259, 300), marks=pytest.mark.slow)])
def test_a_loss(emulated, small_slabs, shape, precision):
    """Forward and backward over slabs of 128 classes, beside float64."""
    inputs = draws("hard", shape, precision, precision, backend="triton")
    with triton_forms.using(**GLUON):
        check_accuracy("triton", inputs, device="cpu", memory_budget=0)
    assert len(emulated) == 2 * -(-shape[1] // 128) * len(inputs)


@pytest.mark.skipif(HAS_GPU, reason="there the kernels may serve")
def test_the_interpreter_has_the_slab_loop(monkeypatch):
    monkeypatch.setattr(triton_hopper, "attend", None)
    features, weight = torch.randn(3, 512, dtype=torch.bfloat16, requires_grad=True), torch.randn(9, 512, dtype=torch.bfloat16)
    with triton_forms.using(**GLUON):
        cosface_loss(features, weight, torch.arange(3), backend="triton", memory_budget=0).backward()
    assert features.grad.any()
