"""Are sampled classes drawn as promised, and is a loss over them, its gradients and a training with it what the definition says?

The oracle is the plain loss over the sampled rows of the table, labels renumbered, whose gradient autograd scatters back.
"""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import check_rule, draws, evaluate, make
from selection import interpreted, slab_loop, slab_loop_when, slow_when
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

from cosface_kernels import CosFaceLoss, MarginSoftmaxLoss, cosface_loss, margin_softmax_loss, reference, sample_classes
from cosface_kernels.before_margin import Inputs
from cosface_kernels.loss import loss_of_table
from cosface_kernels.margins import AdaFace, CosFace, NormSoftmax, Softmax
from cosface_kernels.ops import label_checks, operators, sampled_classes, slabs
from cosface_kernels.ops.operands import Needs, Options, Problem
from cosface_kernels.ops.sampled_classes import one_of_each

EPS = torch.finfo(torch.float64).eps

pytestmark = pytest.mark.usefixtures("small_slabs")


# --- which classes


@pytest.mark.parametrize("population, count", [(7, 3), (12, 4), (5, 5), (9, 1), (10, 7), (23, 4)])
def test_every_number_is_as_likely_as_any_other(population, count):
    """Exactly: over all offsets, and over draws that are each remainder of each stratum's size equally often."""
    sizes = {population // count, -(-population // count)}
    remainders = math.lcm(*sizes)
    tally = torch.zeros(population, dtype=torch.int64)
    for offset in range(population):
        for draw in range(remainders):
            numbers = one_of_each(population, torch.full((count,), draw), torch.tensor(offset), torch.tensor(count))
            assert (numbers.diff() > 0).all() and numbers[0] >= 0 and numbers[-1] < population
            tally[numbers] += 1
    assert (tally == remainders * count).all()


@pytest.mark.parametrize("population, count", [(7, 3), (12, 4), (5, 5)])
def test_every_number_of_a_stratum_is_drawn(population, count):
    edges = [i * population // count for i in range(count + 1)]
    remainders = math.lcm(*(stop - start for start, stop in pairwise(edges)))
    drawn = [
        one_of_each(population, torch.full((count,), draw), torch.tensor(0), torch.tensor(count)).tolist()
        for draw in range(remainders)
    ]
    for numbers, (start, stop) in zip(zip(*drawn, strict=True), pairwise(edges), strict=True):
        assert sorted(numbers) == sorted([*range(start, stop)] * (remainders // (stop - start)))


@pytest.fixture(params=["generator", "hash"])
def source(request, device, monkeypatch):
    """A CPU's random bits, and a GPU's."""
    if request.param == "hash":
        monkeypatch.setattr(sampled_classes, "random_bits", sampled_classes.hashed_bits)
    elif device.type != "cpu":
        pytest.skip("its own bits are hashed")


def drawn_plainly(labels, num_classes, rate, seed, step):
    """The draw as sampled_classes.draw defines it, on the host."""
    positives = labels[(labels >= 0) & (labels < num_classes)].unique().tolist()
    count = max(1, round(rate * num_classes), min(len(labels), num_classes)) - len(positives)
    population, others = num_classes - len(positives), []
    if count:
        bits = sampled_classes.random_bits(labels.device, seed, step, count + 1).tolist()
        edges = [i * population // count for i in range(count + 1)]
        ranks = [edges[i] + bits[i] % (edges[i + 1] - edges[i]) + bits[count] % population for i in range(count)]
        every = sorted(set(range(num_classes)) - set(positives))
        others = [every[rank % population] for rank in ranks]
    return sorted(positives + others)


@pytest.mark.parametrize("num_classes, rate", [(50, 0.2), (50, 1.0), (50, 0.001), (1, 1.0), (1000, 0.1)])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 80])
def test_draws_are_as_described(num_rows, num_classes, rate, device, source):
    for step in range(8):
        labels = torch.randint(-3, num_classes + 3, (num_rows,), generator=torch.Generator().manual_seed(step)).to(device)
        expected = drawn_plainly(labels, num_classes, rate, 5, torch.tensor(step, device=device))
        found = sampled_classes.draw(labels, num_classes, rate, 5, torch.tensor(step, device=device))
        assert found.tolist() == expected and len(set(expected)) == len(expected)


@pytest.mark.parametrize("num_rows, size", [(0, 100), (1, 100), (100, 100), (101, 101), (1000, 1000), (5000, 1000)])
def test_nothing_is_asked_of_the_device(num_rows, size):
    """A tensor of the meta device has nothing to answer with."""
    labels, step = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in (num_rows, ()))
    assert sampled_classes.draw(labels, 1000, 0.1, 5, step).shape == (size,)


def test_hashed_bits_are_splitmix64():
    """The first three numbers of its own published test, whose state starts at 1234567, without the lowest bit."""
    state = torch.tensor(1234567)
    offsets = torch.arange(1, 4) * sampled_classes._signed(sampled_classes.SEED_STRIDE)
    found = sampled_classes._unsigned_shift(sampled_classes._mixed(state + offsets), 1)
    assert found.tolist() == [number >> 1 for number in (6457827717110365317, 3203168211198807973, 9817491932198370423)]


def test_marginals(device, source):
    """P(|X - T p| > t) <= 2 exp(-t² / 2(T p (1 - p) + t / 3)), Bernstein, for X of T draws: 10^-9 for all classes together."""
    num_classes, steps = 50, 800
    labels = torch.tensor([0, 17, 18, 49, 17, -1, 50], device=device)
    tally = torch.zeros(num_classes, dtype=torch.int64, device=device)
    for step in range(steps):
        tally[sample_classes(labels, num_classes, 0.6, step=step)] += 1
    positives = labels.unique()[1:-1]
    assert (tally[positives] == steps).all()
    others = torch.ones(num_classes, dtype=torch.bool, device=device).index_fill(0, positives, False)
    probability = (30 - 4) / (50 - 4)
    log = math.log(2 * 46 / 1e-9)
    bound = log / 3 + math.sqrt(log**2 / 9 + 2 * steps * probability * (1 - probability) * log)
    assert bound < 0.25 * steps * probability  # or it would prove little
    assert (tally[others] - steps * probability).abs().max() <= bound


@pytest.mark.parametrize("num_classes, rate, labels, size", [
    (1000, 0.1, [5, 3, 999, 3, 0], 100),
    (1000, 0.1, [], 100),
    (1000, 1e-9, [7], 1),
    (1000, 1e-9, [], 1),
    (10, 0.2, [4, 4, 2, 8, 9, 0], 6),  # more rows in the batch than classes were asked for
    (3, 0.1, [2, 2, 2, 2, 2, 2], 3),
    (10, 1, [4], 10),
    (1, 0.5, [0, 0], 1),
    (10, 0.5, [-100, 10, 2**62, -(2**63), 3], 5),
    (10**8, 1e-5, [10**8 - 1, 0], 1000),
])  # fmt: skip
def test_sample(num_classes, rate, labels, size, device):
    """Ascending, distinct, in range, with every positive, and as many as promised."""
    labels = torch.tensor(labels, dtype=torch.int64, device=device)
    for seed in range(5):
        classes = sample_classes(labels, num_classes, rate, seed=seed)
        assert (classes.dtype, classes.device, classes.shape) == (torch.int64, labels.device, (size,))
        assert (classes.diff() > 0).all() and classes[0] >= 0 and classes[-1] < num_classes
        assert torch.isin(labels[(labels >= 0) & (labels < num_classes)], classes).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint64], ids=str)
