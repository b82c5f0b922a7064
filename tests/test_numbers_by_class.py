"""Do margins whose numbers are tensors, and margins that see the labels, give each row its own; do heads keep them, and follow
a margin or scale that moves?"""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import check_rule, draws, evaluate
from rounding import NUM_CLASSES, SIZE, assert_close, draw, tolerance
from selection import slow_when
from torch._dynamo.testing import CompileCounterWithBackend

from cosface_kernels import CosFaceLoss, MarginSoftmaxLoss, margin_softmax_loss, margins

pytestmark = pytest.mark.usefixtures("small_slabs")

# For each margin the ends of its numbers, which are spread over the classes; norms of the rows are about 4.
BY_CLASS = {
    "CosFace": (margins.CosFace, {"m": (-0.1, 0.5)}),
    "ArcFace": (margins.ArcFace, {"m": (0.0, 1.2)}),
    "ArcFace easy": (lambda m: margins.ArcFace(m, easy_margin=True), {"m": (0.0, 1.2)}),
    "SphereFace": (margins.SphereFace, {"m": (1.0, 3.0)}),
    "LSoftmax": (margins.LSoftmax, {"m": (1.0, 3.0)}),
    "Combined": (margins.Combined, {"m1": (0.9, 1.2), "m2": (0.0, 0.4), "m3": (-0.1, 0.3)}),
    "AdaFace": (margins.AdaFace, {"m": (0.1, 0.6), "h": (-0.5, 0.5)}),
    "MagFace": (
        margins.MagFace,
        {"l_a": (1.0, 3.0), "u_a": (4.0, 8.0), "l_margin": (0.1, 0.4), "u_margin": (0.5, 0.9), "lambda_g": (0.0, 30.0)},
    ),
}


def spread(low, high, num_classes=NUM_CLASSES, dtype=torch.float64):
    return torch.linspace(low, high, num_classes, dtype=dtype)[
        torch.randperm(num_classes, generator=torch.Generator().manual_seed(5))
    ]


@pytest.mark.parametrize("name", BY_CLASS)
def test_each_row_has_the_numbers_of_its_class(name, device):
    """Loss and gradients of a row: those with the numbers themselves. One number as a tensor () too, and one ignored row."""
    kind, ends = BY_CLASS[name]
    features, weight, labels = draw(device)
    labels[2], features[2] = -100, torch.nan
    numbers = {field: spread(*range_).to(device) for field, range_ in ends.items()}
    upstream = torch.randn(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)

    def ours(*tensors):
        return margin_softmax_loss(*tensors, margin=kind(**numbers), reduction="none")

    def one_by_one(x, w, y):
        rows = []
        for row, label in enumerate(y.clamp(min=0).tolist()):
            margin = kind(**{field: values[label].item() for field, values in numbers.items()})
            rows.append(margin_softmax_loss(x, w, y, margin=margin, reduction="none")[row])
        return torch.stack(rows)

    results = [evaluate(loss, features, weight, labels, upstream) for loss in (ours, one_by_one)]
    for tensor, exact in zip(*results, strict=True):
        assert_close(tensor, exact, 100 * torch.finfo(torch.float64).eps)
    single = {field: values[3] for field, values in numbers.items()}
    as_floats = kind(**{field: value.item() for field, value in single.items()})
    as_tensors, exact = (margin_softmax_loss(features, weight, labels, margin=margin) for margin in (kind(**single), as_floats))
    assert_close(as_tensors, exact, 10 * torch.finfo(torch.float64).eps)


def test_sampled_classes(device):
    """Numbers are those of the whole table's classes."""
    features, weight, labels = draw(device)
    m, classes = spread(0.1, 0.5).to(device), torch.arange(0, NUM_CLASSES, 5, device=device)
    labels = classes[labels % len(classes)]
    options = {"classes": classes, "reduction": "none"}
    ours = margin_softmax_loss(features, weight, labels, margin=margins.ArcFace(m), **options)
    exact = [margin_softmax_loss(features, weight, labels, margin=margins.ArcFace(m[y].item()), **options) for y in labels]
    assert_close(ours, torch.stack(exact).diagonal(), 100 * torch.finfo(torch.float64).eps)


