"""Are losses whose hard negatives change as accurate as every other loss, on every backend, and right in heads and steps?"""

import dataclasses
import math
from functools import partial

import attending
import pytest
import torch
import torch.nn.functional as F
from cases import check_rule, draws, evaluate, make
from rounding import assert_close, tolerance
from selection import interpreted, pairs, repeats_when, slab_loop, slow_when

from cosface_kernels import CosFaceLoss, FusedSGD, MarginSoftmaxLoss, margin_softmax_loss
from cosface_kernels.margins import (
    ArcFace,
    CosFace,
    CurricularFace,
    HardNegatives,
    InterclassFiltering,
    InterTopK,
    MVSoftmax,
    Softmax,
)

SHAPE = 67, 522, 70  # 67 rows: one past a tile; slabs of 128 classes, or of 384 rows for three centres, the last one short
PRECISIONS = {"float32": (torch.float32, False), "autocast": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}

pytestmark = pytest.mark.usefixtures("small_slabs")


@dataclasses.dataclass(frozen=True)
class Own(HardNegatives):
    """Every coefficient, and one of each row."""

    t: float = 0.3
    bound = 1.6

    def polynomial(self, cosine, target, state):
        return target, 0.1, torch.linspace(0.5, 1, len(cosine)).to(cosine), self.t


@dataclasses.dataclass(frozen=True)
class LeftOut(HardNegatives):
    def polynomial(self, cosine, target, state):
        return 0.6, -math.inf, 0.0, 0.0


# margin, negatives, scale, centres. 64 and a bound of 2 are past a constant shift, 32 and 1.6 are not.
FORMS = {
    "CurricularFace": (ArcFace(0.5), CurricularFace(), 64.0, 1),
    "MV-AM": (CosFace(0.35), MVSoftmax(1.2), 64.0, 1),
    "MV-Arc, not adaptive": (ArcFace(0.5), MVSoftmax(1.2, adaptive=False), 32.0, 1),
    "filtering": (CosFace(0.35), InterclassFiltering(0.6), 64.0, 1),
    "own": (CosFace(0.35), Own(), 32.0, 1),
    "left out": (CosFace(0.35), LeftOut(), 64.0, 1),
    "3 centres": (CosFace(0.35), Own(), 64.0, 3),
    "inter-top-k": (CosFace(0.2), InterTopK(3, 0.06), 32.0, 1),
    "inter-top-k, 3 centres": (CosFace(0.2), InterTopK(1, 0.1), 32.0, 3),
    "3 centres, small": (CosFace(0.35), Own(), 16.0, 3),
}


def nearest(cosines, labels, negatives):
    others = cosines.scatter(1, labels.clamp(min=0)[:, None], -math.inf)
    return F.pad(others, (0, negatives.num_nearest), value=-math.inf).topk(negatives.num_nearest).values


def written_out(x, w, y, *, margin, negatives, scale, centers, state=None, reduction="none"):
    """Plain PyTorch, N x C."""
    cosines = (F.normalize(x) @ F.normalize(w).T).float() if x.dtype != torch.float64 else F.normalize(x) @ F.normalize(w).T
    cosines = cosines.unflatten(1, (-1, centers)).amax(2)
    own = cosines.gather(1, y.clamp(min=0)[:, None])
    target = margin.psi(own)
    state = {**(state or {}), "nearest": nearest(cosines.detach(), y, negatives)}
    numbers = negatives.polynomial(own.squeeze(1).detach(), target.squeeze(1).detach(), state)
    threshold, p0, p1, p2 = (each[:, None] if isinstance(each, torch.Tensor) and each.dim() else each for each in numbers)
    changed = torch.where(cosines > threshold, p0 + p1 * cosines + p2 * cosines.square(), cosines)
    logits = scale * changed.scatter(1, y.clamp(min=0)[:, None], target)
    return F.cross_entropy(logits, y, reduction=reduction)


def far_from_thresholds(inputs, form, distance):
    """The same with rows ignored that have a cosine so near their threshold that rounding says on which side it is."""
    margin, negatives, _, centers = FORMS[form]
    settled = []
    for x, w, y in inputs:
        y = y // centers
        cosines = (F.normalize(x.double()) @ F.normalize(w.double()).T).unflatten(1, (-1, centers)).amax(2)
        own = cosines.gather(1, y[:, None]).squeeze(1)
        state = {"nearest": nearest(cosines, y, negatives)}
        threshold = torch.as_tensor(negatives.polynomial(own, margin.psi(own), state)[0]).expand(len(y))
        near = (cosines - threshold[:, None]).abs().scatter(1, y[:, None], torch.inf).amin(1) < distance
        assert not near.all()
        settled.append((x, w, torch.where(near, -100, y)))
    return settled


