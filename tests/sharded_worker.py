"""One rank of test_sharded.py: python sharded_worker.py RANK SIZE FOLDER runs every check that is for SIZE ranks.

Each check has a process group of its own, so that one that fails on a rank takes no other with it. What became of it goes into
FOLDER/outcomes.RANK, a line each: its name, and a traceback or null.
"""

import copy
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import feature_table
import torch
import torch.distributed as dist
import unwritten
import wrapped_heads
from margin_rows import ROWS, batch, steepness
from rounding import NUM_CLASSES, SIZE, assert_close, tolerance
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import (
    CosFaceLoss,
    FusedAdamW,
    FusedSGD,
    MarginSoftmaxLoss,
    ShardedCosFaceLoss,
    ShardedMarginSoftmaxLoss,
    cosface_loss,
    functional,
    load_checkpoint,
    margins,
    save_checkpoint,
)
from cosface_kernels.compat import insightface
from cosface_kernels.distributed import dtensors
from cosface_kernels.heads import confusions, float8
from cosface_kernels.ops import recording, slabs

CHECKS = {}  # name: (numbers of ranks, function)
# Until a collective gives up: on a busy machine a rank may get there minutes after another.
PATIENCE = timedelta(minutes=5)
# Rows of each rank, 12 in all.
COUNTS = {1: [12], 2: [7, 5], 3: [7, 0, 5]}


def check(name, *sizes):
    def register(function):
        assert name not in CHECKS
        CHECKS[name] = (sizes, function)
        return function

    return register


for name, function in wrapped_heads.CHECKS.items():
    check(name, 2)(function)


class World:
    """This rank among the others, and its part of the rows and of a table."""

    def __init__(self, rank, size, done):
        self.rank, self.size, self.counts = rank, size, COUNTS[size]
        self.done = done  # a path to mark with, for the others to see

    def leave(self):
        self.done.with_suffix(f".{self.rank}").touch()

    def wait_for_others(self):
        """Alive, and without a word to them."""
        while not all(self.done.with_suffix(f".{rank}").exists() for rank in range(self.size) if rank != self.rank):
            time.sleep(0.1)

    def margin_loss(self):
        return CosFace()

    def mine(self, rows):
        return rows.split(self.counts)[self.rank].clone()

    def shard(self, table):
        """By torch.chunk's rule, which is Shard(0)'s; the last ranks may have none."""
        chunks = table.chunk(self.size)
        return chunks[self.rank] if self.rank < len(chunks) else table[:0]


@contextmanager
def raises(kind, pattern):
    try:
        yield
    except Exception as error:
        assert type(error) is kind, f"{type(error).__name__}: {error}"
        assert re.search(pattern, str(error)), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")


def draw(num_classes=NUM_CLASSES, dtype=torch.float64):
    """(features, weight, labels) of CosFace."""
    return batch(ROWS["CosFace"], num_classes=num_classes, dtype=dtype)


def fill(world, head, *tables):
    with torch.no_grad():
        for parameter, table in zip(head.parameters(), tables, strict=True):
            parameter.to_local().copy_(world.shard(table))
    return head


def sharded(world, weight, **options):
    head = ShardedCosFaceLoss(SIZE, len(weight), **{"dtype": weight.dtype, "ddp_average": False} | options)
    return fill(world, head, weight)


def single(weight, *features, labels, upstream=1.0, **options):
    """(loss, dX, dW) in one process."""
    features, weight = (tensor.detach().clone().requires_grad_() for tensor in (*features, weight))
    loss = cosface_loss(features, weight, labels, **options)
    return loss.detach(), *torch.autograd.grad((loss * upstream).sum(), (features, weight))


def assert_equals_single(world, head, features, weight, labels, relative=None, **options):
    """Loss, dX and dW of one rank's part."""
    relative = tolerance(features.dtype) if relative is None else relative
    local = world.mine(features).requires_grad_()
    loss = head(local, world.mine(labels))
    loss.backward()
    wanted, features_grad, weight_grad = single(weight, features, labels=labels, **options)
    assert_close(loss.detach(), wanted, relative, "loss")
    assert_close(local.grad, world.mine(features_grad), relative, "dX", size=features_grad.norm())
    grad = head.weight.grad
    grad = grad.to_local() if isinstance(grad, DTensor) else grad
    assert grad.shape == world.shard(weight_grad).shape
    assert_close(grad, world.shard(weight_grad), relative, "dW", size=weight_grad.norm())
    head.weight.grad = None


def heads(world, row, tables, *, dtype, whole_dtype=None, **options):
    """A head of a row of the table, sharded, and one in one process with the same numbers."""
    options = dict(margin=row.margin, bias=row.bias, **row.options) | options
    num_classes = len(tables[0]) // row.centers
    head = ShardedMarginSoftmaxLoss(SIZE, num_classes, dtype=dtype, ddp_average=False, **options)
    whole = MarginSoftmaxLoss(SIZE, num_classes, dtype=whole_dtype or dtype, **options)
    with torch.no_grad():
        for parameter, values in zip(whole.parameters(), tables, strict=True):
            parameter.copy_(values)
    pair = fill(world, head, *tables), whole
    return [each.double() if each.weight.dtype == torch.float64 else each for each in pair]  # the statistics


def every_margin(name, dtype):
    """Two training steps and one in eval mode, with an ignored row of NaN: what one process with the whole batch computes."""

    def function(world):
        row = ROWS[name]
        features, weight, labels, *bias = batch(row)
        labels[4], features[4] = -100, torch.nan
        tables = [table.to(dtype) for table in (weight, *bias)]
        head, whole = heads(world, row, tables, dtype=dtype, whole_dtype=torch.float64)
        relative = tolerance(dtype, steepness(row, features, weight))
        for training in (True, True, False):
            whole.train(training), head.train(training)
            everything = features.to(dtype).to(torch.float64, copy=True).requires_grad_()
            local = world.mine(features).to(dtype).requires_grad_()
            exact, loss = whole(everything, labels), head(local, world.mine(labels))
            assert loss.dtype == dtype
            exact.backward(), loss.backward()
            assert_close(loss.detach(), exact.detach(), relative, "loss")
            assert_close(local.grad, world.mine(everything.grad), relative, "dX", size=everything.grad.norm())
            for (what, ours), other in zip(head.named_parameters(), whole.parameters(), strict=True):
                grad = ours.grad
                assert isinstance(grad, DTensor) and grad.placements == (Shard(0),) and grad.shape == other.shape
                assert_close(grad.to_local(), world.shard(other.grad), relative, "d" + what, size=other.grad.norm())
            for (what, ours), other in zip(head.named_buffers(), whole.buffers(), strict=True):
                assert_close(ours.double(), other.double(), relative, what)
            head.zero_grad(), whole.zero_grad()

    return function


# One of each kind that ranks see: constant, jump, statistics, step, penalty, raw features, raw table, bias, sub-centres.
for name in ("CosFace", "ArcFace raw", "SphereFace annealed", "AdaFace x3", "MagFace", "Softmax bias x3", "LSoftmax 4"):
    check(f"{name} float64", 2, 3)(every_margin(name, torch.float64))
for name in ("CosFace", "AdaFace", "Softmax bias"):
    check(f"{name} float32", 2)(every_margin(name, torch.float32))


