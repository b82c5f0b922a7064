"""Are hard classes in every sample that they belong to, and does a correction of each class make its sums those of all classes?

The oracle holds the logits of the sampled classes, each with its correction, in float64.
"""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import check_rule, draws, make
from selection import interpreted, slab_loop, slow_when
from test_sampling import DenseGradient

from cosface_kernels import CosFaceLoss, FusedSGD, MarginSoftmaxLoss, cosface_loss, margin_softmax_loss, sample_classes
from cosface_kernels.margins import CosFace, MVSoftmax, NormSoftmax, Softmax
from cosface_kernels.sampling import correction

pytestmark = pytest.mark.usefixtures("small_slabs")


# --- a number for each class


def some(labels, num_classes):
    """(the even classes and those of the labels, a correction for each, the largest past what shift a constant allows for)."""
    classes = torch.cat([torch.arange(0, num_classes, 2, device=labels.device), labels.clamp(min=0)]).unique()
    return classes, torch.linspace(0, 19, len(classes), device=labels.device)[classes * 7 % len(classes)]


def ours(x, w, y, bias=None, **options):
    classes, by_class = some(y, len(w) // options.get("centers_per_class", 1))
    table, bias = DenseGradient.apply(w), None if bias is None else DenseGradient.apply(bias)
    options = {"reduction": "none", "classes": classes, "sample_correction": by_class, "bias": bias, **options}
    return margin_softmax_loss(x, table, y, **options)


def plain(x, w, y, bias=None, *, margin, scale, centers_per_class=1, negatives=None):
    """Plain PyTorch, N x M, without a gradient for other rows."""
    classes, by_class = some(y, len(w) // centers_per_class)
    if margin.normalize_features:
        x, w = F.normalize(x), F.normalize(w)
    products = x @ w.unflatten(0, (-1, centers_per_class))[classes].flatten(0, 1).T
    products = products if x.dtype == torch.float64 else products.float()
    products = products.unflatten(1, (-1, centers_per_class)).amax(2)
    products = products if bias is None else products + bias[classes].to(products.dtype)
    place = torch.searchsorted(classes, y.clamp(min=0))[:, None]
    own = products.gather(1, place)
    target = own - margin.m if isinstance(margin, CosFace) else own
    if negatives is not None:
        threshold, p0, p1, _ = negatives.polynomial(own.detach(), target.detach(), {})
        products = torch.where(products > threshold, p0 + p1 * products, products)
    logits = scale * products + by_class.to(products.dtype)
    return F.cross_entropy(logits.scatter(1, place, scale * target), place.squeeze(1), reduction="none")


# margin, scale, options, centres. A scale of 100 is past a constant shift, 64 is not.
FORMS = {
    "cosines": {"margin": CosFace(0.35), "scale": 64.0},
    "cosines, large": {"margin": CosFace(0.35), "scale": 100.0},
    "bias": {"margin": Softmax(), "scale": 1.0},
    "3 centres": {"margin": CosFace(0.35), "scale": 64.0, "centers_per_class": 3},
    "hard negatives": {"margin": NormSoftmax(), "scale": 32.0, "negatives": MVSoftmax(1.2, adaptive=False)},
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of hard negatives and of the nearest centre 16 bits' rounding decides.
CASES = [(form, name) for form in FORMS for name in PRECISIONS if form in ("cosines", "bias") or name == "float32"]


@pytest.mark.parametrize("memory_budget", [0, 10**9], ids=["recompute", "keep"])
@pytest.mark.parametrize(("form", "precision"), CASES)
@slow_when(
    lambda backend, form, precision, memory_budget: (
        interpreted(backend) and not ((form, precision) == ("cosines", "bfloat16") and memory_budget == 0)
    )
)
@slab_loop
def test_error_at_most_the_references(backend, device, form, precision, memory_budget):
    options, dtype = FORMS[form], PRECISIONS[precision]
    centers = options.get("centers_per_class", 1)
    shape = (7, 387, 70) if interpreted(backend) else (33, 522, 64)
    inputs = [(x, w, y // centers) for x, w, y in draws("hard", shape, dtype, dtype, backend=backend)]
    functions = partial(ours, backend=backend, memory_budget=memory_budget, **options), partial(plain, **options)
    if form == "bias":  # one of a table (w, b)
        functions = [lambda x, t, y, each=each: each(x[:, :-1], t[:, :-1], y, bias=t[:, -1]) for each in functions]
    largest = options["scale"] * (shape[2] if form == "bias" else 1.2) + 19
    check_rule(*functions, inputs, device=device, scale=largest)


def test_gradcheck(device):
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 4, 140, 3))
    inputs = features.double().requires_grad_(), weight.double().requires_grad_()
    loss = partial(ours, margin=CosFace(0.35), scale=8.0)
    assert torch.autograd.gradcheck(lambda x, w: loss(x, w, labels), inputs, fast_mode=True)


@pytest.mark.parametrize("number", [0.0, 1.5, 20.0])
@slab_loop
def test_the_same_for_all(number, backend, device):
    """One number for all negatives is a factor of their sum."""
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 9, 300, 70))
    classes, _ = some(labels, 300)
    call = partial(cosface_loss, features, weight, labels, classes=classes, scale=8.0, reduction="none", backend=backend)
    negatives = torch.special.expm1(call().double()).log() + number
    found = call(sample_correction=torch.full(classes.shape, number, device=device, dtype=torch.float16))
    torch.testing.assert_close(found.double(), F.softplus(negatives), rtol=200 * 2**-23, atol=0)


@pytest.mark.parametrize("value, error, message", [
    (torch.tensor([0, 1, 2]), TypeError, r"float32 or float64, got torch\.int64"),
    (torch.zeros(2), ValueError, r"shape \(M,\) = \(3,\), one number for each class, got \(2,\)"),
    (torch.zeros(3, device="meta"), TypeError, "have its numbers in memory"),
    (torch.zeros(3, requires_grad=True), ValueError, "need no gradient"),
    (torch.tensor([0.0, -0.5, 0.0]), ValueError, "from 0 to 20.*, got -0.5"),
    (torch.tensor([0.0, 21.0, 0.0]), ValueError, "from 0 to 20.*, got 21"),
    (torch.tensor([0.0, math.nan, 0.0]), ValueError, "from 0 to 20.*, got nan"),
])  # fmt: skip
def test_wrong_correction(value, error, message):
    features, weight, labels = make("uniform", 2, 9, 4)
    with pytest.raises(error, match=f"^sample_correction must (be |have )?.*{message}"):
        cosface_loss(features, weight, labels * 0 + 3, classes=torch.tensor([1, 3, 5]), sample_correction=value)
    with pytest.raises(ValueError, match=r"^sample_correction may be a tensor with classes alone"):
        cosface_loss(features, weight, labels, sample_correction=torch.zeros(9))


# --- how likely a class is in a sample


def test_sums_are_right_on_average(device):
    """The mean over draws of Σ e^z / q is Σ e^z over all classes, within 6 of its standard errors, which are below 2%."""
    logits = torch.linspace(-2, 2, 40, dtype=torch.float64, device=device).exp()[torch.arange(40, device=device) * 7 % 40]
    certain, sums = torch.tensor([3, 17, 3, -1, 39], device=device), []
    for step in range(1000):
        classes = sample_classes(certain, 40, 0.3, step=step)
        by_class = correction(classes, certain, 40)
        assert torch.equal(by_class == 0, torch.isin(classes, certain))
        sums.append((logits[classes] * by_class.double().exp()).sum())
    sums = torch.stack(sums)
    error = sums.std() / math.sqrt(len(sums))
    assert error < 0.02 * logits.sum() and (sums.mean() - logits.sum()).abs() < 6 * error


def test_correction_is_the_drawn_shares(device):
    certain = torch.tensor([7, 2, 7, -100, 12], dtype=torch.int32, device=device)
    classes = torch.tensor([0, 2, 3, 7, 9], device=device)
    wanted = torch.tensor([1, 0, 1, 0, 1], device=device) * math.log((10 - 2) / (5 - 2))  # 12 is no class
    torch.testing.assert_close(correction(classes, certain, 10), wanted, rtol=2**-22, atol=0)
    assert not correction(torch.arange(10, device=device), certain, 10).any()
    assert not correction(torch.tensor([2, 7], device=device), certain, 10).any()  # no other class was drawn
    assert not correction(torch.tensor([0, 1], device=device), torch.tensor([1, 0], device=device), 2).any()  # there is none


# --- heads


def with_hard(device, kind=CosFaceLoss, **options):
    torch.manual_seed(0)
    options = {"sample_rate": 0.2, "sample_seed": 5, **options}
    head = kind(16, 300, device=device, **options)
    hard = torch.randint(-1, 300, (300, 3), generator=torch.Generator().manual_seed(1))
    head.hard_classes = hard
    return head, hard.to(device)


def batches(device, count=4):
    for seed in range(count):
        features, _, labels = make("uniform", 9, 300, 16, seed=seed)
        yield features.to(device), labels.to(device)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("form", [{}, {"kind": MarginSoftmaxLoss, "margin": Softmax(), "bias": True}], ids=["cosines", "bias"])
def test_head_is_the_loss_over_its_sample(form, corrected, device):
    head, hard = with_hard(device, sample_correction=corrected, ignore_index=2, **form)
    for step, (features, labels) in enumerate(batches(device)):
        labels[:3] = 2  # ignored, and so are its hard classes
        certain = torch.cat([labels[3:], hard[labels[3:]].flatten()])
        classes = sample_classes(certain, 300, 0.2, seed=5, step=step)
        assert set(certain.tolist()) - {-1} <= set(classes.tolist()) and len(classes) == 60
        by_class = correction(classes, certain, 300) if corrected else False
        options = {"margin": head.margin, "bias": head.bias} if form else {"margin": CosFace(0.35)}
        call = partial(margin_softmax_loss, classes=classes, sample_correction=by_class, ignore_index=2, **options)
        assert torch.equal(head(features, labels), call(features, head.weight, labels))
    head.eval()
    head(*next(batches(device)))
    assert head.sample_step == 4


def test_a_head_without_them_draws_as_before(device):
    head, _ = with_hard(device, sample_correction=True)
    other = copy.deepcopy(head)
    head.hard_classes, other.hard_classes = None, torch.full((300, 1), -1)
    features, labels = next(batches(device))
    samples = []
    for each in (head, other):
        each(features, labels).backward()
        samples.append(each.weight.grad.coalesce().indices())
    assert torch.equal(*samples)


def test_resumed_run_is_the_same_run(device):
    """The state dict has the hard classes, also for a head that has none yet."""
    head, _ = with_hard(device)
    resumed = CosFaceLoss(16, 300, sample_rate=0.2, sample_seed=5, device=device)
    for features, labels in batches(device, 2):
        head(features, labels)
    assert [*head.state_dict()] == ["weight", "hard_classes", "sample_step"]
    for other in (resumed, CosFaceLoss(16, 300, sample_rate=0.2, hard_classes=torch.full((300, 1), -1), device=device)):
        other.load_state_dict(copy.deepcopy(head.state_dict()))
        assert torch.equal(other.hard_classes, head.hard_classes)
    assert torch.equal(resumed.hard_classes, head.hard_classes) and head.hard_classes.dtype == torch.int32
    features, labels = next(batches(device))
    assert torch.equal(head(features, labels), resumed(features, labels))
    assert head.half().hard_classes.dtype == torch.int32


def test_confusions_are_hard_classes(device):
    head = CosFaceLoss(16, 300, sample_rate=0.2, hard_classes=torch.full((300, 1), -1), device=device)
    head.hard_classes = head.confusions(2)[1]
    features, labels = next(batches(device))
    statistics = head(features, labels, return_statistics=True)[1]
    head.hard_classes[labels, 0] = statistics.negative_class.int()
    head(features, labels).backward()
    touched = head.weight.grad.coalesce().indices()[0]
    assert torch.isin(statistics.negative_class, touched).all() and torch.isin(head.confusions(1)[1][labels], touched).any()


def test_identities_that_come_and_go(device):
    head, hard = with_hard(device)
    head.grow(2)
    assert torch.equal(head.hard_classes, F.pad(hard, (0, 0, 0, 2), value=-1).int())
    new_ids = head.remove([0, 7]).tolist()
    wanted = [[new_ids[j] if j >= 0 else -1 for j in row] for i, row in enumerate(hard.tolist()) if i not in (0, 7)]
    assert head.hard_classes.tolist() == [*wanted, [-1] * 3, [-1] * 3]
    assert -1 in new_ids and any(-1 in row for row in wanted)
    head(*next((x, y) for x, y in batches(device) if y.max() < 300))


@pytest.mark.parametrize("value, error, message", [
    ([[1]] * 9, TypeError, "be a tensor of shape"),
    (torch.zeros(9, 2), TypeError, "have an integer dtype, got torch.float32"),
    (torch.zeros(9, dtype=torch.int64), ValueError, r"have shape \(C, k\), C = 9, .*, got \(9,\)"),
    (torch.zeros(8, 2, dtype=torch.int64), ValueError, r"got \(8, 2\)"),
    (torch.full((9, 2), 9), IndexError, r"in \[0, 9\), or -1 for none, got 9"),
    (torch.full((9, 2), -2), IndexError, r"in \[0, 9\), or -1 for none, got -2"),
])  # fmt: skip
def test_wrong_hard_classes(value, error, message):
    with pytest.raises(error, match=f"^hard_classes must .*{message}"):
        CosFaceLoss(4, 9, hard_classes=value)
    head = CosFaceLoss(4, 9)
    with pytest.raises(error, match=f"^hard_classes must .*{message}"):
        head.hard_classes = value
    assert head.hard_classes is None


@slab_loop
def test_fused_steps_are_those_of_torch(backend, device):
    """SGD of two batches in one step, whose samples and corrections differ, and of one batch in the next."""
    options = {"sample_correction": True, "backend": backend}
    (head, _), (other, _) = with_hard(device, **options), with_hard(device, **options)
    fused, torchs = FusedSGD(head.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    before = head.weight.detach().clone()
    for number, (features, labels) in enumerate(batches(device, 3)):
        for each in (head, other):
            each(features, labels).backward()
        if number != 1:
            continue
        fused.step(), torchs.step(), fused.zero_grad(), torchs.zero_grad()
    fused.step(), torchs.step()
    moved = (other.weight.detach() - before).abs().max()
    torch.testing.assert_close(head.weight, other.weight, rtol=0, atol=64 * 2**-23 * float(moved + before.abs().max()))
    assert moved > 0


@pytest.mark.slow
@pytest.mark.parametrize("corrected", [False, True])
def test_compile(corrected, device):
    """In one graph as eager, over steps."""
    torch._dynamo.reset()
    (head, _), (eager, _) = with_hard(device, sample_correction=corrected), with_hard(device, sample_correction=corrected)
    whole = torch.compile(head, fullgraph=True, backend="aot_eager")
    for features, labels in batches(device):
        found = []
        for call, module in ((whole, head), (eager, eager)):
            x = features.clone().requires_grad_()
            loss = call(x, labels)
            found.append((loss.detach(), *(grad.to_dense() for grad in torch.autograd.grad(loss, (x, module.weight)))))
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=16 * 2**-23 * float(wanted.abs().max()))
    assert head.sample_step == eager.sample_step == 4