def test_labels_of_any_integer_dtype(dtype, device):
    labels = torch.tensor([3, 100, 77], device=device)
    assert torch.equal(sample_classes(labels.to(dtype), 200, 0.1), sample_classes(labels, 200, 0.1))


def test_sample_is_a_function_of_seed_step_and_labels(device):
    labels = torch.tensor([3, 100, 77], device=device)
    draw = partial(sample_classes, labels, 10_000, 0.01)
    torch.manual_seed(0)
    first = draw(seed=3, step=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, draw(seed=3, step=4)) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, sample_classes(labels.flip(0).repeat(2), 10_000, 0.01, seed=3, step=4))
    samples = {tuple(draw(seed=seed, step=step).tolist()) for seed in range(4) for step in range(4)}
    assert len(samples) == 16


@pytest.mark.parametrize("num_rows", [0, 1, 300])
def test_opcheck_of_the_draw(num_rows, device):
    labels = torch.arange(num_rows, device=device) * 7 % 1000
    library.opcheck(operators.sample_classes, (labels, torch.tensor(3, device=device), 1000, 0.1, 5, True))


# --- the loss over them


def half_of(labels, num_classes):
    """The odd classes and those of the labels."""
    odd = torch.arange(1, num_classes, 2, device=labels.device)
    return torch.cat([odd, labels[(labels >= 0) & (labels < num_classes)]]).unique()


