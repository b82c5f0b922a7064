"""Does CosFaceLoss hold, move and train a class table as a module should, and find the nearest classes?"""

import copy
import math
import pickle
import warnings

import pytest
import torch
from rounding import NUM_CLASSES, SIZE, draw
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from cosface_kernels import (
    CosFaceLoss,
    MarginSoftmaxLoss,
    ShardedCosFaceLoss,
    cosface_loss,
    margin_softmax_loss,
    margins,
    reference,
)
from cosface_kernels.margins import CosFace

pytestmark = pytest.mark.usefixtures("small_slabs")


def head_and_batch(device, dtype=torch.float64, **options):
    """A CosFaceLoss with draw()'s table, and draw()'s batch."""
    features, weight, labels = draw(device, dtype)
    head = CosFaceLoss(SIZE, NUM_CLASSES, device=device, dtype=dtype, **options)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head, features, labels


def test_table(device):
    torch.manual_seed(0)
    head = CosFaceLoss(128, 1000, device=device)
    assert isinstance(head.weight, torch.nn.Parameter) and [*head.state_dict()] == ["weight"]
    assert (head.weight.shape, head.weight.dtype, head.weight.device.type) == ((1000, 128), torch.float32, device.type)
    # The mean and the standard deviation of that many draws, each within five of its own standard deviations.
    draws = head.weight.numel()
    assert abs(head.weight.mean()) < 5 * 0.01 / math.sqrt(draws)
    assert abs(head.weight.std() - 0.01) < 5 * 0.01 / math.sqrt(2 * draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_table_dtype(dtype, device):
    assert CosFaceLoss(3, 5, device=device, dtype=dtype).weight.dtype == dtype


def test_defaults_are_the_functions():
    head = CosFaceLoss(3, 5)
    names = ("scale", "margin", "reduction", "ignore_index", "memory_budget", "backend")
    assert {name: getattr(head, name) for name in names} == {name: cosface_loss.__kwdefaults__[name] for name in names}


OPTIONS = {"scale": 16.0, "margin": 0.1, "reduction": "sum", "ignore_index": 2, "memory_budget": 0, "backend": "torch"}
CHANGES = {"scale": 8.0, "margin": 0.3, "reduction": "mean", "ignore_index": -100}  # each gives another loss
# {head: (its function, options, changes)}
WITH_OPTIONS = {
    CosFaceLoss: (cosface_loss, OPTIONS, CHANGES),
    MarginSoftmaxLoss: (
        margin_softmax_loss,
        {**OPTIONS, "margin": CosFace(0.1), "normalize_features": False, "centers_per_class": 3},
        {**CHANGES, "margin": CosFace(0.3), "normalize_features": True, "centers_per_class": 1},
    ),
}


@pytest.mark.parametrize("kind", WITH_OPTIONS)
def test_every_option_reaches_the_loss(kind, device):
    function, options, changes = WITH_OPTIONS[kind]
    features, _, labels = draw(device)
    labels[0] = options["ignore_index"]
    head = kind(SIZE, NUM_CLASSES, device=device, dtype=torch.float64, **options)
    loss = head(features, labels)
    assert torch.equal(loss, function(features, head.weight, labels, **options))
    for name, other in changes.items():
        assert not torch.equal(loss, function(features, head.weight, labels, **options | {name: other})), name


@pytest.mark.parametrize("kind", WITH_OPTIONS)
def test_memory_budget_and_backend_reach_the_loss(kind, device):
    _, options, _ = WITH_OPTIONS[kind]
    features, _, labels = draw(device)
    head = kind(SIZE, NUM_CLASSES, device=device, dtype=torch.float64, **options)
    nothing_kept = held_for_backward(head, features, labels)
    head.memory_budget = 2**40
    assert held_for_backward(head, features, labels) >= nothing_kept + len(labels) * head.weight.shape[0] * 8
    head.backend = "cpu"
    with pytest.raises(ValueError, match='backend "cpu" cannot be used here'):  # in float64
        head(features, labels)


def held_for_backward(head, *batch):
    """The bytes that autograd saves."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes), lambda _: None):
        head(*batch)
    return sum(sizes)


def test_reset_parameters(device):
    head, *_ = head_and_batch(device)
    torch.manual_seed(3)
    head.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(head.weight, CosFaceLoss(SIZE, NUM_CLASSES, device=device, dtype=torch.float64).weight)


def test_from_meta(device):
    head = CosFaceLoss(SIZE, NUM_CLASSES, device="meta")
    assert head.weight.is_meta
    head = head.to_empty(device=device)
    torch.manual_seed(3)
    head.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(head.weight, CosFaceLoss(SIZE, NUM_CLASSES, device=device).weight)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda head: pickle.loads(pickle.dumps(head)),
    "state_dict": lambda head: load(CosFaceLoss(SIZE, NUM_CLASSES, dtype=torch.float64, **OPTIONS), head.state_dict()),
}


def load(head, state):
    head.load_state_dict(state)
    return head.to(state["weight"].device)


@pytest.mark.parametrize("how", COPIES)
def test_copies(how, device):
    """Equal in all, sharing nothing."""
    head, features, labels = head_and_batch(device, **OPTIONS)
    copied = COPIES[how](head)
    assert torch.equal(copied(features, labels), head(features, labels))
    assert repr(copied) == repr(head)
    with torch.no_grad():
        copied.weight.zero_()
    assert head.weight.any()


def test_repr():
    assert repr(CosFaceLoss(3, 5, scale=30.0)) == "CosFaceLoss(3, 5, scale=30.0, margin=0.35, reduction='mean')"


def test_logits_are_scaled_cosines(device):
    head, features, _ = head_and_batch(device, scale=16.0)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], head.weight[None], dim=2)
    # 16 products and two norms in either: some tens of roundings, of numbers up to 16.
    torch.testing.assert_close(head.logits(features), 16 * cosines, rtol=0, atol=16 * 50 * torch.finfo(torch.float64).eps)
    assert torch.autograd.gradcheck(head.logits, (features.requires_grad_(),), fast_mode=True)


# The last of one slab and the first of the next, among others; 128 is a whole slab, 300 all classes.
@pytest.mark.parametrize("k", [0, 1, 5, 44, 45, 128, 129, NUM_CLASSES])
def test_topk_equals_that_of_logits(k, device):
    head, features, _ = head_and_batch(device)
    values, indices = head.topk(features.requires_grad_(), k)
    wanted = head.logits(features).topk(k)
    assert values.shape == indices.shape == (len(features), k) and not values.requires_grad
    torch.testing.assert_close(values, wanted.values, rtol=0, atol=64 * 50 * torch.finfo(torch.float64).eps)
    assert torch.equal(indices, wanted.indices)


@pytest.mark.parametrize("best", [0, 127, 128, 255, 256, 299])
def test_topk_finds_the_best_at_slab_boundaries(best, device):
    head, *_ = head_and_batch(device)
    _, indices = head.topk(head.weight[[best]], 3)
    assert indices[0, 0] == best


class Counted(torch.nn.Module):
    """A parametrisation that counts how often the table is made."""

    made = 0

    def forward(self, rows):
        self.made += 1
        return 2 * rows


def test_a_parametrised_table_is_loaded_and_does_not_grow():
    head = CosFaceLoss(SIZE, NUM_CLASSES)
    parametrize.register_parametrization(head, "weight", torch.nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the table was not in it
        head.load_state_dict(head.state_dict())
    for change in (lambda: head.grow(3), lambda: head.remove([0])):
        with pytest.raises(ValueError, match="is made anew from other parameters"):
            change()
    assert head.num_classes == NUM_CLASSES == len(head.weight)


class Scores(torch.nn.Module):
    """A model to deploy."""

    def __init__(self, head, method):
        super().__init__()
        self.head, self.method = head, method

    def forward(self, features):
        return self.method(self.head, features)


@pytest.mark.slow
@pytest.mark.parametrize("method", [lambda head, x: head.topk(x, 3), lambda head, x: [head.logits(x)]], ids=["topk", "logits"])
def test_export_for_any_batch(method, monkeypatch):
    monkeypatch.setattr("cosface_kernels.heads.logits.TRACED_CLASSES", 128)  # several slabs
    head = MarginSoftmaxLoss(SIZE, NUM_CLASSES // 2, margin=margins.ArcFace(), centers_per_class=2).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(Scores(head, method), (torch.randn(8, SIZE),), dynamic_shapes=({0: batch},))
    for rows in (1, 5, 40):
        features = torch.randn(rows, SIZE)
        got, wanted = exported.module()(features), method(head, features)
        assert torch.equal(got[-1], wanted[-1]) and torch.allclose(got[0], wanted[0], rtol=1e-6, atol=64 * 2**-21)


@pytest.mark.parametrize("kind", [CosFaceLoss, ShardedCosFaceLoss])
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_a_parametrised_table_is_made_once_a_call(kind, sample_rate, device):
    head = kind(SIZE, NUM_CLASSES, device=device, sample_rate=sample_rate)
    counted = Counted()
    parametrize.register_parametrization(head, "weight", counted)
    features, _, labels = draw(device, torch.float32)
    for call in (lambda: head(features, labels).backward(), lambda: head.logits(features), lambda: head.topk(features, 3)):
        counted.made = 0
        call()
        assert counted.made == 1
    assert head.parametrizations.weight.original.grad.to_dense().any()


class Widths(TorchDispatchMode):
    """The widest row of what any operator returns, among results with this number of rows."""

    def __init__(self, num_rows):
        super().__init__()
        self.num_rows, self.widest = num_rows, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and len(tensor) == self.num_rows:
                self.widest = max(self.widest, tensor.shape[1])
        return result


def test_topk_never_holds_all_logits(device):
    head, features, _ = head_and_batch(device)
    with Widths(len(features)) as widths:
        head.topk(features, 5)
    assert widths.widest == 128


@pytest.mark.parametrize("features_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_topk_of_mixed_dtypes(features_dtype, device):
    head, features, _ = head_and_batch(device, torch.float32)
    features = features.to(features_dtype)
    values, indices = head.topk(features, 3)
    assert values.dtype == head.logits(features).dtype == torch.float32
    torch.testing.assert_close(
        values, head.logits(features).gather(1, indices), rtol=0, atol=64 * 50 * torch.finfo(torch.float32).eps
    )


def test_topk_of_no_rows(device):
    head, features, _ = head_and_batch(device)
    values, indices = head.topk(features[:0], 3)
    assert values.shape == indices.shape == (0, 3)


def test_training_equals_the_references(device):
    """Five steps of SGD with momentum, features and table: an error in any gradient would grow."""
    head, features, labels = head_and_batch(device)
    tables = head.weight, head.weight.detach().clone().requires_grad_()
    embeddings = features.clone().requires_grad_(), features.clone().requires_grad_()
    losses = [[], []]
    for loss, weight, x, history in zip((head, reference.cosface_loss), tables, embeddings, losses, strict=True):
        optimizer = torch.optim.SGD([weight, x], lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            value = loss(x, labels) if loss is head else loss(x, weight, labels)
            value.backward()
            optimizer.step()
            history.append(value.item())
    assert losses[0][-1] < 0.7 * losses[0][0]
    # Rounding times s = 64, carried through five steps.
    relative = 5 * 64 * 50 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(*(torch.tensor(history, dtype=torch.float64) for history in losses), rtol=relative, atol=0)
    for ours, wanted in (tables, embeddings):
        assert (ours - wanted).norm() <= relative * wanted.norm()


def test_logits_and_topk_are_float32_whatever_the_norm_or_autocast(device):
    """A hundred classes within 1e-4 of each other: rounded to bfloat16 they would be a few ties."""
    head = CosFaceLoss(16, 100, device=device)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    with torch.no_grad():
        head.weight.copy_(direction + 1e-2 * torch.randn(100, 16, generator=generator))
    features = 1e25 * direction.to(device)[None]
    exact = reference.logits(features.double(), head.weight.detach().double(), scale=head.scale)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits, (values, indices) = head.logits(features), head.topk(features, 5)
    assert logits.dtype == values.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(indices, exact.topk(5).indices)
