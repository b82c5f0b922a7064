"""Is every backend as accurate as it promises where logits are no plain cosines: raw rows, a bias, several centres to a class?

The rule is that of cases.py, the expression that of reference.py. Shapes as in test_backends.py, in whole classes.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import check_rule, draws, evaluate, make
from selection import interpreted, pairs, repeats_when, slab_loop, slow_when

from cosface_kernels import margin_softmax_loss, reference
from cosface_kernels.margins import CosFace, LSoftmax, NormSoftmax, Softmax
from cosface_kernels.ops import slabs

# (N, rows of the table, D). 522 rows: slabs of 128, or of 384 for three centres, the last one short; 67 rows: one past a tile.
# D is not small: the rounding of operands, which both have, would decide who is nearer.
SHAPES = [(1, 18, 64), (67, 522, 70)]
KINDS = ["peaked", "hard"]
PRECISIONS = {
    "float32": (torch.float32, torch.float32, False),
    "autocast": (torch.float32, torch.float32, True),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
}

pytestmark = [pytest.mark.usefixtures("small_slabs"), slab_loop]


def split(function):
    """function(x, w, y, bias=b) as one of a table (w, b), so that dW holds db too; the last column of features is dropped."""
    return lambda x, table, y: function(x[:, :-1], table[:, :-1], y, bias=table[:, -1])


def sized(shape, centers, backend):
    """A large shape as it is, or for the interpreter with two slabs."""
    return (shape[0], 138 if centers == 1 else 390, shape[2]) if interpreted(backend) and shape[1] > 390 else shape


def whole_classes(inputs, centers):
    return [(x, w, y // centers) for x, w, y in inputs]


def losses(margin, scale, **form):
    """(ours, plain) of a margin that is a number subtracted from the product."""
    subtracted = margin.m if isinstance(margin, CosFace) else 0.0
    ours = partial(margin_softmax_loss, margin=margin, scale=scale, reduction="none", **form)

    def plain(x, w, y, bias=None):
        raw = {"normalize_weight": margin.normalize_weight, "normalize_features": margin.normalize_features, "bias": bias}
        negatives, products = reference.cosine_lse(x, w, y, scale=scale, **raw | form)
        return F.softplus(negatives - scale * (products - subtracted), threshold=40)

    return ours, plain


# name: margin, scale, options, centres. A scale of 100 is past a constant shift for bounded logits too.
FORMS = {
    "raw features": (NormSoftmax(), 1.0, {"normalize_features": False}, 1),
    "raw features, large": (NormSoftmax(), 16.0, {"normalize_features": False}, 1),
    "raw": (Softmax(), 1.0, {}, 1),
    "bias": (Softmax(), 1.0, {}, 1),
    "raw table": (Softmax(), 8.0, {"normalize_features": True}, 1),
    "2 centres": (CosFace(0.35), 64.0, {"centers_per_class": 2}, 2),
    "3 centres": (CosFace(0.35), 64.0, {"centers_per_class": 3}, 3),
    "3 centres, large": (CosFace(0.35), 100.0, {"centers_per_class": 3}, 3),
    "6 raw centres": (Softmax(), 1.0, {"centers_per_class": 6}, 6),
}


# In the interpreter: one shape and kind of each form, and those forms in 16 bits whose kernels differ there.
REPRESENTATIVES = [(form, "float32", "hard", SHAPES[1]) for form in FORMS]
REPRESENTATIVES += [(form, "bfloat16", "hard", SHAPES[1]) for form in ("raw", "bias", "3 centres, large")]
# Every form in every precision at the shape of ragged tiles and slabs.
RAGGED = [(form, precision, "hard", SHAPES[1]) for form in FORMS for precision in PRECISIONS]
GRID = [*FORMS], [*PRECISIONS], KINDS, SHAPES
FORM_PAIRS = pairs(*GRID, first=REPRESENTATIVES)


@pytest.mark.parametrize(
    ("form", "precision", "kind", "shape"), dict.fromkeys([*pairs(*GRID, first=RAGGED), *FORM_PAIRS]), ids=str
)
@slow_when(
    lambda backend, form, precision, kind, shape: (
        (form, precision, kind, shape) not in (REPRESENTATIVES if interpreted(backend) else FORM_PAIRS)
    )
)
def test_error_at_most_the_references(backend, device, form, precision, kind, shape):
    margin, scale, options, centers = FORMS[form]
    *dtypes, autocast = PRECISIONS[precision]
    ours, plain = losses(margin, scale, **options)
    ours = partial(ours, backend=backend)
    if form == "bias":
        ours, plain = split(ours), split(plain)
    inputs = whole_classes(draws(kind, sized(shape, centers, backend), *dtypes, backend=backend), centers)
    # Raw logits are as large as the product of two rows of norm 3, or of sqrt(D).
    largest = scale * (1 if margin.normalize_features and options.get("normalize_features", True) else shape[2])
    check_rule(ours, plain, inputs, device=device, scale=largest, autocast=autocast)


KEPT_FORMS, KEPT_PRECISIONS = ["raw", "bias", "3 centres", "6 raw centres"], ["float32", "autocast"]
BUDGETS = [0, 67 * 128 * 2 * 2, 67 * 384 * 4, 10**9]
KEPT = ("3 centres", "autocast", 67 * 384 * 4)
PAIRS = pairs(KEPT_FORMS, KEPT_PRECISIONS, BUDGETS, first=[KEPT])


@pytest.mark.parametrize("memory_budget", BUDGETS)
@pytest.mark.parametrize("precision", KEPT_PRECISIONS)
@pytest.mark.parametrize("form", KEPT_FORMS)
@slow_when(
    lambda backend, form, precision, memory_budget: (
        (form, precision, memory_budget) not in ([KEPT] if interpreted(backend) else PAIRS)
    )
)
@repeats_when(
    lambda backend, form, precision, memory_budget: interpreted(backend) and (form, precision, memory_budget) not in PAIRS
)
def test_any_budget(backend, device, form, precision, memory_budget):
    """None kept, some of two sizes of slab, all."""
    margin, scale, options, centers = FORMS[form]
    *dtypes, autocast = PRECISIONS[precision]
    ours, plain = losses(margin, scale, **options)
    ours = partial(ours, backend=backend, memory_budget=memory_budget)
    if form == "bias":
        ours, plain = split(ours), split(plain)
    inputs = whole_classes(draws("hard", sized(SHAPES[1], centers, backend), *dtypes, backend=backend), centers)
    check_rule(ours, plain, inputs, device=device, scale=64.0, autocast=autocast)


@pytest.mark.parametrize("form", FORMS)
@slow_when(lambda backend, form: interpreted(backend) and form != "3 centres")
def test_same_bits_every_time_and_nothing_unwritten(backend, device, form):
    margin, scale, options, centers = FORMS[form]
    ours = partial(losses(margin, scale, **options)[0], backend=backend, memory_budget=7 * 384 * 2)
    ours = split(ours) if form == "bias" else ours
    features, weight, labels = (tensor.to(device) for tensor in make("hard", *sized((7, 1002, 70), centers, backend)))
    inputs = features.bfloat16(), weight, labels // centers, torch.linspace(1, 2, 7, device=device)
    first = evaluate(ours, *inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    try:
        second = evaluate(ours, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
@slow_when(lambda backend, form: interpreted(backend) and form not in ("raw", "bias", "3 centres, large"))
def test_ignored_rows_and_the_first_and_last_class(backend, device, form):
    """Rows of class 0 and C - 1, so the first and the last rows of the table; ignored rows full of NaN reach nothing."""
    margin, scale, options, centers = FORMS[form]
    ours, plain = losses(margin, scale, **options)
    ours = partial(ours, backend=backend)
    if form == "bias":
        ours, plain = split(ours), split(plain)
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", *sized((7, 522, 70), centers, backend)))
    labels, last = labels // centers, len(weight) // centers - 1
    labels[0], labels[1], labels[2], labels[3] = 0, last, -100, last
    features[2] = torch.nan
    upstream = torch.linspace(1, 2, 7, device=device)
    got = evaluate(ours, features, weight, labels, upstream)
    counted = labels != -100
    upstream = upstream * counted
    exact = evaluate(plain, torch.where(counted[:, None], features, 0.0).double(), weight.double(), labels, upstream)
    assert not got[0][2] and not got[1][2].any()
    for tensor, wanted in zip(got, exact, strict=True):
        wanted = wanted.clone()
        if len(wanted) == 7:
            wanted[2] = 0
        # 64 or 140 roundings of an exponent, some additions.
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=200 * 2**-23 * float(wanted.abs().max()))


def test_raw_logits_of_any_size(backend, device):
    """An exponent of 10^12 is rounded to 10^5: a row's largest must be the shift to the last bit."""
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 7, 300, 16))
    for size in (1e6, 1e10, 1e12):
        loss = margin_softmax_loss(features * size, weight, labels, margin=Softmax(), reduction="none", backend=backend)
        exact = F.cross_entropy((features * size).double() @ weight.double().T, labels, reduction="none")
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_nearest_centre_of_flat_logits(backend, device, autocast):
    """A table as small as at the start of training: exponentials that differ by 10^-3, and few of them in bfloat16."""
    ours, plain = losses(Softmax(), 1.0, centers_per_class=3)
    made = draws("uniform", sized(SHAPES[1], 3, backend), *[torch.float32] * 2, backend=backend)
    inputs = [(x, 1e-3 * w, y) for x, w, y in whole_classes(made, 3)]
    check_rule(partial(ours, backend=backend), plain, inputs, device=device, scale=1.0, autocast=autocast)