class DenseGradient(torch.autograd.Function):
    """The tensor, its gradient made dense."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        assert grad.is_sparse
        return grad.to_dense()


def sampled(margin, scale, classes=half_of, **options):
    """(ours, plain): of features, weight, and labels over the classes that classes(labels, C) names."""
    subtracted = margin.m if isinstance(margin, CosFace) else 0.0
    form = {name: value for name, value in options.items() if name not in ("memory_budget", "backend")}
    centers = form.get("centers_per_class", 1)

    def ours(x, w, y, bias=None):
        named = classes(y, len(w) // centers)
        bias = None if bias is None else DenseGradient.apply(bias)
        keywords = {"margin": margin, "scale": scale, "reduction": "none", "bias": bias, "classes": named}
        return margin_softmax_loss(x, DenseGradient.apply(w), y, **keywords, **options)

    def plain(x, w, y, bias=None):
        named = classes(y, len(w) // centers)
        rows = (named[:, None] * centers + torch.arange(centers, device=w.device)).flatten()
        bias = None if bias is None else bias[rows]
        raw = {"normalize_weight": margin.normalize_weight, "normalize_features": margin.normalize_features, "bias": bias}
        places = torch.where(y < 0, y, torch.searchsorted(named, y.contiguous()))
        negatives, products = reference.cosine_lse(x, w[rows], places, scale=scale, **raw | form)
        losses = F.softplus(negatives - scale * (products - subtracted), threshold=40)
        return torch.where(y < 0, 0.0, losses)

    return ours, plain


def split(function):
    """function(x, w, y, bias=b) as one of a table (w, b), so that dW holds db too; the last column of features is dropped."""
    return lambda x, table, y: function(x[:, :-1], table[:, :-1], y, bias=table[:, -1])


# (N, rows of the table, D): half of 522 rows and those of 33 labels are three slabs of 128, or one of 384, the last one short.
SHAPE = (33, 522, 64)
# margin, scale, options, centres. A scale of 100 is past a constant shift.
FORMS = {
    "cosines": (CosFace(0.35), 64.0, {}, 1),
    "cosines, large": (CosFace(0.35), 100.0, {}, 1),
    "raw features": (NormSoftmax(), 1.0, {"normalize_features": False}, 1),
    "bias": (Softmax(), 1.0, {}, 1),
    "3 centres": (CosFace(0.35), 64.0, {"centers_per_class": 3}, 3),
    "2 raw centres": (Softmax(), 1.0, {"centers_per_class": 2}, 2),
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_form(backend, device, form, precision, memory_budget):
    margin, scale, options, centers = FORMS[form]
    ours, plain = sampled(margin, scale, backend=backend, memory_budget=memory_budget, **options)
    if form == "bias":
        ours, plain = split(ours), split(plain)
    inputs = [(x, w, y // centers) for x, w, y in draws("hard", SHAPE, *[PRECISIONS[precision]] * 2, backend=backend)]
    # Raw logits are as large as the product of two rows of norm 3, or of sqrt(D).
    largest = scale * (1 if margin.normalize_features and options.get("normalize_features", True) else SHAPE[2])
    check_rule(ours, plain, inputs, device=device, scale=largest)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
@slow_when(lambda backend, form, precision: interpreted(backend) and precision != "float32" and form != "bias")
@slab_loop_when(lambda form: form != "cosines")
def test_error_at_most_the_references(backend, device, form, precision):
    """By default all slabs of so small a table but the last are kept, or all."""
    check_form(backend, device, form, precision, "auto")


@pytest.mark.parametrize("memory_budget", [0, 33 * 128 * 4, 10**9], ids=["recompute", "keep one slab", "keep all"])
@slab_loop
def test_any_budget(backend, device, memory_budget):
    check_form(backend, device, "bias", "float32", memory_budget)


@pytest.mark.parametrize("case", ["repeated", "all equal", "ignored", "all ignored", "first and last", "strided", "no rows"])
@slab_loop_when(lambda case: case == "no rows")
def test_batches_of_every_kind(backend, device, case):
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 9, 300, 70))
    if case == "repeated":
        labels[3:] = labels[:6].clone()
    elif case == "all equal":
        labels = labels[:1].expand(9)
    elif case == "ignored":
        labels[2], features[2] = -100, torch.nan
    elif case == "all ignored":
        labels[:] = -100
    elif case == "first and last":
        labels[0], labels[1], labels[2] = 0, 299, 299
    elif case == "strided":
        weight, labels = weight.T.contiguous().T, labels.repeat_interleave(2)[::2]
    elif case == "no rows":
        features, labels = features[:0], labels[:0]
    ours, plain = sampled(CosFace(0.35), 64.0, backend=backend)
    upstream = torch.linspace(1, 2, 9, device=device)[: len(labels)]
    got = evaluate(ours, features, weight, labels, upstream)
    # The reference does not know that an ignored row may be NaN.
    counted = (labels >= 0)[:, None]
    exact = evaluate(plain, torch.where(counted, features, 0.0).double(), weight.double(), labels, upstream)
    for tensor, wanted in zip(got, exact, strict=True):
        # 64 roundings of an exponent, some additions.
        size = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=200 * 2**-23 * size)


@pytest.mark.parametrize("centers", [1, 3])
@slab_loop_when(lambda centers: centers == 3)
def test_all_classes_are_no_sample(backend, device, centers):
    """A sample of all classes gives the same bits, unless another form of batch_rows.py rounds otherwise."""
    inputs = *(tensor.to(device) for tensor in make("hard", 7, 300, 70)), torch.linspace(1, 2, 7, device=device)
    inputs[2].floor_divide_(centers)
    options = {"backend": backend, "centers_per_class": centers}
    got = evaluate(sampled(CosFace(0.35), 64.0, lambda y, c: torch.arange(c, device=device), **options)[0], *inputs)
    whole = partial(margin_softmax_loss, margin=CosFace(0.35), scale=64.0, reduction="none", **options)
    for ours, wanted in zip(got, evaluate(whole, *inputs), strict=True):
        if backend in ("cpu", "triton") and centers == 1:
            torch.testing.assert_close(ours, wanted, rtol=0, atol=200 * 2**-23 * float(wanted.abs().max()))
        else:
            assert torch.equal(ours, wanted)


def test_gradcheck(device):
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 4, 140, 3))
    inputs = features.double().requires_grad_(), weight.double().requires_grad_()
    ours, _ = sampled(CosFace(0.35), 8.0)
    assert torch.autograd.gradcheck(lambda x, w: ours(x, w, labels), inputs, fast_mode=True)


def test_no_other_class_and_every_other(backend, device):
    """A sample of the positive alone has no negative: the loss is 0, also with the correction, which has nothing to correct."""
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 3, 50, 16))
    labels[:] = 7
    for correction in (False, True):
        options = {"classes": labels[:1], "backend": backend, "sample_correction": correction}
        loss, dx, dw = evaluate(partial(cosface_loss, **options), features, weight, labels, torch.ones((), device=device))
        assert loss == 0 and not dx.any() and not dw.to_dense().any()


@pytest.mark.parametrize("centers", [1, 3])
def test_correction_of_classes(centers, device):
    """In classes, not rows."""
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 9, 300, 70))
    labels = labels // centers
    options = {"centers_per_class": centers, "classes": half_of(labels, 300 // centers), "scale": 1e-3, "reduction": "none"}
    # At so small a scale every logit is 0, and the loss the log of how many classes there are.
    loss = margin_softmax_loss(features, weight, labels, margin=NormSoftmax(), sample_correction=True, **options)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(300 // centers)), rtol=0, atol=2e-3)


@slab_loop
def test_correction(backend, device):
    """log of the negatives that there are over those that were summed, on the log-sum-exp."""
    features, weight, labels = (tensor.to(device) for tensor in make("hard", 9, 300, 70))
    classes = half_of(labels, 300)
    loss = cosface_loss(
        features, weight, labels, classes=classes, sample_correction=True, reduction="none", scale=8.0, backend=backend
    )
    places = torch.searchsorted(classes, labels)
    negatives, cosines = reference.cosine_lse(features.double(), weight[classes].double(), places, scale=8.0)
    corrected = negatives + math.log(299) - math.log(len(classes) - 1)
    torch.testing.assert_close(loss.double(), F.softplus(corrected - 8 * (cosines - 0.35)), rtol=100 * 2**-23, atol=0)
    whole = cosface_loss(features, weight, labels, sample_correction=True, backend=backend)
    assert torch.equal(whole, cosface_loss(features, weight, labels, backend=backend))


def test_correction_is_nearer_to_the_whole(device):
    """With independent rows the loss over a tenth of 10,000 classes is too low by ln 10, and after correction by nearly 0."""
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 32, 10_000, 64))
    options = {"scale": 8.0, "classes": sample_classes(labels, 10_000, 0.1)}
    whole = cosface_loss(features, weight, labels, scale=8.0)
    # A row's sum has 10^3 exponentials of logits with deviation 8 / sqrt(64) = 1: variance e - 1 where the mean is 1.
    deviation = math.sqrt((math.e - 1) / 1000 / 32)
    assert abs(cosface_loss(features, weight, labels, **options, sample_correction=True) - whole) < 5 * deviation
    assert abs(cosface_loss(features, weight, labels, **options) - whole + math.log(10)) < 5 * deviation


# --- what it holds


class Sizes(TorchDispatchMode):
    """Records the numbers in each operator's results, without views, inside the package's operators too."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            tensors = torch.utils._pytree.tree_leaves(result)
            self.sizes += [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return result


@pytest.fixture
def interpreter_uncounted(monkeypatch):
    """Triton's interpreter moves its arguments about with operators of its own."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    run = interpreter.GridExecutor.__call__

    def uncounted(*arguments, **keywords):
        with _disable_current_modes():
            return run(*arguments, **keywords)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", uncounted)


@pytest.mark.usefixtures("interpreter_uncounted")
@pytest.mark.parametrize("form", ["cosines", "cosines, large", "bias", "3 centres"])
@slow_when(lambda backend, form: interpreted(backend) and form != "3 centres")
@slab_loop_when(lambda form: form != "cosines")
def test_rows_are_gathered_slab_by_slab(backend, device, form):
    """Forward holds no M x D numbers and backward the gradient's own alone: slabs are 128 of 500 rows, or 384 of 1500."""
    margin, scale, _, centers = FORMS[form]
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 3, 3000, 64))
    labels, classes = labels % (3000 // centers), torch.arange(0, 3000 // centers, 2, device=device)
    labels = labels // 2 * 2
    index = (classes[:, None] * centers + torch.arange(centers, device=device)).flatten()
    bias = weight[:, 0].contiguous() if form == "bias" else None
    raw = margin.normalize_features, margin.normalize_weight, centers
    problem = Problem(features, weight, bias, labels, index)
    constants = *Options(scale, -100, *raw, torch.float32, 0, backend, None), *Needs(True, True)
    flat = torch.ops.cosface_kernels
    with torch.no_grad(), Sizes() as forward:
        output = flat.negative_lse.default.implementation(*problem, *constants)
    slab = 384 if centers == 3 else 128
    # A bias is one more column, and columns are padded to 64, or 128.
    assert max(forward.sizes) <= slab * 128 < len(index) * 64
    with torch.no_grad(), Sizes() as backward:
        gradients = [torch.ones_like(vector) for vector in output[:5]]
        flat.negative_lse_backward.default.implementation(*gradients, *problem, *output[5:-2], *constants)
    assert [size for size in backward.sizes if size > slab * 128] == [len(index) * 64]


def test_classes_may_be_refilled_after_backward(device):
    """Their gradient stays where it was, also where the next one is added."""
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 3, 20, 8))
    weight.requires_grad_()
    classes, samples = torch.empty(12, dtype=torch.int64, device=device), []
    for start in (0, 8):
        samples.append(torch.arange(start, start + 12, device=device))
        classes.copy_(samples[-1])
        cosface_loss(features, weight, classes[labels % 12], classes=classes).backward()
    found = weight.grad.to_dense()
    weight.grad = None
    for sample in samples:
        cosface_loss(features, weight, sample[labels % 12], classes=sample).backward()
    assert torch.equal(found, weight.grad.to_dense())


