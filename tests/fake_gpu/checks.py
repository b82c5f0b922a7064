"""Checks that need the CUDA builds of PyTorch and Triton, on a GPU that is not there:  make test-fake-gpu

Kernels run nowhere, so results are garbage; every line of Python and C++, every launch, wait and allocation is the real one.
"""

import copy
import ctypes
import os
from collections import Counter

import pytest
import torch
from triton.runtime.jit import JITFunction

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, cosface_loss, margin_softmax_loss, sample_classes
from cosface_kernels.margins import AdaFace, ArcFace, CosFace, LSoftmax, Softmax
from cosface_kernels.ops import slabs
from cosface_kernels.ops.backends import triton_forms

os.environ["USE_PYTORCH_KERNEL_CACHE"] = "0"  # of what it compiles itself
RUNTIME = ctypes.CDLL("libcudart.so.13")
RUNTIME.fake_counts.restype = ctypes.c_char_p
pytestmark = pytest.mark.skipif(torch.cuda.get_device_name(0) != "H100 that is not there", reason="a GPU that is there")


def counted(function):
    """{what: how often} in the second call: the first one compiles and allocates."""
    function()
    torch.cuda.synchronize()
    RUNTIME.fake_reset()
    function()
    return {what: int(number) for what, number in (line.split("\t") for line in RUNTIME.fake_counts().decode().splitlines())}


def batch(num_rows=256, size=512, device="cuda"):
    return torch.randn(num_rows, size, device=device, requires_grad=True), torch.zeros(num_rows, dtype=torch.int64, device=device)


@pytest.mark.parametrize("margin", [CosFace(0.35), ArcFace(0.5), AdaFace(), Softmax(), LSoftmax(4)], ids=repr)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_call_waits_for_nothing(backend, margin):
    (features, labels), weight = batch(), torch.randn(10_000, 512, device="cuda", requires_grad=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = margin_softmax_loss(features, weight, labels, margin=margin, backend=backend)
        torch.autograd.grad(loss, (features, weight))

    assert "wait" not in counted(step)


@pytest.mark.parametrize("rule", [FusedSGD, FusedAdamW])
@pytest.mark.parametrize("formats", [("float32", "float32"), ("bfloat16", "int8"), ("float8", "int8")])
@pytest.mark.parametrize("sample_rate", [1.0, 0.1, 0.001])  # of 10,000 classes, for 256 rows
def test_a_step_waits_for_nothing(sample_rate, formats, rule):
    head = CosFaceLoss(512, 10_000, sample_rate=sample_rate, table_format=formats[0], device="cuda")
    optimizer, (features, labels) = rule(head.parameters(), lr=0.1, state_format=formats[1]), batch()

    def step():
        head(features, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert "wait" not in counted(step)


@pytest.mark.parametrize("num_classes", [10_000, 1000, 100])  # more than the batch's rows are drawn, fewer, and all
def test_a_sample_waits_for_nothing(num_classes):
    _, labels = batch()
    assert "wait" not in counted(lambda: sample_classes(labels, num_classes, 0.1, seed=1, step=2))


@pytest.mark.parametrize("margin", [CosFace(0.35), Softmax(), LSoftmax(4)], ids=repr)
def test_nothing_is_compiled_but_by_triton(margin):
    """PyTorch compiles some of its operators at their first call, with a library that need not be there."""
    (features, labels), weight = batch(), torch.randn(1000, 512, device="cuda", requires_grad=True)
    RUNTIME.fake_reset()
    margin_softmax_loss(features, weight, labels, margin=margin, classes=torch.arange(0, 1000, 2, device="cuda")).backward()
    assert b"compilation" not in RUNTIME.fake_counts()


def test_launches_of_a_million_classes():
    """As benchmarks/host_time.py has them, for one slab of the chip's after another."""
    from benchmarks import host_time

    (features, labels), weight = batch(), torch.empty(10**6, 512, device="cuda", requires_grad=True)
    features = features.detach().bfloat16().requires_grad_()
    found = counted(lambda: cosface_loss(features, weight, labels).backward())
    slabs = -(-(10**6) // host_time.slab_rows(256, 10**6, 512, host_time.slabs.Chip(132, 79 * 2**30)))
    kernels = {what.removeprefix("kernel "): number for what, number in found.items() if what.startswith("kernel ")}
    assert kernels["exponentials"] == kernels["normalize_rows"] == kernels["add_pull"] == kernels["project_rows"] == slabs
    assert sum(kernels.values()) == 4 * slabs + 6


@pytest.mark.parametrize(
    "table_format, product, forms",  # None: no fused optimiser
    [
        (None, "exponentials", {}),
        ("float32", "exponentials", {}),
        ("bfloat16", "exponentials", {}),
        (None, "attend", {"attend_features": {"GLUON": True}, "attend_table": {"GLUON": True}}),
    ],
)
def test_triton_is_asked_once_for_all_whole_slabs(table_format, product, forms, monkeypatch):
    """What it is asked to launch is every kernel of the slab loop, and its first, whole and last launches of a call."""
    asked, ask = Counter(), JITFunction.run

    def counting(kernel, *arguments, **keywords):
        asked[kernel.fn.__name__] += 1
        return ask(kernel, *arguments, **keywords)

    monkeypatch.setattr(JITFunction, "run", counting)
    monkeypatch.setattr(slabs, "slab_rows", lambda *arguments: 1024)
    found, launched = [], []
    for count in (4, 12):
        head = CosFaceLoss(512, 1024 * count - 3, table_format=table_format or "float32", memory_budget=0, device="cuda")
        optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9) if table_format else None
        features, labels = batch()

        def step(head=head, optimizer=optimizer, features=features, labels=labels):
            with triton_forms.using(**forms), torch.autocast("cuda", torch.bfloat16):
                head(features, labels).backward()
            if optimizer:
                optimizer.step()

        step()
        asked.clear()
        kernels = counted(step)  # two steps
        found.append(dict(asked))
        launched.append(kernels[f"kernel {product}"])
    assert found[0] == found[1]
    assert launched == [8, 24]


def test_capture_does_nothing_that_a_graph_cannot():
    (features, labels), weight = batch(), torch.randn(10_000, 512, device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(cosface_loss(features, weight, labels), (features, weight))

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    RUNTIME.fake_reset()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()
    assert b"wait in a capture" not in RUNTIME.fake_counts()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FAKE_DEVICES=2")
@pytest.mark.parametrize("scales", [(64.0,), (64.0, 32.0)])
def test_a_table_on_another_device_is_trained_there(scales):
    head = CosFaceLoss(64, 1000, device="cuda:1")
    optimizer, (features, labels) = FusedSGD(head.parameters(), lr=0.1, momentum=0.9), batch(16, 64, "cuda:1")

    def step():
        for head.scale in scales:
            head(features, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert torch.cuda.current_device() == 0
    assert "pointer of another device" not in counted(step)


@pytest.mark.parametrize("rule", [FusedSGD, FusedAdamW])
def test_a_run_goes_on_from_a_cpus_state(rule):
    """The state_dict has its tensors on the CPU, as after torch.load(..., map_location="cpu")."""
    states = {}
    for device in ("cpu", "cuda"):
        head = CosFaceLoss(64, 1000, device=device)
        optimizer, (features, labels) = rule(head.parameters(), lr=0.1), batch(16, 64, device)
        if states:
            optimizer.load_state_dict(copy.deepcopy(states["cpu"]))
        head(features, labels).backward()
        optimizer.step()
        states[device] = optimizer.state_dict()
    assert states["cuda"]["state"][0]["rounding_step"] == 2
