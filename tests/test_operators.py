"""Do the operators keep PyTorch's promises: opcheck, torch.compile, nothing read or returned that was never written?"""

import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import evaluate
from rounding import NUM_CLASSES, assert_close, draw, tolerance
from selection import slow_when
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._python_dispatch import TorchDispatchMode

from cosface_kernels import CosFaceLoss, cosface_loss, margin_softmax_loss, sample_classes
from cosface_kernels.margins import Softmax
from cosface_kernels.ops.operands import Needs, Options, Problem, split
from cosface_kernels.ops.slabs import wide_dtype

negative_lse = torch.ops.cosface_kernels.negative_lse.default
negative_lse_backward = torch.ops.cosface_kernels.negative_lse_backward.default
margin_losses = torch.ops.cosface_kernels.margin_losses.default
ALL = 2**40  # bytes: keep every slab

pytestmark = pytest.mark.usefixtures("small_slabs")


OP_CASES = {
    "keep all": (torch.float64, ALL, True, True),
    "keep some": (torch.float32, 2 * 7 * 128 * 4, True, True),
    "keep auto": (torch.bfloat16, None, True, True),
    "recompute": (torch.bfloat16, 0, True, True),
    "frozen features": (torch.float32, 0, False, True),
    "frozen weight": (torch.float32, 0, True, False),
    "hard": (torch.float32, 7 * 128 * 4, True, True),
    "hard centres": (torch.bfloat16, 0, True, True),
    "bias": (torch.float32, ALL, True, True),
    "centres": (torch.bfloat16, 2 * 7 * 384 * 2, True, True),
    "raw": (torch.bfloat16, 0, True, True),
    "raw centres": (torch.float32, 0, True, True),
    "sampled": (torch.float32, 7 * 128 * 4, True, True),
    "sampled, frozen weight": (torch.bfloat16, 0, True, False),
    "sampled with a bias": (torch.float64, ALL, True, True),
    "sampled centres": (torch.bfloat16, 0, False, True),
    "smoothing": (torch.bfloat16, 7 * 128 * 4, True, True),
    "sampled, smoothing, corrected": (torch.float64, 0, True, True),
    "scale in a tensor": (torch.float32, 7 * 128 * 4, True, True),
}
# What takes long, for one case of each argument; not slow are those which no other has.
OP_CHECKED = [case for case in OP_CASES if case not in ("keep all", "hard", "raw", "raw centres")]
OP_CHECKED = [case for case in OP_CHECKED if case not in ("sampled", "sampled, frozen weight", "sampled, smoothing")]
OP_FAST = (
    "keep some",
    "frozen features",
    "frozen weight",
    "hard centres",
    "bias",
    "sampled, smoothing, corrected",
    "scale in a tensor",
    "keep auto",
    "smoothing",
    "sampled with a bias",
    "sampled centres",
)
# normalize_features, normalize_weight, centres; 300 classes are 100 of three centres.
FORMS = {"bias": (False, False, 1), "centres": (True, True, 3), "raw": (False, False, 1)}
FORMS |= {"raw centres": (False, False, 3)}
FORMS |= {"hard centres": (True, True, 3)}
FORMS |= {"sampled with a bias": FORMS["bias"], "sampled centres": FORMS["centres"]}


