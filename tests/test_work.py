"""Does a call do the work that it is asked for and no more, in the precision that is asked for?"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from cases import evaluate
from rounding import assert_equals_reference, draw

from cosface_kernels import CosFaceLoss, FusedSGD, cosface_loss
from cosface_kernels.ops import backends, recording, slabs

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

pytestmark = pytest.mark.usefixtures("small_slabs")


@pytest.fixture
def calls(monkeypatch):
    """Every call of the backend: (forward's or backward's name, plan, need_pull)."""
    recorded, choose = [], backends.choose

    def spy(name, function):
        def call(*arguments, **keywords):
            bound = inspect.signature(function).bind(*arguments, **keywords).arguments
            recorded.append((name, bound["plan"], bound.get("need_pull")))
            return function(*arguments, **keywords)

        return call

    def choose_spied(*arguments):
        module = choose(*arguments)
        passes = {name: spy(name, getattr(module, name)) for name in ("forward", "backward")}
        return SimpleNamespace(row_functions=module.row_functions, **passes)

    monkeypatch.setattr(backends, "choose", choose_spied)
    return recorded


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("features_dtype", FLOATS, ids=str)
def test_dtypes(features_dtype, weight_dtype, device, calls):
    features, weight, labels = draw(device, features_dtype)
    weight = weight.to(weight_dtype)
    is_wide = torch.float64 in (features_dtype, weight_dtype)
    product = torch.float64 if is_wide else torch.float32 if features_dtype == torch.float32 else torch.bfloat16
    # A small scale, so that what bfloat16 explains stays a few percent.
    losses, dx, dw = assert_equals_reference(features, weight, labels, product_dtype=product, reduction="none", scale=2.0)
    assert {plan.dtype for _, plan, _ in calls} == {product}
    assert (losses.dtype, dx.dtype, dw.dtype) == (torch.float64 if is_wide else torch.float32, features_dtype, weight_dtype)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast_chooses_the_product(dtype, autocast, device, calls):
    features, weight, labels = draw(device, dtype)
    product = torch.float64 if dtype == torch.float64 else torch.bfloat16
    with torch.autocast(device.type, dtype=autocast):
        losses, *_ = assert_equals_reference(features, weight, labels, product_dtype=product, reduction="none", scale=2.0)
    assert {plan.dtype for _, plan, _ in calls} == {product}
    assert losses.dtype == torch.promote_types(dtype, torch.float32)


FROZEN = {"features": ["forward", "backward"], "weight": ["forward"], "features weight": ["forward"]}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_input_skips_work(frozen, device, calls):
    features, weight, labels = draw(device)
    upstream = torch.ones((), device=device)
    wanted = evaluate(cosface_loss, features, weight, labels, upstream)
    calls.clear()
    for name, tensor in (("features", features), ("weight", weight)):
        tensor.requires_grad_(name not in frozen.split())
    loss = cosface_loss(features, weight, labels)
    assert torch.equal(loss.detach(), wanted[0])
    if loss.requires_grad:
        loss.backward()
    assert [name for name, *_ in calls] == FROZEN[frozen]
    _, plan, need_pull = calls[0]
    assert need_pull == features.requires_grad
    assert (plan.kept_slabs > 0) == weight.requires_grad
    for tensor, gradient in zip((features, weight), wanted[1:], strict=True):
        assert torch.equal(tensor.grad, gradient) if tensor.requires_grad else tensor.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, device, calls):
    features, weight, labels = draw(device)
    features.requires_grad_(), weight.requires_grad_()
    with mode():
        loss = cosface_loss(features, weight, labels)
    assert not loss.requires_grad
    assert [(name, plan.kept_slabs, need_pull) for name, plan, need_pull in calls] == [("forward", 0, False)]
    assert torch.equal(loss, cosface_loss(features, weight, labels).detach())


ROWS = 7  # of draw()
SLAB_BYTES = ROWS * 128 * 4  # float32


@pytest.mark.parametrize(
    "memory_budget, kept",
    [
        (0, 0),
        (SLAB_BYTES - 1, 0),
        (SLAB_BYTES, 1),
        (3 * SLAB_BYTES - 1, 2),
        (3 * SLAB_BYTES, 3),
        (2**62, 3),  # all there are
        ("auto", 3),  # the weight's gradient takes 5.4 slabs
    ],
)
def test_memory_budget_is_a_ceiling(memory_budget, kept, device, calls):
    features, weight, labels = draw(device, torch.float32)
    features.requires_grad_(), weight.requires_grad_()
    cosface_loss(features, weight, labels, memory_budget=memory_budget).backward()
    assert [(name, plan.kept_slabs) for name, plan, _ in calls] == [("forward", kept), ("backward", kept)]


def test_auto_budget_is_at_most_the_weights_gradient(device, calls, monkeypatch):
    monkeypatch.setattr(slabs, "KEPT_ANYWAY", 0)
    features, weight, labels = draw(device, torch.float32, num_rows=101)
    cosface_loss(features, weight.requires_grad_(), labels)
    (_, plan, _), *_ = calls
    assert plan.kept_slabs == weight.nbytes // (101 * plan.slab * 4) == 0
    cosface_loss(features[:15], weight, labels[:15])
    _, (_, plan, _) = calls
    assert plan.kept_slabs == weight.nbytes // (15 * plan.slab * 4) == 2


def test_auto_budget_of_a_fused_optimiser(device, calls, monkeypatch):
    """As without one while a 64th of the memory suffices, else a tenth of the table."""
    features, weight, labels = draw(device, torch.float32)
    head = CosFaceLoss(*weight.shape[::-1], device=device)
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    found = {}
    for memory in (64 * SLAB_BYTES, 2**40, 0):
        monkeypatch.setattr(recording, "total_memory", lambda device, memory=memory: memory)
        head(features, labels).backward()
        optimizer.step()
        found[memory] = [plan.kept_slabs for _, plan, _ in calls]
        calls.clear()
    assert found == {64 * SLAB_BYTES: [1, 1], 2**40: [3, 3], 0: [0, 0]}
    assert weight.nbytes // 10 < SLAB_BYTES < weight.nbytes


def test_auto_budget_keeps_all_of_a_small_table(device, calls):
    features, weight, labels = draw(device, torch.float32, num_rows=101)
    cosface_loss(features, weight.requires_grad_(), labels)
    (_, plan, _), *_ = calls
    assert plan.kept_slabs == 3