def learnt_scale(num_classes, scale):
    """Two steps of a learnt scale as in one process, and the same bits on every rank, also of one with an empty shard."""

    def function(world):
        features, weight, labels = draw(num_classes)
        options = {"scale": scale, "learnable_scale": True, "dtype": weight.dtype}
        head, whole = (
            ShardedCosFaceLoss(SIZE, num_classes, ddp_average=False, **options),
            CosFaceLoss(SIZE, num_classes, **options),
        )
        head.class_weight = whole.class_weight = torch.linspace(1, 2, num_classes, dtype=torch.float64)  # in the first step
        with torch.no_grad():
            head.weight.to_local().copy_(world.shard(weight)), whole.weight.copy_(weight)
        steps = [torch.optim.SGD([each.double().log_scale], lr=1e-3) for each in (head, whole)]
        for _ in range(2):
            everything, local = features.clone().requires_grad_(), world.mine(features).requires_grad_()
            exact, loss = whole(everything, labels), head(local, world.mine(labels))
            loss.backward(), exact.backward()
            assert_close(loss.detach(), exact.detach(), 1e-11, "loss")
            assert_close(head.log_scale.grad, whole.log_scale.grad, 1e-10, "dlog_scale")
            assert_close(local.grad, world.mine(everything.grad), 1e-10, "dX", size=everything.grad.norm())
            for each, step in zip((head, whole), steps, strict=True):
                step.step(), each.zero_grad()
                each.label_smoothing = 0.1
                each.class_weight = None
        values = [torch.zeros((), dtype=torch.float64) for _ in range(world.size)]
        dist.all_gather(values, head.log_scale.detach())
        assert len({value.item() for value in values}) == 1 and values[0] != math.log(scale)

    return function


check("a learnt scale", 2)(learnt_scale(NUM_CLASSES, 30.0))
check("a learnt scale, beyond what a sum holds", 2)(learnt_scale(NUM_CLASSES, 900.0))
check("a learnt scale where a shard is empty", 3)(learnt_scale(4, 30.0))


@check("the weight is a DTensor", 1, 2, 3)
def _(world):
    torch.manual_seed(5)
    head = ShardedCosFaceLoss(SIZE, 301)
    assert isinstance(head.weight, torch.nn.Parameter) and isinstance(head.weight.data, DTensor)
    assert head.weight.placements == (Shard(0),) and head.weight.shape == (301, SIZE)
    whole = head.weight.full_tensor()
    assert torch.equal(world.shard(whole), head.weight.to_local())
    # Each rank draws its own rows: no two are equal. 4816 numbers.
    assert len(whole.unique(dim=0)) == 301 and abs(whole.std() - 0.01) < 5 * 0.01 / (2 * 4816) ** 0.5
    torch.manual_seed(5)
    assert torch.equal(ShardedCosFaceLoss(SIZE, 301).weight.to_local(), head.weight.to_local())
    again = ShardedCosFaceLoss(SIZE, 301)  # the generator has moved on
    assert not again.weight.to_local().eq(head.weight.to_local()).any()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.weight.to_local(), head.weight.to_local())
    for other in (copy.deepcopy(head), head.double()):
        assert isinstance(other.weight.data, DTensor) and torch.equal(other.weight.full_tensor().float(), whole)
    assert repr(head) == (
        "ShardedCosFaceLoss(16, 301, scale=64.0, margin=0.35, reduction='mean', ddp_average=True, "
        f"rank {world.rank} of {world.size})"
    )
    empty = ShardedCosFaceLoss(SIZE, 301, device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    empty.reset_parameters()
    assert torch.equal(empty.weight.to_local(), again.weight.to_local())


@check("every reduction", 1, 2, 3)
def _(world):
    features, weight, labels = draw()
    labels[5] = -100
    for reduction in ("mean", "sum"):
        head = sharded(world, weight, reduction=reduction)
        assert_equals_single(world, head, features, weight, labels, reduction=reduction)
    # "none": each rank its own rows, with upstream gradients of its own; one sum of all is differentiated.
    head = sharded(world, weight, reduction="none")
    local, upstream = world.mine(features).requires_grad_(), torch.linspace(1, 2, 12, dtype=torch.float64)
    losses = head(local, world.mine(labels))
    (losses * world.mine(upstream)).sum().backward()
    wanted, dx, dw = single(weight, features, labels=labels, upstream=upstream, reduction="none")
    assert_close(losses.detach(), world.mine(wanted), tolerance(torch.float64))
    assert_close(local.grad, world.mine(dx), tolerance(torch.float64), size=dx.norm())
    assert_close(head.weight.grad.to_local(), world.shard(dw), tolerance(torch.float64), size=dw.norm())


@check("the same loss on every rank, bit for bit", 2, 3)
def _(world):
    features, weight, labels = draw(dtype=torch.float32)
    loss = sharded(world, weight)(world.mine(features), world.mine(labels))
    losses = [torch.empty_like(loss) for _ in range(world.size)]
    dist.all_gather(losses, loss.detach())
    assert all(torch.equal(loss, other) for other in losses)


@check("ignore_index is a class's place", 2, 3)
def _(world):
    """A place in a shard, the reserved labels of the operator, and a class."""
    features, weight, labels = draw()
    labels[:4] = torch.tensor([2, 102, 152, 202])
    for ignored in (2, 102, 152, -1, -2, -(2**63), 2**63 - 1):
        labels[6] = ignored
        head = sharded(world, weight, ignore_index=ignored)
        assert_equals_single(world, head, features, weight, labels, ignore_index=ignored)


@check("fewer classes than ranks", 2, 3)
def _(world):
    for num_classes in (1, 2):
        features, weight, labels = draw(num_classes)
        head = sharded(world, weight)
        assert_equals_single(world, head, features, weight, labels)
        # A class too few for one of its rows: every rank has a gradient all the same, as an optimizer of DTensors wants.
        head(world.mine(features), world.mine(labels)).backward()
        assert head.weight.grad.shape == weight.shape
        values, indices = head.topk(world.mine(features), num_classes)
        assert torch.equal(indices.sort(1).values, torch.arange(num_classes).expand_as(indices)) and values.isfinite().all()
    features, weight, labels, bias = batch(ROWS["Softmax bias"], num_classes=2)
    head = ShardedMarginSoftmaxLoss(SIZE, 2, margin=margins.Softmax(), bias=True, dtype=torch.float64)
    fill(world, head, weight, bias)
    loss = head(world.mine(features), world.mine(labels))
    exact = functional.margin_softmax_loss(features, weight, labels, margin=margins.Softmax(), bias=bias)
    assert_close(loss.detach(), exact, tolerance(torch.float64))


@check("batches of any size", 2, 3)
def _(world):
    features, weight, labels = draw()
    head = sharded(world, weight)
    for counts in ([0, 12, 0], [12, 0, 0], [0, 0, 12], [1, 10, 1]):
        world.counts = [*counts[: world.size - 1], 12 - sum(counts[: world.size - 1])]
        assert_equals_single(world, head, features, weight, labels)
    loss = head(features[:0].requires_grad_(), labels[:0])
    loss.backward()
    assert loss == 0 and not head.weight.grad.to_local().any()
    head.zero_grad()
    loss = head(world.mine(features), torch.full_like(world.mine(labels), -100))
    loss.backward()
    assert loss == 0 and not head.weight.grad.to_local().any()


@check("huge logits", 2, 3)
def _(world):
    """Exponents past those of float64: each row's maximum over the ranks comes first."""
    features, weight, labels = draw()
    head = sharded(world, weight, scale=5000.0)
    assert_equals_single(world, head, features, weight, labels, tolerance(torch.float64, 5000.0), scale=5000.0)
    head = ShardedMarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=margins.Softmax(), dtype=torch.float64)
    fill(world, head, weight)
    loss = head(1e4 * world.mine(features), world.mine(labels))
    exact = functional.margin_softmax_loss(1e4 * features, weight, labels, margin=margins.Softmax())
    assert exact > 1e4
    assert_close(loss.detach(), exact, tolerance(torch.float64))


