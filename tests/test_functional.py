"""Do the losses and their gradients equal the reference on every kind of call: reductions, ignored rows, labels, layouts?

Extreme numbers are in test_extremes.py, dtypes in test_work.py, ways to ask for a gradient in test_autograd.py.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import evaluate
from rounding import NUM_CLASSES, assert_close, assert_equals_reference, draw, tolerance
from selection import interpreted, pairs, slab_loop_when, slow_when

from cosface_kernels import cosface_loss, cosine_lse, reference

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)

pytestmark = pytest.mark.usefixtures("small_slabs")


def test_equals_cross_entropy(device):
    """The expression that this package replaces, written out: an oracle that shares no line with reference.py."""
    features, weight, labels = draw(device)
    labels[2] = -100

    def plain(x, w, y):
        one_hot = F.one_hot(y.clamp(min=0), NUM_CLASSES).to(x)
        return F.cross_entropy(64.0 * (F.normalize(x) @ F.normalize(w).T - 0.35 * one_hot), y)

    upstream = torch.ones((), device=device)
    ours, exact = evaluate(cosface_loss, features, weight, labels, upstream), evaluate(plain, features, weight, labels, upstream)
    for tensor, wanted in zip(ours, exact, strict=True):
        assert_close(tensor, wanted, tolerance(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_reductions(reduction, ignore_index, dtype, device):
    features, weight, labels = draw(device, dtype)
    labels[::3] = ignore_index
    losses, *_ = assert_equals_reference(features, weight, labels, reduction=reduction, ignore_index=ignore_index)
    assert losses.shape == (labels.shape if reduction == "none" else ())


def test_ignored_rows_take_no_nan_from_one_class_to_others(device, backend, small_slabs):
    """As F.cross_entropy of a batch without a row that counts: the gradient of each other class is 0."""
    features, weight, labels = draw(device, torch.float32)
    weight[3] = torch.nan
    labels[:] = -100
    for budget in (0, "auto"):
        loss = partial(cosface_loss, reduction="none", backend=backend, memory_budget=budget)
        losses, dx, dw = evaluate(loss, features, weight, labels, torch.ones(len(labels), device=device))
        assert not losses.any() and not dx.any()
        assert not dw[:3].any() and not dw[4:].any()


IGNORED = [("none", -100, torch.nan), ("none", 1, torch.nan)]


@pytest.mark.parametrize(
    ("reduction", "ignore_index", "poison"),
    pairs(["mean", "sum", "none"], [-100, 1], [torch.nan, torch.inf, 1e30], first=IGNORED),
)
@slow_when(lambda backend, reduction, poison: interpreted(backend) and (reduction != "none" or poison is not torch.nan))
def test_ignored_rows_reach_nothing(reduction, ignore_index, poison, device, backend):
    """Whatever they hold, a batch with ignored rows is the batch without them."""
    features, weight, labels = draw(device, torch.float32)
    labels[labels == ignore_index] += 1
    labels[[1, 4]] = ignore_index
    features[1], features[4, 3] = poison, poison
    counted = labels != ignore_index
    upstream = torch.linspace(1, 2, len(labels), device=device) if reduction == "none" else torch.ones((), device=device)
    loss = partial(cosface_loss, ignore_index=ignore_index, reduction=reduction, backend=backend)
    losses, dx, dw = evaluate(loss, features, weight, labels, upstream)
    without = evaluate(loss, features[counted], weight, labels[counted], upstream[counted] if reduction == "none" else upstream)
    assert not dx[~counted].any()
    if reduction == "none":
        assert not losses[~counted].any()
        losses = losses[counted]
    for tensor, wanted in zip((losses, dx[counted], dw), without, strict=True):
        assert_close(tensor, wanted.double(), tolerance(torch.float32))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["all ignored", "all ignored and NaN", "no rows", "one class"])
@slab_loop_when(lambda case: case == "no rows")
def test_nothing_to_learn_from(case, reduction, device, backend):
    """Loss 0 and gradients 0."""
    num_rows, num_classes = 0 if case == "no rows" else 5, 1 if case == "one class" else 9
    features, weight, labels = draw(device, torch.float32, num_rows=num_rows, num_classes=num_classes)
    if "ignored" in case:
        labels[:] = -100
    if "NaN" in case:
        features[:] = torch.nan
    upstream = torch.ones(labels.shape if reduction == "none" else (), device=device)
    for tensor in evaluate(partial(cosface_loss, reduction=reduction, backend=backend), features, weight, labels, upstream):
        assert not tensor.any()  # NaN counts as nonzero


@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_cosine_lse(ignore_index, device):
    """Both results and their gradients; (0, 0) and none for ignored rows, which hold NaN here."""
    features, weight, labels = draw(device)
    labels[[1, 4]] = ignore_index
    features[[1, 4]] = torch.nan
    upstream = torch.linspace(-1, 1, 2 * len(labels), device=device)

    def both(function):
        def results(*tensors):
            return torch.cat(function(*tensors, ignore_index=ignore_index))

        return evaluate(results, features, weight, labels, upstream)

    ours, exact = both(cosine_lse), both(reference.cosine_lse)
    for tensor, wanted in zip(ours, exact, strict=True):
        assert_close(tensor, wanted, tolerance(torch.float64))
    for tensor in (ours[0].view(2, -1).T, ours[1]):
        assert not tensor[labels == ignore_index].any()


def test_one_class_has_no_negatives(device):
    features, weight, labels = draw(device, num_rows=5, num_classes=1)
    features.requires_grad_(), weight.requires_grad_()
    lse, cosine = cosine_lse(features, weight, labels)
    assert (lse == -torch.inf).all()
    assert_close(cosine.detach(), F.cosine_similarity(features, weight).detach(), tolerance(torch.float64))
    for gradient in torch.autograd.grad(lse.sum(), (features, weight)):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_label_dtypes(dtype, device):
    features, weight, labels = draw(device, torch.float32)
    labels %= 128  # every dtype holds these
    upstream = torch.ones((), device=device)
    ours = evaluate(cosface_loss, features, weight, labels.cpu().to(dtype).to(device), upstream)
    for tensor, wanted in zip(ours, evaluate(cosface_loss, features, weight, labels, upstream), strict=True):
        assert torch.equal(tensor, wanted)


LAYOUTS = {
    "transposed": lambda rows: rows.T.contiguous().T,
    "every other row": lambda rows: rows.repeat_interleave(2, 0)[::2],
    "every other column": lambda rows: rows.repeat_interleave(2, 1)[:, ::2],
    "misaligned": lambda rows: torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view_as(rows),
    "one row, stride 0": lambda rows: rows[:1].expand_as(rows),
    "one column, stride 0": lambda rows: rows[:, :1].expand_as(rows),
}
VECTOR_LAYOUTS = {
    "every other": lambda vector: vector.repeat_interleave(2)[::2],
    "stride 0": lambda vector: vector[:1].expand_as(vector),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["features", "weight"])
def test_matrix_layouts(which, layout, device, backend):
    tensors = dict(zip(("features", "weight", "labels"), draw(device, torch.float32), strict=True))
    tensors[which] = LAYOUTS[layout](tensors[which])
    one_class = (which, layout) == ("weight", "one row, stride 0")
    assert_equals_reference(**tensors, reduction="none", cancels=one_class, backend=backend)


@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
@pytest.mark.parametrize("which", ["labels", "upstream"])
def test_vector_layouts(which, layout, device, backend):
    tensors = dict(zip(("features", "weight", "labels"), draw(device, torch.float32), strict=True))
    tensors["upstream"] = torch.linspace(1, 2, len(tensors["labels"]), device=device)
    tensors[which] = VECTOR_LAYOUTS[layout](tensors[which])
    assert_equals_reference(**tensors, reduction="none", backend=backend)


def test_repeated_labels_add_up(device, backend):
    features, weight, labels = draw(device, torch.float32, num_rows=9)
    # The same class in several rows that are not neighbours; classes at both ends of a slab and in the short last one.
    labels[:] = torch.tensor([299, 127, 0, 299, 128, 0, 299, 0, 127])
    assert_equals_reference(features, weight, labels, reduction="none", backend=backend)


def test_arcface_from_cosine_lse(device):
    features, weight, labels = draw(device)
    labels[3] = -100

    def bent(cosine):
        return torch.cos(torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7)) + 0.5)

    def ours(x, w, y):
        lse, cosine = cosine_lse(x, w, y, scale=32.0)
        return F.softplus(lse - 32.0 * bent(cosine), threshold=40)[y != -100].sum()

    def plain(x, w, y):
        x, y = x[y != -100], y[y != -100]
        cosines = F.normalize(x) @ F.normalize(w).T
        return F.cross_entropy(32.0 * torch.where(F.one_hot(y, NUM_CLASSES) == 1, bent(cosines), cosines), y, reduction="sum")

    upstream = torch.ones((), device=device)
    exact = evaluate(plain, features, weight, labels, upstream)
    for tensor, wanted in zip(evaluate(ours, features, weight, labels, upstream), exact, strict=True):
        assert_close(tensor, wanted, tolerance(torch.float64))
