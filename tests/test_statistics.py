"""Are the statistics of a loss those of its logits, on every backend, and does the loss keep its bits beside them?"""

import attending
import pytest
import torch
import torch.nn.functional as F
from cases import make
from rounding import assert_close, tolerance
from selection import interpreted, slab_loop, slab_loop_when, slow_when

from cosface_kernels import CosFaceLoss, FusedSGD, MarginSoftmaxLoss, Statistics, cosface_loss, cosine_lse, margin_softmax_loss
from cosface_kernels.margins import ArcFace, CosFace, Softmax

# 521 rows: slabs of 128 classes, or of 384 rows for three centres, the last one short; 67 rows: one past a tile.
N, R, D = 67, 522, 70
# margin, scale, options, centres. A scale of 1000 takes the pass that finds row maxima.
FORMS = {
    "CosFace": (CosFace(0.35), 64.0, {}, 1),
    "large": (CosFace(0.35), 1000.0, {}, 1),
    "3 centres": (ArcFace(0.5), 64.0, {"centers_per_class": 3}, 3),
    "bias": (Softmax(), 1.0, {}, 1),
}

INTERPRETED = ("CosFace", "bfloat16"), ("3 centres", "float32")

pytestmark = pytest.mark.usefixtures("small_slabs")


def products(x, w, form, bias=None):
    """x̃·w̃ + b (N, C) in float64, of sub-centres the largest."""
    margin, _, _, centers = FORMS[form]
    x, w = x.double(), w.double()
    found = F.normalize(x) @ F.normalize(w).T if margin.normalize_weight else x @ w.T + bias.double()
    return found.unflatten(1, (-1, centers)).amax(2)


def assert_right(found, exact, labels, scale, within):
    """Statistics of products (N, C) in float64, of which those of the negatives may be off by `within`."""
    counted = labels >= 0
    own = exact.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    negatives = exact.scatter(1, labels.clamp(min=0)[:, None], -torch.inf)
    largest = negatives.amax(1)
    assert not any(each.requires_grad for each in found)
    assert found.target_cosine[~counted].isnan().all() and found.negative_cosine[~counted].isnan().all()
    assert found.probability[~counted].isnan().all() and not found.correct[~counted].any()
    assert (found.negative_class == -1).equal(~counted) and found.negative_class.dtype == torch.int64
    own, negatives, largest, found = own[counted], negatives[counted], largest[counted], [each[counted] for each in found]
    found = Statistics(*found)
    # In float32 a product of unit rows is off by less than its length times a rounding.
    size = own.abs().amax().clamp(min=1) * D * torch.finfo(torch.float32).eps
    assert (found.target_cosine - own).abs().amax() <= size
    assert (found.negative_cosine - largest).abs().amax() <= within
    assert (negatives.gather(1, found.negative_class[:, None]).squeeze(1) >= largest - 2 * within).all()
    sure = (own - largest).abs() > within + size
    assert sure.any() and (found.correct == (own > largest))[sure].all()
    probability = torch.sigmoid(scale * own - (scale * negatives).logsumexp(1))
    assert (found.probability - probability).abs().amax() <= scale * within


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@slow_when(lambda backend, precision, form: interpreted(backend) and (form, precision) not in INTERPRETED)
@slab_loop_when(lambda form: form != "CosFace")
def test_what_the_logits_say(backend, device, form, precision, request):
    margin, scale, options, centers = FORMS[form]
    dtype, rows = getattr(torch, precision), N if not interpreted(backend) else 7
    features, weight, labels = (tensor.to(device) for tensor in make("hard", rows, R, D))
    labels = torch.where(torch.arange(rows, device=device) % 5 == 2, -100, labels // centers)
    given = {"bias": torch.linspace(-3, 3, R, device=device).to(dtype)} if form == "bias" else {}
    x, w = features.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    options = options | given | {"margin": margin, "scale": scale, "backend": backend, "reduction": "none"}
    losses, found = margin_softmax_loss(x, w, labels, return_statistics=True, **options)
    # Two rows, each number rounded to half an eps, and a sum of D products: of the product of their lengths.
    rounded = torch.finfo(dtype).eps + D * torch.finfo(torch.float32).eps
    length = 1.0 if margin.normalize_weight else float(features.norm(dim=1).amax() * weight.norm(dim=1).amax())
    assert_right(found, products(x.detach(), w.detach(), form, **given), labels, scale, length * rounded)
    losses.sum().backward()
    bare = margin_softmax_loss(x, w, labels, **options)
    for ours, wanted in zip((bare, *torch.autograd.grad(bare.sum(), (x, w))), (losses, x.grad, w.grad), strict=True):
        if attending.asked(request.node):
            # Kernels that attend find no largest: beside statistics forward is the slab loop's. E is rounded to the dtype, once.
            assert_close(ours, wanted.double(), tolerance(torch.float32, scale, D) + torch.finfo(dtype).eps)
        else:
            assert torch.equal(ours, wanted)


@slab_loop
def test_equal_classes(backend, device):
    """Of equal ones the lowest, within a slab and in several; a target that is one of them has not won."""
    weight = torch.eye(4, device=device).repeat(100, 1)  # class j is j % 4
    features = weight[:5].clone()
    labels = torch.tensor([0, 1, 2, 3, 1], device=device)
    _, found = cosface_loss(features, weight, labels, backend=backend, return_statistics=True)
    assert found.negative_class.tolist() == [4, 5, 6, 7, 0]
    assert found.negative_cosine.tolist() == [1.0] * 5 and not found.correct.any()
    _, found = cosface_loss(features[:1], weight[:1], labels[:1], backend=backend, return_statistics=True)
    assert found.negative_class.item() == -1 and found.negative_cosine.item() == -torch.inf and found.correct.item()


@slab_loop
def test_rows_that_are_no_numbers(backend, device):
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 5, 300, 8))
    features[1] = torch.nan
    _, found = cosface_loss(features, weight, labels, backend=backend, return_statistics=True)
    assert found.target_cosine.isnan().tolist() == found.negative_cosine.isnan().tolist() == [False, True, False, False, False]
    assert (found.negative_class < 0).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("centers", [1, 2])