def test_raw_features_of_16_bits(backend, device):
    """Near its class LSoftmax's gradient is a small difference of two large ones, by the product and by ‖x‖: rounded once."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 64, generator=generator).to(device)
    labels = torch.arange(60, device=device)
    features = (weight[:60] + 0.02 * torch.randn(60, 64, generator=generator).to(device)).bfloat16()

    def gradient(features, backend):
        weights = weight.to(torch.promote_types(features.dtype, torch.float32))
        loss = partial(margin_softmax_loss, margin=LSoftmax(4), scale=0.05, reduction="sum", backend=backend)
        return evaluate(loss, features, weights, labels, torch.ones((), device=device))[1].double()

    exact = gradient(features.double(), "torch")
    found = gradient(features, backend)
    errors = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.max() < 2**-7, errors.max()


@pytest.mark.parametrize(
    ("margin", "what", "size"),
    [
        (CosFace(0.35), "features", 1e-13),
        (CosFace(0.35), "features", 1e-25),
        (LSoftmax(2), "features", 1e-13),
        (LSoftmax(2), "table", 1e-13),
    ],
)
def test_short_rows_have_a_direction(margin, what, size, backend, device):
    """The derivative of a length, which is not a unit row, has them."""
    features, weight, labels = make("uniform", 4, 300, 16)
    features, weight, labels = features.to(device), weight.to(device), labels.to(device)
    {"features": features, "table": weight}[what].mul_(size)
    raw = {"normalize_features": False} if isinstance(margin, CosFace) else {}
    loss = partial(margin_softmax_loss, margin=margin, scale=1.0, reduction="sum", **raw)

    def plain(x, w, y):
        if margin.normalize_weight:
            w = F.normalize(w, eps=1e-12)
        logits = x @ w.T
        length = x.norm(dim=1) * (1.0 if margin.normalize_weight else w[y].norm(dim=1))
        target = margin.target_logit(logits.gather(1, y[:, None]).squeeze(1), length)
        return F.cross_entropy(logits.scatter(1, y[:, None], target[:, None]), y, reduction="sum")

    exact = evaluate(plain, features.double(), weight.double(), labels, torch.ones((), device=device))
    found = evaluate(partial(loss, backend=backend), features, weight, labels, torch.ones((), device=device))
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).norm() < 1e-5 * other.norm()


def test_rows_of_zeros_keep_their_gradient(backend, device):
    """A rectifier may give rows of zeros. Their gradient is not 0 if the target's logit is linear in them."""
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 7, 300, 16))
    features[1] = 0
    upstream = torch.ones(7, device=device)
    for margin, table in ((NormSoftmax(), F.normalize), (CosFace(0.0), F.normalize), (Softmax(), lambda w: w)):
        ours = partial(margin_softmax_loss, margin=margin, normalize_features=False, reduction="none", backend=backend)
        got = evaluate(ours, features, weight, labels, upstream)

        def plain(x, w, y, table=table):
            return F.cross_entropy(x @ table(w).T, y, reduction="none")

        exact = evaluate(plain, features.double(), weight.double(), labels, upstream)
        torch.testing.assert_close(got[1][1].double(), exact[1][1], rtol=0, atol=1e-5)