def test_auto_budget_is_at_most_the_sampled_gradient(device, monkeypatch):
    """One slab of 30 x 128 numbers: the gradient of 256 rows of 16 takes a little more; that of all 512 would be two."""
    monkeypatch.setattr(slabs, "KEPT_ANYWAY", 0)
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 30, 512, 16))
    weight.requires_grad_()
    classes = torch.arange(0, 512, 2, device=device)
    problem = Problem(features, weight, None, labels // 2 * 2, classes)
    options = Options(64.0, -100, True, True, 1, torch.float32, None, "auto", None)
    _, saved, _ = operators.negative_lse(problem, options, Needs(True, True))
    assert saved.kept.numel() == 30 * 128


# --- gradients and optimisers


def sparse_step(device, optimizer, steps=1, **options):
    """(table before, table after, classes) of steps over one sample."""
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 9, 300, 16))
    weight = weight.double().requires_grad_()
    classes, before = half_of(labels, 300), weight.detach().clone()
    optimizer = optimizer([weight], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        cosface_loss(features, weight, labels, classes=classes).backward()
        optimizer.step()
    return before, weight.detach(), classes


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad])
def test_optimisers_touch_what_was_sampled_alone(optimizer, device):
    before, after, classes = sparse_step(device, optimizer, steps=2, lr=0.1)
    changed = torch.zeros(300, dtype=torch.bool, device=device).index_fill(0, classes, True)
    assert torch.equal(after[~changed], before[~changed]) and (after != before).any(1)[changed].all()


