"""Are gradients right however they are asked for: gradcheck, twice, scaled, under autocast, kept or recomputed, bit for bit?"""

from functools import partial

import pytest
import torch
from cases import evaluate
from rounding import assert_close, draw, tolerance
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cosface_kernels import CosFaceLoss, cosface_loss, cosine_lse, margin_softmax_loss, margins, reference

ALL = 2**40  # bytes: keep every slab

pytestmark = pytest.mark.usefixtures("small_slabs")


def leaves(device, dtype=torch.float64, **sizes):
    features, weight, labels = draw(device, dtype, **sizes)
    return features.requires_grad_(), weight.requires_grad_(), labels


FUNCTIONS = {
    **{reduction: partial(cosface_loss, reduction=reduction) for reduction in ("mean", "sum", "none")},
    "negative_lse": lambda *tensors, **options: cosine_lse(*tensors, **options)[0],
    "target_cosine": lambda *tensors, **options: cosine_lse(*tensors, **options)[1],
    "both": cosine_lse,
}


@pytest.mark.parametrize("memory_budget", [0, ALL])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function, memory_budget, device):
    # 131 classes: two slabs, the second of three.
    features, weight, labels = leaves(device, num_rows=4, num_classes=131)
    labels[1], labels[2] = -100, 130

    def call(features, weight):
        return FUNCTIONS[function](features, weight, labels, scale=4.0, memory_budget=memory_budget)

    assert torch.autograd.gradcheck(call, (features, weight), fast_mode=True)


