"""Checks of sharded_worker.py: the losses and gradients of sharded heads are those of one process."""

import copy
import math
from dataclasses import dataclass

import feature_table
import torch
import torch.distributed as dist
from margin_rows import ROWS, batch, steepness
from rounding import NUM_CLASSES, SIZE, assert_close, tolerance
from sharded_world import CosFace, assert_equals_single, check, draw, fill, heads, raises, sharded, single, theirs
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import (
    CosFaceLoss,
    MarginSoftmaxLoss,
    ShardedCosFaceLoss,
    ShardedMarginSoftmaxLoss,
    cosface_loss,
    functional,
    margins,
)
from cosface_kernels.compat import insightface
from cosface_kernels.heads import confusions, float8


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
