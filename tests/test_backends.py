"""Is every backend as accurate as it promises, on every kind of input, shape, precision and plan?

Shapes (N, C, D), each for what it breaks: ragged tiles of 64 and 128 rows and classes, slabs of 128 classes (the fixture),
embedding sizes below, at and past the 64 columns that rows are padded to, primes throughout.
"""

from functools import partial

import pytest
import torch
from cases import check_accuracy, draws, evaluate
from selection import interpreted, pairs, repeats_when, slab_loop_when, slow_when

from benchmarks import measure, peers
from cosface_kernels import cosface_loss, cosine_lse, reference

SHAPES = [
    (1, 131, 5),  # one row; one class past a slab and three
    (5, 2, 3),  # one negative
    (7, 17, 64),  # fewer classes than a tile, rows exactly as wide as the padding
    (67, 257, 127),  # one row past a tile, one class past two slabs
    (131, 521, 70),  # several slabs, the last one short
]
KINDS = ["uniform", "peaked", "hard", "adversarial"]
PRECISIONS = {
    "float32": (torch.float32, torch.float32, False),
    "autocast": (torch.float32, torch.float32, True),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "float16 features": (torch.float16, torch.float32, False),
}


pytestmark = pytest.mark.usefixtures("small_slabs")


# For Triton's interpreter.
REPRESENTATIVES = [
    ("float32", "uniform", (1, 131, 5)),
    ("float32", "uniform", (5, 2, 3)),
    ("float32", "adversarial", (7, 17, 64)),
    ("float16 features", "peaked", (7, 17, 64)),
    ("autocast", "hard", (7, 17, 64)),
    ("float32", "hard", (67, 257, 127)),
    ("bfloat16", "hard", (67, 257, 127)),
]
SCALES = [("float32", "hard", 1000.0), ("autocast", "hard", 1e-3)]
# Every kind in every precision at a shape of ragged tiles and slabs; the other shapes meet each kind and each precision.
RAGGED = [(precision, kind, (67, 257, 127)) for precision in PRECISIONS for kind in KINDS]
PAIRS = pairs([*PRECISIONS], KINDS, SHAPES, first=REPRESENTATIVES)
CASES = [*dict.fromkeys(PAIRS + RAGGED)]


@pytest.mark.parametrize(("precision", "kind", "shape"), CASES, ids=str)
@slow_when(
    lambda backend, precision, kind, shape: (precision, kind, shape) not in (REPRESENTATIVES if interpreted(backend) else PAIRS)
)
@repeats_when(lambda backend, precision, kind, shape: interpreted(backend) and (precision, kind, shape) not in PAIRS)
def test_error_at_most_the_references(backend, device, precision, kind, shape):
    *dtypes, autocast = PRECISIONS[precision]
    if kind == "adversarial" and torch.float16 in dtypes:
        kind = "hard"  # float16 holds no norms of 1e15; its range is no part of this rule
    check_accuracy(backend, draws(kind, shape, *dtypes, backend=backend), device=device, autocast=autocast)


@pytest.mark.parametrize(
    ("precision", "kind", "scale"), pairs(["float32", "autocast"], KINDS, [1e-3, 30.0, 1000.0], first=SCALES), ids=str
)
@slow_when(lambda backend, precision, kind, scale: interpreted(backend) and (precision, kind, scale) not in SCALES)
@repeats_when(lambda backend, kind: interpreted(backend) and kind == "uniform")
@slab_loop_when(lambda scale: scale == 1000)
def test_any_scale(backend, device, scale, precision, kind):
    """1000 is past the range of a constant shift: every row's maximum is found first."""
    *dtypes, autocast = PRECISIONS[precision]
    check_accuracy(backend, draws(kind, (67, 257, 70), *dtypes, backend=backend), device=device, autocast=autocast, scale=scale)