@pytest.mark.parametrize("function", ["mean", "none", "negative_lse"])
@pytest.mark.parametrize(
    "learned, differentiated",
    [
        ("features weight", "features"),
        ("features weight", "weight"),
        ("features weight", "features weight"),
        ("features", "features"),
        ("weight", "weight"),
    ],
)
def test_second_derivative_raises(learned, differentiated, function, device):
    features, weight, labels = draw(device)
    tensors = {"features": features, "weight": weight}
    for name in learned.split():
        tensors[name].requires_grad_()
    losses = FUNCTIONS[function](features, weight, labels).sum()
    with pytest.raises(RuntimeError, match=r"first derivatives only.*cosface_kernels\.reference"):
        first = torch.autograd.grad(losses, [tensors[name] for name in differentiated.split()], create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()


@pytest.mark.parametrize("differentiated", ["margin", "features"])
def test_second_derivative_by_a_learned_margin_raises(differentiated, device):
    """It would not come back through the table's operator, which alone would let it pass in silence."""
    features, weight, labels = draw(device)
    features.requires_grad_()
    margin = Learned(torch.tensor(0.3, device=device, requires_grad=True))
    loss = margin_softmax_loss(features, weight, labels, margin=margin)
    (first,) = torch.autograd.grad(loss, margin.m, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*cosface_kernels\.reference"):
        torch.autograd.grad(first, margin.m if differentiated == "margin" else features)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_vmap_hides_that_a_gradient_is_needed(num_rows, backend, device):
    features, weight, labels = draw(device, torch.float32)
    features, labels = features[: 2 * num_rows].requires_grad_(), labels[: 2 * num_rows]
    weight.requires_grad_()
    losses = partial(cosface_loss, reduction="none", backend=backend)
    expected = torch.autograd.grad(losses(features, weight, labels).sum(), (features, weight))
    batched = torch.func.vmap(lambda x, y: losses(x, weight, y))
    found = batched(features.unflatten(0, (2, num_rows)), labels.unflatten(0, (2, num_rows)))
    for one, other in zip(torch.autograd.grad(found.sum(), (features, weight)), expected, strict=True):
        assert_close(one, other.double(), tolerance(torch.float32))


def test_results_may_be_changed_in_place(backend, device):
    features, weight, labels = leaves(device, torch.float32)
    lse, cosine = cosine_lse(features, weight, labels, backend=backend)
    (lse.mul_(2) - cosine.clamp_(-0.5, 0.5)).sum().backward()
    assert features.grad.isfinite().all() and features.grad.any()


class Learned(margins.Margin):
    def __init__(self, m):
        self.m = m

    def psi(self, cosine):
        return cosine - self.m.square()


def test_backward_twice_through_one_graph(device):
    features, weight, labels = leaves(device, torch.float32)
    losses = cosface_loss(features, weight, labels, reduction="none")
    first, second = (
        torch.autograd.grad(losses, (features, weight), torch.ones_like(losses), retain_graph=True) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("memory_budget", [0, ALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_every_time(dtype, memory_budget, device):
    features, weight, labels = draw(device, dtype, num_rows=67)
    labels %= 5  # many rows add to one class
    upstream = torch.linspace(1, 2, len(labels), device=device)
    losses = partial(cosface_loss, reduction="none", memory_budget=memory_budget)
    first, *others = (evaluate(losses, features, weight, labels, upstream) for _ in range(3))
    for other in others:
        for tensor, wanted in zip(other, first, strict=True):
            assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("slabs", [1, 2, 3])
def test_kept_exponentials_equal_recomputed_ones(slabs, dtype, device):
    features, weight, labels = draw(device, dtype)
    product = torch.bfloat16 if dtype.itemsize == 2 else dtype
    upstream = torch.linspace(1, 2, len(labels), device=device)
    budget = slabs * len(labels) * 128 * product.itemsize
    recomputed, kept, auto = (
        evaluate(partial(cosface_loss, reduction="none", memory_budget=memory), features, weight, labels, upstream)
        for memory in (0, budget, "auto")
    )
    for tensors in (kept, auto):
        for tensor, wanted in zip(tensors, recomputed, strict=True):
            # Each exponential rounded once, maybe to its other neighbour.
            assert_close(tensor, wanted.double(), torch.finfo(product).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_inside_and_outside_autocast(dtype, device):
    gradients = []
    for inside in (False, True):
        features, weight, labels = leaves(device, torch.float32)
        with torch.autocast(device.type, dtype=dtype):
            loss = cosface_loss(features, weight, labels)
        assert loss.dtype == torch.float32
        with torch.autocast(device.type, dtype=dtype, enabled=inside):
            gradients.append(torch.autograd.grad(loss, (features, weight)))
    for outside, inside in zip(*gradients, strict=True):
        assert outside.dtype == torch.float32 and torch.equal(outside, inside)


@pytest.mark.parametrize("autocast", [False, True])
# GradScaler's first factor; and two whose product with an exponential, between 2^-92 and 2^92, may leave float32's range.
@pytest.mark.parametrize("factor", [65536.0, 1e-30, 1e15])
def test_scaled_upstream_gradients(factor, autocast, device):
    features, weight, labels = draw(device, torch.float32)
    losses = partial(cosface_loss, reduction="none")
    upstream = torch.linspace(1, 2, len(labels), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        plain = evaluate(losses, features, weight, labels, upstream)
        scaled = evaluate(losses, features, weight, labels, upstream * factor)
    product = torch.bfloat16 if autocast else torch.float32
    for tensor, wanted in zip(scaled[1:], plain[1:], strict=True):
        # A factor that is not a power of two changes how every operand is rounded.
        assert_close(tensor.double() / factor, wanted.double(), 2 * torch.finfo(product).eps)


def test_upstream_gradients_of_very_different_sizes(device):
    """By 2^80 in one batch: the largest sets the scale of backward's products, and none is lost."""
    features, weight, labels = draw(device, torch.float32)
    upstream = torch.exp2(torch.linspace(-80, 0, len(labels), device=device))
    losses = partial(cosface_loss, reduction="none")
    ours = evaluate(losses, features, weight, labels, upstream)
    exact = evaluate(
        partial(reference.cosface_loss, reduction="none"), features.double(), weight.double(), labels, upstream.double()
    )
    for row in range(len(labels)):
        assert_close(ours[1][row], exact[1][row], tolerance(torch.float32))
    assert_close(ours[2], exact[2], tolerance(torch.float32))


def test_activation_checkpointing(device):
    """Recomputes forward in backward, and lets each saved tensor be unpacked once."""
    features, weight, labels = draw(device)
    upstream = torch.ones((), device=device)

    def checkpointed(*tensors):
        return checkpoint(cosface_loss, *tensors, use_reentrant=False)

    for ours, wanted in zip(
        evaluate(checkpointed, features, weight, labels, upstream),
        evaluate(cosface_loss, features, weight, labels, upstream),
        strict=True,
    ):
        assert torch.equal(ours, wanted)


def test_forward_mode_raises(device):
    features, weight, labels = draw(device)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda rows: cosface_loss(rows, weight, labels), (features,), (features,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        cosface_loss(features, forward_ad.make_dual(weight, weight), labels)


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacrev, lambda function: torch.func.vmap(torch.func.grad(function))]
)
def test_gradients_of_torch_func_are_refused(transform, device):
    features, weight, labels = draw(device)
    inputs = features if transform in (torch.func.grad, torch.func.jacrev) else features[None]
    with pytest.raises(RuntimeError, match=r"no gradient for torch\.func"):
        transform(lambda rows: cosface_loss(rows, weight, labels))(inputs)
    with pytest.raises(RuntimeError, match=r"no gradient for torch\.func"):
        torch.func.vjp(lambda table: cosface_loss(features, table, labels), weight)


def test_functional_call(backend, device):
    """Parameters of the caller's own, and their gradients by torch.autograd.grad."""
    features, weight, labels = leaves(device, torch.float32)
    head = CosFaceLoss(weight.shape[1], len(weight), backend=backend, device=device)
    found = torch.func.functional_call(head, {"weight": weight}, (features, labels))
    wanted = cosface_loss(features, weight, labels, backend=backend)
    assert torch.equal(found, wanted) and head.weight.grad is None
    for ours, exact in zip(*(torch.autograd.grad(loss, (features, weight)) for loss in (found, wanted)), strict=True):
        assert torch.equal(ours, exact)
