"""Is a head with a float8 table the head of the numbers that the table has, in all that a head can do?"""

import copy

import pytest
import torch

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, MarginSoftmaxLoss, cosface_loss
from cosface_kernels.heads import float8
from cosface_kernels.margins import ArcFace, CosFace, MVSoftmax, Softmax
from cosface_kernels.ops import formats
from cosface_kernels.ops.formats import FLOAT8

SIZE, NUM_CLASSES, ROWS = 20, 300, 9  # several slabs, the last one short

pytestmark = pytest.mark.usefixtures("small_slabs")


def new(kind=CosFaceLoss, seed=0, **options):
    torch.manual_seed(seed)
    return kind(SIZE, NUM_CLASSES, table_format="float8", **options)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, SIZE, generator=generator), torch.randint(NUM_CLASSES, (ROWS,), generator=generator)


def decoded(head):
    """The same head with a float32 table of the same numbers."""
    return copy.deepcopy(head).float()


HEADS = {
    "cosines": {"margin": CosFace(0.35)},
    "bias": {"margin": Softmax(), "bias": True},
    "sub-centres": {"margin": ArcFace(0.3), "centers_per_class": 2},
    "lengths": {"margin": CosFace(0.35), "normalize_features": False},
    "sampled": {"margin": CosFace(0.35), "sample_rate": 0.5},
    "hard negatives": {"margin": CosFace(0.35), "negatives": MVSoftmax()},
    "smoothing": {"margin": CosFace(0.35), "label_smoothing": 0.1},
}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_one_step_is_that_of_the_same_numbers(options, backend):
    """Loss and dX to the bit, the step's result to a neighbour of the exact one."""
    head = new(MarginSoftmaxLoss, backend=backend, **options)
    twin, (features, labels) = decoded(head), batch()
    results = []
    for each in (head, twin):
        torch.manual_seed(0)
        optimizer = FusedSGD(each.parameters(), lr=0.01, momentum=0.9)
        x = features.clone().requires_grad_()
        loss = each(x, labels)
        loss.backward()
        optimizer.step()
        results.append([loss.detach(), x.grad, decoded(each).weight.detach()])
    (loss, grad, ours), (exact_loss, exact_grad, exact) = results
    # batch_rows.py adds the products of the targets in another order than the native kernel that a float32 table has.
    assert torch.allclose(loss, exact_loss, rtol=1e-6) and torch.allclose(grad, exact_grad, rtol=1e-4, atol=1e-6)
    spacing = exact.abs().log2().floor().exp2() / 8
    assert ((ours - exact).abs() <= torch.maximum(spacing, head.weight_scale[:, None] * 2.0**-9) * 1.001).all()
    assert (ours != exact).any() and not torch.equal(exact, twin.weight * 0)


def test_topk_logits_and_confusions_are_those_of_the_same_numbers():
    head = new()
    twin, (features, _) = decoded(head), batch()
    assert torch.equal(head.logits(features), twin.logits(features))
    for ours, exact in ((head.topk(features, 3), twin.topk(features, 3)), (head.confusions(2), twin.confusions(2))):
        assert torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1])
    head = new(MarginSoftmaxLoss, margin=ArcFace(0.3), centers_per_class=2)
    assert torch.equal(head.own_cosines(*batch()), decoded(head).own_cosines(*batch()))


def test_state_dicts_go_both_ways():
    head, plain = new(), CosFaceLoss(SIZE, NUM_CLASSES)
    plain.load_state_dict(head.state_dict())
    assert torch.equal(plain.weight, decoded(head).weight) and plain.weight_scale is None
    again = new(seed=1)
    again.load_state_dict(plain.state_dict())
    assert torch.equal(decoded(again).weight, decoded(head).weight)
    with torch.no_grad():
        plain.weight.normal_()
    again.load_state_dict(plain.state_dict())
    error = (decoded(again).weight - plain.weight).abs()
    assert (error <= plain.weight.abs() / 16 + again.weight_scale[:, None] * 2.0**-10).all() and error.any()
    assert again.table_format == "float8" and decoded(again).table_format == "float32"
    for strict in (True, False):
        with pytest.raises(ValueError, match="is float8, and the scales of its rows, weight_scale, are not there"):
            again.load_state_dict({"weight": head.weight.detach()}, strict=strict)