# Which of two centres is nearest is a matter of 16 bits' rounding, and with it a row of dX.
CASES = [(form, precision) for form in FORMS for precision in PRECISIONS if "centres" not in form or precision == "float32"]
INTERPRETED = ("CurricularFace", "bfloat16", 0), ("3 centres", "float32", 0)
BUDGETS = {"recompute": 0, "keep": 10**9}
CENTRES = [(form, "float32", budget) for form in FORMS if "centres" in form for budget in BUDGETS.values()]
PAIRS = pairs([*FORMS], [*PRECISIONS], [*BUDGETS.values()], first=dict.fromkeys((*INTERPRETED, *CENTRES)))


@pytest.mark.parametrize("memory_budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize(("form", "precision"), CASES)
@slow_when(
    lambda backend, form, precision, memory_budget: (
        (form, precision, memory_budget) not in (INTERPRETED if interpreted(backend) else PAIRS)
    )
)
@repeats_when(
    lambda backend, form, precision, memory_budget: interpreted(backend) and (form, precision, memory_budget) not in PAIRS
)
@slab_loop
def test_error_at_most_the_references(backend, device, form, precision, memory_budget):
    margin, negatives, scale, centers = FORMS[form]
    dtype, autocast = PRECISIONS[precision]
    shape = (7, 258, 70) if interpreted(backend) else SHAPE
    inputs = draws("hard", shape, dtype, dtype, backend=backend)
    inputs = far_from_thresholds(inputs, form, 1e-5 if precision == "float32" else 0.01)
    options = {"margin": margin, "negatives": negatives, "scale": scale}
    ours = partial(
        margin_softmax_loss,
        **{**options, "centers_per_class": centers, "reduction": "none", "backend": backend, "memory_budget": memory_budget},
    )
    plain = partial(written_out, **options, centers=centers)
    check_rule(ours, plain, inputs, device=device, scale=scale * negatives.bound, autocast=autocast)


def test_nothing_is_hard(backend, device, request):
    """Past every cosine the bits are those of no negatives at all; kernels that attend serve the latter alone."""
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 7, 258, 70))
    upstream = torch.linspace(1, 2, 7, device=device)
    both = [
        evaluate(
            partial(margin_softmax_loss, margin=CosFace(), reduction="none", backend=backend, negatives=negatives),
            *(features, weight, labels, upstream),
        )
        for negatives in (InterclassFiltering(1.0), None)
    ]
    for changed, unchanged in zip(*both, strict=True):
        if attending.asked(request.node):
            assert_close(changed, unchanged.double(), tolerance(torch.float32, size=70))
        else:
            assert torch.equal(changed, unchanged)


@pytest.mark.parametrize("k", [2, 3, 4])
@slab_loop
def test_nearest_of_few(k, backend, device):
    """Of three other classes: two, all, and all though one more was asked for. Of two that are equal at the edge none."""
    weight, x = torch.eye(4, device=device), torch.tensor([[0.1, 0.3, 0.5, 0.7], [0.1, 0.5, 0.5, 0.7]], device=device)
    options = {"margin": CosFace(0.0), "scale": 8.0, "backend": backend, "reduction": "none"}
    loss = margin_softmax_loss(x, weight, torch.tensor([0, 0], device=device), negatives=InterTopK(k, 0.1), **options)
    raised = torch.tensor([[k > 2, 1, 1], [k > 2, k > 2, 1]], device=device)
    cosines = F.normalize(x.double())
    logits = 8 * torch.cat([cosines[:, :1], cosines[:, 1:] + 0.1 * raised], 1)
    torch.testing.assert_close(loss.double(), -logits.log_softmax(1)[:, 0], rtol=100 * 2**-23, atol=0)


def head_of(negatives, weight, **options):
    head = MarginSoftmaxLoss(weight.shape[1], len(weight), margin=ArcFace(0.5), negatives=negatives, **options)
    head.weight.data.copy_(weight)
    return head.to(weight.device)


