"""Is every wrong argument refused, by name, with what it got and what it takes, and with nothing modified?"""

import math
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from fresh import run
from torch._subclasses.fake_tensor import FakeTensorMode

from cosface_kernels import CosFaceLoss, cosface_loss, cosine_lse, margin_softmax_loss, margins
from cosface_kernels.compat.insightface import PartialFC_V2
from cosface_kernels.ops import backends
from cosface_kernels.sampling import sample_classes

EMBEDDING_SIZE, NUM_CLASSES, NUM_ROWS = 3, 5, 4

WRONG_TENSORS = {
    "features a list": ("features", lambda t: t.tolist(), TypeError, r"tensor of shape \(N, D\), got list"),
    "weight None": ("weight", lambda t: None, TypeError, r"tensor of shape \(C, D\), got NoneType"),
    "labels a list": ("labels", lambda t: t.tolist(), TypeError, r"tensor of shape \(N,\), got list"),
    "features int64": ("features", lambda t: t.long(), TypeError, r"float32 or float64, got torch\.int64"),
    "features bool": ("features", lambda t: t > 0, TypeError, r"float32 or float64, got torch\.bool"),
    "weight complex64": ("weight", lambda t: t.cfloat(), TypeError, r"float32 or float64, got torch\.complex64"),
    "labels float32": ("labels", lambda t: t.float(), TypeError, r"integer dtype, got torch\.float32"),
    "labels bool": ("labels", lambda t: t > 0, TypeError, r"integer dtype, got torch\.bool"),
    "features 1-D": ("features", lambda t: t[0], ValueError, r"shape \(N, D\), got \(3,\)"),
    "features 3-D": ("features", lambda t: t[..., None], ValueError, r"shape \(N, D\), got \(4, 3, 1\)"),
    "weight 1-D": ("weight", lambda t: t[0], ValueError, r"shape \(C, D\), got \(3,\)"),
    "weight without classes": ("weight", lambda t: t[:0], ValueError, r"at least one class .* got shape \(0, 3\)"),
    "weight without dimensions": ("weight", lambda t: t[:, :0], ValueError, r"at least .* one dimension, got shape \(5, 0\)"),
    "features wider": ("features", lambda t: t.repeat(1, 2), ValueError, r"embedding size of weight, D = 3, got shape \(4, 6\)"),
    "labels too short": ("labels", lambda t: t[1:], ValueError, r"shape \(N,\) = \(4,\), .* got \(3,\)"),
    "labels a column": ("labels", lambda t: t[:, None], ValueError, r"shape \(N,\) = \(4,\), .* got \(4, 1\)"),
    "labels 0-D": ("labels", lambda t: t[0], ValueError, r"shape \(N,\) = \(4,\), .* got \(\)"),
}

# All three callables take these.
WRONG_OPTIONS = [
    *[("scale", value, ValueError) for value in (0, -1.0, math.nan, math.inf, -math.inf, 1e31, 10**400)],
    *[("scale", value, TypeError) for value in (True, "64", None, 64j, torch.tensor(64))],
    *[("ignore_index", value, TypeError) for value in (1.5, "none", None, True)],
    ("ignore_index", 2**63, ValueError),
    *[("memory_budget", value, TypeError) for value in (1.5, "all", None, True)],
    ("memory_budget", -1, ValueError),
    *[("backend", value, ValueError) for value in ("cuda", "", None, 0)],
]
# cosine_lse takes neither of these.
WRONG_LOSS_OPTIONS = [
    *[("margin", value, ValueError) for value in (math.nan, math.inf, -math.inf, 10**400)],
    *[("margin", value, TypeError) for value in (True, "0.35", None)],
    *[("reduction", value, ValueError) for value in ("avg", "MEAN", None, 0)],
]


def name_of_case(value):
    return repr(value)[:20] if not isinstance(value, type) else value.__name__


@pytest.fixture
def arguments(device):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_ROWS, EMBEDDING_SIZE, generator=generator).to(device).requires_grad_()
    weight = torch.randn(NUM_CLASSES, EMBEDDING_SIZE, generator=generator).to(device).requires_grad_()
    features.grad, weight.grad = torch.ones_like(features), torch.ones_like(weight)
    return {"features": features, "weight": weight, "labels": torch.tensor([0, 4, 2, 2], device=device)}