def test_step_of_sgd(device):
    before, after, _ = sparse_step(device, torch.optim.SGD, lr=0.1)
    features, _, labels = (tensor.to(device) for tensor in make("uniform", 9, 300, 16))
    _, plain = sampled(CosFace(0.35), 64.0)
    upstream = torch.full((9,), 1 / 9, dtype=torch.float64, device=device)
    _, _, grad = evaluate(plain, features.double(), before, labels, upstream)
    torch.testing.assert_close(after, before - 0.1 * grad, rtol=0, atol=64 * 100 * EPS * float(grad.abs().max()))


@pytest.mark.parametrize("optimizer, options", [
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.Adagrad, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {}),
])  # fmt: skip
def test_optimisers_that_cannot_say_so(optimizer, options, device):
    with pytest.raises(RuntimeError, match="sparse"):
        sparse_step(device, optimizer, **options)


def test_gradients_are_sparse_and_add_up(device):
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 9, 300, 16))
    weight, bias = weight.requires_grad_(), torch.zeros(300, device=device, requires_grad=True)
    classes = [half_of(labels, 300), sample_classes(labels, 300, 0.2)]
    losses = [margin_softmax_loss(features, weight, labels, margin=Softmax(), bias=bias, classes=some) for some in classes]
    gradients = [torch.autograd.grad(loss, (weight, bias), retain_graph=True) for loss in losses]
    for some, (dw, db) in zip(classes, gradients, strict=True):
        assert (dw.shape, db.shape, dw.dtype) == (weight.shape, bias.shape, weight.dtype)
        for grad in (dw, db):
            assert grad.is_sparse and grad.is_coalesced() and torch.equal(grad.indices(), some[None])
    for loss in losses:
        loss.backward()
    for parameter, parts in zip((weight, bias), zip(*gradients, strict=True), strict=True):
        assert parameter.grad.is_sparse
        assert torch.equal(parameter.grad.to_dense(), parts[0].to_dense() + parts[1].to_dense())


