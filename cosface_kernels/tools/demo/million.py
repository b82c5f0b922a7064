"""Real optimiser steps over one million identities, beside time and memory of the plain expression for the same step.

    generator    pool of 2,048 identities among the million -> latent -> view = latent · mixing + noise
    backbone     view -> multilayer perceptron -> 128 features
    head         CosFaceLoss(128, 1_000_000): every step, all its rows are in the denominator and receive a gradient

The plain expression is cosface_kernels.reference.cosface_loss: of the plain forms tried the one with least memory. Its forward
and backward pass alone are timed, without backbone and optimiser, in bfloat16 autocast or in float32, whichever is faster on the
machine, and with fewer classes where all of them would take long or not fit.
"""

import statistics
import time
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from ... import CosFaceLoss, reference
from ...ops.memory import available_bytes, peak_bytes

CLASSES, EMBEDDING, ROWS = 1_000_000, 128, 256
POOL, LATENT, VIEW, NOISE = 2048, 64, 256, 0.5
HEAD_RATE, BACKBONE_RATE, MOMENTUM = 0.1, 0.003, 0.9
STEPS = {"cpu": 16, "cuda": 200}
# A slow machine stops early.
SECONDS_MAX = 60
# Class table, its gradient, its momentum, the kept exponentials, each CLASSES x EMBEDDING x 4 bytes; and the rest of the process.
BYTES_NEEDED = 3_500_000_000
PLAIN_DTYPES = torch.bfloat16, torch.float32
PLAIN_SECONDS_MAX = 20
PROBE_CLASSES = 20_000  # with which each dtype is timed first


class Result(NamedTuple):
    device: str
    steps: int
    step_seconds: float  # median
    peak_bytes: int
    losses: list[float]  # of every step
    plain_dtype: str
    plain_classes: int  # C of the plain expression's run; if it is not CLASSES, the next two are extrapolated
    plain_seconds: float
    plain_peak_bytes: int


def require_memory(device):
    """Raises MemoryError, with a message for people, where the class table and its optimiser state would not fit."""
    available = available_bytes(device)
    if available < BYTES_NEEDED:
        raise MemoryError(f"the demo needs {_gb(BYTES_NEEDED)} of free memory, but {device.type} has {_gb(available)}")


def run(out, device):
    """Train, measure the plain expression, draw million_loss.png into `out`, return the Result."""
    torch.manual_seed(0)
    head = CosFaceLoss(EMBEDDING, CLASSES, device=device)
    backbone = make_backbone(EMBEDDING).to(device)
    draw_batch = generator(CLASSES, ROWS, device)
    groups = [{"params": head.parameters(), "lr": HEAD_RATE}, {"params": backbone.parameters(), "lr": BACKBONE_RATE}]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, fused=True)
    losses, seconds = _train(head, backbone, optimizer, draw_batch)
    peak = peak_bytes(device)
    optimizer.zero_grad()
    views, labels = draw_batch()
    plain = _measure_plain(backbone(views).detach(), head.weight.detach(), labels)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    _draw(losses).savefig(out / "million_loss.png")
    # The first step allocates and warms up.
    step_seconds = statistics.median(seconds[1:] or seconds)
    return Result(name, len(losses), step_seconds, peak, losses, **plain)


def make_backbone(size):
    """A backbone that makes `size` features of a view."""
    return nn.Sequential(nn.Linear(VIEW, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, size), nn.BatchNorm1d(size))


def generator(classes, rows, device):
    """A function that draws (views (N, VIEW), labels (N,)) of N different identities of a pool among all."""
    latents = torch.randn(POOL, LATENT, device=device)
    mixing = torch.randn(LATENT, VIEW, device=device) / LATENT**0.5
    identities = torch.randperm(classes, device=device)[:POOL]

    def draw_batch():
        drawn = torch.randperm(POOL, device=device)[:rows]
        return latents[drawn] @ mixing + NOISE * torch.randn(rows, VIEW, device=device), identities[drawn]

    return draw_batch


