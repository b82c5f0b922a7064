"""Are several classes to a row soft targets over margin logits, in every backend, and do fused optimisers and samples follow?"""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import check_rule, draws, evaluate
from rounding import NUM_CLASSES, SIZE, assert_close, draw, tolerance
from selection import interpreted, slab_loop, slow_when

from cosface_kernels import CosFaceLoss, FusedSGD, MarginSoftmaxLoss, margin_softmax_loss, margins

pytestmark = pytest.mark.usefixtures("small_slabs")


def several(num_rows, num_classes, width=3, seed=3):
    """(labels (N, K), weights (N, K)): one row without any class, one with a class twice, the others with 1 to K of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows, width), generator=generator)
    labels[torch.arange(num_rows) % width == 1, 1] = -1
    labels[1] = -1
    labels[2] = labels[2, 0]
    return labels, torch.rand(num_rows, width, generator=generator)


def written_out(features, weight, labels, weights, psi, scale=64.0, raw=False, bias=None):
    """The losses (N,) with all N x C logits: soft targets beside logits with the margin at every class of a row."""
    x, w = (features, weight) if raw else (F.normalize(features), F.normalize(weight))
    logits = x @ w.T + (0.0 if bias is None else bias)
    rows, columns = (labels >= 0).nonzero().T
    targets = torch.zeros_like(logits).index_put((rows, labels[rows, columns]), weights[rows, columns].to(logits), True)
    logits = torch.where(
        torch.zeros_like(logits).index_put((rows, labels[rows, columns]), logits.new_tensor(1.0)) > 0, psi(logits), logits
    )
    return -(targets * (scale * logits).log_softmax(1)).sum(1)


PSI = {
    "CosFace": (margins.CosFace(0.35), lambda c: c - 0.35),
    "ArcFace": (margins.ArcFace(0.5), lambda c: (c.clamp(-1, 1).acos() + 0.5).cos()),
    "no margin": (margins.NormSoftmax(), lambda c: c),
}


@pytest.mark.parametrize("scale", [16.0, 300.0], ids=["one shift", "a shift for each row"])
@slow_when(lambda backend, scale: interpreted(backend) and scale > 100)
@slab_loop
def test_error_at_most_the_references(backend, device, scale):
    labels, weights = several(7, 300)

    def ours(x, w, _):
        options = {"margin": margins.CosFace(0.35), "scale": scale, "reduction": "none", "backend": backend}
        return margin_softmax_loss(x, w, labels.to(x.device), label_weights=weights.to(x.device), **options)

    def plain(x, w, _):
        return written_out(x, w, labels.to(x.device), weights.to(x.device), PSI["CosFace"][1], scale)

    for dtype in (torch.float32, torch.bfloat16) if scale < 100 else (torch.float32,):
        check_rule(ours, plain, draws("hard", (7, 300, 16), dtype, dtype, backend=backend), device=device, scale=scale)


@pytest.mark.parametrize("name", PSI)
@pytest.mark.parametrize("memory_budget", [0, 10**9])
def test_in_float64(name, memory_budget, device):
    margin, psi = PSI[name]
    features, weight, _ = draw(device)
    labels, weights = (each.to(device) for each in several(7, NUM_CLASSES))
    upstream = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"margin": margin, "reduction": "none", "memory_budget": memory_budget}
    results = [
        evaluate(loss, features, weight, labels, upstream)
        for loss in (
            lambda x, w, y: margin_softmax_loss(x, w, y, label_weights=weights, **options),
            lambda x, w, y: written_out(x, w, y, weights, psi),
        )
    ]
    for ours, exact in zip(*results, strict=True):
        assert_close(ours, exact, tolerance(torch.float64))
    assert results[0][0][1] == 0 and not results[0][1][1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_a_class_that_is_named_twice_are_added_exactly(dtype):
    """In 16 bits their sum would be rounded; and the weights' dtype is not the loss's."""
    features, weight, labels = torch.eye(2, 8), torch.linspace(-1, 1, 80).view(10, 8), torch.tensor([[1, 1, 1], [4, 5, 4]])
    weights = torch.tensor([[0.3, 0.3, 0.4], [0.1, 0.3, 0.9]], dtype=dtype)
    options = {"margin": margins.CosFace(), "reduction": "none"}
    loss = margin_softmax_loss(features, weight, labels, label_weights=weights, **options)
    exact = margin_softmax_loss(features.double(), weight.double(), labels, label_weights=weights.double(), **options)
    assert loss.dtype == torch.float32
    assert_close(loss, exact, tolerance(torch.float32))


def test_no_rows_at_all_and_none_that_counts():
    weight = torch.randn(5, 3, requires_grad=True)
    for num_rows in (0, 4):
        features, labels = torch.randn(num_rows, 3), torch.full((num_rows, 2), -1)
        weights = torch.ones(num_rows, 2)
        loss = margin_softmax_loss(features, weight, labels, margin=margins.CosFace(), label_weights=weights)
        assert loss == 0 and not torch.autograd.grad(loss, weight)[0].any()


def test_one_class_with_weight_one_is_an_ordinary_label(device):
    features, weight, labels = draw(device)
    labels[3] = -100
    several_labels = torch.stack([torch.full_like(labels, -1), labels], 1)
    ones = torch.ones(7, 2, device=device)
    for margin in (margins.AdaFace(), margins.MagFace(), margins.ArcFace(torch.linspace(0.1, 0.5, NUM_CLASSES, device=device))):
        results = [
            evaluate(
                lambda x, w, y, more=more, margin=margin: margin_softmax_loss(x, w, y, margin=margin, **more),
                features,
                weight,
                y,
                torch.ones(()),
            )
            for y, more in ((labels, {}), (several_labels, {"label_weights": ones}))
        ]
        for exact, ours in zip(*results, strict=True):
            assert_close(ours, exact, tolerance(torch.float64))


def test_raw_logits_with_a_bias_and_no_other_class():
    features, weight, _ = draw("cpu", num_rows=5)
    labels, weights = several(5, NUM_CLASSES)
    bias = torch.randn(NUM_CLASSES, dtype=torch.float64)
    ours = margin_softmax_loss(
        features, weight, labels, margin=margins.Softmax(), bias=bias, label_weights=weights, reduction="none"
    )
    exact = written_out(features, weight, labels, weights, lambda c: c, 1.0, raw=True, bias=bias)
    assert_close(ours, exact, tolerance(torch.float64))
    labels, weights = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    features.requires_grad_()
    loss = margin_softmax_loss(features, weight[:2], labels, margin=margins.CosFace(0.2), label_weights=weights)
    assert_close(
        loss.detach(),
        written_out(features, weight[:2], labels, weights, lambda c: c - 0.2).mean().detach(),
        tolerance(torch.float64),
    )
    assert torch.autograd.grad(loss, features)[0].isfinite().all()


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_fused_sgd_makes_the_step_of_sgd(sample_rate):
    """Two batches of one step, with other numbers of classes to a row, and an ordinary one."""
    torch.manual_seed(0)
    heads = [CosFaceLoss(SIZE, 300, scale=16.0, sample_rate=sample_rate)]
    heads.append(copy.deepcopy(heads[0]))
    optimizers = [FusedSGD(heads[0].parameters(), lr=0.1), torch.optim.SGD(heads[1].parameters(), lr=0.1)]
    batches = [(torch.randn(6, SIZE), *several(6, 300, width)) for width in (2, 4)]
    for head, optimizer in zip(heads, optimizers, strict=True):
        for features, labels, weights in batches:
            head(features, labels, label_weights=weights).backward()
        head(batches[0][0], torch.arange(6)).backward()
        optimizer.step()
    assert_close(heads[0].weight.detach(), heads[1].weight.detach().double(), tolerance(torch.float32, 16.0))


def test_a_learnt_scale_and_weights_have_their_gradients():
    features, weight, _ = draw("cpu")
    labels, weights = several(7, NUM_CLASSES)
    scale, weights = torch.tensor(8.0, dtype=torch.float64, requires_grad=True), weights.double().requires_grad_()
    loss = margin_softmax_loss(
        features, weight, labels, margin=margins.CosFace(0.2), scale=scale, label_weights=weights, reduction="sum"
    )
    exact = written_out(features, weight, labels, weights, lambda c: c - 0.2, scale).sum()
    for ours, wanted in zip(
        torch.autograd.grad(loss, (scale, weights)), torch.autograd.grad(exact, (scale, weights)), strict=True
    ):
        assert_close(ours, wanted, tolerance(torch.float64))


@pytest.mark.slow
def test_compile():
    head = MarginSoftmaxLoss(SIZE, 300, margin=margins.AdaFace())
    labels, weights = several(7, 300)
    features = torch.randn(7, SIZE)
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")
    results = [
        (loss, torch.autograd.grad(loss, module.weight)[0])
        for module in (head, compiled)
        for loss in [module(features, labels, label_weights=weights)]
    ]
    for ours, wanted in zip(*results, strict=True):
        assert_close(ours.detach(), wanted.detach().double(), tolerance(torch.float32))


LABELS, WEIGHTS = torch.tensor([[0, 1], [2, -1]]), torch.ones(2, 2)
WRONG = {
    "no weights": (
        LABELS,
        None,
        {},
        ValueError,
        r"labels must have shape \(N,\) = \(2,\).*got \(2, 2\); \(N, K\), .* label_weights",
    ),
    "labels (N,)": (LABELS[:, 0], WEIGHTS, {}, ValueError, r"labels must have shape \(N, K\) .* got \(2,\)"),
    "too many": (LABELS.repeat(1, 17), WEIGHTS.repeat(1, 17), {}, ValueError, r"K from 1 to 32, got \(2, 34\)"),
    "weights (N,)": (LABELS, WEIGHTS[:, 0], {}, ValueError, r"label_weights must have the shape of labels, \(2, 2\), got \(2,\)"),
    "weights of ints": (LABELS, WEIGHTS.long(), {}, TypeError, "label_weights must be float16.* got torch.int64"),
    "no such class": (LABELS + 3, WEIGHTS, {}, IndexError, r"labels\[1, 0\] is 5, but a label must be in \[0, 5\)"),
    "sub-centres": (LABELS, WEIGHTS, {"centers_per_class": 5}, ValueError, "label_weights go with one centre to a class"),
    "statistics": (LABELS, WEIGHTS, {"return_statistics": True}, ValueError, "label_weights and return_statistics=True exclude"),
    "norms and numbers by class": (
        LABELS,
        WEIGHTS,
        {"margin": margins.AdaFace(torch.full((5,), 0.4))},
        ValueError,
        "by class of margins without norms",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    labels, weights, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        margin_softmax_loss(
            torch.ones(2, 3), torch.eye(5, 3) + 0.1, labels, label_weights=weights, **{"margin": margins.CosFace(), **options}
        )


def test_an_unsigned_label_past_int64_is_no_class():
    """It must not wrap to -1, which is no positive."""
    labels = torch.full((4, 1), 2**64 - 1, dtype=torch.uint64)
    with pytest.raises(IndexError, match="must be in"):
        margin_softmax_loss(torch.eye(4, 8), torch.eye(6, 8), labels, margin=margins.CosFace(), label_weights=torch.ones(4, 1))