@pytest.mark.parametrize("frozen", ["features", "weight", "bias", "weight bias"])
def test_frozen_inputs(frozen, device):
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 9, 300, 16))
    tensors = {"features": features, "weight": weight, "bias": torch.zeros(300, device=device)}
    options = {"margin": Softmax(), "classes": half_of(labels, 300)}

    def gradients(trained):
        leaves = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in tensors.items()}
        margin_softmax_loss(**leaves, labels=labels, **options).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    every, some = gradients(tensors), gradients(tensors.keys() - set(frozen.split()))
    for name, grad in some.items():
        assert grad is None if name in frozen.split() else torch.equal(grad.to_dense(), every[name].to_dense())


# --- heads


def sampled_head(device, kind=CosFaceLoss, **options):
    torch.manual_seed(0)
    margin = {} if kind is CosFaceLoss else {"margin": AdaFace()}
    return kind(16, 300, device=device, **{"sample_rate": 0.2, "sample_seed": 5, **margin, **options})


def batches(device):
    """A last short one, an empty one, and one of more classes than are asked for."""
    for seed, num_rows in enumerate((20, 20, 7, 0, 20, 150, 20)):
        features, _, labels = make("uniform", num_rows, 300, 16, seed=seed)
        yield features.to(device), labels.to(device)


KINDS = [CosFaceLoss, MarginSoftmaxLoss]


@pytest.mark.parametrize("kind", KINDS)
def test_head_samples_in_training_alone(kind, device):
    """AdaFace's statistics, which move first, are those of a head that takes all classes."""
    head = sampled_head(device, kind, ignore_index=2)
    whole = sampled_head(device, kind, ignore_index=2, sample_rate=1.0)
    for step, (features, labels) in enumerate(batches(device)):
        labels[:3] = 2  # ignored, so no class of this step
        classes = sample_classes(torch.where(labels == 2, -1, labels), 300, 0.2, seed=5, step=step)
        assert head.sample_step == step
        loss = head(features, labels)
        inputs = Inputs(features, whole.weight, labels, whole.bias, classes)
        exact = loss_of_table(inputs, whole._loss_options(), state=whole._statistics(), training=True)
        assert torch.equal(loss, exact)
        (grad,) = torch.autograd.grad(loss, head.weight)
        assert torch.equal(grad.indices(), classes[None])
        head.eval(), whole.eval()
        assert torch.equal(head(features, labels), whole(features, labels)) and head.sample_step == step + 1
        head.train(), whole.train()


def test_head_with_correction(device):
    head = sampled_head(device, sample_correction=True)
    features, labels = next(batches(device))
    classes = sample_classes(labels, 300, 0.2, seed=5)
    assert torch.equal(
        head(features, labels), cosface_loss(features, head.weight, labels, classes=classes, sample_correction=True)
    )
    head.eval()
    assert torch.equal(head(features, labels), cosface_loss(features, head.weight, labels))


def train(head, steps):
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    history = []
    for features, labels in steps:
        optimizer.zero_grad()
        loss = head(features, labels)
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
    return history


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_same_run(kind, device):
    head, every = sampled_head(device, kind), list(batches(device))
    train(head, every[:3])
    resumed = sampled_head(device, kind)
    resumed.load_state_dict(copy.deepcopy(head.state_dict()))
    for ours, wanted in zip(train(resumed, every[3:]), train(head, every[3:]), strict=True):
        assert torch.equal(ours, wanted)
    assert torch.equal(resumed.weight, head.weight) and resumed.sample_step == head.sample_step == len(every)