def assert_refused(error, message, arguments, call):
    """call() raises, and leaves the arguments and their gradients as they were."""
    tensors = [tensor for argument in arguments.values() for tensor in (argument, argument.grad) if tensor is not None]
    before = [(tensor, tensor.detach().clone(), tensor._version) for tensor in tensors]
    with pytest.raises(error, match=message):
        call()
    for tensor, value, version in before:
        assert tensor._version == version and torch.equal(tensor.detach(), value)


@pytest.mark.parametrize("function", [cosface_loss, cosine_lse])
@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensor(function, case, arguments):
    name, change, error, message = WRONG_TENSORS[case]
    changed = {**arguments, name: change(arguments[name])}
    assert_refused(error, f"^{name} must .*{message}", arguments, lambda: function(**changed))


@pytest.mark.parametrize("function", [cosface_loss, cosine_lse])
@pytest.mark.parametrize("name, value, error", WRONG_OPTIONS, ids=name_of_case)
def test_wrong_option(function, name, value, error, arguments):
    shown = f"a tensor of shape (), {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
    message = rf"^{name} must .*got {re.escape(shown)}"
    assert_refused(error, message, arguments, lambda: function(**arguments, **{name: value}))


@pytest.mark.parametrize("name, value, error", WRONG_LOSS_OPTIONS, ids=name_of_case)
def test_wrong_loss_option(name, value, error, arguments):
    message = rf"^{name} must .*got {re.escape(repr(value))}"
    assert_refused(error, message, arguments, lambda: cosface_loss(**arguments, **{name: value}))


@pytest.mark.parametrize(
    "name, value, error",
    [
        *WRONG_OPTIONS,
        *WRONG_LOSS_OPTIONS,
        *[(size, value, ValueError) for size in ("embedding_size", "num_classes") for value in (0, -1)],
        *[(size, value, TypeError) for size in ("embedding_size", "num_classes") for value in (1.5, "3", None, True)],
    ],
    ids=name_of_case,
)
def test_module_refuses_at_construction(name, value, error):
    with pytest.raises(error, match=rf"^{name} must "):
        CosFaceLoss(**{"embedding_size": EMBEDDING_SIZE, "num_classes": NUM_CLASSES, name: value})


LABELS_OUTSIDE = [
    (NUM_CLASSES, torch.int64),
    (-1, torch.int64),
    (2**40, torch.int64),  # 0 when cut to 32 bits
    (200, torch.uint8),
    (-5, torch.int8),
    (2**64 - 100, torch.uint64),  # -100 when its bits are read as int64
]


# With ignore_index = 3, row 1 is wrong in no way and -100 is a label like any other.
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("label, dtype", LABELS_OUTSIDE, ids=name_of_case)
def test_label_outside(label, dtype, ignore_index, arguments, monkeypatch):
    # On a GPU the check waits for the device, so there it is on request.
    monkeypatch.setenv("COSFACE_CHECK_LABELS", "1")
    arguments["labels"] = torch.tensor([0, 3, label, label], dtype=dtype).to(arguments["labels"].device)
    shown = r"\d+" if label >= 2**63 else label  # PyTorch computes with such labels as little as it can
    message = rf"labels\[2\] is {shown}, .*\[0, {NUM_CLASSES}\).*ignore_index = {ignore_index}"
    assert_refused(IndexError, message, arguments, lambda: cosface_loss(**arguments, ignore_index=ignore_index))


WRONG_K = [(-1, ValueError), (NUM_CLASSES + 1, ValueError), (2.5, TypeError), ("3", TypeError), (None, TypeError)]


@pytest.mark.parametrize("k, error", WRONG_K, ids=name_of_case)
def test_wrong_k(k, error, arguments):
    head = CosFaceLoss(EMBEDDING_SIZE, NUM_CLASSES, device=arguments["features"].device)
    assert_refused(error, rf"^k must .*got {k!r}", arguments, lambda: head.topk(arguments["features"], k))