@slab_loop
def test_sampled_classes(backend, device, centers):
    """By their numbers in the whole table, among those that take part."""
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 7, 300, D))
    labels, classes = labels // centers, torch.arange(0, 300 // centers, 3, device=device)
    classes = torch.cat([classes, labels]).unique()
    options = {"margin": CosFace(), "centers_per_class": centers, "backend": backend, "classes": classes}
    _, found = margin_softmax_loss(features, weight, labels, return_statistics=True, **options)
    cosines = (F.normalize(features.double()) @ F.normalize(weight.double()).T).unflatten(1, (-1, centers)).amax(2)
    left = torch.full_like(cosines, -torch.inf)
    left[:, classes] = cosines[:, classes]
    assert found.negative_class.tolist() == left.scatter(1, labels[:, None], -torch.inf).argmax(1).tolist()


def test_the_largest_of_cosine_lse(device):
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 7, 300, D))
    labels[2] = -100
    *vectors, value, place = cosine_lse(features, weight, labels, return_largest=True)
    _, found = cosface_loss(features, weight, labels, return_statistics=True)
    assert all(map(torch.equal, vectors, cosine_lse(features, weight, labels)))
    assert torch.equal(value.nan_to_num(9), found.negative_cosine.nan_to_num(9)) and torch.equal(place, found.negative_class)


def test_a_head_and_a_fused_optimiser(device):
    """The accuracy of the head's own topk."""
    features, weight, labels = (tensor.to(device) for tensor in make("peaked", 67, 300, D))
    head = CosFaceLoss(D, 300, device=device)
    head.weight.data.copy_(weight)
    with torch.no_grad():
        features[::3] = torch.randn(23, D, generator=torch.Generator().manual_seed(0)).to(device)
    right = head.topk(features, 1)[1].squeeze(1) == labels
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    loss, found = head(features, labels, return_statistics=True)
    assert torch.equal(found.correct, right) and 0 < right.float().mean() < 1
    loss.backward()
    optimizer.step()
    assert loss.item() != head(features, labels).item()


@pytest.mark.slow
def test_compiled_in_one_graph(device):
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 7, 300, D))
    head = MarginSoftmaxLoss(D, 300, margin=ArcFace(), device=device)
    head.weight.data.copy_(weight)

    def step(features, labels):
        loss, found = head(features, labels, return_statistics=True)
        return loss, found.correct.float().mean(), found

    loss, accuracy, found = torch.compile(step, fullgraph=True, backend="aot_eager")(features.requires_grad_(), labels)
    exact, wanted, every = step(features, labels)
    assert torch.equal(loss, exact) and torch.equal(accuracy, wanted)
    assert all(map(torch.equal, found, every))
    loss.backward()
    assert features.grad.isfinite().all()


def test_no_flag_is_refused():
    features, weight, labels = make("hard", 7, 300, D)
    for function, name in ((cosface_loss, "return_statistics"), (cosine_lse, "return_largest")):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 1"):
            function(features, weight, labels, **{name: 1})