def test_state_of_a_head_without_sampling_is_as_before(device):
    assert [*CosFaceLoss(3, 5, device=device).state_dict()] == ["weight"]
    assert [*sampled_head(device).state_dict()] == ["weight", "sample_step"]
    assert sampled_head(device).half().sample_step.dtype == torch.int64


def test_head_from_meta(device):
    head = sampled_head("meta").to_empty(device=device)
    head.sample_step.fill_(7)
    head.reset_parameters()
    assert head.sample_step == 0


def test_repr():
    assert repr(sampled_head("cpu")).endswith("reduction='mean', sample_rate=0.2, sample_seed=5)")
    assert "sample" not in repr(CosFaceLoss(3, 5))


def test_a_refused_call_is_no_step():
    head = sampled_head("cpu")
    features, labels = next(batches("cpu"))
    for wrong in (labels + 300, labels[1:], labels.float()):
        with pytest.raises((IndexError, ValueError, TypeError)):
            head(features, wrong)
    assert head.sample_step == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind, device):
    """Every step in one graph as eager, its gradient too, which is computed when the step has moved on."""
    torch._dynamo.reset()
    eager, head = sampled_head(device, kind), sampled_head(device, kind)
    whole = torch.compile(head, fullgraph=True, backend="aot_eager")
    for features, labels in batches(device):
        results = []
        for call, module in ((whole, head), (eager, eager)):
            x = features.clone().requires_grad_()
            loss = call(x, labels)
            results.append((loss.detach(), *(grad.to_dense() for grad in torch.autograd.grad(loss, (x, module.weight)))))
        for ours, wanted in zip(*results, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=16 * 2**-23 * float(wanted.abs().max() if len(labels) else 0))
    assert head.sample_step == eager.sample_step


@pytest.mark.parametrize(
    "use_reentrant, compiled", [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
def test_checkpointing_a_head_is_refused(use_reentrant, compiled, device):
    torch._dynamo.reset()
    head = sampled_head(device)
    call = torch.compile(head, backend="aot_eager") if compiled else head
    features, labels = next(batches(device))
    loss = checkpoint(call, features.requires_grad_(), labels, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="sample_classes and call margin_softmax_loss"):
        loss.backward()


def test_checkpointing_a_sample_drawn_outside(device):
    features, labels = next(batches(device))
    weight = sampled_head(device).weight
    call = partial(cosface_loss, classes=sample_classes(labels, 300, 0.2))
    wanted = evaluate(call, features, weight, labels, torch.ones((), device=device))
    got = evaluate(partial(checkpoint, call, use_reentrant=False), features, weight, labels, torch.ones((), device=device))
    for ours, exact in zip(got, wanted, strict=True):
        assert torch.equal(ours.to_dense(), exact.to_dense())


# --- what callers get wrong

WRONG_CLASSES = {
    "a list": (lambda c: c.tolist(), TypeError, r"tensor of shape \(M,\), got list"),
    "float32": (lambda c: c.float(), TypeError, r"integer dtype, got torch\.float32"),
    "a column": (lambda c: c[:, None], ValueError, r"shape \(M,\).*got \(4, 1\)"),
    "none": (lambda c: c[:0], ValueError, r"at least one class, got \(0,\)"),
    "elsewhere": (lambda c: c.to("meta"), TypeError, "have its numbers in memory, got .* meta"),
    "descending": (lambda c: c.flip(0), ValueError, "ascend, each number once, got 8 before 5 at 0"),
    "repeated": (lambda c: c.repeat_interleave(2), ValueError, "ascend, each number once, got 0 before 0 at 0"),
    "negative": (lambda c: c - 1, IndexError, r"in \[0, 9\), got -1"),
    "past the last": (lambda c: c + 1, IndexError, r"in \[0, 9\), got 9"),
}


@pytest.mark.parametrize("centers", [1, 2])
@pytest.mark.parametrize("case", WRONG_CLASSES)
def test_wrong_classes(case, centers, device, monkeypatch):
    monkeypatch.setenv("COSFACE_CHECK_LABELS", "1")
    change, error, message = WRONG_CLASSES[case]
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 3, 9 * centers, 4))
    classes = change(torch.tensor([0, 3, 5, 8], device=device))
    with pytest.raises(error, match=f"^classes must .*{message}"):
        options = {"margin": CosFace(), "centers_per_class": centers}
        margin_softmax_loss(features, weight, labels * 0 + 3, classes=classes, **options)