@pytest.mark.parametrize("memory_budget", [0, 67 * 128 * 2 * 2, 10**9], ids=["recompute", "keep some", "keep all"])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
@slow_when(lambda backend, precision, memory_budget: interpreted(backend) and (precision == "float32" or memory_budget == 10**9))
@repeats_when(lambda backend, memory_budget: backend == "attend" and memory_budget > 0)
def test_any_budget(backend, device, precision, memory_budget):
    *dtypes, autocast = PRECISIONS[precision]
    inputs = draws("hard", (67, 257 if interpreted(backend) else 521, 70), *dtypes, backend=backend)
    check_accuracy(backend, inputs, device=device, autocast=autocast, memory_budget=memory_budget)


@slow_when(interpreted)
def test_twice_as_accurate_as_autocast_on_hard_inputs(backend, device):
    """Three negatives at the cosine of the target, 0.8, where plain PyTorch's cosines are rounded to bfloat16."""
    sizes = (16, 500, 128) if interpreted(backend) else (64, 2000, 128)
    check = measure.Check(peers.inputs(*sizes, device))
    ours = check.errors(peers.autocast(partial(cosface_loss, backend=backend)))
    for mine, plain in zip(ours[1:], check.errors(peers.autocast(peers.plain))[1:], strict=True):
        assert mine < plain / 2


@pytest.mark.parametrize("kind", KINDS)
def test_float64(device, kind):
    """To float64's own rounding, times s = 64 in the exponent and some hundred additions: what gradcheck relies on."""
    features, weight, labels = draws(kind, (67, 257, 70), torch.float64, torch.float64)[0]
    upstream = torch.linspace(-1, 1, len(labels))
    inputs = features, weight, labels, upstream
    got = evaluate(partial(cosface_loss, reduction="none", backend="torch"), *(tensor.to(device) for tensor in inputs))
    for ours, exact in zip(got, evaluate(partial(reference.cosface_loss, reduction="none"), *inputs), strict=True):
        assert (ours.cpu() - exact).norm() <= 64 * 100 * torch.finfo(torch.float64).eps * exact.norm()


@pytest.mark.parametrize("transpose", [False, True])
def test_strided_table(backend, device, transpose):
    """A table that is a view: read in place, whatever its strides."""
    inputs = draws("hard", (7, 257, 70), torch.float32, torch.float32, backend=backend)
    if transpose:
        strided = [(x, w.T.contiguous().T, y) for x, w, y in inputs]
    else:
        strided = [(x, torch.cat([w, w], 1)[:, ::2].copy_(w), y) for x, w, y in inputs]
    assert not strided[0][1].is_contiguous()
    check_accuracy(backend, strided, device=device)


@pytest.mark.gpu
def test_offsets_past_int32():
    """C x D > 2^31: the last identities must be as right as the first. Compared with a table of those alone."""
    size, num_classes, tail = 512, 2**22 + 2**10, 2**10
    weight = torch.zeros(num_classes, size, device="cuda", dtype=torch.bfloat16)
    weight[-tail:] = torch.randn(tail, size, generator=torch.Generator().manual_seed(0)).to(weight)
    features = weight[-8:].float() + 0.5
    labels = torch.arange(tail - 8, tail, device="cuda")
    whole, part = weight.requires_grad_(), weight[-tail:].detach().clone().requires_grad_()
    lse, cosine = cosine_lse(features, whole, labels + num_classes - tail, backend="triton")
    lse_part, cosine_part = cosine_lse(features, part, labels, backend="triton")
    # Every class before the tail has cosine 0: e^0 each.
    torch.testing.assert_close(lse, torch.logaddexp(lse_part, torch.tensor(num_classes - tail).log().cuda()))
    torch.testing.assert_close(cosine, cosine_part)
    (cosine.sum()).backward()
    (cosine_part.sum()).backward()
    torch.testing.assert_close(whole.grad[-tail:], part.grad)
    assert not whole.grad[:-tail].any()
