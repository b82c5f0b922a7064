"""Does MarginSoftmaxLoss train as each margin's formula does, with running statistics that move as published, and only then?"""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from cases import evaluate
from margin_rows import KINDS, ROWS, batch, every_kind, every_row, steepness, written_out
from rounding import NUM_CLASSES, SIZE, assert_close, tolerance
from selection import slow_when
from torch import library

from cosface_kernels import MarginSoftmaxLoss, margin_softmax_loss, margins, reference

EPS = torch.finfo(torch.float64).eps

pytestmark = pytest.mark.usefixtures("small_slabs")
with_state = pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].state])


def head_and_batch(row, device, dtype=torch.float64, **options):
    """The module with batch()'s table, its buffers in `dtype` too, and batch()'s features and labels."""
    features, weight, labels, *bias = batch(row, device, dtype=dtype)
    head = MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=row.margin, bias=row.bias, **row.options, **options).to(device, dtype)
    with torch.no_grad():
        for parameter, values in zip(head.parameters(), (weight, *bias), strict=True):
            parameter.copy_(values)
    return head, features, labels


def statistics(head):
    return {name: buffer.clone() for name, buffer in head.named_buffers()}


def assert_statistics(head, wanted):
    """Each the sum of few numbers of its own size, some steps long."""
    assert {*dict(head.named_buffers())} == {*wanted}
    for name, value in wanted.items():
        assert abs(getattr(head, name) - value) <= 100 * torch.finfo(torch.float64).eps * abs(value)