def test_ignored_row_beside_a_nan_in_the_table(backend, device):
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 7, 300, 16))
    labels[1], weight[5, 0] = -100, torch.nan
    ours = partial(margin_softmax_loss, margin=Softmax(), reduction="none", backend=backend)
    loss, dx, _ = evaluate(ours, features, weight, labels, torch.ones(7, device=device))
    assert loss[1] == 0 and not dx[1].any() and dx[0].isnan().all()


def test_overflowing_target_beside_tiny_negatives(backend, device):
    """The target's own centres take no part in a row's maximum: at scale 1000 they would hide every negative."""
    features, weight, labels = make("peaked", *sized((7, 522, 70), 3, backend))
    labels = labels // 3
    options = {"scale": 1000.0, "centers_per_class": 3}
    ours, plain = losses(CosFace(1.9), **options)
    inputs = [(features, weight, labels)]
    check_rule(partial(ours, backend=backend), plain, inputs, device=device, scale=1000.0)


def test_backward_finds_what_forward_kept_beside_a_bias(backend, device, monkeypatch):
    """Backward's features have a column more, which must not make other slabs: of 384 rows for D = 4, of 256 for D = 5."""
    monkeypatch.setattr("cosface_kernels.ops.slabs.SLAB_CLASSES_MAX", 2**16)
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", 257 * (7 + 2 * 4))
    monkeypatch.setattr(slabs, "SLAB_FLOPS", 1)  # of a GPU: one wave, whatever D is
    features, table, labels = make("uniform", 7, 700, 4)
    inputs = features.to(device), table.to(device), labels.to(device), torch.ones(7, device=device)
    bias = torch.linspace(-1, 1, 700, device=device)
    loss = partial(margin_softmax_loss, margin=Softmax(), bias=bias, reduction="none", backend=backend)
    (_, _, kept), (_, _, again) = (evaluate(partial(loss, memory_budget=budget), *inputs) for budget in (2**30, 0))
    torch.testing.assert_close(kept, again)