# As heads of other libraries are called.
WRONG_CALLS = {
    "without labels": (lambda head, x, y: head(x), r"got no labels; .*head\.logits\(features\).*head\.topk\(features, k\)"),
    "labels None": (lambda head, x, y: head(x, None), "got no labels"),
    "an optimiser": (
        lambda head, x, y: head(x, y, torch.optim.SGD(head.parameters())),
        "got SGD too; an optimizer is not passed",
    ),
    "nothing": (lambda head, x, y: head(), "got no features"),
    "one tuple": (lambda head, x, y: head((x, y)), "got one tuple: pass its parts apart"),
    "an optimiser by name": (lambda head, x, y: head(x, y, opt=None), "got opt= too; an optimizer is not passed"),
    "pairs": (lambda head, x, y: head(x, y, indices_tuple=(y, y, y)), r"got indices_tuple= too; .*pytorch_metric_learning"),
    "pairs by position": (lambda head, x, y: head(x, y, (y, y, y)), r"got tuple too; .*pytorch_metric_learning"),
    "label": (lambda head, x, y: head(x, label=y), "got label= too; its two arguments are named features and labels"),
    "input and target": (lambda head, x, y: head(input=x, target=y), "got input=, target= too; its two arguments are named"),
    "AdaFace's norms": (lambda head, x, y: head(x, x.norm(dim=1, keepdim=True), y), "got Tensor too; norms are not passed"),
    "mixup": (
        lambda head, x, y: head(x, y, y.flip(0), 0.7),
        r"got Tensor, float too; two classes of a row.* label_weights \(N, 2\)",
    ),
    "weights": (lambda head, x, y: head(x, y, torch.ones(4)), 'got Tensor too; for weights of rows .*reduction="none"'),
    "an option": (lambda head, x, y: head(x, y, scale=32.0), "got scale= too; options are the constructor's"),
}


class CosFace:
    """InsightFace's."""

    s, m = 64.0, 0.4

    def __call__(self, cosines, labels):
        return self.s * (cosines - self.m * torch.nn.functional.one_hot(labels, cosines.shape[1]))


@pytest.mark.parametrize("case", WRONG_CALLS)
@pytest.mark.parametrize("kind", ["CosFaceLoss", "PartialFC_V2"])
def test_wrong_call_of_a_head(kind, case):
    head = CosFaceLoss(3, 5, sample_rate=0.6) if kind == "CosFaceLoss" else PartialFC_V2(CosFace(), 3, 5, sample_rate=0.6)
    call, message = WRONG_CALLS[case]
    with pytest.raises(TypeError, match=rf"^a head is called as head\(features, labels\), {message}"):
        call(head, torch.ones(4, 3), torch.arange(4))
    assert head.sample_step == 0


@pytest.mark.parametrize("case", [case for case in WRONG_TENSORS if case.startswith("features")])
def test_module_methods_refuse_wrong_features(case, arguments):
    head = CosFaceLoss(EMBEDDING_SIZE, NUM_CLASSES, device=arguments["features"].device)
    name, change, error, message = WRONG_TENSORS[case]
    features = change(arguments[name])
    for call in (lambda: head(features, arguments["labels"]), lambda: head.logits(features), lambda: head.topk(features, 2)):
        assert_refused(error, f"^{name} must .*{message}", arguments, call)


def test_triton_needs_a_gpu():
    # In a process of its own: this one may run Triton's interpreter, which takes CPU tensors.
    script = """
import torch
from cosface_kernels import cosface_loss
try:
    cosface_loss(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), backend="triton")
except ValueError as error:
    print(error)
"""
    assert re.search(r'backend "triton" .*on a GPU, these are on cpu.*"auto"', " ".join(run(script)))


def test_triton_not_installed(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    message = r'backend "triton" .*pip install "cosface-kernels\[triton\]"'
    assert_refused(ValueError, message, arguments, lambda: cosface_loss(**arguments, backend="triton"))


def test_a_gpu_without_triton(monkeypatch):
    """No slower backend in silence, but where triton would not serve either."""
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cosface-kernels\[triton\]"; backend="torch" computes'):
        backends.choose("auto", torch.device("cuda"), torch.float32)
    for name, dtype in (("torch", torch.float32), ("auto", torch.float64)):
        assert backends.choose(name, torch.device("cuda"), dtype).__name__.endswith("torch_backend")


@pytest.mark.parametrize("name", ["features", "weight"])
def test_triton_refuses_float64(name, arguments):
    arguments[name] = arguments[name].detach().double()
    message = 'backend "triton" .*not float64'
    assert_refused(ValueError, message, arguments, lambda: cosface_loss(**arguments, backend="triton"))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 64, "margin": 1},
        {"scale": np.float32(64), "margin": np.float64(0.35), "ignore_index": np.int32(2), "memory_budget": np.int64(100)},
        {"scale": Fraction(64), "margin": Fraction(7, 20)},
        {"scale": 10**30},
        {"memory_budget": 10**30},
    ],
    ids=str,
)
def test_any_real_number_is_accepted(options, arguments):
    plain = {name: int(value) if name in ("ignore_index", "memory_budget") else float(value) for name, value in options.items()}
    plain["memory_budget"] = min(plain.get("memory_budget", 2**40), 2**40)
    assert torch.equal(cosface_loss(**arguments, **options), cosface_loss(**arguments, **plain))