@check("16 bits", 2)
def _(world):
    """As one process in 16 bits does, but for another order of its sums and a rounding of dX: twice what rounding explains."""
    for autocast in (False, True):
        features, weight, labels = draw(dtype=torch.float32)
        features = features if autocast else features.bfloat16()
        head, local = sharded(world, weight, scale=8.0), world.mine(features).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = head(local, world.mine(labels))
        loss.backward()
        exact = single(weight.double(), features.double(), labels=labels, scale=8.0)
        relative = tolerance(torch.bfloat16, 2.0)  # |cos| <= 1: most of an exponent's error is common to a row
        assert local.grad.dtype == features.dtype and loss.dtype == torch.float32
        assert_close(loss.detach(), exact[0], relative)
        assert_close(local.grad, world.mine(exact[1]), relative, size=exact[1].norm())
        assert_close(head.weight.grad.to_local(), world.shard(exact[2]), relative, size=exact[2].norm())


@check("features without gradient", 2, 3)
def _(world):
    """On one rank only, and on all."""
    features, weight, labels = draw()
    head = sharded(world, weight)
    _, dx, dw = single(weight, features, labels=labels)
    for frozen in ([0], range(3)):
        local = world.mine(features).requires_grad_(world.rank not in frozen)
        head(local, world.mine(labels)).backward()
        if local.requires_grad:
            assert_close(local.grad, world.mine(dx), tolerance(torch.float64), size=dx.norm())
        assert_close(head.weight.grad.to_local(), world.shard(dw), tolerance(torch.float64), size=dw.norm())
        head.zero_grad()
    with torch.no_grad():
        assert not head(world.mine(features), world.mine(labels)).requires_grad
    head.weight.requires_grad_(False)
    local = world.mine(features).requires_grad_()
    head(local, world.mine(labels)).backward()
    assert_close(local.grad, world.mine(dx), tolerance(torch.float64), size=dx.norm())


def backbone():
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(SIZE, 24), torch.nn.Tanh(), torch.nn.Linear(24, SIZE)).double()


def check_backbone(world, wrap, **options):
    features, weight, labels = draw()
    model, plain, head = wrap(backbone()), backbone(), sharded(world, weight, **options)
    head(model(world.mine(features)), world.mine(labels)).backward()
    cosface_loss(plain(features), weight, labels).backward()
    for ours, exact in zip(model.parameters(), plain.parameters(), strict=True):
        grad = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        # Through a small network: some ten terms of the size of its Jacobian.
        assert_close(grad, exact.grad, 10 * tolerance(torch.float64), size=exact.grad.norm())


@check("a DDP backbone ends with the gradient of the global mean", 2, 3)
def _(world):
    check_backbone(world, DistributedDataParallel, ddp_average=True)


@check("a FSDP2 backbone ends with the gradient of the global mean", 2, 3)
def _(world):
    mesh = init_device_mesh("cpu", (world.size,))
    check_backbone(world, lambda model: fully_shard(model, mesh=mesh), ddp_average=True)


@check("ddp_average", 2, 3)
def _(world):
    features, weight, labels = draw()
    _, dx, dw = single(weight, features, labels=labels)
    for average in (True, False):
        head, local = sharded(world, weight, ddp_average=average), world.mine(features).requires_grad_()
        head(local, world.mine(labels)).backward()
        factor = world.size if average else 1
        assert_close(local.grad, factor * world.mine(dx), tolerance(torch.float64), size=dx.norm())
        assert_close(head.weight.grad.to_local(), world.shard(dw), tolerance(torch.float64), size=dw.norm())


@check("optimizers", 2, 3)
def _(world):
    """Three steps of each, table and features, C < W too: the table of one process."""
    for num_classes in (NUM_CLASSES, 2):
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            features, weight, labels = draw(num_classes)
            head, whole = sharded(world, weight), CosFaceLoss(SIZE, num_classes, dtype=torch.float64)
            whole.weight.data.copy_(weight)
            steps = [kind(module.parameters(), lr=0.01, weight_decay=0.1) for module in (head, whole)]
            for _ in range(3):
                head(world.mine(features), world.mine(labels)).backward(), whole(features, labels).backward()
                for step in steps:
                    step.step(), step.zero_grad()
            # AdamW divides by a gradient that may be small: what rounds there is as large as a step.
            relative = 0.01 if kind is torch.optim.AdamW and num_classes == 2 else 100 * tolerance(torch.float64)
            assert_close(head.weight.to_local(), world.shard(whole.weight.detach()), relative)


@check("topk", 1, 2, 3)
def _(world):
    features, weight, _ = draw()
    head = sharded(world, weight)
    whole = CosFaceLoss(SIZE, NUM_CLASSES, dtype=torch.float64)
    whole.weight.data.copy_(weight)
    for k in (0, 1, 5, 130, NUM_CLASSES):
        values, indices = head.topk(world.mine(features), k)
        wanted = whole.topk(features, k)
        assert torch.equal(indices, world.mine(wanted[1]))
        assert_close(values, world.mine(wanted[0]), tolerance(torch.float64))
    with raises(ValueError, "k must be from 0 to the number of classes, 300, got 301"):
        head.topk(world.mine(features), NUM_CLASSES + 1)
    if world.size > 1:
        with raises(ValueError, "k must be the same on all ranks, got 1, 2"):
            head.topk(world.mine(features), 1 + world.rank)
        with raises(NotImplementedError, "topk"):
            head.logits(world.mine(features))


@check("classes and rows looked up in the table", 2, 3)
def _(world):
    """As in one process, also where a shard is empty: confusions on every rank of all classes, own_cosines of a rank's rows."""
    confusions.ROWS = 5  # looked up at a time
    for num_classes, centers, table_format in ((4, 1, "float32"), (12, 3, "float32"), (13, 1, "float8")):
        features, weight, labels = draw(num_classes * centers, dtype=torch.float32)
        labels = (labels % num_classes).index_fill(0, torch.tensor([4]), -100)
        options = {"margin": margins.CosFace(), "centers_per_class": centers, "table_format": table_format}
        head, whole = ShardedMarginSoftmaxLoss(SIZE, num_classes, **options), MarginSoftmaxLoss(SIZE, num_classes, **options)
        with torch.no_grad():
            float8.put(whole.weight, whole.weight_scale, slice(None), weight)
            float8.put(head.weight.to_local(), head._row_scale(), slice(None), world.shard(weight))
        for ours, exact in zip(head.confusions(3), whole.confusions(3), strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-6)
        ours, exact = head.own_cosines(world.mine(features), world.mine(labels)), whole.own_cosines(features, labels)
        torch.testing.assert_close(ours, world.mine(exact), rtol=0, atol=1e-6, equal_nan=True)
    module = insightface.PartialFC_V2(CosFace(), SIZE, 13)
    module.load_state_dict({"weight": theirs(weight, world.rank, world.size)})
    exact = CosFaceLoss(SIZE, 13)
    exact.weight.data.copy_(weight)
    assert torch.equal(module.confusions(2)[1], exact.confusions(2)[1])
    with raises(ValueError, "k must be the same on all ranks, got 1, 2"):
        head.confusions(1 + world.rank)
    with raises(IndexError, r"rank 0: IndexError: labels\[0\] is 13"):
        head.own_cosines(world.mine(features), world.mine(torch.full_like(labels, 13 if world.rank == 0 else 1)))