def test_the_statistic_of_curricular_face(device):
    """It moves in training before it counts, and comes and goes with the negatives."""
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 67, 258, 70))
    labels[3] = -100
    head = head_of(CurricularFace(0.5), weight)
    cosines = (F.normalize(features) * F.normalize(weight)[labels.clamp(min=0)]).sum(1)[labels >= 0]
    t = 0.0
    for training in (True, True, False):
        head.train(training)
        t = t + 0.5 * (cosines.mean().item() - t) if training else t
        exact = written_out(
            *(features.double(), weight.double(), labels),
            **{"margin": ArcFace(0.5), "negatives": CurricularFace(), "scale": 64.0, "centers": 1, "state": {"t": t}},
            reduction="mean",
        )
        torch.testing.assert_close(head(features, labels).double(), exact, rtol=1e-5, atol=0)
        torch.testing.assert_close(head.t, torch.tensor(t, device=device))
    assert head.half().t.dtype == torch.float32 and "t" in head.state_dict()
    head.negatives = None
    assert "t" not in head.state_dict()
    head.negatives = CurricularFace()
    head.reset_parameters()
    assert head.t.item() == 0


@pytest.mark.parametrize("first, second", [(Own(0.5), Own(0.5)), (InterclassFiltering(0.1), None)], ids=str)
def test_a_fused_step(first, second, device):
    """Of two batches, whose records are concatenated if both have hard negatives: as torch.optim.SGD with the same gradient."""
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 67, 258, 70))
    tables = []
    for kind in (FusedSGD, torch.optim.SGD):
        head = head_of(first, weight)
        optimizer = kind(head.parameters(), lr=10.0)
        head(features[:30], labels[:30]).backward()
        head.negatives = second
        head(features[30:], labels[30:]).backward()
        optimizer.step()
        tables.append(head.weight.detach())
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)
    assert not torch.equal(tables[0], weight)


def test_sampled_classes(device):
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 7, 258, 70))
    classes = torch.cat([torch.arange(0, 258, 2, device=device), labels]).unique()
    options = {"margin": ArcFace(0.5), "negatives": CurricularFace(), "scale": 64.0}
    loss = margin_softmax_loss(features, weight, labels, classes=classes, **options)
    part = weight[classes].double(), torch.searchsorted(classes, labels)
    exact = written_out(features.double(), *part, **options, centers=1, reduction="mean")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("negatives", [CurricularFace(0.5), pytest.param(InterTopK(3), marks=pytest.mark.slow)], ids=str)
def test_compiled_in_one_graph(negatives, device):
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 7, 258, 70))
    results = []
    for compiled in (False, True):
        head = head_of(negatives, weight)
        x = features.clone().requires_grad_()
        loss = (torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head)(x, labels)
        loss.backward()
        results.append((loss.detach(), x.grad, head.weight.grad, *head.buffers()))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


def test_statistics_are_of_the_cosines_as_they_are(device):
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 7, 258, 70))
    found = [
        margin_softmax_loss(features, weight, labels, margin=CosFace(), negatives=negatives, return_statistics=True)[1]
        for negatives in (None, Own())
    ]
    for name in ("target_cosine", "negative_cosine", "negative_class", "correct"):
        assert torch.equal(*(getattr(each, name) for each in found))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CosFaceLoss(8, 9, negatives=0.4), "negatives must be None or one of CurricularFace"),
        (lambda: MarginSoftmaxLoss(8, 9, margin=MVSoftmax()), r"MVSoftmax goes beside a margin: margin=ArcFace\(0.5\)"),
        (lambda: MVSoftmax(0.9), "t of MVSoftmax must be from 1 to inf, got 0.9"),
        (lambda: InterTopK(0), "k must be 1 or more, got 0"),
        (lambda: InterTopK(m=-0.1), "m of InterTopK must be from 0 to 1, got -0.1"),
        (lambda: InterclassFiltering(40), "threshold of InterclassFiltering must be from -1 to 1, got 40"),
        (
            lambda: MarginSoftmaxLoss(8, 9, margin=Softmax(), negatives=MVSoftmax())(torch.ones(2, 8), torch.ones(2).long()),
            "negatives go with cosines, features and table normalised",
        ),
        (
            lambda: CosFaceLoss(8, 9, learnable_scale=True, negatives=MVSoftmax())(torch.ones(2, 8), torch.ones(2).long()),
            "negatives go with a scale that is a number",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