@every_row
def test_training_equals_the_formula(row, device):
    """Five steps of SGD with momentum, features, table and bias, against the formula with statistics moved by hand; then a loss
    in eval mode, which moves none. One ignored row holds NaN."""
    head, features, labels = head_and_batch(row, device)
    labels[4], features[4] = -100, torch.nan
    counted = labels != -100
    assert_statistics(head, row.state)
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in row.state.items()}
    wanted = [features.clone(), *(parameter.detach().clone() for parameter in head.parameters())]
    for tensor in (features, *wanted):
        tensor.requires_grad_()
    steps = [torch.optim.SGD(group, lr=0.01, momentum=0.9) for group in ([features, *head.parameters()], wanted)]
    # Rounding, amplified by how steep a logit is, in each of five steps.
    relative = 5 * tolerance(torch.float64, steepness(row, features.detach(), head.weight.detach()))
    for step in range(6):
        if step == 5:
            head.eval()
        else:
            state = row.advance(state, wanted[0].detach()[counted].norm(dim=1))
        losses = head(features, labels), written_out(row, *wanted[:2], labels, *wanted[2:], state=state)
        assert_close(losses[0].detach(), losses[1].detach(), relative, f"loss {step}")
        assert_statistics(head, state)
        for loss, optimizer in zip(losses, steps, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for what, ours, exact in zip(("features", "weight", "bias"), (features, *head.parameters()), wanted, strict=False):
        assert_close(ours.detach().nan_to_num(), exact.detach().nan_to_num(), relative, what)


@every_kind
@slow_when(lambda row: row != ROWS["AdaFace"])  # test_operators.py has CosFace
def test_compile(row, device):
    """As eager in two training steps and one in eval mode of another size, column-major features with row-major ones.

    Statistics too; and backward, which waits for all of them, takes those of its own step.
    """
    torch._dynamo.reset()
    eager, features, labels = head_and_batch(row, device, torch.float32)
    labels[4] = -100
    head = copy.deepcopy(eager)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    steps = []
    for num_rows, training in ((12, True), (12, True), (7, False)):
        head.train(training), eager.train(training)
        leaves = [tensor.requires_grad_() for tensor in (features[:num_rows].clone(), features[:num_rows].T.contiguous().T)]
        losses = [call(leaf, labels[:num_rows]) for call, leaf in zip((eager, compiled), leaves, strict=True)]
        steps.append((losses, leaves))
        for name, value in eager.named_buffers():
            assert torch.equal(dict(head.named_buffers())[name], value)
    for losses, leaves in steps:
        exact, got = (
            [loss.detach(), *torch.autograd.grad(loss, [leaf, *module.parameters()])]
            for loss, leaf, module in zip(losses, leaves, (eager, head), strict=True)
        )
        for tensor, wanted in zip(got, exact, strict=True):
            assert_close(tensor, wanted.double(), SIZE * torch.finfo(torch.float32).eps)


def test_opcheck_of_snapshot(device):
    library.opcheck(torch.ops.cosface_kernels.snapshot.default, (torch.tensor(20.0, device=device),))


@with_state
def test_training_moves_the_statistics_and_eval_does_not(name, device):
    row = ROWS[name]
    head, features, labels = head_and_batch(row, device)
    before = statistics(head)
    head.eval()(features, labels)
    assert_statistics(head, before)
    with torch.no_grad():
        head.train()(features, labels)
    assert all(buffer != before[key] for key, buffer in head.named_buffers())


# Rows that count: none, one, and all but one that is not a number.
@pytest.mark.parametrize("case", ["no rows", "all ignored", "one counted", "one counted is finite", "one is NaN"])
def test_adaface_takes_statistics_of_counted_finite_rows(case, device):
    row = ROWS["AdaFace"]
    head, features, labels = head_and_batch(row, device)
    others = torch.arange(len(labels), device=device) != 2
    norms = features[others].norm(dim=1)
    if case in ("all ignored", "one counted"):
        labels[others if case == "one counted" else slice(None)] = -100
    elif case != "no rows":
        features[others if case == "one counted is finite" else 2, 3] = torch.nan
    if case == "no rows":
        features, labels = features[:0], labels[:0]
    loss = head(features, labels)
    assert loss.isnan() == ("finite" in case or "NaN" in case)
    assert_statistics(head, row.advance(row.state, norms) if case == "one is NaN" else row.state)


def test_adaface_of_one_row_has_quality_zero(device):
    """Its own mean, and no deviation."""
    features, weight, labels = batch(ROWS["AdaFace"], device, num_rows=1, num_classes=2, angles=(1.0, 1.0))
    loss = margin_softmax_loss(features, weight, labels, margin=margins.AdaFace(), scale=4.0)
    same = margin_softmax_loss(features, weight, labels, margin=margins.CosFace(0.4), scale=4.0)
    assert_close(loss, same, tolerance(torch.float64))


# The floor of 5 is reached in step 1659.
@pytest.mark.parametrize("step, weight", [(1, 1000 / 1.12), (100, 1000 / 13), (1657, 1000 / 199.84), (1659, 5), (10**7, 5)])
def test_annealing(step, weight, device):
    """In training step t; each row has cosine -1 with its class of two, so that its logits are -(λ + 7) / (1 + λ) and 1."""
    head = MarginSoftmaxLoss(2, 2, margin=margins.SphereFace(4, annealing=True), scale=1.0, device=device, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        head.step.fill_(step - 1)
    loss = head(-head.weight.detach(), torch.arange(2, device=device))
    assert head.step == step
    wanted = math.log1p(math.exp(1 + (weight + 7) / (1 + weight)))
    # The cosine is held sqrt(2 eps) within π.
    assert abs(loss.item() - wanted) < 16 * 2 * EPS


@pytest.mark.parametrize("norm, share", [(5.0, 0), (30.0, 1), (109.0, 1), (150.0, 0)])
def test_magface_penalty(norm, share, device):
    """λ_g (1/a + a / u_a²) more, and its slope along x where a = ‖x‖ lies between the two bounds."""
    features, weight, labels = batch(ROWS["MagFace"]._replace(norms=(norm,)), device)
    found = []
    for lambda_g in (0.0, 35.0):
        loss = partial(margin_softmax_loss, margin=margins.MagFace(lambda_g=lambda_g), reduction="none")
        found.append(evaluate(loss, features, weight, labels, torch.ones_like(features[:, 0])))
    a = min(max(norm, 10), 110)
    difference = [with_penalty - without for without, with_penalty in zip(*found, strict=True)]
    penalty = torch.full_like(features[:, 0], 35 * (1 / a + a / 110**2))
    slope = share * 35 * (1 / 110**2 - 1 / a**2) * features / norm
    for tensor, wanted, cancelled in zip(difference[:2], (penalty, slope), found[0][:2], strict=True):
        assert_close(tensor, wanted, tolerance(torch.float64), size=cancelled.norm())
    assert not difference[2].any()


@every_row
def test_logits_and_topk(row, device):
    """As reference.logits: raw rows, bias and sub-centres; 44 is the last slab's number of classes without sub-centres."""
    head, features, _ = head_and_batch(row, device)
    options = {"scale": row.scale, "bias": head.bias, "centers_per_class": row.centers}
    raw = {"normalize_features": "features" not in row.raw, "normalize_weight": "weight" not in row.raw}
    wanted = reference.logits(features, head.weight, **options, **raw)
    assert_close(head.logits(features).detach(), wanted.detach(), 50 * EPS)
    for k in (1, 44, NUM_CLASSES):
        values, indices = head.topk(features, k)
        assert_close(values, wanted.topk(k).values.detach(), 50 * EPS)
        assert torch.equal(indices, wanted.topk(k).indices)


def load(head):
    options = {name: getattr(head, name) for name in ("margin", "centers_per_class", "normalize_features")}
    fresh = MarginSoftmaxLoss(SIZE, NUM_CLASSES, bias=head.bias is not None, **options)
    fresh.double().load_state_dict(head.state_dict())
    return fresh.to(head.weight.device)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda head: pickle.loads(pickle.dumps(head)), "state_dict": load}


@every_row
@pytest.mark.parametrize("how", COPIES)
@slow_when(lambda row, how: how != "state_dict" and row not in [ROWS[name] for name in KINDS])
def test_copies(row, how, device):
    """Equal in all, statistics after a step included, and sharing nothing."""
    head, features, labels = head_and_batch(row, device)
    head(features, labels)
    assert {*head.state_dict()} == {"weight", *(["bias"] if row.bias else []), *row.state}
    copied = COPIES[how](head)
    assert repr(copied) == repr(head)
    assert_statistics(copied, statistics(head))
    before = statistics(head)
    head.eval()
    assert torch.equal(copied.eval()(features, labels), head(features, labels))
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.detach().zero_()
    assert_statistics(head, before)
    assert head.weight.any()


@every_row
def test_reset_parameters(row, device):
    """A head that has trained is as drawn again; from the meta device too."""
    head, features, labels = head_and_batch(row, device)
    head(features, labels)
    options = dict(margin=row.margin, bias=row.bias, dtype=torch.float64, **row.options)
    empty = MarginSoftmaxLoss(SIZE, NUM_CLASSES, device="meta", **options).to_empty(device=device)
    torch.manual_seed(3)
    fresh = MarginSoftmaxLoss(SIZE, NUM_CLASSES, device=device, **options)
    for each in (head, empty):
        torch.manual_seed(3)
        each.reset_parameters()
        assert torch.equal(each.weight, fresh.weight) and (not row.bias or not each.bias.any())
        assert_statistics(each, row.state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@with_state
def test_statistics_of_a_head_in_another_dtype(name, dtype, device):
    """In 16 bits they would stop: a mean of 20 moves by some 0.1 in a step, and a bfloat16 counter stops at 256."""
    row = ROWS[name]
    head, features, labels = head_and_batch(row, device, torch.float32)
    head = head.to(dtype)
    assert head.weight.dtype == dtype
    features, state = features.to(dtype), {key: 300 if key == "step" else value for key, value in row.state.items()}
    for key, value in state.items():
        getattr(head, key).fill_(value)
    for _ in range(3):
        state = row.advance(state, features.double().norm(dim=1))
        with torch.no_grad():
            head(features, labels)
    # A sum over the rows and the columns, in float32 at least.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for key, buffer in head.named_buffers():
        assert abs(buffer - state[key]) <= 3 * (SIZE + len(labels)) * eps * state[key]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@with_state
def test_statistics_under_another_default_dtype(name, dtype):
    """Those of a margin that is set later too."""
    torch.set_default_dtype(dtype)
    try:
        heads = [MarginSoftmaxLoss(SIZE, 5, margin=margin) for margin in (ROWS[name].margin, margins.NormSoftmax())]
        heads[1].margin = ROWS[name].margin
    finally:
        torch.set_default_dtype(torch.float32)
    for head in heads:
        before = statistics(head)
        assert {buffer.dtype for buffer in before.values()} <= {torch.float32, torch.int64}
        head(torch.randn(6, SIZE), torch.arange(6) % 5)
        assert all(buffer != before[key] for key, buffer in head.named_buffers())


REPRS = {
    "ArcFace(m=0.5, easy_margin=False, gradient='exact')": (margins.ArcFace(), {}, "scale=64.0", ""),
    "Softmax()": (margins.Softmax(), {"bias": True}, "scale=1.0", ", bias=True"),
    "LSoftmax(m=4, annealing=False)": (margins.LSoftmax(), {"reduction": "sum"}, "scale=1.0", ""),
    "SphereFace(m=4, annealing=False)": (
        margins.SphereFace(),
        {"normalize_features": False, "centers_per_class": 2},
        "scale=1.0",
        ", normalize_features=False, centers_per_class=2",
    ),
    "CosFace(m=0.35)": (margins.CosFace(), {"scale": 30}, "scale=30", ""),
}


@pytest.mark.parametrize("margin", REPRS)
def test_repr(margin):
    given, options, scale, rest = REPRS[margin]
    reduction = options.get("reduction", "mean")
    wanted = f"MarginSoftmaxLoss(3, 5, {scale}, margin={margin}, reduction={reduction!r}{rest})"
    assert repr(MarginSoftmaxLoss(3, 5, margin=given, **options)) == wanted


def test_defaults_are_the_functions():
    head = MarginSoftmaxLoss(3, 5, margin=margins.CosFace())
    names = ("centers_per_class", "reduction", "ignore_index", "memory_budget", "backend")
    assert {name: getattr(head, name) for name in names} == {name: margin_softmax_loss.__kwdefaults__[name] for name in names}
