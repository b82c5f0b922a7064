"""How many kernels does a call launch on a GPU? Counted on a CPU: Triton launches, and ATen operators that are no mere view.

At a small table a launch costs more than what it computes, so a count that grows is a regression like a slower kernel. An
operator counts once, though some launch more.
"""

import itertools
from collections import Counter

import pytest
import torch
from cases import make
from selection import HAS_GPU, pairs, slow_when
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks import host_time
from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, MarginSoftmaxLoss, cosface_loss, margins
from cosface_kernels.ops import backends, label_checks, slabs

EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """counts[name] of everything launched while active, inside the package's own operators too."""

    def __init__(self):
        super().__init__()
        self.counts, self.computes = Counter(), True  # computes: whether Triton's launches do

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if hasattr(operator, "implementation"):  # the package's own
            with self:
                return operator.implementation(*arguments, **(keywords or {}))
        if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"):
            with self:
                return operator.decompose(*arguments, **(keywords or {}))
        result = operator(*arguments, **(keywords or {}))
        is_empty = isinstance(result, torch.Tensor) and not result.numel()
        if not operator.is_view and not is_empty and operator.overloadpacket.__name__ not in EMPTY | {"detach", "_unsafe_view"}:
            self.counts[operator.overloadpacket.__name__] += 1
        return result