@pytest.mark.parametrize("number", [2**61, 2**62, 2**63 - 1, -(2**63), -(2**62)])
def test_classes_beyond_64_bits_of_rows(number):
    """Four times these is a row number of the table, or 0, modulo 2^64."""
    features, weight, _ = make("uniform", 3, 36, 4)
    labels = torch.full((3,), -100)
    with pytest.raises(IndexError, match=r"^classes must be in \[0, 9\)"):
        margin_softmax_loss(features, weight, labels, margin=CosFace(), centers_per_class=4, classes=torch.tensor([number]))


@pytest.mark.parametrize("centers", [1, 2])
@pytest.mark.parametrize("label, message", [
    (4, "labels[1] is 4, but classes must hold"),
    (0, "labels[1] is 0, but classes must hold"),
    (8, "labels[1] is 8, but classes must hold"),
    (9, "labels[1] is 9, but a label must be in [0, 9)"),
    (-1, "labels[1] is -1, but a label must be in [0, 9)"),
])  # fmt: skip
@slab_loop_when(lambda centers: centers == 2)
def test_label_that_takes_no_part(label, message, centers, backend, device, monkeypatch):
    """An IndexError, or, where that would wait for the device, NaN in all that it reaches and nothing else."""
    monkeypatch.setenv("COSFACE_CHECK_LABELS", "1")
    features, weight, _ = (tensor.to(device) for tensor in make("uniform", 3, 9 * centers, 4))
    inputs = features, weight, torch.tensor([3, label, 5], device=device), torch.ones(3, device=device)
    classes = torch.tensor([3, 5, 6], dtype=torch.int32, device=device)
    options = {"margin": CosFace(), "centers_per_class": centers, "reduction": "none", "backend": backend}
    loss = partial(margin_softmax_loss, classes=classes, **options)
    with pytest.raises(IndexError) as raised:
        loss(*inputs[:3])
    assert str(raised.value).startswith(message)
    for check in ("check_labels", "check_sampled"):
        monkeypatch.setattr(label_checks, check, lambda *arguments: None)
    losses, dx, dw = evaluate(loss, *inputs)
    assert losses.isnan().tolist() == dx.isnan().all(1).tolist() == [False, True, False]
    assert dw.coalesce().values().isnan().all()


@pytest.mark.parametrize("name, value, error", [
    *[("sample_rate", value, ValueError) for value in (0, -0.1, 1.1, math.nan)],
    *[("sample_rate", value, TypeError) for value in ("1", None, True)],
    *[("sample_seed", value, ValueError) for value in (-1, 2**63)],
    *[("sample_seed", value, TypeError) for value in (1.5, None, True)],
    ("sample_correction", 1, TypeError),
])  # fmt: skip
def test_wrong_options(name, value, error):
    for make_head in (CosFaceLoss, partial(MarginSoftmaxLoss, margin=CosFace())):
        with pytest.raises(error, match=f"^{name} must "):
            make_head(3, 5, **{name: value})
    arguments = {"labels": torch.tensor([1]), "num_classes": 5, "rate": 0.5}
    if name == "sample_correction":
        with pytest.raises(error, match=f"^{name} must "):
            cosface_loss(torch.ones(1, 3), torch.ones(5, 3), torch.tensor([1]), sample_correction=value)
        return
    short = name.removeprefix("sample_")
    for given in [short, "step"] if short == "seed" else [short]:
        with pytest.raises(error, match=f"^{given} must "):
            sample_classes(**arguments | {given: value})


@pytest.mark.parametrize("labels, error", [([1], TypeError), (torch.ones(2), TypeError), (torch.tensor([[1]]), ValueError)])
def test_wrong_labels_to_sample(labels, error):
    with pytest.raises(error, match=r"^labels must "):
        sample_classes(labels, 5, 0.5)


def test_a_rate_that_is_set_later(device):
    """As one that the head was made with, steps counted from then on; back at 1 all classes take part again."""
    features, labels = torch.randn(8, 16, device=device), torch.arange(8, device=device)
    made = CosFaceLoss(16, 500, sample_rate=0.1, sample_seed=3, device=device)
    head = CosFaceLoss(16, 500, sample_seed=3, device=device)
    head.weight.data.copy_(made.weight)
    assert "sample_step" not in head.state_dict()
    head.sample_rate = 0.1
    for step in (1, 2):
        assert torch.equal(head(features, labels), made(features, labels)) and head.sample_step == step
    head.sample_rate = 1.0
    assert torch.equal(head(features, labels), cosface_loss(features, head.weight, labels)) and head.sample_step == 2
    for wrong, error in ((0, ValueError), ("0.1", TypeError)):
        with pytest.raises(error, match=r"^sample_rate must be "):
            head.sample_rate = wrong
    assert head.sample_rate == 1