def sampled_rows(labels, centers):
    """The rows of half of the classes, in two slabs, the second one short."""
    classes = sample_classes(labels, NUM_CLASSES // centers, 0.5)
    return (classes[:, None] * centers + torch.arange(centers, device=labels.device)).flatten()


def op_arguments(case, device):
    dtype, memory_budget, need_x_grad, need_weight_grad = OP_CASES[case]
    features, weight, labels = draw(device, torch.promote_types(dtype, torch.float32))
    labels[3] = -100
    features.requires_grad_(need_x_grad)
    weight = weight.to(dtype).requires_grad_(need_weight_grad)
    form = FORMS.get(case, (True, True, 1))
    bias = weight[:, 0].detach().clone().requires_grad_(need_weight_grad) if "bias" in case else None
    labels = torch.where(labels < 0, labels, labels // form[2])
    index = sampled_rows(labels, form[2]) if "sampled" in case else None
    scale = torch.tensor(8.0, dtype=torch.float64, device="cpu") if "scale" in case else None
    correction = torch.linspace(0, 20, len(index), device=device).to(wide_dtype(dtype)) if "corrected" in case else None
    hard = torch.tensor([0.1, 0.2, 1.1, 0.3], device=device).to(wide_dtype(dtype)).expand(7, 4) if "hard" in case else None
    options = Options(8.0, -100, *form, dtype, memory_budget, "auto", None, "smoothing" in case, 1.6)
    needs = Needs(need_x_grad, need_weight_grad, "bias" in case or "centres" in case)
    return *Problem(features, weight, bias, labels, index, scale, hard, correction), *options, *needs


@pytest.mark.parametrize("case", OP_CHECKED)
@slow_when(lambda case: case not in OP_FAST)
def test_opcheck_forward(case, device):
    library.opcheck(negative_lse, op_arguments(case, device))


def test_opcheck_of_targets(device):
    *arguments, _, _, _ = op_arguments("hard centres", device)
    with torch.no_grad():
        library.opcheck(torch.ops.cosface_kernels.target_products.default, (*arguments, 3))


@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", OP_CHECKED)
@slow_when(lambda case: case not in OP_FAST)
def test_opcheck_backward(case, device, transposed):
    with torch.no_grad():
        problem, options, needs = split(op_arguments(case, device), (Problem, Options, Needs))
        x = problem.x.T.contiguous().T if transposed else problem.x
        inputs = [each if each is None else each.detach() for each in problem._replace(x=x)]
        constants = *options, *needs
        output = negative_lse(*inputs, *constants)
        vectors, saved = output[:5], output[5:-2]
        gradients = [torch.ones_like(vector) for vector in vectors]
        library.opcheck(negative_lse_backward, (*gradients, *inputs, *saved, *constants))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck_losses(reduction, device):
    lse, logit = torch.randn(2, 7, device=device).requires_grad_().unbind()
    library.opcheck(margin_losses, (lse, logit, torch.arange(7, device=device) != 2, 8.0, reduction, "auto"))


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # an error on a GPU would be about cuBLAS, not about memory
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", OP_CASES)
def test_no_output_is_left_unwritten(case, device, poisoned_memory):
    *outputs, kept = negative_lse(*op_arguments(case, device))
    for output in (*outputs, kept):
        assert not output.isnan().any()


@pytest.mark.parametrize("memory_budget", [0, ALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unwritten_memory_reaches_nothing(dtype, memory_budget, device, poisoned_memory):
    loss = partial(cosface_loss, memory_budget=memory_budget)
    for tensor in evaluate(loss, *draw(device, dtype), torch.ones((), device=device)):
        assert not tensor.isnan().any()


def test_exported_for_features_without_a_gradient(device):
    """The features need a gradient only when the exported program runs."""
    features, weight, labels = draw(device, torch.float32, num_rows=5)
    head = CosFaceLoss(weight.shape[1], len(weight)).to(device)
    exported = torch.export.export(head, (features, labels)).module()
    features.requires_grad_()
    found, wanted = (torch.autograd.grad(loss(features, labels), (features, *loss.parameters())) for loss in (exported, head))
    for one, other in zip(found, wanted, strict=True):
        assert other.any()
        assert_close(one, other.double(), tolerance(torch.float32))


def can_generate_code():
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return False
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def batches(device):
    """The first is compiled for its own size, the second for any; then a short one, and one of a single row. Whether none, some
    or all slabs are kept is a guard too: the second and the third keep some, in either precision."""
    for num_rows in (64, 35, 28, 1):
        features, weight, labels = draw(device, torch.float32, num_rows=num_rows)
        labels[num_rows // 2] = 2  # the index ignored below; alone in the last batch
        yield features, weight, labels


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile(autocast, device):
    torch._dynamo.reset()
    # aot_eager is all of torch.compile but the generated code, which needs a compiler.
    counter = CompileCounterWithBackend("aot_eager")
    eager = partial(cosface_loss, ignore_index=2)
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        for tensors in batches(device):
            upstream = torch.ones((), device=device)
            for ours, wanted in zip(evaluate(compiled, *tensors, upstream), evaluate(eager, *tensors, upstream), strict=True):
                assert_close(ours, wanted.double(), tolerance(torch.float32))
    # A size of 1 is always compiled for itself.
    assert counter.frame_count <= 3
    features, weight, labels = tensors
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"labels\[0\] is {NUM_CLASSES}"):
            compiled(features, weight, torch.full_like(labels, NUM_CLASSES))


@pytest.mark.slow
@pytest.mark.skipif(not can_generate_code(), reason="torch.compile generates C++, and there is no compiler or no Python.h")
def test_compile_to_code_with_a_bias(device):
    """Inductor fuses the operations before the head onto its gradient, whose layout must be the declared one."""
    torch._dynamo.reset()
    features, weight, labels = draw(device, torch.float32)
    bias, upstream = torch.linspace(-1, 1, len(weight), device=device), torch.ones((), device=device)

    def loss(x, w, y):
        return margin_softmax_loss(torch.tanh(x) * 2, w, y, margin=Softmax(), bias=bias)

    results = evaluate(torch.compile(loss, fullgraph=True), features, weight, labels, upstream)
    for ours, wanted in zip(results, evaluate(loss, features, weight, labels, upstream), strict=True):
        assert_close(ours, wanted.double(), tolerance(torch.float32))


@pytest.mark.skipif(not can_generate_code(), reason="torch.compile generates C++, and there is no compiler or no Python.h")
@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_compile_to_code(device, transposed):
    torch._dynamo.reset()
    compiled = torch.compile(cosface_loss, fullgraph=True)
    features, *tensors = *draw(device, torch.float32), torch.ones((), device=device)
    tensors = features.T.contiguous().T if transposed else features, *tensors
    results = evaluate(compiled, *tensors)
    for ours, wanted in zip(results, evaluate(cosface_loss, *tensors), strict=True):
        assert_close(ours, wanted.double(), tolerance(torch.float32))


def test_view_that_negates(device):
    """Its numbers in memory are not those that PyTorch's operators see."""
    features, weight, labels = draw(device, torch.float32)
    negated = torch._neg_view(features)
    assert negated.is_neg() and negated.is_contiguous()
    assert torch.equal(cosface_loss(negated, weight, labels), cosface_loss(-features, weight, labels))


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.operators = {*getattr(self, "operators", ()), operator}
        return operator(*arguments, **(keywords or {}))


def test_a_profile_names_the_operators(device):
    features, weight, labels = draw(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cosface_loss(features.requires_grad_(), weight, labels).backward()
    names = {event.key for event in profile.key_averages()}
    assert {f"cosface_kernels::{name}" for name in ("negative_lse", "negative_lse_backward", "margin_losses")} <= names


def test_modes_see_the_operators(device):
    """Counters of flops and activation checkpointing that selects by operator are modes."""
    features, weight, labels = draw(device)
    with Seen() as seen:
        cosface_loss(features.requires_grad_(), weight, labels).backward()
    assert {negative_lse, negative_lse_backward, margin_losses} <= seen.operators