def _train(head, backbone, optimizer, draw_batch):
    """(loss, seconds) of each step."""
    device_type = head.weight.device.type
    losses, seconds = [], []
    started = time.perf_counter()
    with tqdm(total=STEPS[device_type], desc=f"{CLASSES:,} identities", unit="step") as bar:
        while len(losses) < STEPS[device_type] and time.perf_counter() - started < SECONDS_MAX:
            step_started = time.perf_counter()
            views, labels = draw_batch()
            with torch.autocast(device_type, torch.bfloat16):
                loss = head(backbone(views), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # waits for the device
            _synchronize(head.weight.device)
            seconds.append(time.perf_counter() - step_started)
            bar.set_postfix(loss=f"{losses[-1]:.1f}")
            bar.update()
    return losses, seconds


def _measure_plain(features, weight, labels):
    """Result's fields of plain forward and backward, by name; seconds and bytes of all classes."""
    device = weight.device
    probe = weight[:PROBE_CLASSES]
    rates = {dtype: _plain_seconds(features, probe, labels, dtype, 2) / len(probe) for dtype in PLAIN_DTYPES}
    dtype = min(rates, key=rates.get)
    # At the peak of the reference's backward: five N x C matrices; unit rows, at most one C x D in float32.
    bytes_per_class = 5 * ROWS * dtype.itemsize + EMBEDDING * 4
    fits, in_time = available_bytes(device) // (2 * bytes_per_class), int(PLAIN_SECONDS_MAX / rates[dtype])
    classes = min(len(weight), fits, in_time)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # training's peak is not this one's
    seconds = _plain_seconds(features, weight[:classes], labels, dtype, 1 if device.type == "cpu" else 5)
    table_and_momentum = 2 * len(weight) * EMBEDDING * 4
    return {
        "plain_dtype": str(dtype),
        "plain_classes": classes,
        "plain_seconds": seconds * len(weight) / classes,
        "plain_peak_bytes": table_and_momentum + len(weight) * bytes_per_class if classes < len(weight) else peak_bytes(device),
    }


def _plain_seconds(features, weight, labels, dtype, repeats):
    """The best time of plain forward and backward, in autocast to dtype."""
    features, weight = features.detach().requires_grad_(), weight.detach().requires_grad_()
    seconds = []
    for _ in tqdm(range(repeats), desc=f"plain PyTorch, {dtype}, {len(weight):,} identities", unit="step"):
        features.grad = weight.grad = None
        started = time.perf_counter()
        with torch.autocast(weight.device.type, dtype, enabled=dtype != torch.float32):
            loss = reference.cosface_loss(features, weight, labels % len(weight))
        loss.backward()
        _synchronize(weight.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _draw(losses):
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, marker="o", markersize=4 if len(losses) < 50 else 0)
    axes.set_title(f"CosFaceLoss over {CLASSES:,} identities: {POOL:,} of them revisited, {ROWS} a step")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    return figure


def table(result):
    """Lines of text."""
    plain_seconds, plain_peak = f"{result.plain_seconds:.3g} s", _gb(result.plain_peak_bytes)
    loss = f"{result.losses[0]:.1f} -> {result.losses[-1]:.1f}"
    yield f"Training over {CLASSES:,} identities: D = {EMBEDDING}, N = {ROWS}, bfloat16 autocast (million_loss.png)"
    yield f"  on {result.device}"
    yield f"  {'':<14}{'CosFaceLoss':>14}{'plain PyTorch':>16}"
    yield f"  {'step':<14}{f'{result.step_seconds:.3g} s':>14}{plain_seconds:>16}"
    yield f"  {'peak memory':<14}{_gb(result.peak_bytes):>14}{plain_peak:>16}"
    yield f"  {'loss':<14}{loss:>14}{'':>16}   in {result.steps} steps"
    dtype = result.plain_dtype.removeprefix("torch.")
    matrix = _gb(ROWS * CLASSES * getattr(torch, dtype).itemsize)
    yield "  Ours: the median of whole steps. Plain: cosface_kernels.reference.cosface_loss, a forward and backward pass alone,"
    yield f"  in the faster of bfloat16 and float32, here {dtype}; at its peak it holds five N x C matrices of {matrix} each."
    if result.plain_classes < CLASSES:
        yield f"  All classes take it too long or do not fit: extrapolated from {result.plain_classes:,}, its memory computed."


def _gb(count):
    return f"{count / 1e9:.2f} GB"
