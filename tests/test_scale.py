"""Is a scale that is a tensor the loss of its number, with the exact derivative; and do heads learn one?"""

import copy
import pickle
import re
from functools import partial

import pytest
import torch
from cases import assert_as_accurate, draws
from margin_rows import ROWS, batch, written_out
from rounding import NUM_CLASSES, SIZE, assert_close, draw, tolerance
from selection import interpreted, slab_loop_when, slow_when

from cosface_kernels import CosFaceLoss, FusedSGD, MarginSoftmaxLoss, cosface_loss, cosine_lse, margin_softmax_loss, reference

pytestmark = pytest.mark.usefixtures("small_slabs")


def derivative(loss, features, weight, labels, upstream, scale):
    """∂/∂s of the sum of losses times upstream, (1,)."""
    scale = torch.tensor(scale, dtype=features.dtype, device=features.device, requires_grad=True)
    losses = loss(features, weight, labels, scale=scale)
    return torch.autograd.grad(losses, scale, upstream.to(losses.dtype))[0][None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["uniform", "hard"])
@pytest.mark.parametrize("scale", [30.0, 300.0])  # a constant shift, and each row's maximum
@slow_when(lambda backend, kind, scale, dtype: interpreted(backend) and (kind, scale, dtype) != ("hard", 30.0, torch.float32))
@slab_loop_when(lambda scale: scale == 300)
def test_derivative(kind, scale, dtype, backend, device):
    """By the rule of cases.py."""
    results = []
    for features, weight, labels in draws(kind, (7, 300, 16), dtype, dtype, backend=backend):
        labels[2], features[2] = -100, torch.nan
        upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1))
        tensors = [tensor.to(device) for tensor in (features, weight, labels, upstream)]
        ours = derivative(partial(cosface_loss, reduction="none", backend=backend), *tensors, scale)
        plain = partial(reference.cosface_loss, reduction="none")
        exact = derivative(plain, tensors[0].double(), tensors[1].double(), *tensors[2:], scale)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            bound = derivative(plain, tensors[0].float(), tensors[1].float(), *tensors[2:], scale)
        results.append([tensor.cpu() for tensor in (ours, exact, bound)])
    low = dtype == torch.bfloat16
    # Of both terms, the log-sum-exp's and the target's, an exponent's rounding.
    rounded = 2 * scale * torch.finfo(torch.float32).eps
    assert_as_accurate("ds", *map(torch.cat, zip(*results, strict=True)), luck=not low, rounded=rounded)


FORMS = ["CosFace", "ArcFace x3", "AdaFace", "Softmax bias", "CosFace raw"]


@pytest.mark.parametrize("row", [ROWS[name] for name in FORMS], ids=FORMS)
def test_every_form(row, device):
    """Loss and derivatives by features, table, bias and scale, in float64; frozen features and table leave that by the scale."""
    *tensors, labels = ((each := batch(row, device))[0], each[1], *each[3:], each[2])
    tensors = [tensor.requires_grad_() for tensor in tensors]
    scale = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)

    def ours(features, weight, *bias):
        bias = {"bias": bias[0]} if bias else {}
        return margin_softmax_loss(features, weight, labels, margin=row.margin, scale=scale, **row.options, **bias)

    found = torch.autograd.grad(loss := ours(*tensors), [scale, *tensors])
    exact_loss = written_out(row, *tensors[:2], labels, *tensors[2:], scale=scale)
    exact = torch.autograd.grad(exact_loss, [scale, *tensors])
    assert_close(loss.detach(), exact_loss.detach(), tolerance(torch.float64))
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, tolerance(torch.float64))
    (alone,) = torch.autograd.grad(ours(*(tensor.detach() for tensor in tensors)), scale)
    assert torch.equal(alone, found[0])


