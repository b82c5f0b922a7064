"""Behaviour on a GPU alone: labels that cannot be checked without waiting for the device, graph capture, several devices.

The first runs everywhere: it takes the check away on a CPU.
"""

import contextlib

import pytest
import torch
from cases import make
from conftest import HAS_GPU

from cosface_kernels import CosFaceLoss, FusedAdamW, FusedSGD, cosface_loss, margin_softmax_loss
from cosface_kernels.margins import CosFace, Softmax
from cosface_kernels.ops import formats, label_checks
from cosface_kernels.ops.backends import NAMES


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(label_checks, "check_labels", lambda *arguments: None)


@pytest.mark.parametrize("outside", [300, 10**12, -1, -(2**63)])
def test_label_outside_is_nan_where_it_reaches(device, backend, outside, unchecked):
    features, weight, labels = (tensor.to(device) for tensor in make("uniform", 7, 300, 19))
    features.requires_grad_()
    weight.requires_grad_()
    labels[3] = outside
    losses = cosface_loss(features, weight, labels, reduction="none", backend=backend)
    losses.sum().backward()
    others = torch.arange(7, device=device) != 3
    assert torch.equal(losses.isnan(), ~others)
    assert torch.equal(features.grad.isnan().all(1), ~others)
    assert features.grad[others].isfinite().all()
    assert weight.grad.isnan().all()  # the row is a negative of every class
    alone = cosface_loss(features[others], weight, labels[others], reduction="none", backend=backend)
    torch.testing.assert_close(losses[others], alone)


@pytest.mark.gpu
def test_label_check_on_request(monkeypatch):
    features, weight, labels = (tensor.to("cuda") for tensor in make("uniform", 7, 300, 19))
    labels[3] = 300
    assert cosface_loss(features, weight, labels).isnan()
    monkeypatch.setenv("COSFACE_CHECK_LABELS", "1")
    with pytest.raises(IndexError, match=r"labels\[3\] is 300"):
        cosface_loss(features, weight, labels)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [name for name in NAMES if name != "cpu"])
def test_graph_capture(backend):
    """A captured step, replayed on new inputs, gives the eager step's bits."""
    features, weight, labels = (tensor.to("cuda") for tensor in make("hard", 67, 1009, 70))
    features.requires_grad_()
    weight.requires_grad_()

    def step():
        loss = cosface_loss(features, weight, labels, backend=backend)
        return loss, *torch.autograd.grad(loss, (features, weight))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        features.copy_(features.flip(0))
        labels.copy_(labels.flip(0))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", range(3))
def test_rounding_draws_the_same_bits_as_on_a_cpu(stream):
    """For a step and row: test_triton_update holds the kernel to what formats.py draws on the GPU."""
    rows, key = torch.tensor([0, 3, 10**8, 2**40]), 2**63 + 5
    on_cpu, on_gpu = (formats.random_bits(key, each, 70, stream) for each in (rows, rows.to("cuda")))
    assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.fixture
def launched(monkeypatch):
    """[(kernel, keywords, what the innermost torch.cuda.device_of was given)] of what the interpreter runs in place of a GPU."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    found, guards, run = [], [None], interpreter.GridExecutor.__call__

    @contextlib.contextmanager
    def guard(tensor):
        guards.append(tensor)
        yield
        guards.pop()

    def record(executor, *arguments, **keywords):
        found.append((executor.fn.__name__, keywords, guards[-1]))
        return run(executor, *arguments, **keywords)

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    return found


@pytest.mark.skipif(HAS_GPU, reason="recorded in the interpreter")
@pytest.mark.parametrize("scales", [(64.0,), (64.0, 32.0)])
@pytest.mark.parametrize("table_format", ["float32", "bfloat16"])
def test_a_step_launches_on_the_tables_device(table_format, scales, launched):
    """Two scales: gradients that are added up first."""
    head = CosFaceLoss(16, 300, table_format=table_format, backend="triton")
    optimizer = FusedSGD(head.parameters(), lr=0.1, momentum=0.9)
    features, _, labels = make("uniform", 7, 300, 16)
    for head.scale in scales:
        head(features, labels).backward()
    launched.clear()
    optimizer.step()
    assert launched
    assert all(tensor.device == head.weight.device and tensor.dtype == head.weight.dtype for *_, tensor in launched)


@pytest.mark.skipif(HAS_GPU, reason="recorded in the interpreter")
@pytest.mark.parametrize(
    ("margin", "scale", "fused"), [(CosFace(0.35), 64.0, True), (CosFace(0.35), 1000.0, False), (Softmax(), 1.0, False)]
)
def test_exponents_are_rounded_as_their_maxima(margin, scale, fused, launched):
    """A fused multiply-add of a logit of 10^9 and its shift is off by hundreds; test_ahead_of_time checks the flag's effect."""
    features, weight, labels = make("uniform", 7, 300, 16)
    loss = margin_softmax_loss(
        features.requires_grad_(), weight.requires_grad_(), labels, margin=margin, scale=scale, backend="triton"
    )
    loss.backward()
    products = {"exponentials", "maxima"}
    assert {keywords["enable_fp_fusion"] for name, keywords, _ in launched if name in products} == {fused}
    assert all(keywords["enable_fp_fusion"] for name, keywords, _ in launched if name not in products)


@pytest.mark.parametrize("rule", [FusedSGD, FusedAdamW])
def test_counts_of_steps_follow_their_table(rule):
    """To where the table is, as a run on a GPU resumes from a file read to the CPU; what only the host reads stays there."""

    def made(device):
        head = CosFaceLoss(16, 300, device=device)
        return head, rule(head.parameters(), lr=0.1)

    head, optimizer = made("cpu")
    features, _, labels = make("uniform", 7, 300, 16)
    head(features, labels).backward()
    optimizer.step()
    elsewhere, resumed = made("meta")
    resumed.load_state_dict(optimizer.state_dict())
    state = resumed.state[elsewhere.weight]
    assert state["skipped"].device.type == "meta" and state["rounding_step"] == 1
    assert state.keys() == optimizer.state[head.weight].keys()
    assert all(value.device.type == "meta" for name, value in state.items() if name != "rounding_step")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.gpu
def test_device_that_is_not_current():
    features, weight, labels = (tensor.to("cuda:1") for tensor in make("uniform", 7, 300, 19))
    loss = cosface_loss(features, weight, labels)
    assert loss.device.index == 1 and loss.isfinite()