def test_accuracy(device):
    """The rule, in float32 and bfloat16, beside the N x C expression with each class's m."""
    m = spread(0.1, 0.9, 40)

    def plain(x, w, y):
        cosines = (F.normalize(x) @ F.normalize(w).T).unflatten(1, (-1, 3)).amax(2)
        own = cosines.gather(1, y[:, None])
        angle = own.clamp(-1 + 1e-6, 1 - 1e-6).acos() + m[y, None].to(x)
        return F.cross_entropy(64 * cosines.scatter(1, y[:, None], angle.cos().to(cosines.dtype)), y, reduction="none")

    def ours(x, w, y):
        return margin_softmax_loss(x, w, y, margin=margins.ArcFace(m.to(x.device)), centers_per_class=3, reduction="none")

    for dtype in (torch.float32, torch.bfloat16):
        made = [(x, w, y // 3) for x, w, y in draws("uniform", (12, 120, 16), dtype, dtype)]
        check_rule(ours, plain, made, device=device)


def test_gradient_of_the_numbers():
    """A margin that is learnt: ∂loss/∂m of each class, by differences."""
    features, weight, labels = draw("cpu")
    m = spread(0.1, 0.4).requires_grad_()

    def loss(values):
        return margin_softmax_loss(features, weight, labels, margin=margins.CosFace(values), scale=4.0)

    gradient, step = torch.autograd.grad(loss(m), m)[0], 1e-6
    for label in {*labels.tolist()}:
        change = F.one_hot(torch.tensor(label), len(m)) * step
        difference = (loss(m.detach() + change) - loss(m.detach() - change)) / (2 * step)
        assert abs(gradient[label] - difference) <= 1e-8 and difference > 0
    assert gradient.count_nonzero() == len({*labels.tolist()})


@dataclass(frozen=True)
class Seeing(margins.Margin):
    """m for even classes, 2 m for odd ones."""

    m: float | torch.Tensor = 0.1

    def for_labels(self, labels):
        assert labels.dtype == torch.int64 and ((labels >= 0) & (labels < NUM_CLASSES)).all()
        return Seeing(self.m * (1 + labels % 2))

    def psi(self, cosine):
        return cosine - self.m


def test_a_margin_of_ones_own_sees_the_labels(device):
    features, weight, labels = draw(device)
    labels[2] = -100
    ours = margin_softmax_loss(features, weight, labels, margin=Seeing(), reduction="none")
    m = 0.1 * (1 + torch.arange(NUM_CLASSES, device=device) % 2)
    assert_close(ours, margin_softmax_loss(features, weight, labels, margin=margins.CosFace(m.double()), reduction="none"), 1e-15)
    wrong = type("Wrong", (margins.NormSoftmax,), {"for_labels": lambda self, labels: labels})
    with pytest.raises(TypeError, match=r"margin must be one of .* got a tensor"):
        margin_softmax_loss(features, weight, labels, margin=wrong())


WRONG = {
    "outside of its range": (
        lambda: margins.ArcFace(torch.tensor([0.1, -0.2])),
        ValueError,
        r"from 0 to .* got -0\.2\d* for class 1",
    ),
    "NaN": (lambda: margins.CosFace(torch.tensor([0.1, torch.nan])), ValueError, "m of CosFace .* got nan for class 1"),
    "integers": (lambda: margins.SphereFace(torch.tensor([2, 4])), TypeError, r"a float tensor .*got .*torch\.int64"),
    "a matrix": (lambda: margins.CosFace(torch.zeros(2, 1)), TypeError, r"shape \(\) or \(C,\), got a tensor of shape \(2, 1\)"),
    "t_alpha": (lambda: margins.AdaFace(t_alpha=torch.ones(2)), TypeError, "t_alpha must be a real number, got a tensor"),
    "l_a above u_a": (lambda: margins.MagFace(l_a=torch.tensor([10.0, 120.0])), ValueError, "0 < l_a < u_a, got l_a = a tensor"),
    "a number for each row": (
        lambda: call(margins.CosFace(torch.zeros(4))),
        ValueError,
        r"\(C,\) = \(3,\), got shape \(4,\); .* rows",
    ),
    "learnt by a CosFaceLoss": (
        lambda: CosFaceLoss(3, 3, margin=torch.nn.Parameter(torch.tensor(0.1))),
        ValueError,
        "m of CosFace must need no gradient in a head",
    ),
    "a parameter where negatives belong": (
        lambda: CosFaceLoss(3, 3, negatives=torch.nn.Parameter(torch.tensor(0.1))),
        TypeError,
        "negatives must be None or one of",
    ),
    "learnt by a head": (
        lambda: MarginSoftmaxLoss(3, 3, margin=margins.CosFace(torch.zeros(3, requires_grad=True))),
        ValueError,
        "m of CosFace must need no gradient in a head",
    ),
}


def call(margin):
    return margin_softmax_loss(torch.ones(4, 3), torch.eye(3), torch.tensor([0, 1, 2, 2]), margin=margin)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numbers(case):
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        make()


def test_repr_and_equality():
    m = torch.linspace(0.2, 0.5, 4)
    margin = margins.ArcFace(m)
    assert repr(margin) == "ArcFace(m=a tensor of shape (4,), torch.float32, easy_margin=False, gradient='exact')"
    assert margin == margins.ArcFace(m) and hash(margin) == hash(margins.ArcFace(m))
    assert margin != margins.ArcFace(m.clone()) and margin != margins.ArcFace(0.2) and margin != margins.CosFace(m)
    assert "margin=a tensor of shape (4,), torch.float32," in repr(CosFaceLoss(3, 4, margin=m))


def by_class_head(device="cpu", num_classes=6):
    m = torch.linspace(0.1, 0.6, num_classes)
    return MarginSoftmaxLoss(3, num_classes, margin=margins.AdaFace(m), device=device), m


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda head: pickle.loads(pickle.dumps(head)),
    "to_empty": lambda head: by_class_head("meta")[0].to_empty(device="cpu"),
    "half": lambda head: head.half(),
    "double": lambda head: head.double(),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_head_keeps_the_numbers(how):
    head, m = by_class_head()
    copied = COPIES[how](head)
    assert torch.equal(copied.margin.m, m) and copied.margin.m is copied.margin_m
    assert copied.margin_m.dtype == (torch.float64 if how == "double" else torch.float32)
    assert {*copied.state_dict()} == {"weight", "batch_mean", "batch_std", "margin_m"}


def test_a_head_has_its_own_copy_and_loads_it():
    head, m = by_class_head()
    m.zero_()
    other = MarginSoftmaxLoss(3, 6, margin=margins.AdaFace(m))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.margin.m, torch.linspace(0.1, 0.6, 6)) and not m.any()


def test_numbers_follow_identities():
    head, m = by_class_head()
    head.remove([0, 3])
    assert torch.equal(head.margin.m, m[[1, 2, 4, 5]])
    head.grow(2)
    assert_close(head.margin.m, torch.cat([m[[1, 2, 4, 5]], m[[1, 2, 4, 5]].mean().expand(2)]).double(), 1e-7)
    head(torch.ones(2, 3), torch.tensor([4, 5])).backward()
    assert head.batch_mean.dim() == 0


def test_margins_come_and_go():
    """Statistics that both margins have go on, others begin, and vanish; the loss is that of the margin of the day."""
    features, weight, labels = draw("cpu", torch.float32)
    head = MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=margins.ArcFace(0.1))
    head.weight.data.copy_(weight)
    buffers = lambda: {*dict(head.named_buffers())}  # noqa: E731
    for margin in (margins.ArcFace(0.3), margins.CosFace(spread(0, 0.4, dtype=torch.float32)), margins.Combined(1.0, 0.2, 0.1)):
        head.margin = margin
        assert torch.equal(head(features, labels), margin_softmax_loss(features, weight, labels, margin=margin))
    assert buffers() == set()
    head.margin = margins.AdaFace()
    head(features, labels)
    moved = head.batch_mean.clone()
    assert buffers() == {"batch_mean", "batch_std"} and moved != 20
    head.margin = margins.AdaFace(m=0.2, t_alpha=0.0)
    head(features, labels)
    assert head.batch_mean == moved and head.margin.m == 0.2
    head.margin = margins.SphereFace(annealing=True)
    head(features, labels)
    assert buffers() == {"step"} and head.step == 1
    head.margin = margins.AdaFace(m=spread(0, 0.4))
    assert buffers() == {"batch_mean", "batch_std", "margin_m"} and head.batch_mean == 20
    head.margin = margins.NormSoftmax()
    assert buffers() == set() and repr(head.margin) == "NormSoftmax()"