def test_cosine_lse(device):
    features, weight, labels = draw(device)
    labels[1] = -100
    scale = torch.tensor(8.0, dtype=torch.float64, device=device, requires_grad=True)
    upstream = torch.linspace(1, 2, len(labels), dtype=torch.float64, device=device)
    (found,) = torch.autograd.grad(cosine_lse(features, weight, labels, scale=scale)[0], scale, upstream)
    (exact,) = torch.autograd.grad(reference.cosine_lse(features, weight, labels, scale=scale)[0], scale, upstream)
    assert_close(found, exact, tolerance(torch.float64))
    (first,) = torch.autograd.grad(cosine_lse(features, weight, labels, scale=scale)[0].sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.backward()


def test_no_negatives(device):
    """One class: log 0, whatever the scale."""
    features, weight, labels = draw(device, num_rows=3, num_classes=1)
    scale = torch.tensor(8.0, device=device, requires_grad=True)
    cosface_loss(features, weight, labels, scale=scale).backward()
    assert scale.grad == 0


MISTAKES = {
    "shape": (
        torch.ones(1),
        ValueError,
        r"scale must be .* a tensor of shape \(\) .*, got a tensor of shape \(1,\), torch.float32",
    ),
    "dtype": (torch.tensor(3), TypeError, r"scale must be .* a float dtype, got a tensor of shape \(\), torch.int64"),
    "negative": (torch.tensor(-1.0), ValueError, r"scale must be in \(0, 1e30\], got -1.0"),
    "nan": (torch.tensor(torch.nan), ValueError, "scale must be finite, got nan"),
    "meta": (torch.tensor(1.0, device="meta"), TypeError, "scale must have its numbers in memory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, device):
    scale, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        cosface_loss(*draw(device), scale=scale)


def learning(device, **options):
    torch.manual_seed(0)
    return CosFaceLoss(SIZE, NUM_CLASSES, scale=16.0, learnable_scale=True, device=device, **options)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_training_beside_a_fused_optimiser(sample_rate, device):
    """Steps of FusedSGD for the table and SGD for the scale are those of SGD for both; also with a scale of each batch's own."""
    trained = []
    for is_fused in (False, True):
        head = learning(device, sample_rate=sample_rate)
        fused = FusedSGD([head.weight], lr=0.1) if is_fused else torch.optim.SGD([head.weight], lr=0.1)
        plain = torch.optim.SGD([head.log_scale], lr=0.01)
        for step in range(3):
            features, _, labels = draw(device, torch.float32, num_rows=6)
            for part in range(2):
                loss = head(features[part::2] + step, labels[part::2])
                loss.backward()
                plain.step()  # between two records of one step of the table
                plain.zero_grad()
            fused.step()
            fused.zero_grad()
        trained.append((head.weight.detach(), head.scale.detach()[None]))
    for one, other in zip(*trained, strict=True):
        assert_close(one, other.double(), tolerance(torch.float32))
    assert trained[0][1] != 16


def test_number_of_a_head(device):
    """Read, set, saved and copied as any number, and float32 in any head."""
    head = learning(device)
    assert "log_scale" in head.state_dict()
    assert abs(head.scale - 16) < 1e-5 and "scale=16, learnable_scale=True" in repr(head)
    head.scale = 20.0
    assert abs(head.scale - 20) < 1e-5 and head.log_scale.requires_grad
    with pytest.raises(ValueError, match="scale must be in"):
        head.scale = -1.0
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), learning(device)):
        other.load_state_dict(head.state_dict())
        assert other.scale == head.scale
    assert head.bfloat16().log_scale.dtype == torch.float32 and abs(head.scale - 20) < 1e-5
    features = torch.randn(3, SIZE, device=device)
    assert_close(head.logits(features).detach(), head.scale.item() * head.logits(features).detach().double() / 20, 1e-5)
    head.reset_parameters()
    assert abs(head.scale - 16) < 1e-5


def test_number_in_place_of_a_parameter(device):
    features, _, labels = draw(device, torch.float32)
    head = CosFaceLoss(SIZE, NUM_CLASSES, scale=torch.nn.Parameter(torch.tensor(16.0)), device=device)
    loss = head(features, labels)
    loss.backward()
    assert head.scale.grad and "scale" in head.state_dict() and "scale=16, margin" in repr(head)
    head.scale = 16.0
    assert "scale" not in head.state_dict()
    assert_close(head(features, labels).detach(), loss.detach().double(), tolerance(torch.float32))
    head.scale = torch.tensor(16.0)
    assert_close(head(features, labels).detach(), loss.detach().double(), tolerance(torch.float32))
    with pytest.raises(ValueError, match=re.escape("a number, got scale = a tensor of shape ()")):
        CosFaceLoss(SIZE, NUM_CLASSES, scale=torch.tensor(16.0), learnable_scale=True)


@pytest.mark.slow
def test_compile(device):
    torch._dynamo.reset()
    head = MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=ROWS["CosFace"].margin, learnable_scale=True, device=device)
    features, _, labels = draw(device, torch.float32)
    losses = [loss(features, labels) for loss in (head, torch.compile(head, fullgraph=True, backend="aot_eager"))]
    wanted, found = (torch.autograd.grad(loss, [*head.parameters()]) for loss in losses)
    for one, other in zip((losses[1].detach(), *found), (losses[0].detach(), *wanted), strict=True):
        assert_close(one, other.double(), tolerance(torch.float32))