# What one rank does wrong: (features, labels) -> them; the error of all.
MISTAKES = {
    "labels of floats": (lambda x, y: (x, y.float()), TypeError, "labels must have an integer dtype"),
    "wrong D": (lambda x, y: (x[:, :5], y), ValueError, r"D = 16, got shape \(\d, 5\)"),
    "no tensor": (lambda x, y: (None, y), TypeError, "got no features"),
    "too few labels": (lambda x, y: (x, y[1:]), ValueError, "one class index for each row"),
    "on another device": (lambda x, y: (x.to("meta"), y), TypeError, "must have its numbers in memory"),
    "a label past the last class": (lambda x, y: (x, torch.full_like(y, 300)), IndexError, r"labels\[0\] is 300.* \[0, 300\)"),
    "a negative label": (lambda x, y: (x, torch.full_like(y, -7)), IndexError, r"labels\[0\] is -7"),
}


@check("statistics", 1, 2, 3)
def _(world):
    """Each rank's rows have those of one process with the whole table, classes that tie across shards included."""
    features, weight, labels = draw()
    tied = [0, NUM_CLASSES // 2, NUM_CLASSES - 1]
    weight[tied] = features[0] = torch.eye(SIZE, dtype=weight.dtype)[0]
    labels[0], labels[3] = 1, -100
    _, wanted = cosface_loss(features, weight, labels, return_statistics=True)
    loss, found = sharded(world, weight)(world.mine(features), world.mine(labels), return_statistics=True)
    assert wanted.negative_class[0] == 0
    for ours, exact in zip(found, map(world.mine, wanted), strict=True):
        assert_close(ours.double().nan_to_num(9), exact.double().nan_to_num(9), tolerance(torch.float64))
    assert torch.equal(loss, sharded(world, weight)(world.mine(features), world.mine(labels)))
    if world.size > 1:
        with raises(ValueError, "return_statistics must be the same on all ranks"):
            sharded(world, weight)(world.mine(features), world.mine(labels), return_statistics=world.rank == 0)
    few, weight, labels = draw(world.size - 1 or 1)  # a rank without classes
    _, wanted = cosface_loss(few, weight, labels, return_statistics=True)
    _, found = sharded(world, weight)(world.mine(few), world.mine(labels), return_statistics=True)
    assert torch.equal(found.negative_class, world.mine(wanted.negative_class))
    assert torch.equal(found.correct, world.mine(wanted.correct))


@check("hard negatives", 2, 3)
def _(world):
    """Two training steps and one in eval mode, with the running statistic: what one process with the whole batch computes."""
    features, weight, labels = draw()
    labels[4] = -100
    options = {"negatives": margins.CurricularFace(0.5), "margin": 0.2, "scale": 64.0}
    head, whole = sharded(world, weight, **options), CosFaceLoss(SIZE, NUM_CLASSES, dtype=weight.dtype, **options)
    whole.weight.data.copy_(weight)
    for training in (True, True, False):
        head.train(training), whole.train(training)
        local = world.mine(features).requires_grad_()
        everything = features.clone().requires_grad_()
        loss, exact = head(local, world.mine(labels)), whole(everything, labels)
        loss.backward(), exact.backward()
        relative = tolerance(torch.float32)  # the statistic is float32
        assert_close(loss.detach(), exact.detach(), relative)
        assert_close(head.t, whole.t, relative)
        assert_close(local.grad, world.mine(everything.grad), relative, size=everything.grad.norm())
    assert_close(head.weight.grad.to_local(), world.shard(whole.weight.grad), relative, size=whole.weight.grad.norm())
    if world.rank == 1:
        head.negatives = None
    with raises(ValueError, "options of the head must be the same"):
        head(world.mine(features), world.mine(labels))


@check("the nearest negatives of all shards", 2, 3)
def _(world):
    """Also where a shard has fewer classes than are asked for, or none."""
    for num_classes in (NUM_CLASSES, 4):
        features, weight, labels = draw()
        weight, labels = weight[:num_classes], labels % num_classes
        options = {"negatives": margins.InterTopK(2, 0.1), "margin": 0.2, "scale": 16.0}
        head, whole = sharded(world, weight, **options), CosFaceLoss(SIZE, num_classes, dtype=weight.dtype, **options)
        whole.weight.data.copy_(weight)
        loss, exact = head(world.mine(features), world.mine(labels)), whole(features, labels)
        loss.backward(), exact.backward()
        relative = tolerance(torch.float64, 16.0)
        assert_close(loss.detach(), exact.detach(), relative)
        assert_close(head.weight.grad.to_local(), world.shard(whole.weight.grad), relative, size=whole.weight.grad.norm())


@check("a mistake on one rank is an error on all", 2, 3)
def _(world):
    features, weight, labels = draw()
    head, last = sharded(world, weight), world.size - 1
    for wrong, kind, pattern in MISTAKES.values():
        arguments = world.mine(features), world.mine(labels)
        with raises(kind, f"^rank {last}: {kind.__name__}: .*" + pattern):
            head(*(wrong(*arguments) if world.rank == last else arguments))
    # On two ranks at once: all hear of both.
    head.scale = -5.0 if world.rank in (0, last) else 64.0
    with raises(ValueError, f"^rank 0: ValueError: scale must.*\nrank {last}: ValueError: scale must.*got -5"):
        head(world.mine(features), world.mine(labels))
    head.scale = 64.0
    with raises(ValueError, r"same dtype on all ranks, got torch.float32, torch.float64"):
        head(world.mine(features).to(torch.float64 if world.rank else torch.float32), world.mine(labels))
    with raises(ValueError, "gradients must be enabled .*got True, False"), torch.set_grad_enabled(not world.rank):
        head(world.mine(features), world.mine(labels))
    # And all of them go on.
    assert_equals_single(world, head, features, weight, labels)


@check("meshes", 2, 3)
def _(world):
    features, weight, labels = draw()
    some = init_device_mesh("cpu", (1, world.size), mesh_dim_names=("replicate", "shard"))
    assert_equals_single(world, sharded(world, weight, mesh=some["shard"]), features, weight, labels)
    with torch.device("meta"):  # the default device is not the mesh's
        adaface = ShardedMarginSoftmaxLoss(SIZE, 5, mesh=some["shard"], margin=margins.AdaFace())
    assert {tensor.device.type for tensor in adaface.state_dict().values()} == {"cpu"}
    with raises(ValueError, "mesh must have one dimension"):
        ShardedCosFaceLoss(SIZE, 5, mesh=some)
    with raises(TypeError, "mesh must be a torch.distributed DeviceMesh or None, got int"):
        ShardedCosFaceLoss(SIZE, 5, mesh=3)
    with raises(ValueError, "device must be of the mesh's type, cpu, got"):
        ShardedCosFaceLoss(SIZE, 5, mesh=some["shard"], device="cuda")
    alone = some["replicate"]  # this rank alone
    loss = ShardedCosFaceLoss(SIZE, NUM_CLASSES, mesh=alone, dtype=torch.float64)
    with torch.no_grad():
        loss.weight.to_local().copy_(weight)
    exact = cosface_loss(world.mine(features), weight, world.mine(labels))
    assert_close(loss(world.mine(features), world.mine(labels)).detach(), exact, tolerance(torch.float64))


@check("classes cut in two", 2)
def _(world):
    with raises(ValueError, "15 rows for 2 ranks after every 8.*num_classes must be a multiple.* such as 6"):
        ShardedMarginSoftmaxLoss(SIZE, 5, margin=margins.ArcFace(), centers_per_class=3)
    ShardedMarginSoftmaxLoss(SIZE, 6, margin=margins.ArcFace(), centers_per_class=3)


class CosFace(torch.nn.Module):
    """InsightFace's, in the one point that `translate` measures."""

    s, m = 64.0, 0.4

    def forward(self, cosines, labels):
        rows = torch.where(labels != -1)[0]
        cosines[rows, labels[rows]] -= self.m
        return cosines * self.s


def theirs(table, rank, size):
    """Shard `rank` of InsightFace's rule."""
    num_classes = len(table)
    start = num_classes // size * rank + min(rank, num_classes % size)
    return table[start : start + num_classes // size + int(rank < num_classes % size)]


@check("PartialFC_V2", 1, 2, 3)
def _(world):
    world.shard = lambda table: theirs(table, world.rank, world.size)
    # 301 classes: shards of 151 and 150, or of 101, 100 and 100; one class: empty ones.
    for num_classes in (301, 1):
        features, weight, labels = draw(num_classes)
        labels[3] = -1
        module = insightface.PartialFC_V2(CosFace(), SIZE, num_classes).double()
        assert [*module.state_dict()] == ["weight"] and type(module.weight.data) is torch.Tensor
        module.load_state_dict({"weight": world.shard(weight)})
        module.ddp_average = False
        assert_equals_single(world, module, features, weight, labels, margin=0.4, ignore_index=-1)
        module.ddp_average = True
    local = world.mine(features).requires_grad_()
    module(local, world.mine(labels)[:, None]).backward()
    _, dx, _ = single(weight, features, labels=labels, margin=0.4, ignore_index=-1)
    assert_close(local.grad, world.size * world.mine(dx), tolerance(torch.float64), size=dx.norm())
    assert module.weight.grad.shape == module.weight.shape


@check("PartialFC_V2 keeps their constructor", 1, 2)
def _(world):
    torch.manual_seed(1)
    module = insightface.PartialFC_V2(CosFace(), 16, 300, 1.0, True)
    assert (module.embedding_size, module.num_classes, module.fp16, module.rank) == (16, 300, True, world.rank)
    assert module.num_local == 300 // world.size and module.class_start == module.num_local * world.rank
    features, weight, labels = draw(dtype=torch.float32)
    module.load_state_dict({"weight": theirs(weight, world.rank, world.size)})
    loss = module(world.mine(features), world.mine(labels))
    with torch.autocast("cpu", torch.bfloat16):
        exact = cosface_loss(features, weight, labels, margin=0.4)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < abs(loss - cosface_loss(features, weight, labels, margin=0.4)) / 4
    others = [torch.empty(300 // world.size, 16) for _ in range(world.size)]
    dist.all_gather(others, insightface.PartialFC_V2(CosFace(), 16, 300).weight.detach())
    assert len(torch.cat(others).unique(dim=0)) == 300


@check("PartialFC_V2 refuses what would lose rows", 2)
def _(world):
    module = insightface.PartialFC_V2(CosFace(), SIZE, NUM_CLASSES)
    for change in (lambda: module.grow(3), lambda: module.remove([0])):
        with raises(NotImplementedError, "on several ranks cannot be changed in place"):
            change()
    folder = world.done.with_suffix(".checkpoint")
    with raises(ValueError, "save its state_dict.. on every rank"):
        save_checkpoint(folder, module)
    assert not folder.exists() and len(module.weight) == module.num_local


@check("sampled shards want a fused optimiser", 2, 3)
def _(world):
    features, weight, labels = draw()
    head = sharded(world, weight, sample_rate=0.5, sample_seed=2**62)
    with raises(RuntimeError, "trains with FusedSGD or FusedAdamW alone"):
        head(world.mine(features), world.mine(labels))
    head.eval()
    assert_equals_single(world, head, features, weight, labels)
    head.train()
    optimizer = FusedSGD(head.parameters(), lr=0.1)
    head(world.mine(features), world.mine(labels)).backward()
    optimizer.step()


def sampled_like_one_process(name, correction, num_classes=NUM_CLASSES, num_labels=NUM_CLASSES, hard=False):
    """Two steps over what the ranks drew: the loss of all of it in one process, and SGD written out for its rows.

    hard: whether each class has two others that are drawn along with it, and with a correction one for each class.
    """

    def function(world):
        row = ROWS[name]
        features, *tables = batch(row, num_classes=num_classes)
        labels = tables.pop(1) % num_labels
        options = {"sample_rate": 0.2, "sample_seed": 3, "sample_correction": correction}
        head, _ = heads(world, row, tables, dtype=torch.float64, **options)
        certain = labels
        if hard:
            head.hard_classes = torch.randint(-1, num_classes, (num_classes, 2), generator=torch.Generator().manual_seed(2))
            certain = torch.cat([labels, head.hard_classes[labels].flatten().long()])
            certain = certain[certain >= 0]
        drawn, sample = [], head._sample
        head._sample = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
        tables, momenta = [table.requires_grad_() for table in tables], [torch.zeros_like(table) for table in tables]
        for _ in range(2):
            relative = 10 * tolerance(torch.float64, steepness(row, features, tables[0].detach()))
            local, everything = world.mine(features).requires_grad_(), features.clone().requires_grad_()
            loss = head(local, world.mine(labels))
            loss.backward()
            optimizer.step()
            parts, held = [None] * world.size, world.shard(torch.arange(num_classes))
            here, by_class = drawn[-1]
            dist.all_gather_object(parts, (held[here], by_class) if len(held) else (held, torch.zeros(0)))
            num_certain = world.shard(certain.bincount(minlength=num_classes)).count_nonzero()
            assert len(parts[world.rank][0]) == min(max(num_certain, round(0.2 * len(held)), 1), len(held))
            if hard and correction and len(held) > len(here) > num_certain:
                share = math.log((len(held) - num_certain) / (len(here) - num_certain))
                assert_close(by_class.sum(), torch.tensor(share * (len(here) - num_certain)), 1e-5)
            classes = torch.cat([classes for classes, _ in parts])
            assert torch.isin(certain, classes).all()
            exact = functional.margin_softmax_loss(
                *(everything, tables[0], labels),
                margin=row.margin,
                bias=tables[1] if row.bias else None,
                classes=classes,
                sample_correction=torch.cat([by_class for _, by_class in parts]) if hard and correction else correction,
                **row.options,
            )
            exact.backward()
            assert_close(loss.detach(), exact.detach(), relative, "loss")
            assert_close(local.grad, world.mine(everything.grad), relative, "dX", size=everything.grad.norm())
            rows = (classes[:, None] * row.centers + torch.arange(row.centers)).flatten()
            with torch.no_grad():
                for ours, table, momentum in zip(head.parameters(), tables, momenta, strict=True):
                    momentum[rows] = 0.9 * momentum[rows] + table.grad.to_dense()[rows] + 0.01 * table[rows]
                    table[rows] -= 0.5 * momentum[rows]
                    assert_close(ours.to_local(), world.shard(table), relative, "table", size=table.norm())
                    table.grad = None

    return function


for name in ("CosFace", "Softmax bias x3"):
    for correction in (False, True):
        what = f"{name}, sampled, as in one process" + ", corrected" * correction
        check(what, 2, 3)(sampled_like_one_process(name, correction))
# One class of the batch: a rank draws it alone, another draws one that is not, and the last has none to draw from.
check("CosFace, sampled where a shard is empty", 3)(sampled_like_one_process("CosFace", True, 4, 1))
check("CosFace, sampled with hard classes", 2, 3)(sampled_like_one_process("CosFace", True, num_labels=7, hard=True))
check("CosFace, sampled with hard classes where a shard is empty", 3)(sampled_like_one_process("CosFace", True, 4, 1, hard=True))


@check("PartialFC_V2 samples", 1, 2)
def _(world):
    """As theirs: a rank draws of its own classes, and the gradient is dense; two backward passes add up."""
    features, weight, labels = draw()
    module = insightface.PartialFC_V2(CosFace(), SIZE, NUM_CLASSES, 0.2).double()
    assert [*module.state_dict()] == ["weight"]
    module.load_state_dict({"weight": theirs(weight, world.rank, world.size)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        module(world.mine(features), world.mine(labels)).backward()
    touched = module.weight.grad.any(1)
    assert not module.weight.grad.is_sparse and 0.2 * module.num_local <= touched.sum() < 0.5 * module.num_local
    own = labels[(labels >= module.class_start) & (labels < module.class_start + module.num_local)] - module.class_start
    assert touched[own].all()
    optimizer.step()


def fused_pair(world, tables, options, kind=FusedSGD, name="CosFace", **head_options):
    """((head, optimiser) sharded, the same in one process)."""
    pair = heads(world, ROWS[name], tables, **{"dtype": tables[0].dtype} | head_options)
    return [(head, kind(head.parameters(), **options)) for head in pair]


FUSED = {
    "FusedSGD": (FusedSGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}),
    "FusedAdamW": (FusedAdamW, {"lr": 0.01}),
}


def fused_like_one_process(name, num_classes, margin="CosFace"):
    def function(world):
        kind, options = FUSED[name]
        features, weight, labels, *bias = batch(ROWS[margin], num_classes=num_classes)
        (head, optimizer), (whole, other) = fused_pair(world, (weight, *bias), options, kind, margin)
        for step in range(3):
            turned = features.roll(step, 1)
            local = world.mine(turned).requires_grad_()
            head(local, world.mine(labels)).backward()
            head(world.mine(turned), world.mine(labels.flip(0))).backward()
            whole(turned, labels).backward()
            whole(turned, labels.flip(0)).backward()
            assert all(parameter.grad is None for parameter in head.parameters()) and local.grad is not None
            for each in (optimizer, other):
                each.step()
                each.zero_grad()
        for ours, exact in zip(head.parameters(), whole.parameters(), strict=True):
            assert_close(ours.to_local().detach(), world.shard(exact.detach()), 1e-11, size=exact.detach().norm())
            for key, buffer in other.state[exact].items():
                if buffer.dim() and len(ours.to_local()):
                    found = optimizer.state[ours][key]
                    assert type(found) is DTensor and found.shape == buffer.shape
                    assert_close(found.to_local(), world.shard(buffer), 1e-11, size=buffer.norm())

    return function


for optimizer_name in FUSED:
    check(f"{optimizer_name} as in one process", 1, 2, 3)(fused_like_one_process(optimizer_name, NUM_CLASSES))
    check(f"{optimizer_name} where a shard is empty", 3)(fused_like_one_process(optimizer_name, 4))
    for name in ("Softmax bias", "AdaFace x3"):
        check(f"{optimizer_name} of {name} as in one process", 2, 3)(fused_like_one_process(optimizer_name, NUM_CLASSES, name))


def rounded_like_one_process(name):
    """Random bits belong to a row of the whole table: sums in another order tip few, those of another row many."""

    def function(world):
        kind, options = FUSED[name]
        features, weight, labels = draw(dtype=torch.float32)
        options = options | {"state_format": "int8", "seed": 5}
        (head, optimizer), (whole, other) = fused_pair(world, [weight], options, kind, dtype=None, table_format="bfloat16")
        for step in range(3):
            turned = features.roll(step, 1)
            head(world.mine(turned), world.mine(labels)).backward(), whole(turned, labels).backward()
            optimizer.step(), other.step()
        local, exact = head.weight.to_local().detach(), world.shard(whole.weight.detach())
        assert local.dtype == torch.bfloat16 and (local != world.shard(weight.bfloat16())).double().mean() > 0.5
        assert (local != exact).double().mean() < 0.01
        for key, buffer in other.state[whole.weight].items():
            found = optimizer.state[head.weight][key]
            if buffer.dim() == 2:
                assert found.dtype == buffer.dtype and not buffer.is_floating_point()
                assert (found.to_local() != world.shard(buffer)).double().mean() < 0.01
            elif buffer.dim():
                assert_close(found.to_local(), world.shard(buffer).double(), 1e-3, key)

    return function


for optimizer_name in FUSED:
    check(f"{optimizer_name} rounds as in one process", 2, 3)(rounded_like_one_process(optimizer_name))


@check("a shard of 16 bits wants a fused optimiser", 2)
def _(world):
    features, weight, labels = draw(dtype=torch.float32)
    head = sharded(world, weight, dtype=None, table_format="bfloat16")
    loss = head(world.mine(features).requires_grad_(), world.mine(labels))
    with raises(RuntimeError, "trains with FusedSGD or FusedAdamW alone"):
        loss.backward()
    assert head.weight.grad is None


@check("fused, sampled and in 16 bits", 2, 3)
def _(world):
    """Only sampled rows change, on every rank; two runs have the same bits, another seed other ones."""
    features, weight, labels = draw(dtype=torch.float32)
    results = []
    for seed in (1, 1, 2):
        head = ShardedCosFaceLoss(SIZE, NUM_CLASSES, table_format="bfloat16", sample_rate=0.2, sample_seed=3)
        fill(world, head, weight.bfloat16())
        options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.5}  # decay moves every row that has a gradient, however small
        optimizer = FusedSGD(head.parameters(), state_format="int8", seed=seed, **options)
        for _ in range(2):
            loss = head(world.mine(features), world.mine(labels))
            loss.backward()
            optimizer.step()
        local = head.weight.to_local().detach()
        changed = (local != world.shard(weight.bfloat16())).any(1)
        assert 0.2 * len(local) <= changed.sum() < 0.6 * len(local) and loss.isfinite()
        results.append(local.clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@check("float8 shards", 2, 3)
def _(world):
    """Loss, nearest classes and rows after a step are those of one process with the same numbers, also where a shard is empty."""
    for num_classes in (NUM_CLASSES, 2):
        features, weight, labels = draw(num_classes, dtype=torch.float32)
        head = ShardedCosFaceLoss(SIZE, num_classes, table_format="float8", ddp_average=False)
        whole = CosFaceLoss(SIZE, num_classes, table_format="float8")
        float8.put(whole.weight, whole.weight_scale, slice(None), weight)
        float8.put(head.weight.to_local(), head.weight_scale.to_local(), slice(None), world.shard(weight))
        options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "state_format": "int8"}
        optimizers = FusedSGD(head.parameters(), **options), FusedSGD(whole.parameters(), **options)
        loss, expected = head(world.mine(features), world.mine(labels)), whole(features, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        (_, ours), (_, others) = head.topk(world.mine(features), 2), whole.topk(world.mine(features), 2)
        assert torch.equal(ours, others)
        loss.backward(), expected.backward()
        for each in optimizers:
            each.step()
        ours = head.weight.to_local().float() * head.weight_scale.to_local()[:, None]
        exact = world.shard(whole.weight.detach().float() * whole.weight_scale[:, None])
        differ = ours != exact  # numbers near the border of a rounding, whose gradient was added up in another order
        assert differ.double().mean() < 0.02 if len(ours) else differ.numel() == 0
        assert ours.shape == exact.shape and (ours - exact).abs().le(exact.abs() / 8 + 1e-6).all()


def partial_fc(world, weight):
    module = insightface.PartialFC_V2(CosFace(), SIZE, len(weight)).to(weight.dtype)
    module.load_state_dict({"weight": theirs(weight, world.rank, world.size)})
    return module


@check("PartialFC_V2 with FusedSGD", 1, 2, 3)
def _(world):
    """A plain tensor of this rank's rows: what torch.optim makes of it."""
    features, weight, labels = draw(301)
    fused, options = FUSED["FusedSGD"]
    modules = [partial_fc(world, weight) for _ in range(2)]
    kinds = zip(modules, (fused, torch.optim.SGD), strict=True)
    pairs = [(module, kind(module.parameters(), **options)) for module, kind in kinds]
    for step in range(3):
        for module, optimizer in pairs:
            module(world.mine(features.roll(step, 1)), world.mine(labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
    results = [(module.weight.detach(), optimizer.state[module.weight]["momentum_buffer"]) for module, optimizer in pairs]
    for ours, exact in zip(*results, strict=True):
        assert_close(ours, exact, 1e-11)


# Rows in a DTensor, and in a plain tensor on each rank.
SHARDED = {"ShardedCosFaceLoss": sharded, "PartialFC_V2": partial_fc}


def skipped_together(make):
    def function(world):
        features, weight, labels = draw()
        head = make(world, weight)
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
        features[0] = torch.nan  # of rank 0
        head(world.mine(features), world.mine(labels)).backward()
        optimizer.step()
        assert torch.equal(dtensors.local(head.weight).detach(), world.shard(weight)) and optimizer.skipped_steps == 1
        found = torch.tensor([float(world.rank == 1)])  # a scaler's finding on one rank
        head(world.mine(features.nan_to_num()), world.mine(labels)).backward()
        optimizer.found_inf, optimizer.grad_scale = found.squeeze(), torch.tensor(1.0)
        optimizer.step()
        assert torch.equal(dtensors.local(head.weight).detach(), world.shard(weight)) and optimizer.skipped_steps == 2

    return function


def made_by_none(make):
    def function(world):
        features, weight, labels = draw()
        head = make(world, weight)
        optimizer = FusedSGD(head.parameters(), lr=0.5, momentum=0.9)
        head(world.mine(features), world.mine(labels)).backward()
        if world.rank == 1:
            with torch.no_grad():
                head.weight.add_(1)
        before = dtensors.local(head.weight).detach().clone()
        with raises(RuntimeError, "^rank 1: RuntimeError: the class table.*changed between"):
            optimizer.step()
        assert torch.equal(dtensors.local(head.weight).detach(), before)
        optimizer.zero_grad()
        head(world.mine(features), world.mine(labels)).backward()
        optimizer.step()  # and on it goes
        assert not torch.equal(dtensors.local(head.weight).detach(), before)

    return function


for name, make in SHARDED.items():
    check(f"what is not finite is skipped on every rank: {name}", 2, 3)(skipped_together(make))
    check(f"a step that one rank cannot make is made by none: {name}", 2, 3)(made_by_none(make))


@dataclass(frozen=True)
class PerRow(margins.Margin):
    m: torch.Tensor

    def psi(self, cosine):
        return cosine - self.m


@check("numbers by class and by row", 2, 3)
def _(world):
    """As CosFace in one process; those by class differ by one number on one rank at last."""
    features, weight, labels = draw()
    labels[4] = -100
    m = torch.linspace(0.1, 0.4, NUM_CLASSES, dtype=torch.float64)
    wanted = single(weight, features, labels=labels, margin=m)
    of_rows = PerRow(world.mine(m[labels.clamp(min=0)]))
    for kind, margin in (
        (ShardedCosFaceLoss, m),
        (ShardedMarginSoftmaxLoss, margins.CosFace(m)),
        (ShardedMarginSoftmaxLoss, of_rows),
    ):
        head = kind(SIZE, NUM_CLASSES, margin=margin, dtype=torch.float64, ddp_average=False)
        fill(world, head, weight)
        local = world.mine(features).requires_grad_()
        loss = head(local, world.mine(labels))
        loss.backward()
        for ours, exact in (
            (loss.detach(), wanted[0]),
            (local.grad, world.mine(wanted[1])),
            (head.weight.grad.to_local(), world.shard(wanted[2])),
        ):
            assert_close(ours, exact, tolerance(torch.float64), size=exact.norm())
        if margin is m:
            m2 = head.margin.clone()
            m2[7] += 1e-3 * (world.rank == 1)
            head.margin = m2
            with raises(ValueError, "options of the head must be the same"):
                head(local, world.mine(labels))


@check("several classes to a row", 2, 3)
def _(world):
    """As in one process: rows with classes of several shards, one without any, one of two classes that are one."""
    features, weight, labels = draw()
    labels = torch.stack([labels, labels.flip(0), (labels + 150) % NUM_CLASSES], 1)
    labels[3], labels[5, 1], labels[6] = -1, -1, labels[6, 0]
    weights = torch.rand(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    m = torch.linspace(0.1, 0.4, NUM_CLASSES, dtype=torch.float64)
    for margin, options in ((margins.ArcFace(m), {}), (margins.AdaFace(), {"normalize_features": False, "scale": 4.0})):
        head = ShardedMarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=margin, dtype=torch.float64, ddp_average=False, **options)
        whole = MarginSoftmaxLoss(SIZE, NUM_CLASSES, margin=margin, dtype=torch.float64, **options)
        fill(world, head, weight)
        whole.weight.data.copy_(weight)
        local, everything = world.mine(features).requires_grad_(), features.clone().requires_grad_()
        loss = head(local, world.mine(labels), label_weights=world.mine(weights))
        exact = whole(everything, labels, label_weights=weights)
        loss.backward(), exact.backward()
        relative = tolerance(torch.float64, 64.0)
        assert_close(loss.detach(), exact.detach(), relative)
        assert_close(local.grad, world.mine(everything.grad), relative, size=everything.grad.norm())
        assert_close(head.weight.grad.to_local(), world.shard(whole.weight.grad), relative, size=whole.weight.grad.norm())
    with raises(ValueError, "the number of label_weights to a row must be the same"):
        columns = 3 if world.rank else 2
        head(local, world.mine(labels)[:, :columns], label_weights=world.mine(weights)[:, :columns])


@check("the features of the table", 2)
def _(world):
    """Of docs/features.md: they go with shards, or are refused, as it says."""
    world.counts = [4, 2]
    said = {name: columns["shards"] for name, columns in feature_table.cells("feature").items()}
    found = {name: feature_table.outcome([name], "shards", world) for name in feature_table.FEATURES}
    assert {name: each.split(":")[0] for name, each in found.items()} == said, found


@check("options that differ between ranks", 2, 3)
def _(world):
    """Some would wait for each other, some would only be wrong."""
    features, weight, labels = draw()
    different = [
        {"scale": 700.0},
        {"reduction": "none"},
        {"margin": 0.1},
        {"num_classes": NUM_CLASSES - 1},
        {"ddp_average": True},
        {"ignore_index": 7},
        {"sample_correction": True},
        {"hard_classes": torch.zeros(NUM_CLASSES, 1, dtype=torch.int64)},
        {"margin": torch.full((NUM_CLASSES,), 0.35)},
    ]
    for options in different:
        head = sharded(world, weight)
        for name, value in options.items():
            if world.rank == 1:
                setattr(head, name, value)
        with raises(ValueError, "options of the head must be the same"):
            head(world.mine(features), world.mine(labels % 50))


@check("skipped steps are counted where a shard is empty", 3)
def _(world):
    features, weight, labels = draw(4)
    (head, optimizer), _ = fused_pair(world, [weight], {"lr": 0.5, "momentum": 0.9})
    features[0] = torch.nan
    head(world.mine(features), world.mine(labels)).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1


@check("checkpoint of a fused run", 2, 3)
def _(world):
    """Saved on these ranks, and on with it: on these ranks again, and in one process."""
    features, weight, labels = draw(dtype=torch.float32)
    options = {"lr": 0.1, "momentum": 0.9, "state_format": "int8"}
    (head, optimizer), _ = fused_pair(world, [weight], options, dtype=None, table_format="bfloat16")
    folder = world.done.with_suffix(".checkpoint")

    def step(head, optimizer):
        head(world.mine(features), world.mine(labels)).backward()
        optimizer.step()

    step(head, optimizer)
    save_checkpoint(folder, head, optimizer)
    (again, other), (whole, single_optimizer) = fused_pair(world, [weight], options, dtype=None, table_format="bfloat16")
    load_checkpoint(folder, again, other)
    load_checkpoint(folder, whole, single_optimizer)
    assert torch.equal(world.shard(whole.weight.detach()), head.weight.to_local().detach())
    for name, buffer in single_optimizer.state[whole.weight].items():
        found = optimizer.state[head.weight][name]
        assert torch.equal(world.shard(buffer), found.to_local()) if buffer.dim() else torch.equal(buffer, found)
    for each in ((head, optimizer), (again, other)):
        step(*each)
    assert torch.equal(again.weight.to_local(), head.weight.to_local())


# What gloo adds where a rank has left: it has not waited for as long as it may.
AT_ONCE = "(?s:(?!.*Timed out))"


@check("an error inside the loss", 3)
def _(world):
    """One rank has no memory left: it raises, and when it has left, so do the others, long before the timeout."""
    features, weight, labels = draw()
    head = sharded(world, weight)
    if world.rank == 1:
        recording.negative_lse = out_of_memory
        with raises(MemoryError, "none left"):
            head(world.mine(features), world.mine(labels))
        dist.destroy_process_group()
    else:
        with raises(RuntimeError, f"^rank {world.rank} of 3: the all-reduce of sums failed.*another rank has failed{AT_ONCE}"):
            head(world.mine(features), world.mine(labels))


def out_of_memory(*arguments):
    raise MemoryError("none left")


# The parts of a step, and what the others wait for in each.
WAITS = {
    "forward": "^rank {} of 3: the exchange of batch sizes",
    "backward": "rank {} of 3: the reduce-scatter of the features' gradient",
    "step": "^rank {} of 3: the agreement on a step",
}


def until(part, world):
    """(that part of a step, the head, its optimiser) after all before it."""
    features, weight, labels = draw()
    (head, optimizer), _ = fused_pair(world, [weight], {"lr": 0.5})
    local, losses = world.mine(features).requires_grad_(), []
    parts = {
        "forward": lambda: losses.append(head(local, world.mine(labels))),
        "backward": lambda: losses[0].backward(),
        "step": optimizer.step,
    }
    for name, run in parts.items():
        if name == part:
            return run, head, optimizer
        run()


def missing(part):
    def function(world):
        run, *_held = until(part, world)
        if world.rank == 1:
            return world.wait_for_others()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
        try:
            with raises(RuntimeError, WAITS[part].format(world.rank) + " failed or timed out"):
                run()
        finally:
            world.leave()

    return function


for part in WAITS:
    check(f"a rank that does not come to {part}", 3)(missing(part))


@check("a rank that has gone before step", 3)
def _(world):
    step, head, _ = until("step", world)
    before = head.weight.to_local().detach().clone()
    if world.rank == 1:
        return dist.destroy_process_group()
    with raises(RuntimeError, WAITS["step"].format(world.rank) + " failed.*another rank has failed" + AT_ONCE):
        step()
    assert torch.equal(head.weight.to_local().detach(), before)


@check("a rank that is killed", 3)  # the last one
def _(world):
    features, weight, labels = draw()
    head = sharded(world, weight)
    if world.rank == 1:
        recording.negative_lse = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    with raises(RuntimeError, f"^rank {world.rank} of 3: the all-reduce of sums failed{AT_ONCE}"):
        head(world.mine(features), world.mine(labels))


def main(rank, size, folder):
    torch.set_num_threads(1)
    unwritten.install()
    warnings.simplefilter("ignore")  # of scales and margins past the paper's bounds, at 300 classes
    slabs.SLAB_CLASSES_MIN, slabs.SLAB_CLASSES_MAX = 1, 128  # several slabs to a shard
    with open(folder / f"outcomes.{rank}", "w", buffering=1) as outcomes:
        for number, (name, (sizes, function)) in enumerate(CHECKS.items()):
            if size not in sizes:
                continue
            store = dist.FileStore(str(folder / f"store.{number}"), size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
            lse, outcome = recording.negative_lse, None
            try:
                function(World(rank, size, folder / f"done{number}"))
            except Exception:
                outcome = traceback.format_exc()
            recording.negative_lse = lse
            print(json.dumps([name, outcome]), file=outcomes)
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    os._exit(0)  # as checkpoint_worker.leave does, and why