def test_a_wrong_margin_and_then_a_right_one():
    head, m = by_class_head()
    head.margin = 0.2
    assert head.margin == 0.2
    with pytest.raises(TypeError, match=r"margin must be one of .* got 0\.2"):
        head(torch.ones(2, 3), torch.tensor([4, 5]))
    head.margin = margins.AdaFace(2 * m)
    assert torch.equal(head.margin.m, 2 * m) and head.batch_mean == 20


@dataclass(frozen=True)
class PerRow(margins.Margin):
    m: torch.Tensor

    def psi(self, cosine):
        return cosine - self.m.to(cosine.device)


MOVING = {
    "CosFace's m": (lambda: CosFaceLoss(SIZE, NUM_CLASSES), "margin", [0.0, 0.1, 0.15, 0.2, 0.25], 2),
    "ArcFace's m": (
        lambda: MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=margins.ArcFace(0.0)),
        "margin",
        [margins.ArcFace(m) for m in (0.0, 0.1, 0.15, 0.2, 0.25)],
        2,
    ),
    "the scale": (lambda: CosFaceLoss(SIZE, NUM_CLASSES), "scale", [20.0, 30.0, 35.0, 40.0, 45.0], 2),
    "a number for each row": (
        lambda: MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=margins.CosFace()),
        "margin",
        [PerRow(torch.linspace(0, end, 7)) for end in (0.1, 0.2, 0.3)],
        1,
    ),
    "numbers by class": (
        lambda: MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=margins.CosFace(spread(0, 0.1))),
        "margin",
        [margins.CosFace(spread(0, end)) for end in (0.1, 0.2, 0.3)],
        1,
    ),
}


@pytest.mark.parametrize("case", MOVING)
@slow_when(lambda case: case != "the scale")
def test_a_moving_number_is_compiled_twice_at_most(case, device):
    """The first value is taken for a constant, the next for a number that moves; a tensor moves from the start."""
    make, name, values, compilations = MOVING[case]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    features, _, labels = draw(device, torch.float32)
    head = make().to(device)
    compiled = torch.compile(head, fullgraph=True, backend=counter)
    for value in values:
        setattr(head, name, value)
        losses = [call(features, labels) for call in (compiled, head)]
        gradients = [torch.autograd.grad(loss, head.weight)[0] for loss in losses]
        for ours, exact in (losses, gradients):
            assert_close(ours.detach(), exact.detach().double(), tolerance(torch.float32))
    assert counter.frame_count == compilations