@pytest.mark.parametrize(
    "scales",
    ["none", torch.ones(7), torch.ones(1), torch.ones(NUM_CLASSES, dtype=torch.float64)],
    ids=["text", "7", "1", "float64"],
)
def test_scales_to_load_that_are_none(scales):
    plain, before = CosFaceLoss(SIZE, NUM_CLASSES), new().weight.detach()
    kept = plain.weight.detach().clone()
    with pytest.raises((TypeError, ValueError), match=r"^weight_scale must be"):
        plain.load_state_dict({"weight": before, "weight_scale": scales})
    assert torch.equal(plain.weight, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_a_dtype_takes_the_scales_in(dtype):
    head = new()
    exact, converted = decoded(head).weight, copy.deepcopy(head).to(dtype)
    assert converted.weight.dtype == dtype and converted.weight_scale is None
    assert torch.equal(converted.weight.float(), exact)  # of 3 bits and a power of two, near 0.01
    assert head.to("cpu").weight.dtype == FLOAT8 and head.weight_scale.dtype == torch.float32


def test_rows_come_and_go():
    head = new()
    optimizer = FusedAdamW(head.parameters(), state_format="int8")
    features, labels = batch()
    head(features, labels).backward()
    optimizer.step()
    before = decoded(head).weight
    assert head.grow(3) == range(NUM_CLASSES, NUM_CLASSES + 3)
    grown = decoded(head).weight
    assert torch.equal(grown[:NUM_CLASSES], before) and 0 < grown[NUM_CLASSES:].std() < 0.02
    head.remove([0, 2])
    assert torch.equal(decoded(head).weight, grown[[1, *range(3, NUM_CLASSES + 3)]])
    head(features, labels).backward()
    optimizer.step()
    assert not torch.equal(decoded(head).weight, grown[[1, *range(3, NUM_CLASSES + 3)]])


def test_what_has_no_fused_optimiser_is_refused():
    head, (features, labels) = new(), batch()
    head(features.requires_grad_(), labels).backward(inputs=[features])
    assert features.grad.isfinite().all() and features.grad.any()
    for loss in (head(features, labels), head.logits(features).sum()):
        with pytest.raises(RuntimeError, match="16 or 8 bits trains with FusedSGD or FusedAdamW alone"):
            loss.backward()
    optimizer = FusedSGD(head.parameters())
    with pytest.raises(RuntimeError, match="of a float8 class table is not made"):
        torch.autograd.grad(head(features, labels), head.weight)
    with pytest.raises(TypeError, match="weight is float8 without the scales of its rows"):
        cosface_loss(features, head.weight, labels)
    cast = CosFaceLoss(SIZE, NUM_CLASSES).to(FLOAT8)
    with pytest.raises(TypeError, match="weight is float8 without the scales"):
        cast(features, labels)
    with pytest.raises(ValueError, match="needs the scales of its rows"):
        FusedSGD(cast.parameters())
    other = new(seed=1)
    other.weight = head.weight
    with pytest.raises(ValueError, match="must share its scales too"):
        optimizer.step()
    other.weight_scale = head.weight_scale
    optimizer.step()


def test_scales_of_other_rows_are_refused():
    head = new()
    optimizer = FusedSGD(head.parameters())
    head.weight_scale = head.weight_scale[:-1]
    with pytest.raises(ValueError, match="the scales of 299 rows are beside 300 rows of a float8 table"):
        optimizer.step()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda scales: scales.to("meta"), TypeError, "weight_scale must have its numbers in memory"),
        (lambda scales: scales.to_sparse(), TypeError, r"weight_scale must be a dense tensor of shape \(R,\)"),
        (lambda scales: scales.double(), ValueError, "weight_scale must be float32 of shape .*, got torch.float64"),
        (
            lambda scales: scales[:2],
            ValueError,
            r"weight_scale must be float32 of shape \(R,\) = \(5,\).* got torch.float32 of shape \(2,\)",
        ),
    ],
)
def test_scales_that_are_none(change, error, message):
    head = CosFaceLoss(3, 5, table_format="float8").eval()
    head.weight_scale = change(head.weight_scale)
    with pytest.raises(error, match=message):
        head(torch.ones(2, 3), torch.tensor([0, 4]))


def test_drawn_as_other_tables_are():
    head = new()
    torch.manual_seed(0)
    exact = CosFaceLoss(SIZE, NUM_CLASSES).weight
    buffer, scale = torch.zeros(NUM_CLASSES, SIZE, dtype=FLOAT8), torch.zeros(NUM_CLASSES)
    float8.put(buffer, scale, slice(None), exact)
    assert torch.equal(formats.read(buffer, scale, slice(None)), decoded(head).weight)