def without_storage(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


NOT_IN_MEMORY = {
    "meta": (lambda tensor: tensor.to("meta"), TypeError, "{} must have its numbers in memory, got .* meta"),
    "sparse": (lambda tensor: tensor.to_sparse(), TypeError, r"{} must be a dense tensor of shape .*, got torch\.sparse_coo"),
    "nested": (lambda tensor: torch.nested.nested_tensor([*tensor]), TypeError, "{} must be a dense .*, got a nested tensor"),
    "freed": (without_storage, ValueError, "{} must have its numbers in memory, got shape .* over a storage of 0 bytes"),
    "fake": (lambda tensor: FakeTensorMode().from_tensor(tensor), TypeError, "all tensors must be fake, .* for {} alone"),
}


@pytest.mark.parametrize("kind", NOT_IN_MEMORY)
@pytest.mark.parametrize("name", ["features", "weight", "labels", "bias", "classes", "sample_correction"])
def test_a_tensor_whose_numbers_are_not_in_memory(name, kind):
    make, error, message = NOT_IN_MEMORY[kind]
    tensors = {"features": torch.ones(4, 3), "weight": torch.ones(5, 3), "labels": torch.tensor([0, 4, 2, 2])}
    tensors |= {"bias": torch.zeros(5), "classes": torch.arange(5), "sample_correction": torch.zeros(5)}
    with pytest.raises(error, match=message.format(name)):
        margin_softmax_loss(**tensors | {name: make(tensors[name])}, margin=margins.Softmax())


@pytest.mark.parametrize("kind", ["meta", "sparse", "nested", "freed"])
def test_topk_and_sampling_of_no_numbers_in_memory(kind):
    make, error, message = NOT_IN_MEMORY[kind]
    with pytest.raises(error, match=message.format("features")):
        CosFaceLoss(3, 5).topk(make(torch.ones(4, 3)), 2)
    with pytest.raises(error, match=message.format("labels")):
        sample_classes(make(torch.tensor([0, 4, 2, 2])), 5, 0.5)
    with pytest.raises(error, match=message.format("ids")):
        CosFaceLoss(3, 5).remove(make(torch.tensor([0, 4])))


def test_fake_tensors_alone_have_a_fake_loss_and_gradients():
    mode = FakeTensorMode()
    tensors = torch.ones(4, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True), torch.tensor([0, 4, 2, 2])
    features, weight, labels = map(mode.from_tensor, tensors)
    loss = cosface_loss(features, weight, labels, reduction="none")
    grads = torch.autograd.grad(loss.sum(), (features, weight))
    assert loss.shape == (4,) and [grad.shape for grad in grads] == [(4, 3), (5, 3)]


NUMBERS = {
    cosface_loss: ("scale", "margin", "reduction", "ignore_index", "memory_budget", "backend"),
    margin_softmax_loss: ("scale", "margin", "normalize_features", "centers_per_class"),
    CosFaceLoss: ("embedding_size", "num_classes", "scale", "table_format", "sample_rate", "sample_seed"),
    sample_classes: ("num_classes", "rate", "seed"),
}


@pytest.mark.parametrize(("call", "name"), [(call, name) for call, names in NUMBERS.items() for name in names])
def test_a_tensor_without_memory_in_a_numbers_place(call, name):
    """Its message cannot show it: PyTorch's own repr of such a tensor ends the process."""
    usual = {
        cosface_loss: {"features": torch.ones(2, 4), "weight": torch.ones(3, 4), "labels": torch.zeros(2, dtype=torch.long)},
        margin_softmax_loss: {"margin": margins.CosFace()},
        CosFaceLoss: {"embedding_size": 4, "num_classes": 3},
        sample_classes: {"labels": torch.zeros(2, dtype=torch.long), "num_classes": 3, "rate": 0.5},
    }
    usual[margin_softmax_loss] |= usual[cosface_loss]
    with pytest.raises((TypeError, ValueError), match=rf"{name} must .*got a tensor of shape \(3, 4\), torch.float32"):
        call(**usual[call] | {name: without_storage(torch.ones(3, 4))})
