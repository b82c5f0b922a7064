"""Is label smoothing F.cross_entropy's, on the logits with the margin, in every backend and form?"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import check_rule, draws, evaluate
from margin_rows import ROWS, batch, steepness, written_out
from rounding import NUM_CLASSES, SIZE, assert_close, draw, tolerance
from selection import interpreted, slab_loop_when, slow_when

from cosface_kernels import (
    CosFaceLoss,
    FusedSGD,
    MarginSoftmaxLoss,
    cosface_loss,
    margin_softmax_loss,
    margins,
    reference,
    sample_classes,
)

EPSILON = 0.1

pytestmark = pytest.mark.usefixtures("small_slabs")


def plain(features, weight, labels, scale=64.0, epsilon=EPSILON, shift=0.0):
    """CosFace's losses (N,), with every N x C logit; shift: of the negatives'."""
    cosines = reference.unit_rows(features) @ reference.unit_rows(weight).T
    one_hot = F.one_hot(labels.clamp(min=0), len(weight)).to(cosines)
    logits = scale * (cosines - 0.35 * one_hot)
    smooth = F.cross_entropy(logits, labels, label_smoothing=epsilon, reduction="none")
    shifted = F.cross_entropy(logits + shift * (1 - one_hot), labels, reduction="none")
    return smooth - F.cross_entropy(logits, labels, reduction="none") + shifted if shift else smooth


CASES = [("hard", 64.0, torch.float32), ("peaked", 64.0, torch.float32), ("uniform", 300.0, torch.float32)]
CASES += [("hard", 64.0, torch.bfloat16)]


@pytest.mark.parametrize("memory_budget", [0, "auto"])
@pytest.mark.parametrize("kind, scale, dtype", CASES)
@slow_when(lambda backend, dtype, memory_budget: interpreted(backend) and (dtype, memory_budget) != (torch.bfloat16, 0))
@slab_loop_when(lambda scale: scale == 300)
def test_precision(kind, scale, dtype, memory_budget, backend, device):
    """By the rule of cases.py; with logits below and beyond a constant shift, and losses of which smoothing is all."""
    ours = partial(
        cosface_loss, reduction="none", label_smoothing=EPSILON, scale=scale, backend=backend, memory_budget=memory_budget
    )
    given = draws(kind, (7, 300, 16), dtype, dtype, backend=backend)
    check_rule(ours, partial(plain, scale=scale), given, device=device, scale=scale)


FORMS = ["CosFace", "ArcFace", "AdaFace", "MagFace", "Softmax bias", "CosFace raw", "LSoftmax 4"]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("row", [ROWS[name] for name in FORMS], ids=FORMS)
def test_every_form(row, reduction, device):
    """In float64, with an ignored row that holds NaN."""
    features, weight, labels, *bias = batch(row, device)
    labels[4], features[4] = -100, torch.nan
    bias = {"bias": bias[0]} if bias else {}
    upstream = torch.linspace(1, 2, len(labels), device=device) if reduction == "none" else torch.ones((), device=device)

    def ours(features, weight, labels):
        options = {**row.options, **bias, "reduction": reduction}
        return margin_softmax_loss(features, weight, labels, margin=row.margin, label_smoothing=EPSILON, **options)

    def exact(features, weight, labels):
        return written_out(row, features, weight, labels, *bias.values(), reduction=reduction, label_smoothing=EPSILON)

    relative = tolerance(torch.float64, steepness(row, features, weight))
    both = [evaluate(loss, features, weight, labels, upstream) for loss in (ours, exact)]
    for one, other in zip(*both, strict=True):
        assert_close(one.nan_to_num(), other.nan_to_num(), relative)
    assert not both[0][1][4].any()


def test_bias_and_scale_get_their_gradients(device):
    features, weight, labels, bias = batch(ROWS["Softmax bias"], device)
    scale = torch.tensor(2.0, dtype=torch.float64, device=device)
    leaves = [tensor.requires_grad_() for tensor in (bias, scale)]
    margin = {"margin": margins.Softmax(), "bias": bias, "scale": scale}
    ours = margin_softmax_loss(features, weight, labels, label_smoothing=EPSILON, **margin)
    exact = F.cross_entropy(scale * F.linear(features, weight, bias), labels, label_smoothing=EPSILON)
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in (ours, exact)), strict=True):
        assert_close(one, other, tolerance(torch.float64, steepness(ROWS["Softmax bias"], features, weight)))


@pytest.mark.parametrize("correction", [False, True])
def test_sampled_classes(correction, backend, device):
    """The mean is over the classes that take part, and knows no correction."""
    features, weight, labels = draw(device, torch.float32)
    classes = sample_classes(labels, NUM_CLASSES, 0.3)
    shift = torch.tensor((NUM_CLASSES - 1) / (len(classes) - 1)).log().item() if correction else 0.0
    options = {"classes": classes, "sample_correction": correction, "backend": backend, "reduction": "none"}
    upstream = torch.linspace(1, 2, len(labels), device=device)
    ours = evaluate(partial(cosface_loss, label_smoothing=EPSILON, **options), features, weight, labels, upstream)

    def sampled(features, weight, labels):
        return plain(features, weight[classes], torch.searchsorted(classes, labels), shift=shift)

    exact = evaluate(sampled, features.double(), weight.double(), labels, upstream)
    for one, other in zip(ours, exact, strict=True):
        assert_close(one.to_dense(), other, tolerance(torch.float32))


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
@slow_when(lambda backend: interpreted(backend))
def test_fused_optimiser(sample_rate, backend, device):
    """Batches with and without smoothing, and one under a GradScaler's factor, make the step that torch.optim.SGD makes."""
    tables = []
    for kind in (torch.optim.SGD, FusedSGD):
        torch.manual_seed(0)
        head = CosFaceLoss(SIZE, NUM_CLASSES, label_smoothing=EPSILON, sample_rate=sample_rate, backend=backend, device=device)
        optimizer = kind(head.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
        features, _, labels = draw(device, torch.float32, num_rows=6)
        for head.label_smoothing in (EPSILON, 0.0, 2 * EPSILON):
            scaler.scale(head(features.roll(1, 0), labels)).backward()
        scaler.step(optimizer)
        tables.append(head.weight.detach())
    before = tables[0]
    assert_close(tables[1], before.double(), tolerance(torch.float32))


MISTAKES = {
    "negative": (-0.1, 1, ValueError, "label_smoothing must be from 0 to 1, got -0.1"),
    "more than 1": (1.5, 1, ValueError, "label_smoothing must be from 0 to 1, got 1.5"),
    "tensor": (torch.tensor(0.1), 1, TypeError, "label_smoothing must be a real number, got a tensor"),
    "sub-centres": (0.1, 3, ValueError, "centers_per_class must be 1, got 3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, device):
    label_smoothing, centers, error, message = MISTAKES[mistake]
    options = {"margin": margins.CosFace(), "centers_per_class": centers, "label_smoothing": label_smoothing}
    with pytest.raises(error, match=message):
        margin_softmax_loss(*draw(device), **options)
    with pytest.raises(error, match=message):
        MarginSoftmaxLoss(SIZE, NUM_CLASSES, **options)


# --- weights of classes

CLASS_WEIGHT = torch.linspace(0, 2, NUM_CLASSES, dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("row", [ROWS[name] for name in ("CosFace", "ArcFace x3", "MagFace")], ids=["CosFace", "x3", "MagFace"])
def test_class_weight(row, reduction, device):
    """In float64 against the formula, which margins.md has from F.cross_entropy; a penalty is weighted too."""
    features, weight, labels = batch(row, device)
    labels[4], features[4] = -100, torch.nan
    class_weight = CLASS_WEIGHT.to(device)
    upstream = torch.linspace(1, 2, len(labels), device=device) if reduction == "none" else torch.ones((), device=device)
    options = {**row.options, "margin": row.margin, "reduction": reduction, "class_weight": class_weight}

    def exact(features, weight, labels):
        weights = torch.where(labels == -100, 0.0, class_weight[labels])
        losses = weights * written_out(row, features, weight, labels, reduction="none")
        return losses if reduction == "none" else losses.sum() / (weights.sum() if reduction == "mean" else 1)

    ours = evaluate(partial(margin_softmax_loss, **options), features, weight, labels, upstream)
    for one, other in zip(ours, evaluate(exact, features, weight, labels, upstream), strict=True):
        assert_close(one.nan_to_num(), other.nan_to_num(), tolerance(torch.float64))


def test_class_weight_of_a_head(device):
    """A buffer, float32 at least, that identities that come and go take along; a batch of weight 0 has loss 0."""
    features, _, labels = draw(device, torch.float32)
    head = CosFaceLoss(SIZE, NUM_CLASSES, class_weight=CLASS_WEIGHT.to(torch.bfloat16), device=device)
    assert torch.equal(head.state_dict()["class_weight"], CLASS_WEIGHT.to(device, torch.bfloat16).float())
    assert torch.equal(head.bfloat16().class_weight, CLASS_WEIGHT.to(device, torch.bfloat16).float())
    head.float()
    found = head(features, labels)
    weights = head.class_weight[labels]
    losses = cosface_loss(features, head.weight, labels, reduction="none")
    assert_close(found.detach(), ((weights * losses).sum() / weights.sum()).detach().double(), tolerance(torch.float32))
    head.grow(1)
    head.remove([0])
    assert_close(head.class_weight, torch.cat([weight := head.class_weight[:-1], weight.new_ones(1)]).double(), 1e-2)
    assert len(head.class_weight) == NUM_CLASSES and head.class_weight[0] > 0
    head.class_weight.zero_()
    assert head(features, labels) == 0


WRONG_WEIGHTS = {
    "shape": (torch.ones(3), {}, ValueError, r"class_weight must have shape \(C,\) = \(300,\), got \(3,\)"),
    "dtype": (torch.ones(300, dtype=torch.int64), {}, TypeError, "class_weight must be float16, .*, got torch.int64"),
    "smoothing": (torch.ones(300), {"label_smoothing": 0.1}, ValueError, "class_weight and label_smoothing exclude each other"),
}


@pytest.mark.parametrize("mistake", WRONG_WEIGHTS)
def test_wrong_weights(mistake, device):
    class_weight, options, error, message = WRONG_WEIGHTS[mistake]
    options = {**options, "class_weight": class_weight.to(device)}
    with pytest.raises(error, match=message):
        cosface_loss(*draw(device, torch.float32), **options)
    with pytest.raises(error, match=message):
        CosFaceLoss(SIZE, NUM_CLASSES, **options)


@pytest.mark.parametrize("name", ["label_smoothing", "class_weight"])
def test_several_classes_to_a_row_are_refused(name, device):
    features, weight, labels = draw(device)
    option = {name: 0.1 if name == "label_smoothing" else CLASS_WEIGHT.to(device)}
    labels = labels[:, None]
    with pytest.raises(ValueError, match=rf"label_weights and {name} exclude each other"):
        margin_softmax_loss(
            features,
            weight,
            labels,
            margin=margins.CosFace(),
            label_weights=torch.ones_like(labels, dtype=weight.dtype),
            **option,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_of_16_bits_is_not_rounded_with_the_smoothing(dtype):
    """64 is exact in both; 0.1 x 64 is not."""
    features, weight, labels = torch.eye(4, 8), torch.linspace(-1, 1, 48).view(6, 8), torch.arange(4)
    wanted = cosface_loss(features, weight, labels, scale=64.0, label_smoothing=0.1)
    got = cosface_loss(features, weight, labels, scale=torch.tensor(64.0, dtype=dtype), label_smoothing=0.1)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def test_class_weights_of_a_head_made_on_meta():
    weights = torch.arange(1.0, 7)
    head = MarginSoftmaxLoss(8, 6, margin=margins.CosFace(0.1), scale=16.0, class_weight=weights, device="meta")
    head.to_empty(device="cpu")
    assert torch.equal(head.class_weight, weights)