@pytest.fixture
def launches(monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    mode, run = Launches(), interpreter.GridExecutor.__call__

    def count(executor, *arguments, **keywords):
        mode.counts["triton " + executor.fn.__name__] += 1
        if not mode.computes:
            return None
        with _disable_current_modes():
            return run(executor, *arguments, **keywords)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    return mode


@pytest.mark.parametrize("num_rows, parts", [(1, 16), (512, 16), (1024, 8), (4096, 2), (16384, 1)])
def test_pull_fills_a_gpu(num_rows, parts):
    """With its 2 x ceil(N / 128) tiles of D = 512, in parts of aligned width, of which 10000 classes are no 16."""
    triton_backend = pytest.importorskip("cosface_kernels.ops.backends.triton_backend")
    widths = (65536, 10000, 80, 16)
    found = [triton_backend.pull_parts(num_rows, 512, width) for width in widths]
    assert found[0] == parts
    assert all(count <= parts and width % (8 * count) == 0 for count, width in zip(found, widths, strict=True))


CALLS = [host_time.H100, host_time.H200], [10**6, 10**7], [256, 512, 1024, 4096], [True, False]
CALL_PAIRS = pairs(*CALLS)


@pytest.mark.skipif(HAS_GPU, reason="counted in the interpreter")
@pytest.mark.parametrize("gpu, num_classes, num_rows, kept", itertools.product(*CALLS))
@slow_when(lambda gpu, num_classes, num_rows, kept: (gpu, num_classes, num_rows, kept) not in CALL_PAIRS)
def test_host_takes_a_third_of_the_gpus_time_at_most(gpu, num_classes, num_rows, kept, launches, monkeypatch):
    """Launches are counted in the call itself, whose tensors have no memory; both times are predicted."""
    triton_backend = pytest.importorskip("cosface_kernels.ops.backends.triton_backend")

    def product(left, right, out):
        launches.counts["product"] += 1
        return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32) if out is None else out

    def parts(left, right, count):
        launches.counts["product"] += 1
        return left.new_empty(count, left.shape[0], right.shape[1], dtype=torch.float32)

    rows = host_time.slab_rows(num_rows, num_classes, 512, gpu.chip)
    monkeypatch.setattr("cosface_kernels.validation.tensors.check_dense", lambda *arguments: None)  # tensors have no memory
    monkeypatch.setattr(slabs, "slab_rows", lambda *arguments: rows)
    monkeypatch.setattr(backends, "unusable", lambda *arguments: None)
    monkeypatch.setattr(
        "cosface_kernels.before_margin.product_dtype", lambda *arguments: torch.bfloat16
    )  # there is no autocast for "meta"
    monkeypatch.setattr(triton_backend, "accumulated", product)
    monkeypatch.setattr(triton_backend, "in_parts", parts)
    features = torch.empty(num_rows, 512, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(num_classes, 512, device="meta", requires_grad=True)
    labels = torch.empty(num_rows, dtype=torch.int64, device="meta")
    launches.computes = False
    with launches:
        loss = cosface_loss(features, weight, labels, backend="triton", memory_budget=2**50 if kept else 0)
    forward = host_time.forward(num_rows, num_classes, 512, gpu)
    assert launches.counts.total() == forward.launches and forward.share < 1 / 3, (launches.counts, forward)
    launches.counts.clear()
    with launches:
        loss.backward()
    backward = host_time.backward(num_rows, num_classes, 512, gpu, kept=kept)
    assert launches.counts.total() == backward.launches and backward.share < 1 / 3, (launches.counts, backward)


@pytest.mark.skipif(HAS_GPU, reason="counted in the interpreter")
@pytest.mark.parametrize("count", [1, 3])
def test_launches(count, launches, monkeypatch, small_slabs):
    monkeypatch.setattr(label_checks, "check_labels", lambda *arguments: None)  # a GPU has none
    features, weight, labels = make("uniform", 5, 128 * count - 3, 64)
    features = features.bfloat16().requires_grad_()
    weight.requires_grad_()
    with launches:
        loss = cosface_loss(features, weight, labels, backend="triton")
    # The interpreter's bfloat16 products convert: two forward and one backward that a GPU does not launch.
    expected = host_time.FORWARD + 2 + (host_time.SLAB_FORWARD + 2) * (count - 1)
    assert launches.counts.total() == expected, launches.counts
    launches.counts.clear()
    with launches:
        loss.backward()
    expected = host_time.BACKWARD + 1 + (host_time.SLAB_BACKWARD + 1) * (count - 1)
    assert launches.counts.total() == expected, launches.counts


@pytest.mark.skipif(HAS_GPU, reason="counted in the interpreter")
@pytest.mark.parametrize("kind", [FusedSGD, pytest.param(FusedAdamW, marks=pytest.mark.slow)])
def test_launches_of_a_fused_step(kind, launches, small_slabs):
    """Equal numbers for each format; a further slab adds one product, which the interpreter converts, and three kernels."""
    counts = Counter()
    for count, (table_format, state_format) in [(1, ("float32", "float32")), *((n, ("bfloat16", "int8")) for n in (1, 2))]:
        head = CosFaceLoss(64, 128 * count, backend="triton", memory_budget=0, table_format=table_format)
        optimizer = kind(head.parameters(), lr=0.1, state_format=state_format)
        for _ in range(2):  # the first one makes the state
            head(torch.ones(5, 64).bfloat16(), torch.arange(5)).backward()
            launches.counts.clear()
            with launches:
                optimizer.step()
        assert launches.counts["triton update_rows"] == count
        counts[count, table_format] = launches.counts.total()
    assert counts[1, "float32"] == counts[1, "bfloat16"]
    assert counts[2, "bfloat16"] - counts[1, "bfloat16"] == 3 + 2, counts


def test_a_launcher_chooses_for_whole_slabs_once():
    """In place of Triton: a kernel that tells what it was asked for, and what was launched without asking."""
    launcher_of = pytest.importorskip("cosface_kernels.ops.backends.triton_launch").Launcher
    asked, launched = [], []

    class Chosen:
        def __getitem__(self, programs):
            return lambda *arguments: launched.append((programs, arguments))

    class Kernel:
        arg_names = ("rows", "size", "RAGGED", "BLOCK")

        def __getitem__(self, programs):
            return lambda *arguments, **constants: asked.append((programs, arguments, constants)) or Chosen()

    launch, constants = launcher_of(Kernel(), BLOCK=64, num_warps=4), {"BLOCK": 64, "num_warps": 4}
    for rows, whole in (("a", True), ("b", True), ("c", True), ("d", False), ("e", True)):
        launch(7, rows, 512, whole=whole, RAGGED=not whole)
    assert asked == [((7,), (rows, 512), {**constants, "RAGGED": ragged}) for rows, ragged in (("a", False), ("d", True))]
    assert launched == [((7, 1, 1), (rows, 512, False, 64)) for rows in "bce"]


def _unaligned(weight):
    return torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view(weight.shape)


ATTEND = {"attend_features": {}, "attend_table": {"DESCRIPTORS": True}}
WHOLE = {  # a head's options, what becomes of its table, forms
    "kept": ({"memory_budget": 2**30}, None, {}),
    "frozen features, half of it kept": ({"memory_budget": 2 * 128 * 5 * 4}, None, {}),
    "unaligned": ({"memory_budget": 0}, _unaligned, {}),
    "transposed": ({"scale": 1000.0}, lambda weight: weight.T.contiguous().T, {}),
    "bias": ({"margin": margins.Softmax()}, None, {}),
    "sampled": ({"sample_rate": 0.8}, None, {}),
    "centers": ({"centers_per_class": 3}, None, {}),
    "float8": ({"table_format": "float8"}, None, {}),
    "statistics": ({"scale": 1000.0, "centers_per_class": 3, "negatives": margins.MVSoftmax()}, None, {}),
    "attend": ({"memory_budget": 0}, None, ATTEND),
    "updated by attend": ({"memory_budget": 0, "table_format": "bfloat16"}, None, ATTEND),
}


@pytest.mark.skipif(HAS_GPU, reason="counted in the interpreter")
@pytest.mark.parametrize("case", WHOLE)
def test_whole_slabs_are_launched_alike(case, launches, monkeypatch, small_slabs):
    """A compiled kernel stands for arguments of one dtype and alignment, where numbers are 1, and where they divide by 16."""
    launch, forms = (pytest.importorskip(f"cosface_kernels.ops.backends.triton_{name}") for name in ("launch", "forms"))
    options, changed, asked = WHOLE[case]
    found, call, launches.computes = {}, launch.Launcher.__call__, False

    def described(value):
        if hasattr(value, "block_shape"):
            return *described(value.base), *value.block_shape
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return (type(value), value % 16 == 0, value == 1) if isinstance(value, int) else (type(value),)

    def recorded(launcher, programs, *arguments, whole=False, **constants):
        if whole:
            found.setdefault(launcher, []).append((tuple(map(described, arguments)), constants))
        call(launcher, programs, *arguments, whole=whole, **constants)

    monkeypatch.setattr(launch.Launcher, "__call__", recorded)
    head = MarginSoftmaxLoss(70, 637, **{"margin": margins.CosFace(), "backend": "triton", **options})
    if changed:
        head.weight = torch.nn.Parameter(changed(head.weight.detach()))
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9) if "table_format" in options else None
    with forms.using(**asked):
        features = torch.ones(5, 70).requires_grad_("frozen" not in case)
        loss = head(features, torch.arange(5), return_statistics=case == "statistics")
        (loss[0] if case == "statistics" else loss).backward()
        if optimizer:
            optimizer.step()
    assert len(found) >= 3 and all(len(alike) >= 2 and alike == alike[:1] * len(alike) for alike in found.values()), found
