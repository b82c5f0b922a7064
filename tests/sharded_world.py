"""One rank among the others, and what the checks of sharded_worker.py share."""

import re
import time
from contextlib import contextmanager

import torch
from margin_rows import ROWS, batch
from rounding import NUM_CLASSES, SIZE, assert_close, tolerance
from torch.distributed.tensor import DTensor

from cosface_kernels import (
    FusedAdamW,
    FusedSGD,
    MarginSoftmaxLoss,
    ShardedCosFaceLoss,
    ShardedMarginSoftmaxLoss,
    cosface_loss,
)
from cosface_kernels.compat import insightface

CHECKS = {}  # name: (numbers of ranks, function)
# Rows of each rank, 12 in all.
COUNTS = {1: [12], 2: [7, 5], 3: [7, 0, 5]}


def check(name, *sizes):
    def register(function):
        assert name not in CHECKS
        CHECKS[name] = (sizes, function)
        return function

    return register


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


def fused_pair(world, tables, options, kind=FusedSGD, name="CosFace", **head_options):
    """((head, optimiser) sharded, the same in one process)."""
    pair = heads(world, ROWS[name], tables, **{"dtype": tables[0].dtype} | head_options)
    return [(head, kind(head.parameters(), **options)) for head in pair]


FUSED = {
    "FusedSGD": (FusedSGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}),
    "FusedAdamW": (FusedAdamW, {"lr": 0.01}),
}


def partial_fc(world, weight):
    module = insightface.PartialFC_V2(CosFace(), SIZE, len(weight)).to(weight.dtype)
    module.load_state_dict({"weight": theirs(weight, world.rank, world.size)})
    return module
